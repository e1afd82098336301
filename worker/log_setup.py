"""Where log lines go: stdout (pretty on a terminal, JSON otherwise) and the rotating file `worker.log`."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from typing import Final

import stamina
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from worker.settings import Settings

_FILE_BYTES: Final = 5 * 1024**2
_FILES: Final = 5


def set_up_logs(settings: Settings) -> None:
    """Configure structlog and the standard library's logging for the daemon. An unusable log file is only a warning."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    hide = _hide_secrets(settings)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level.lower()),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    stamina.instrumentation.set_on_retry_hooks(())  # who retries says so itself, with the task it is about
    root = logging.getLogger()
    root.setLevel(settings.log_level)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    trouble = ""
    try:
        settings.worker_log_file.parent.mkdir(parents=True, exist_ok=True)
        file = RotatingFileHandler(settings.worker_log_file, maxBytes=_FILE_BYTES, backupCount=_FILES - 1, delay=True)
        if settings.worker_log_file.exists() and settings.worker_log_file.stat().st_size:
            file.doRollover()  # a fresh file for each start; the last one is kept beside it
        with settings.worker_log_file.open("a"):
            pass
        file.setFormatter(_formatter(structlog.processors.JSONRenderer(), hide, shared))
        root.addHandler(file)
    except OSError as error:
        trouble = str(error)
    if settings.worker_log_to_stdout or trouble:
        stdout = logging.StreamHandler(sys.stdout)
        pretty = settings.log_format == "pretty" or (settings.log_format == "auto" and sys.stdout.isatty())
        renderer = structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer()
        stdout.setFormatter(_formatter(renderer, hide, shared))
        root.addHandler(stdout)
    if trouble:
        structlog.get_logger().warning(
            "no log file; logging to stdout only", action="start", file=str(settings.worker_log_file), error=trouble
        )


def _formatter(renderer: Processor, hide: Processor, shared: list[Processor]) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            hide,  # after tracebacks have become text
            renderer,
        ],
        foreign_pre_chain=shared,
    )


def _hide_secrets(settings: Settings) -> Processor:
    """Replace what must not be in a log, wherever it turns up: passwords in our URLs and the orchestrator's token."""
    # A broker's password may hold a slash; an HTTP path may hold an @.
    places = [settings.redis_url.get_secret_value().partition("://")[2]]
    places += [
        url.partition("://")[2].partition("/")[0]
        for url in (settings.orchestrator_base_url, settings.results_upload_url)
    ]
    userinfos = [place.rpartition("@")[0] for place in places]
    token = settings.orchestrator_token.get_secret_value() if settings.orchestrator_token else ""
    secrets = [*userinfos, *(userinfo.partition(":")[2] for userinfo in userinfos), token]
    hidden = [secret for secret in secrets if len(secret) > 3]

    def hide(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        for key, value in event.items():
            if isinstance(value, str):
                for secret in hidden:
                    value = value.replace(secret, "***")  # noqa: PLW2901 - several may be in one text
                event[key] = value
        return event

    return hide
