"""How the daemon and the command line end. Supervisors read these; docs/configuration.md lists them."""

from __future__ import annotations

from typing import Final

OK: Final = 0
FAILED: Final = 1
"""The command ran, and what it was asked for failed: a task failed, a doctor check failed."""
USAGE: Final = 2
"""The command line itself is wrong (typer's own code)."""
UNAVAILABLE: Final = 69
"""The broker or a worker cannot be reached (EX_UNAVAILABLE)."""
CRASHED: Final = 70
"""A fault of the daemon itself (EX_SOFTWARE); the log has the cause."""
ID_IN_USE: Final = 75
"""Another live process has this WORKER_ID (EX_TEMPFAIL): it may be gone at the next try."""
BAD_CONFIG: Final = 78
"""A setting is missing or wrong (EX_CONFIG): do not restart before it is mended."""
TIMED_OUT: Final = 124
"""`submit --wait --timeout`: the time is over and the task goes on."""
INTERRUPTED: Final = 130
"""Ctrl-C in a client command (128 + SIGINT). The daemon itself ends with 0 after a signal."""
