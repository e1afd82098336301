"""`inference` (WIRE 4.3): how to generate, for every engine that generates text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from executors.inference.guided_limits import check_grammar, check_pattern, check_schema
from executors.task_spec import SpecSection, as_list

_COLDEST = 1e-5  # below it, scores divided by the temperature may be too large for their type
_MOST_SAMPLES = 64
_MOST_LOGPROBS = 20
_MOST_CHOICES = 10_000
_LONGEST_GRAMMAR = 1024**2
_DEEPEST_SCHEMA = 64  # compilers of grammars go down by recursion


def _without_empty(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value for value in values if value)


def _parsed(value: object) -> object:
    """A JSON schema may come as text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except RecursionError:
            raise _too_deep() from None
        except ValueError as error:
            raise PydanticCustomError(
                "schema_text", "is text that is no JSON ({problem}); expected a JSON schema", {"problem": str(error)}
            ) from error
    if _is_too_deep(value):
        raise _too_deep()
    return value


def _too_deep() -> PydanticCustomError:
    return PydanticCustomError(
        "schema_depth", "is nested too deeply; expected at most {most} levels", {"most": _DEEPEST_SCHEMA}
    )


def _is_too_deep(value: object) -> bool:
    """Whether objects and lists are nested beyond the limit; goes down level by level, so that any depth is safe."""
    level = [value]
    for _ in range(_DEEPEST_SCHEMA):
        inner = [each for outer in level if isinstance(outer, Mapping) for each in outer.values()]
        inner += [each for outer in level if isinstance(outer, list) for each in outer]
        level = [each for each in inner if isinstance(each, Mapping | list)]
    return bool(level)


def _some_schema(value: JsonValue) -> JsonValue:
    if not isinstance(value, dict):
        raise PydanticCustomError("schema", "expected a JSON schema: an object")
    if len(json.dumps(value)) > _LONGEST_GRAMMAR:
        raise PydanticCustomError("schema_size", "is longer than 1 MiB; expected a smaller schema")
    check_schema(value)
    return value


def _switch_is_zero(value: object) -> object:
    return (0 if value else None) if isinstance(value, bool) else value


class GuidedOutput(SpecSection):
    """`inference.guided`: what the output has to look like. Exactly one of the fields is given.

    Attributes:
        json_schema: a JSON schema, in the spec `json`.
        json_object: any JSON object.
        regex: the whole output matches it.
        choice: the output is one of these.
        grammar: a context-free grammar in EBNF.
    """

    json_schema: Annotated[JsonValue, BeforeValidator(_parsed), AfterValidator(_some_schema)] = Field(
        default=None, validation_alias=AliasChoices("json", "json_schema", "schema")
    )
    json_object: bool = False
    regex: Annotated[str, Field(min_length=1), AfterValidator(check_pattern)] | None = None
    choice: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None, min_length=1, max_length=_MOST_CHOICES
    )
    grammar: Annotated[str, Field(min_length=1, max_length=_LONGEST_GRAMMAR), AfterValidator(check_grammar)] | None = (
        None
    )

    @property
    def field(self) -> str:
        """The spec's key of the one that is given, for errors."""
        return f"spec.inference.guided.{self._given[0]}"

    @property
    def _given(self) -> list[str]:
        given = {
            "json": self.json_schema is not None,
            "json_object": self.json_object,
            "regex": self.regex is not None,
            "choice": self.choice is not None,
            "grammar": self.grammar is not None,
        }
        return [name for name, value in given.items() if value]

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = self._given
        if len(given) != 1:
            raise PydanticCustomError(
                "guided",
                "gives {given}; expected exactly one of json, json_object, regex, choice and grammar",
                {"given": " and ".join(given) or "none"},
            )
        return self


class InferenceOptions(SpecSection):
    """`inference`: how to generate.

    Attributes:
        temperature: below 0.00001 means greedy, and so does `do_sample: false`.
        top_k: 0 and -1 mean no limit; absent: what the engine's kind has as default (WIRE 4.3).
        max_tokens: new tokens for each prompt; `max_new_tokens` wins over it.
        chat: apply the model's chat template to plain strings too.
        batch_size: prompts generated together at most; the engine chooses when absent.
        seed: makes sampling repeatable; absent means a new draw each time.
        n: how many outputs for each prompt.
        logprobs: how many alternatives to list with their log probabilities at each token; 0: of the token itself only.
        guided: what the output has to look like; `structured_outputs` is another name, and `response_format` is
            understood as OpenAI's API defines it.
        resume: go on behind what an earlier, cut-off run of the same task has finished.
    """

    system_prompt: str = Field(default="", validation_alias=AliasChoices("system_prompt", "systemPrompt"))
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    max_tokens: int = Field(default=512, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    do_sample: bool | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(as_list), AfterValidator(_without_empty)] = ()
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    chat: bool = False
    batch_size: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=_MOST_SAMPLES)
    logprobs: Annotated[int | None, BeforeValidator(_switch_is_zero)] = Field(default=None, ge=0, le=_MOST_LOGPROBS)
    guided: GuidedOutput | None = Field(default=None, validation_alias=AliasChoices("guided", "structured_outputs"))
    resume: bool = False

    @model_validator(mode="before")
    @classmethod
    def _response_format(cls, value: object) -> object:
        if not isinstance(value, Mapping) or value.get("response_format") is None:
            return value
        rest = {key: item for key, item in value.items() if key != "response_format"}
        if rest.get("guided") is not None or rest.get("structured_outputs") is not None:
            raise PydanticCustomError("guided_twice", "has 'response_format' beside 'guided'; expected one of them")
        match value["response_format"]:
            case {"type": "text"}:
                return rest
            case {"type": "json_object"}:
                return {**rest, "guided": {"json_object": True}}
            case {"type": "json_schema", "json_schema": {"schema": schema}}:
                return {**rest, "guided": {"json": schema}}
        raise PydanticCustomError(
            "response_format",
            "'response_format' is not understood; expected type 'text', 'json_object', "
            "or 'json_schema' with json_schema.schema",
        )

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.n > 1 and self.greedy:
            raise PydanticCustomError(
                "greedy_samples", "'n' is {n}, but temperature 0 gives the same output each time; expected n = 1",
                {"n": self.n},
            )  # fmt: skip
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _COLDEST or self.do_sample is False

    @property
    def token_limit(self) -> int:
        """New tokens for each prompt at most."""
        return self.max_new_tokens or self.max_tokens
