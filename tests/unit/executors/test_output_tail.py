"""What is kept of the output of this process and of those it starts, and which line in it is the cause."""

from __future__ import annotations

import re
import subprocess
import sys

import psutil
import pytest
from waiting_until import wait_until

from executors.output_tail import error_in, means_no_memory, means_small_share

_PREAMBLE = """
import ctypes, faulthandler, os, subprocess, sys
from executors.output_tail import OutputTail
faulthandler.enable()
tail = OutputTail()
def start(script):
    with tail.watching():
        return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
def prints(text):
    start(f"import os; os.write(2, {text!r})").communicate()
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
        ("ValueError: No available memory for the cache blocks. Try increasing it", True),
        ("ValueError: To serve at least one request with the model's max seq len (9), (2 GiB KV cache is needed", True),
        ("ValueError: 2 GiB is needed, which is larger than the available KV cache memory (1 GiB)", True),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to", True),
        ("ValueError: Available memory on node 0 (1/2 GiB) on startup is less than desired", True),
        ("ValueError: block_size must be 32", False),
    ],
)
def test_which_causes_mean_too_little_memory(cause: str, expected: bool):  # noqa: FBT001 - a parameter of the test
    assert means_no_memory(cause) is expected


def test_what_a_child_prints_is_passed_on_in_order_and_remembered():
    done = run(
        """
print("from here", flush=True)
child = start("print('to stdout', flush=True); input(); raise KeyError('of the child')")
child.communicate(b"go on\\n")
assert tail.cause() == "KeyError: 'of the child'"
print("ValueError: mine", file=sys.stderr, flush=True)
assert tail.cause() == "KeyError: 'of the child'", "only children count"
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "from here\n", "this process's own descriptors stay what they are"
    lines = done.stderr.splitlines()
    assert lines[0] == "to stdout", "whatever children print comes out at descriptor 2"
    assert lines[-2:] == ["KeyError: 'of the child'", "ValueError: mine"]


def test_the_first_cause_wins_over_what_follows_from_it():
    done = run(
        r"""
prints(b"RuntimeError: the cause\nRuntimeError: Engine core initialization failed. See above.\n")
assert tail.cause() == "RuntimeError: the cause"
prints(b"torch.OutOfMemoryError: out of memory\nValueError: later\n")
assert tail.cause() == "OutOfMemoryError: out of memory"
tail.clear()
assert tail.cause() == ""
"""
    )
    assert done.returncode == 0, done.stderr


def test_lines_are_put_together_and_broken_bytes_and_long_lines_do_no_harm():
    done = run(
        r"""
prints(b"Value")
assert tail.cause() == ""
prints(b"Error: in two parts")
assert tail.cause() == "ValueError: in two parts", "also without its newline"
prints(b"\n\xff" + b"x" * 100_000 + b"\nKeyError: \xff behind it\n")
assert tail.cause() == "KeyError: \ufffd behind it"
prints(b"a line without an error\n" * 1000)
assert tail.cause() == ""
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("place", ["at once", "inside watching", "with a child"])
def test_the_last_words_of_a_crash_are_not_lost(place: str):
    child = "start('input()')" if place == "with a child" else ""
    around = "tail.watching()" if place == "inside watching" else "open(os.devnull)"
    crash = f"{child}\nwith {around}:\n    print('before it', flush=True)\n    ctypes.string_at(0)"
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + crash],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert re.search(r"\Abefore it\nFatal Python error: Segmentation fault\n", done.stdout)
    assert "string_at" in done.stdout


def test_nobody_waits_when_nobody_reads_any_more():
    script = """
child = start("import sys; input(); print('x' * 1_000_000, flush=True); sys.exit(7)")
sys.stdin.readline()
child.communicate(b"go on\\n")
os._exit(child.returncode)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PREAMBLE + script], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stderr is not None
        parent.stderr.close()
        parent.communicate("go on\n", timeout=60)
    assert parent.returncode == 7


def test_without_the_process_that_copies_nobody_waits_either():
    done = run(
        """
child = start("import sys; input(); print('x' * 1_000_000, flush=True)")
tail._tee.kill()
tail._tee.wait()
child.communicate(b"go on\\n")
assert child.returncode == 1, "its pipe is broken"
assert tail.cause() == ""
tail.clear()
"""
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_child_that_stays_behind_does_not_hold_what_the_reader_reads():
    """Whoever reads this process's output must see its end, also while a child of it still runs."""
    script = """
child = start("input()")
print(child.pid, tail._tee.pid, file=sys.stderr, flush=True)
input()
os._exit(0)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PREAMBLE + script], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdin is not None
        assert parent.stderr is not None
        child, tee = map(int, parent.stderr.readline().split())
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stderr.read()  # comes to its end
    wait_until(lambda: has_ended(tee), "the process that copies has ended")
    assert child != tee


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("ValueError: Free memory on device (3.0/79.6 GiB) is less than desired GPU memory utilization", False),
    ],
)
def test_a_share_that_is_too_small_already_is_told_apart(cause: str, *, expected: bool):
    assert means_no_memory(cause)
    assert means_small_share(cause) is expected
