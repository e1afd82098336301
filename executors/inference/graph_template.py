"""`data.type: graph_template` (WIRE 4.2): one prompt out of the results of earlier stages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from executors.errors import BadDataError, BadSpecError
from executors.inference.prompt_spec import GraphColumn, GraphTemplate

_SEGMENT = re.compile(r"([^\[\]]*)((?:\[\d+\])*)")
_PLACEHOLDER = re.compile(r"\{col(\d+)_(label|value)\}")


@dataclass(frozen=True)
class FilledColumn:
    """A column with its text."""

    label: str
    value: str


def render_template(template: GraphTemplate, upstream: Mapping[str, JsonValue]) -> str:
    """Fill a graph template.

    Args:
        template: `data.template`.
        upstream: `_upstreamResults`: stage name to the stage's stored result.

    Raises:
        BadSpecError: an unknown template without text, too few columns, or an impossible path.
        BadDataError: no upstream results, or a value that is null or missing and has no default.
    """
    if not upstream:
        raise BadDataError(
            "spec._upstreamResults is empty; a graph template needs the result of at least one earlier stage",
            hint="Send the task as a stage of a workflow, or use data.type: list.",
        )
    columns = [_fill(column, position, upstream) for position, column in enumerate(template.columns)]
    built_in = _BUILT_IN.get(template.name)
    if built_in is not None:
        return built_in(template, columns)
    if template.text is None:
        raise BadSpecError(
            f"spec.data.template.name is {template.name!r}; expected one of {sorted(_BUILT_IN)}, "
            "or another name together with 'text'"
        )
    return _fill_text(template.text, columns)


def is_built_in(name: str) -> bool:
    """Tell whether a template's name is one of ours, whose text cannot be replaced."""
    return name in _BUILT_IN


def _fill(column: GraphColumn, position: int, upstream: Mapping[str, JsonValue]) -> FilledColumn:
    field = f"spec.data.template.columns[{position}]"
    label = column.label or f"Column {position + 1}"
    if column.expr:
        node, _, path = column.expr.strip().removeprefix("${").removesuffix("}").partition(".")
        if "[" in node:  # `stage[0]`: the index belongs to the path
            node, bracket, rest = node.partition("[")
            path = f"{bracket}{rest}" + (f".{path}" if path else "")
    else:
        node, path = column.node or "", column.path
    value = _look_up(upstream[node], _tokens(path, field)) if node in upstream else None
    if value is None:
        value = column.default
    if value is None:
        where = column.expr or f"{node}.{path}"
        raise BadDataError(
            f"{field} ({label!r}) reads {where!r}, which is missing or null; expected a value, or a 'default'",
            hint=f"Stages with results: {', '.join(sorted(upstream))}. Paths look like stage.result.items[0].output.",
        )
    return FilledColumn(label=label, value=_printed(value))


def _tokens(path: str, field: str) -> list[str | int]:
    tokens: list[str | int] = []
    for segment in path.split(".") if path else []:
        match = _SEGMENT.fullmatch(segment)
        if match is None or not segment:
            raise BadSpecError(
                f"{field} has the path {path!r}; expected names and numbers like result.items[0].output, "
                f"but found {segment!r}"
            )
        if match[1]:
            tokens.append(match[1])
        tokens.extend(int(number) for number in re.findall(r"\d+", match[2]))
    return tokens


def _look_up(root: JsonValue, tokens: list[str | int]) -> JsonValue:
    found = _walk(root, tokens)
    if found is None:
        # Stored results come wrapped in `result` from the orchestrator and bare from a shared folder (WIRE 9.24).
        found = _walk(root, tokens[1:] if tokens[:1] == ["result"] else ["result", *tokens])
    return found


def _walk(value: JsonValue, tokens: list[str | int]) -> JsonValue:
    for token in tokens:
        if isinstance(value, dict):
            value = value.get(str(token))
        elif isinstance(value, list) and str(token).isdecimal() and int(token) < len(value):
            value = value[int(token)]
        else:
            return None
    return value


def _printed(value: JsonValue) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _fill_text(text: str, columns: list[FilledColumn]) -> str:
    def replace(match: re.Match[str]) -> str:
        number = int(match[1])
        if not 1 <= number <= len(columns):
            raise BadSpecError(
                f"spec.data.template.text uses {match[0]}, but there are {len(columns)} columns, numbered from 1"
            )
        column = columns[number - 1]
        return column.label if match[2] == "label" else column.value

    return _PLACEHOLDER.sub(replace, text)


def _two_column_briefing(template: GraphTemplate, columns: list[FilledColumn]) -> str:
    if len(columns) < 2:
        raise BadSpecError(
            f"spec.data.template.columns has {len(columns)} entries; 'two_column_briefing' expects at least 2"
        )
    options = template.options
    intro = options.intro or (
        f"Your role: {options.role}. Use the notes below." if options.role else "Use the notes below.",
    )
    closing = options.closing or (f"Weigh {columns[0].label} against {columns[1].label} and give your answer.",)
    bullets = (f"• {column.label}: " + column.value.replace("\n", "\n  ") for column in columns)
    return "\n".join((*intro, *bullets, *closing))


_BUILT_IN: dict[str, Callable[[GraphTemplate, list[FilledColumn]], str]] = {
    "two_column_briefing": _two_column_briefing,
}
