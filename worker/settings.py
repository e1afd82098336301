"""All settings: read from the environment once, checked, frozen. The only file that reads the environment."""

from __future__ import annotations

import difflib
import os
import re
import secrets
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from orchestrator_client.connection import check_url, redacted
from orchestrator_client.errors import AddressError
from orchestrator_client.messages import WORKER_ID_PATTERN
from orchestrator_client.transfers.web_addresses import check_pattern, read_address, shown_url

_FALSE_WORDS = frozenset({"0", "false", "no", "off"})
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class SettingsError(Exception):
    """A setting is missing or wrong; the text is one line for the operator."""


def _switch(value: object) -> object:
    # The reference system's rule (WIRE 7): everything but these words is on.
    return value.strip().lower() not in _FALSE_WORDS if isinstance(value, str) else value


def _words(value: object) -> object:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def _folders(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(Path(part).expanduser().resolve() for part in value.split(os.pathsep) if part.strip())


def _absolute(value: object) -> object:
    return Path(value).expanduser().resolve() if isinstance(value, str | Path) else value


def _compression(value: object) -> object:
    # The contract says: clamp, and take the default when the value is no number (WIRE 7).
    try:
        return min(max(int(str(value)), 0), 9)
    except ValueError:
        return None


def _log_level(value: object) -> object:
    name = str(value).strip().upper()
    return name if name in _LOG_LEVELS else "INFO"


Switch = Annotated[bool, BeforeValidator(_switch)]
Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Folders = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_folders)]
Folder = Annotated[Path, BeforeValidator(_absolute)]


class BrokerSettings(BaseSettings):
    """What the command line's client commands need; a bad value of the worker's own settings does not concern them."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, hide_input_in_errors=False)

    redis_url: SecretStr = Field(
        description="The broker: redis://, rediss:// or unix:// URL. No broker yet? `make demo KEEP=1` runs one."
    )
    task_topic: str = Field(
        default="tasks", min_length=1, description="Channel to take tasks from; existing orchestrators use `tasks`."
    )

    @field_validator("redis_url")
    @classmethod
    def _url_scheme(cls, value: SecretStr) -> SecretStr:
        check_url(value.get_secret_value().strip())
        return SecretStr(value.get_secret_value().strip())


class Settings(BrokerSettings):
    """Each field is one environment variable of the same name in capitals; an empty value counts as unset."""

    worker_id: str = Field(
        default="",
        description="This worker's name in Redis: letters, digits, dot, dash, underscore. Unset: 16 random hex digits.",
    )
    worker_tags: Words = Field(default=(), description="Comma-separated tags, published with the registration.")
    results_dir: Folder = Field(
        default=Path("results_workers"),
        validate_default=True,
        description="Folder for results, one subfolder a task; the journal lies in its `.worker` subfolder.",
    )
    heartbeat_interval_sec: int = Field(
        default=30,
        ge=1,
        description="Seconds between heartbeats. The worker counts as dead after max(4 x this, 120) s.",
    )
    worker_cost_per_hour: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Price of this host per hour; orchestrators rank workers by it.",
    )
    worker_network_bandwidth_bytes_per_sec: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Cap on everything sent over HTTP, bytes per second; also reported with the hardware.",
    )

    worker_executor_mask: Words = Field(
        default=(),
        description="Comma-separated task types and executors to accept (`inference`, `transformers`, or "
        "`inference.transformers` for one executor of one type); empty means all that are installed.",
    )
    worker_allow_remote_code: Switch = Field(
        default=False,
        description="Whether a task may set `trust_remote_code`, which runs Python code of a model's author.",
    )
    worker_allowed_roots: Folders = Field(
        default=(),
        description="Folders (separated by `:`) from which tasks may read local models and data, beside RESULTS_DIR "
        "and the Hugging Face cache, and below which `output.destination.path` may put results.",
    )
    worker_max_envelope_bytes: int = Field(
        default=32 * 1024**2, ge=1024, description="Largest task message that is accepted, bytes."
    )

    worker_task_timeout_sec: float = Field(
        default=86400.0,
        ge=0,
        allow_inf_nan=False,
        description="Wall-clock limit of a task that sets no `timeoutSec`; 0 is none.",
    )
    worker_no_progress_timeout_sec: float = Field(
        default=1800.0, ge=0, allow_inf_nan=False,
        description="A task that says and prints nothing for this long is stopped; 0 is never.",
    )  # fmt: skip
    worker_cancel_grace_sec: float = Field(
        default=10.0, ge=0, allow_inf_nan=False,
        description="How long a task that is asked to stop may take before its engine process is ended.",
    )  # fmt: skip
    worker_max_batched_tasks: int = Field(
        default=8, ge=1,
        description="How many queued tasks of one loaded model may run together, where its engine can do that.",
    )  # fmt: skip
    worker_max_queue_skips: int = Field(
        default=16, ge=0,
        description="How often a waiting task may be overtaken by tasks of the model that is loaded; 0 keeps the order "
        "of arrival.",
    )  # fmt: skip
    executor_idle_ttl_sec: float = Field(
        default=900.0, ge=0, allow_inf_nan=False,
        description="An engine without a task for this long is ended; 0 is never.",
    )  # fmt: skip
    shutdown_grace_sec: float = Field(
        default=30.0, ge=0, allow_inf_nan=False,
        description="After SIGTERM, how long the running task may go on before it is stopped and reported failed. "
        "Results that are being sent have what it leaves of this time, and go on after the next start.",
    )  # fmt: skip
    task_min_turnaround_ms: int = Field(
        default=200, ge=0,
        description="Least time between the receipt of a task and its final event. The orchestrator marks a task as "
        "dispatched after publishing it, and would overwrite an earlier end. The next task does not wait for it.",
    )  # fmt: skip

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_log_level)] = Field(
        default="INFO", description="Least level that is logged; an unknown word counts as INFO."
    )
    log_format: Literal["auto", "pretty", "json"] = Field(
        default="auto", description="Form of the lines on stdout; auto is pretty on a terminal and JSON otherwise."
    )
    worker_log_file: Folder = Field(
        default=Path("worker.log"), validate_default=True,
        description="Log file in JSON, 5 files of 5 MiB; a new one is begun at each start.",
    )  # fmt: skip
    worker_log_to_stdout: Switch = Field(default=True, description="Off: log to the file only.")

    vllm_model: str | None = Field(default=None, description="Model for inference tasks that name none, on GPU hosts.")
    hf_model: str | None = Field(default=None, description="Model for inference tasks that name none, without a GPU.")
    hf_home: Folder | None = Field(default=None, description="Hugging Face cache; default ~/.cache/huggingface.")
    cuda_visible_devices: str | None = Field(
        default=None, description="GPUs of this worker: indexes, UUIDs or MIG names. Only these are reported and used."
    )

    orchestrator_base_url: str = Field(
        default="",
        description="Where the orchestrator's HTTP interface is, for instance http://orch.example:8000: files of other "
        "tasks are fetched there, and results go there when a task names no URL.",
    )
    orchestrator_token: SecretStr | None = Field(
        default=None,
        description="Bearer token for the origins of ORCHESTRATOR_BASE_URL and RESULTS_UPLOAD_URL; sent nowhere else.",
    )
    results_upload_url: str = Field(
        default="", description="Replaces the destination URL that tasks give for results that go over HTTP."
    )
    worker_allowed_hosts: Words = Field(
        default=(),
        description="Comma-separated hosts (`name`, `name:port`, `*.domain`; no http://, no path) that tasks may send "
        "to and fetch from, beside those of ORCHESTRATOR_BASE_URL and RESULTS_UPLOAD_URL. Unset: any host.",
    )
    worker_delivery_patience_sec: float = Field(
        default=86400.0, gt=0, allow_inf_nan=False,
        description="How long the delivery of a result is tried, restarts included, before its task fails.",
    )  # fmt: skip
    worker_download_max_bytes: int = Field(
        default=64 * 1024**3, ge=1, description="Largest file that is fetched for a task, bytes."
    )
    worker_download_timeout_sec: float = Field(
        default=7200.0, gt=0, allow_inf_nan=False, description="Longest time to fetch one file, retries included."
    )
    worker_unpack_max_bytes: int = Field(
        default=256 * 1024**3, ge=1, description="Largest content of a fetched archive, bytes."
    )
    worker_cache_max_bytes: int = Field(
        default=64 * 1024**3, ge=0,
        description="Room for fetched files in RESULTS_DIR/.cache; those unused for longest go first.",
    )  # fmt: skip
    model_archive_use_pigz: Switch = Field(
        default=True,
        description="Off: model archives are compressed in process, never with pigz. On: with pigz if a level is set; "
        "else where samples of the data say that it is worth its time.",
    )
    model_archive_compression_level: Annotated[int | None, BeforeValidator(_compression)] = Field(
        default=None,
        description="0 to 9, clamped. Unset or no number: samples of the data decide for what is fastest without being "
        "larger than level 6.",
    )
    model_archive_pigz_threads: int | None = Field(default=None, ge=1, description="Default: all processors.")
    model_archive_pigz_bin: str = Field(default="pigz", description="The pigz program.")
    model_archive_tar_bin: str = Field(default="tar", description="The tar program.")
    model_cleanup_after_upload: Switch = Field(
        default=False,
        description="Delete a task's model folders, their archives and its checkpoints once they are delivered over "
        "HTTP.",
    )
    enable_elastic_scaling: Switch = Field(
        default=True,
        description="Read by orchestrators, not by the worker; accepted here so that one file serves both.",
    )

    @field_validator("worker_id")
    @classmethod
    def _id_charset(cls, value: str) -> str:
        value = value.strip()
        if value and not WORKER_ID_PATTERN.match(value):
            raise ValueError("expected letters, digits, '.', '-' and '_', at most 128, starting with a letter or digit")
        return value

    @field_validator("orchestrator_base_url", "results_upload_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        value = value.strip()
        if value:
            try:
                read_address(value, what="the URL")
            except AddressError as error:
                raise ValueError(str(error)) from error
        return value.rstrip("/")

    @field_validator("orchestrator_token")
    @classmethod
    def _token_of_one_word(cls, value: SecretStr | None) -> SecretStr | None:
        token = value.get_secret_value().strip() if value else ""  # secret files end with a newline
        if not re.fullmatch(r"[\x21-\x7e]*", token):
            raise ValueError("expected printable ASCII characters without blanks")
        return SecretStr(token) if token else None

    @field_validator("worker_allowed_hosts")
    @classmethod
    def _host_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                check_pattern(pattern)
            except AddressError as error:
                raise ValueError(str(error)) from error
        return value

    @property
    def state_root(self) -> Path:
        """Folder that holds one subfolder of durable state for each worker id."""
        return self.results_dir / ".worker"

    @property
    def input_cache(self) -> Path:
        """Where files that were fetched for tasks are kept."""
        return self.results_dir / ".cache"

    @property
    def model_cache(self) -> Path:
        """Where Hugging Face libraries keep what they download."""
        return self.hf_home or Path("~/.cache/huggingface").expanduser()

    @property
    def readable_roots(self) -> tuple[Path, ...]:
        """Folders from which tasks may read; relative paths in specs count from the first."""
        return (self.results_dir, *self.worker_allowed_roots, self.model_cache)


def random_worker_id() -> str:
    """16 random hex digits (WIRE 7)."""
    return secrets.token_hex(8)


def variable(field_name: str) -> str:
    """The environment variable behind a field."""
    return field_name.upper()


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        SettingsError: a variable is missing or wrong; the text names it, its value and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise _settings_error(error) from error


def read_broker_settings(redis_url: str = "") -> BrokerSettings:
    """Read only what a client needs.

    Args:
        redis_url: replaces the variable of that name unless it is empty.

    Raises:
        SettingsError: as `read_settings`.
    """
    try:
        return BrokerSettings(redis_url=SecretStr(redis_url)) if redis_url else BrokerSettings()
    except ValidationError as error:
        raise _settings_error(error, redis_url=redis_url) from error


def _settings_error(error: ValidationError, *, redis_url: str = "") -> SettingsError:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return SettingsError(
            f"{variable(name)} is not set: expected the broker's URL, for instance redis://127.0.0.1:6379/0 "
            "(no broker yet? `make demo KEEP=1` runs one and prints its address)"
        )
    value = (redis_url if name == "redis_url" else "") or os.environ.get(variable(name), str(problem["input"]))
    shown = repr(_shown(name, value))
    wanted = problem["msg"].removeprefix("Value error, ")
    return SettingsError(f"{variable(name)}={shown} is not valid: {wanted[:1].lower()}{wanted[1:]}")


def _shown(name: str, value: str) -> str:
    if name == "redis_url":
        return redacted(value)
    if name in _SECRETS:
        return "(hidden)"
    return shown_url(value) if name in _ADDRESSES or "://" in value else value


_SECRETS = frozenset(
    name for name, info in Settings.model_fields.items() if SecretStr in (info.annotation, *get_args(info.annotation))
)
_WITH_PASSWORD = frozenset({"orchestrator_base_url", "results_upload_url"})
"""URLs that may hold a password."""
_ADDRESSES = _WITH_PASSWORD | {"worker_allowed_hosts"}
_NOT_OURS = frozenset({"WORKER_ALIAS", "WORKER_HTTP_PORT"})
"""WORKER_* names of other programs on such hosts, and of parts that read them later."""


def suspicious_names(environment: Mapping[str, str]) -> list[str]:
    """Return one sentence for each WORKER_* variable that nobody reads, with the nearest name that somebody does."""
    known = [variable(name) for name in Settings.model_fields]
    sentences = []
    for name in sorted(environment):
        if not name.startswith("WORKER_") or name in known or name in _NOT_OURS:
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        sentences.append(f"{name} is set but not read" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    return sentences


def unread_variables() -> list[str]:
    """`suspicious_names` of our own environment."""
    return suspicious_names(os.environ)


_SHARED_BY_HOST = frozenset({"cuda_visible_devices", "hf_home"})


def demo_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of a second worker beside the host's own: none of its settings but what is true of the host.

    Args:
        changes: variables to set.
    """
    own = {variable(name) for name in Settings.model_fields if name not in _SHARED_BY_HOST}
    return {name: value for name, value in os.environ.items() if name not in own} | dict(changes)


def engine_environment(*, task_tag: str) -> dict[str, str]:
    """The environment of engine processes: ours, without what may hold secrets of ours, with unbuffered output.

    Args:
        task_tag: marks the process and all that it starts, so that leftovers can be found.
    """
    hidden = {variable(name) for name in _SECRETS | _WITH_PASSWORD}  # settings are read in either case
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.upper() not in hidden and not name.upper().startswith("ORCHESTRATOR_")
    }
    # vLLM and TRL report to their makers otherwise.
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {
        **quiet,
        **kept,
        "PYTHONUNBUFFERED": "1",
        "FLOWMESH_ENGINE": task_tag,
        "TOKENIZERS_PARALLELISM": "false",
        "SPT_NOENV": "1",  # or vLLM's processes, which name themselves, lose their environment and with it the tag
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML counts, so that what is said of a GPU is about that one
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # engine processes have threads, which a fork would not survive
    }


def described() -> list[tuple[str, str, str]]:
    """Variable, default and meaning of each setting, in order: the source of `--help` and docs/configuration.md."""
    rows = []
    for name, info in Settings.model_fields.items():
        if info.is_required():
            default = "required"
        elif isinstance(info.default, tuple) or info.default in (None, ""):
            default = "unset"
        elif isinstance(info.default, bool):
            default = "on" if info.default else "off"
        else:
            default = str(info.default)
        rows.append((variable(name), default, info.description or ""))
    return rows


def help_text() -> str:
    """What `--help` prints: every variable with its default and meaning."""
    lines = [
        "Usage: uv run python worker/main.py",
        "",
        "A worker daemon for LLM tasks. All settings are environment variables:",
        "",
    ]
    for name, default, meaning in described():
        lines.append(f"  {name} (default: {default})" if default != "required" else f"  {name} (required)")
        lines += textwrap.wrap(meaning, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def interpreter() -> str:
    """The Python that runs engine processes: the one that runs us."""
    return sys.executable
