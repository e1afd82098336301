"""Upload of a large file by `upload_file` and by `curl -F`, in turns, to one sink; and our memory meanwhile.

The sink is a process of its own that reads bodies as fast as a plain socket gives them and keeps nothing: a real server
would be slower than either sender, and the figures would be its own. Each of our uploads is a fresh process, whose
first request (import, certificates) is not counted: the daemon makes it once.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.broker_link import BenchError
from benchmarks.live_worker import Broker
from benchmarks.report_table import Row, against_target, beside
from orchestrator_client.transfers.http_link import HttpLink, HttpPolicy, Target
from orchestrator_client.transfers.uploads import upload_file

_REPO: Final = Path(__file__).resolve().parent.parent
_MB: Final = 1_000_000
_MOST_RATIO: Final = 1.10
_MOST_GROWTH_MB: Final = 100.0
_LIMIT_SEC: Final = 300


def measure(_broker: Broker, *, megabytes: int, rounds: int) -> list[Row]:
    """Median of some rounds, ours and curl's in turns, beside a plain socket's `sendfile`."""
    curl = shutil.which("curl")
    if curl is None:
        raise BenchError("curl is not installed: install it to compare uploads with it")
    ours, theirs, growth = [], [], []
    with tempfile.TemporaryDirectory() as folder, _sink() as port:
        path = Path(folder, "final_model.tar.gz")
        _write_file(path, megabytes)
        url = f"http://127.0.0.1:{port}/api/v1/results"
        for _ in range(rounds):
            command = [sys.executable, "-m", "benchmarks.upload_speed", "send", url, str(path)]
            answer = json.loads(_output(command))
            ours.append(answer["seconds"])
            growth.append(answer["grown_mb"])
            theirs.append(_curl(curl, f"{url}/t/files", path))
    name = f"upload of {megabytes:,} MB"
    mine, other = statistics.median(ours), statistics.median(theirs)
    details = {"MB/s": megabytes / mine, "curl MB/s": megabytes / other, "fastest": min(ours), "slowest": max(ours)}
    return [
        beside(name, ("curl -F", other), mine, "s", details),
        against_target(f"{name}, time over curl's", mine / other, ("<=", _MOST_RATIO), "x"),
        against_target(f"{name}, memory above idle", max(growth), ("<", _MOST_GROWTH_MB), "MB"),
    ]


def _write_file(path: Path, megabytes: int) -> None:
    block = Path("/dev/urandom").open("rb").read(_MB)  # noqa: SIM115 - one line, closed at once
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(block)


def _curl(curl: str, url: str, path: Path) -> float:
    started = time.perf_counter()
    _output([curl, "--silent", "--show-error", "--fail", "--form", f"file=@{path};type=application/gzip", url])
    return time.perf_counter() - started


def _output(command: list[str]) -> str:
    done = subprocess.run(command, cwd=_REPO, capture_output=True, text=True, timeout=_LIMIT_SEC, check=False)
    if done.returncode:
        raise BenchError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


@contextmanager
def _sink() -> Iterator[int]:
    """Run the sink. Yields its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.upload_speed", "sink"], cwd=_REPO, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _serve() -> None:
    """Take one request after the other, for ever, and keep nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        buffer = bytearray(1024**2)
        while True:
            connection, _ = listener.accept()
            with connection:
                while _take_request(connection, buffer):
                    pass


def _take_request(connection: socket.socket, buffer: bytearray) -> bool:
    received = b""
    while b"\r\n\r\n" not in received:
        more = connection.recv(65536)
        if not more:
            return False
        received += more
    head, _, body = received.partition(b"\r\n\r\n")
    headers = head.lower()
    if b"expect: 100-continue" in headers:  # curl waits for it, up to a second
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    left = int(headers.partition(b"content-length:")[2].partition(b"\r\n")[0]) - len(body)
    while left:
        got = connection.recv_into(buffer)
        if not got:
            return False
        left -= got
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + b'{"ok":true}')
    return True


async def _send(url: str, path: Path) -> None:
    """Upload once, after a first small request, and print what it took."""
    idle = _memory_mb("VmRSS")
    link = HttpLink(HttpPolicy())
    target = Target(url)
    await upload_file(link, target, "warm", Path(__file__), "warm.py", _unheard)
    started = time.perf_counter()
    await upload_file(link, target, "t", path, path.name, _unheard)
    seconds = time.perf_counter() - started
    await link.aclose()
    print(json.dumps({"seconds": seconds, "grown_mb": _memory_mb("VmHWM") - idle}))


def _memory_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / _MB


def _unheard(_sent: int, _total: int) -> None:
    pass


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        _serve()
    else:
        asyncio.run(_send(sys.argv[2], Path(sys.argv[3])))
