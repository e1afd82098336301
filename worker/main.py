"""Start the worker: `uv run python worker/main.py`, configured by environment variables only."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started as a script, Python puts worker/ first on the path; our packages lie one level up.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import asyncio

import structlog

from orchestrator_client.errors import BrokerRefusedError
from worker import exit_codes
from worker.log_setup import set_up_logs
from worker.settings import Settings, SettingsError, help_text, read_settings, unread_variables
from worker.task_journal import JournalError
from worker.worker_identity import IdInUseError, StateFolder, take_identity


def main(arguments: list[str]) -> int:  # noqa: PLR0911 - one return for each way to end reads best
    """Run the daemon until it is told to stop. Returns the exit code (worker/exit_codes.py)."""
    if arguments and arguments[0] in {"-h", "--help"}:
        sys.stdout.write(help_text())
        return exit_codes.OK
    if arguments:
        return _refuse(f"unknown argument {arguments[0]!r}: settings come from environment variables, see --help")
    try:
        settings = read_settings()
    except SettingsError as error:
        return _refuse(str(error))
    set_up_logs(settings)
    log = structlog.get_logger()
    for sentence in unread_variables():
        log.warning(sentence, action="start")
    try:
        state = take_identity(settings)
    except IdInUseError as error:
        return _refuse(str(error), exit_codes.ID_IN_USE)
    except OSError as error:
        return _refuse(f"RESULTS_DIR={str(settings.results_dir)!r} cannot be used: {error}; choose a writable folder")
    try:
        return asyncio.run(_run(settings, state))
    except IdInUseError as error:
        return _refuse(str(error), exit_codes.ID_IN_USE)
    except (SettingsError, BrokerRefusedError) as error:
        return _refuse(str(error))
    except JournalError as error:
        return _refuse(str(error), exit_codes.CRASHED)


async def _run(settings: Settings, state: StateFolder) -> int:
    from worker.app_wiring import Daemon  # noqa: PLC0415 - a bad setting is reported before the rest is imported

    return await Daemon(settings, state).run()


def _refuse(reason: str, code: int = exit_codes.BAD_CONFIG) -> int:
    sys.stderr.write(f"flowmesh-worker: {reason}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
