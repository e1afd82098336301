"""The process that keeps Trackio's database: JSON lines from standard input go in, until the input ends."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Log every line `{"step": …, "metrics": {…}}`. The arguments are Trackio's project and the run's name."""
    import trackio  # noqa: PLC0415 - comes with an extra

    project, name = sys.argv[1:]
    # A task that is continued goes on in the same run.
    trackio.init(project=project, name=name, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    for line in sys.stdin:
        entry = json.loads(line)
        trackio.log(entry["metrics"], step=entry["step"])
    trackio.finish()


if __name__ == "__main__":
    main()
