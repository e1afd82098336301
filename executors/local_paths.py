"""Tells hub names from paths, and keeps every path inside the folders that the operator allows (WIRE 9.35)."""

from __future__ import annotations

import re
from pathlib import Path

from executors.contract import EnginePolicy
from executors.errors import BadSpecError
from executors.secret_masking import shown

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_FILE_SUFFIXES = frozenset(
    {".gguf", ".safetensors", ".bin", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt"}
)


def find_local(value: str, field: str, policy: EnginePolicy) -> Path | None:
    """Return the existing file or folder that `value` names, or None when it is a hub name.

    Something absolute, something beginning with a dot or `~`, and a name with the suffix of a data or weights file is
    a path. A relative name counts as one too when it exists below the first allowed root.

    Args:
        value: what stands in the spec.
        field: the spec's key, for the error text.
        policy: holds the allowed roots.

    Raises:
        BadSpecError: a path that does not exist or lies outside the allowed roots, also through a symbolic link; a hub
            name that is a relative path as well.
    """
    looks_like_path = (
        value.startswith(("/", ".", "~", "\\")) or Path(value).suffix.lower() in _FILE_SUFFIXES or "://" in value
    )
    if looks_like_path or not _HUB_NAME.fullmatch(value):
        return confine(value, field, policy)
    if policy.allowed_roots and _exists(policy.allowed_roots[0] / value):
        return confine(value, field, policy)
    if _exists(Path(value)):  # libraries would take that for a path, too
        raise BadSpecError(
            f"{field} is {value!r}, which is also a file or folder where this worker runs; expected a hub name that "
            "is none, or an absolute path",
            hint="Start the worker in an empty folder to use the hub's.",
        )
    return None


def confine(value: str | Path, field: str, policy: EnginePolicy) -> Path:
    """Resolve a path, relative ones against the first allowed root, and make sure that it may be read.

    Returns:
        The absolute path, free of symbolic links.

    Raises:
        BadSpecError: it does not exist or lies outside the allowed roots.
    """
    roots = [root.resolve() for root in policy.allowed_roots]
    allowed = ", ".join(str(root) for root in roots) or "none"
    named = shown(str(value))
    hint = "Put it below one of these folders, or add its folder to WORKER_ALLOWED_ROOTS at the worker."
    if "://" in str(value):
        raise BadSpecError(f"{field} is {named}; expected a hub name or a path, not a URL", hint=hint)
    if "\0" in str(value):
        raise BadSpecError(f"{field} is {named}; a path cannot hold a null character")
    base = roots[0] if roots else Path("/")
    try:
        resolved = (base / value).resolve()
    except (OSError, RuntimeError) as error:  # a loop of symbolic links
        raise BadSpecError(f"{field} is {named}, which cannot be resolved: {shown(str(error))}", hint=hint) from error
    # Asked before existence, so that an answer tells nothing about files elsewhere.
    if not any(resolved.is_relative_to(root) for root in roots):
        raise BadSpecError(
            f"{field} is {named}, which lies outside the folders this worker may read ({allowed})", hint=hint
        )
    if _is_the_workers_own(resolved, roots):
        raise BadSpecError(f"{field} is {named}, which lies in a folder of the worker's own", hint=hint)
    if not _exists(resolved):
        raise BadSpecError(
            f"{field} is {named}, but {shown(str(resolved))} does not exist",
            hint=f"Check the path; this worker reads from: {allowed} (WORKER_ALLOWED_ROOTS).",
        )
    return resolved


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that we may not enter
        return False


def _is_the_workers_own(path: Path, roots: list[Path]) -> bool:
    """Whether a path lies in a hidden folder of the first root (journal, cache) that no root of its own allows."""
    own = roots[0]
    if not path.is_relative_to(own) or not any(part.startswith(".") for part in path.relative_to(own).parts[:1]):
        return False
    return not any(path.is_relative_to(root) and root.is_relative_to(own) and root != own for root in roots)
