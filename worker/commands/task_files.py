"""Task files that people write: YAML or JSON, a whole task or a bare spec."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import yaml

from orchestrator_client.messages import JsonObject

_LARGEST_BYTES = 256 * 1024**2
"""Beyond this no broker would take the message; reading on would only fill the memory."""


class TaskFileError(Exception):
    """A task file cannot be used; the text names the file, the place and what was expected."""


class _PlainLoader(yaml.SafeLoader):
    """YAML as JSON knows it: dates stay text, and a key that is there twice is an error instead of a surprise."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:  # noqa: FBT001, FBT002 - the signature is the base class's
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_task(source: str) -> JsonObject:
    """Read a task file.

    Args:
        source: a path, or `-` for stdin. JSON where the content starts with a brace, YAML otherwise.

    Returns:
        The task with its `spec`; a bare spec is wrapped.

    Raises:
        TaskFileError: the file cannot be read, is no YAML or JSON object, holds what JSON cannot, or has no taskType.
    """
    name = "standard input" if source == "-" else source
    document = _parse(_read(source, name), name)
    if not isinstance(document, dict):
        raise TaskFileError(f"{name} holds {_kind(document)}: expected a task (an object with `spec`) or a bare spec")
    task = _checked(document, name)
    if "spec" not in task and {"apiVersion", "kind", "metadata"} & task.keys():
        raise TaskFileError(f"{name}: `spec` is missing")
    if "spec" not in task:
        task = {"spec": task}
    spec = task["spec"]
    if not isinstance(spec, dict):
        raise TaskFileError(f"{name}: `spec` is {_kind(spec)}: expected an object")
    if not isinstance(spec.get("taskType"), str) or not str(spec["taskType"]).strip():
        raise TaskFileError(
            f"{name}: `spec.taskType` is {spec.get('taskType')!r}: expected a word such as inference or echo"
        )
    return task


def _read(source: str, name: str) -> str:
    try:
        if source == "-":
            raw = sys.stdin.buffer.read(_LARGEST_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                raw = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise TaskFileError(f"cannot read {name}: {error.strerror or error}") from error
    if len(raw) > _LARGEST_BYTES:
        raise TaskFileError(f"{name} is larger than {_LARGEST_BYTES // 1024**2} MiB: put its data into another file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskFileError(f"{name} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _parse(text: str, name: str) -> object:
    try:
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text)
            except ValueError:
                if name.endswith(".json"):
                    raise
        # YAML also has objects in braces, so what is no JSON gets a second chance. _PlainLoader is a SafeLoader.
        return yaml.load(text, Loader=_PlainLoader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise TaskFileError(f"{name}{place} is no valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise TaskFileError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise TaskFileError(f"{name} is nested too deeply") from error
    except ValueError as error:  # JSON, and impossible numbers in either
        raise TaskFileError(f"{name} is no valid JSON: {error}") from error


def _checked(document: dict[object, object], name: str) -> JsonObject:
    """Return the document once all of it is JSON."""
    try:
        _check(document, "", name)
    except RecursionError as error:
        raise TaskFileError(f"{name} is nested too deeply, or refers to itself") from error
    checked: JsonObject = json.loads(json.dumps(document))
    return checked


def _check(value: object, path: str, name: str) -> None:
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TaskFileError(f"{name}: the key {key!r} in `{path or 'the file'}` is no text: put it in quotes")
            _check(part, f"{path}.{key}" if path else key, name)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check(part, f"{path}[{index}]", name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise TaskFileError(f"{name}: `{path}` is {value}: expected a finite number")
    elif value is not None and not isinstance(value, str | int | float):
        raise TaskFileError(f"{name}: `{path}` is {_kind(value)}: expected text, a number, true, false or null")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)
