"""The process that unpacks one archive: python -m orchestrator_client.archives.archive_reader_child.

It is asked with one JSON line on stdin, and answers with one on stdout. It ends when stdin closes: then the process
that asked is gone. Whatever a library does with hostile bytes, it cannot take more memory than `MEMORY_BYTES`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Final

from orchestrator_client.archives.archive_reader_formats import UnpackLimits
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import ArchiveError, UnsafeArchiveError

MEMORY_BYTES: Final = 1024**3
"""Address space; an ordinary archive needs a tenth of it."""


def main() -> None:
    """Unpack what stdin says."""
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()
    limits = UnpackLimits(**request["limits"])
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_AS, MEMORY_BYTES)
    _bound(resource.RLIMIT_FSIZE, limits.total_bytes)
    _bound(resource.RLIMIT_CPU, math.ceil(limits.seconds) * 2 + 60)  # two threads, and a parent that forgot us
    answer: dict[str, int | str]
    try:
        size = unpack_here(Path(request["archive"]), Path(request["target"]), request["archive_format"], limits)
        answer = {"kind": "unpacked", "number": size}
    except UnsafeArchiveError as error:
        answer = {"kind": "unsafe", "text": str(error)}
    except ArchiveError as error:
        answer = {"kind": "archive", "text": str(error)}
    except MemoryError:
        answer = {"kind": "unsafe", "text": f"archive refused: it needs more than {MEMORY_BYTES} bytes of memory"}
    except OSError as error:
        answer = {"kind": "os", "number": error.errno or 0, "text": error.strerror or str(error)}
    print(json.dumps(answer), flush=True)  # noqa: T201 - that is how it answers


def _bound(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(what, (value, value))


def _end_with_the_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)  # the folder that is left is removed by the next one who unpacks there


if __name__ == "__main__":
    main()
