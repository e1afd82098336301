"""A rank that trains nothing: `python fake_rank.py SOCKET RANK SCENE [FILE]` plays one scene of a rank's life."""

# ruff: noqa: T201 -- it prints to be overheard

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class FakeRank:
    """Speaks to the launcher as a rank does, or should not."""

    def __init__(self, address: str, rank: int, file: Path) -> None:
        self.rank = rank
        self.file = file
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address)

    def say(self, kind: str, **fields: object) -> None:
        self.socket.sendall(json.dumps({"type": kind, **fields}).encode() + b"\n")

    def begin(self) -> Json:
        self.say("hello", rank=self.rank, pid=os.getpid())
        job: Json = json.loads(self.socket.makefile("rb").readline())
        return job

    def end(self, **changed: object) -> None:
        outcome = {"dataset_size": 4, "model_name": "tiny", "seed": 1, "metrics": {"steps": 2}, **changed}
        self.say("done", outcome=outcome if self.rank == 0 else None)

    def fail(self, reason: str, message: str, **fields: object) -> None:
        self.say("failed", failure={"reason": reason, "message": message}, **fields)

    def done(self) -> None:
        self.begin()
        self.say("log", level="info", message=f"rank {self.rank} trains")
        self.say("warning", message="the tokenizer has no padding token")
        self.say("progress", step=1, total=2, metrics={"loss": 0.5})
        self.end(warnings=["one of the outcome's own"])

    def notes_its_job(self) -> None:
        print(json.dumps(self.begin()), flush=True)
        self.end()

    def failed(self) -> None:
        self.begin()
        print("first line\nlast line", flush=True)
        self.fail("executor_error", "ValueError: no such thing")
        signal.pause()

    def refused(self) -> None:
        self.begin()
        print("noise", flush=True)
        self.fail("bad_data", "the data set is empty", foreseen=True)

    def fails_when_told(self) -> None:
        """At a signal, fail as a rank does whose peer is gone."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self.works()
        signal.sigwait({signal.SIGUSR1})
        self.fail("executor_error", "RuntimeError: Connection reset by peer")
        print("it has said so", flush=True)
        signal.pause()

    def works(self) -> None:
        self.begin()
        self.say("log", level="info", message=f"rank {self.rank} works as pid {os.getpid()}")

    def works_on(self) -> None:
        self.works()
        signal.pause()

    def greedy(self) -> None:
        """Run out of memory unless the batch is 2 or less."""
        job = self.begin()
        if job["batch_size"] > 2:
            memory = {"allocated": 3 * 2**30, "reserved": 3.5 * 2**30, "total": 4 * 2**30}
            self.fail("gpu_oom", "CUDA out of memory", out_of_memory=True, memory=memory)
        else:
            self.end(metrics={"steps": job["gradient_accumulation_steps"]})

    def greedy_and_picky(self) -> None:
        """Run out of memory, and refuse half the batch."""
        if self.begin()["batch_size"] == 8:
            self.fail("gpu_oom", "CUDA out of memory", out_of_memory=True)
        else:
            self.fail("bad_spec", "num_generations is 8, the batch is 4", foreseen=True)

    def killed(self) -> None:
        self.begin()
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def dies_while_saving(self) -> None:
        out_dir = Path(self.begin()["out_dir"])
        for folder in (out_dir / ".final_model.partial", out_dir / "checkpoints" / ".final_lora.partial"):
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def exits(self) -> None:
        self.begin()
        os._exit(3)

    def silent(self) -> None:
        print("no connection for me", flush=True)
        os._exit(4)

    def hangs(self) -> None:
        """Hang with a child in a session of its own, and one whose parent is gone."""
        self.begin()
        sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
        child = subprocess.Popen(sleeper, start_new_session=True)
        code = f"import subprocess; print(subprocess.Popen({sleeper!r}, start_new_session=True, stdout=2).pid)"
        orphan = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        self.file.write_text(f"{os.getpid()} {child.pid} {orphan.stdout}")
        self.say("progress", step=1, total=9)
        signal.pause()

    def hangs_alone(self) -> None:
        self.begin()
        signal.pause()

    def chatty(self) -> None:
        print("loading", flush=True)
        self.begin()
        signal.pause()

    def floods(self) -> None:
        """Print more than the log may hold, and fail once it was cut."""
        self.begin()
        print("x" * 400_000, flush=True)
        self.say("progress", step=1, total=2)
        while "too much was printed" not in Path("/proc/self/fd/1").read_text():
            os.sched_yield()
        print("the last words", flush=True)
        self.fail("executor_error", "ValueError: no such thing")
        signal.pause()

    def writes(self) -> None:
        """Write a file as a save does, and no word about it."""
        self.begin()
        self.file.write_text("weights")
        signal.pause()

    def takes_no_job(self) -> None:
        self.say("hello", rank=self.rank, pid=os.getpid())
        signal.pause()

    def babbles(self) -> None:
        self.begin()
        self.socket.sendall(b"{this is no message\n")
        signal.pause()

    def never_stops(self) -> None:
        """Send a line without an end."""
        self.begin()
        while True:
            self.socket.sendall(b"x" * 65536)

    def stranger(self) -> None:
        self.rank = 7
        self.say("hello", rank=7, pid=os.getpid())
        signal.pause()

    def impatient(self) -> None:
        self.say("progress", step=1)
        signal.pause()

    def without_outcome(self) -> None:
        self.begin()
        self.say("done", outcome=None)
        signal.pause()

    def lingers(self) -> None:
        """Say all, and do not end."""
        self.begin()
        self.end()
        signal.pause()


if __name__ == "__main__":
    _, address, rank, scene, *rest = sys.argv
    getattr(FakeRank(address, int(rank), Path(*rest)), scene)()
