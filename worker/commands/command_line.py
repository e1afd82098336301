"""The console script `flowmesh-worker`. It chooses what to import: the daemon must stay small, the client need not."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command in `sys.argv`; returns the exit code."""
    if sys.argv[1:2] == ["run"]:  # before typer and rich, which the daemon has no use for
        from worker.main import main as run_daemon  # noqa: PLC0415 - only this command needs it

        return run_daemon(sys.argv[2:])
    from worker.commands.client_commands import run_client  # noqa: PLC0415 - only the other commands need it

    return run_client(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
