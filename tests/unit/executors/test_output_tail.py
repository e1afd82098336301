"""What is kept of the output of this process and of those it starts, and which line in it is the cause."""

from __future__ import annotations

import subprocess
import sys

import pytest

from executors.output_tail import error_in, means_no_memory

_PREAMBLE = """
import os, subprocess, sys, time
from executors.output_tail import OutputTail
tail = OutputTail()
def until(look):
    deadline = time.monotonic() + 20
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own: descriptors 1 and 2 of this one belong to pytest."""
    return subprocess.run(
        [sys.executable, "-c", _PREAMBLE + script],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ValueError: no such thing", "ValueError: no such thing"),
        ("(EngineCore pid=7) ERROR 07-01 [core.py:1] ValueError: odd: very odd", "ValueError: odd: very odd"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "OutOfMemoryError: CUDA out of memory."),
        ("vllm.v1.engine.exceptions.EngineDeadError", "EngineDeadError"),
        ("SystemExit: 3\n", "SystemExit: 3"),
        ("INFO loading the model", ""),
        ("2 errors were found", ""),
        ("", ""),
    ],
)
def test_the_exception_at_the_end_of_a_line(line: str, expected: str):
    assert error_in(line) == expected


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("RuntimeError: CUDA error: out of memory", True),
        ("ValueError: Free memory on device is less than desired GPU memory utilization", True),
        ("ValueError: block_size must be 32", False),
    ],
)
def test_which_causes_mean_too_little_memory(cause: str, expected: bool):  # noqa: FBT001 - a parameter of the test
    assert means_no_memory(cause) is expected


def test_output_of_this_process_and_of_a_child_is_passed_on_and_remembered():
    done = run(
        """
print("from here", flush=True)
print("ValueError: mine", file=sys.stderr, flush=True)
until(lambda: tail.cause() == "ValueError: mine")
subprocess.run([sys.executable, "-c", "print('KeyError: of the child')"], check=True)
until(lambda: tail.cause() == "KeyError: of the child")
"""
    )
    assert done.returncode == 0, done.stderr
    # Descriptor 2 took what was printed to either.
    assert done.stderr.splitlines() == ["from here", "ValueError: mine", "KeyError: of the child"]


def test_the_first_cause_wins_over_what_follows_from_it():
    done = run(
        """
os.write(2, b"RuntimeError: the cause\\nRuntimeError: Engine core initialization failed. See above.\\n")
until(lambda: tail.cause())
os.write(1, b"torch.OutOfMemoryError: out of memory\\nValueError: later\\n")
until(lambda: tail.cause() == "OutOfMemoryError: out of memory")
tail.clear()
assert tail.cause() == ""
"""
    )
    assert done.returncode == 0, done.stderr


def test_lines_are_put_together_and_broken_bytes_and_long_lines_do_no_harm():
    done = run(
        r"""
os.write(2, b"Value")
os.write(2, b"Error: in two parts\n")
until(lambda: tail.cause() == "ValueError: in two parts")
os.write(2, b"\xff" + b"x" * 1_000_000 + b"\nKeyError: \xff behind it\n")
until(lambda: tail.cause() == "KeyError: \ufffd behind it")
for number in range(1000):
    os.write(2, b"a line without an error\n")
until(lambda: tail.cause() == "")
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_child_that_stays_behind_does_not_hold_what_the_reader_reads():
    """Whoever reads this process's output must see its end, also while a child of it still runs."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _PREAMBLE
            + "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
            + "print(child.pid, flush=True)\n"
            + "input()\n"
            + "os._exit(0)\n",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdin is not None
        assert parent.stderr is not None
        assert int(parent.stderr.readline()) > 0
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stderr.read() == ""  # comes to its end
