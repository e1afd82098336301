"""The reward functions that a task may name (`reward_functions`): deterministic, cheap, and without code of the task.

Words are compared literally: a regular expression of a task could take for ever on a completion made to fit it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from executors.errors import BadDataError, BadSpecError
from executors.task_spec import as_list, lower

if TYPE_CHECKING:
    from pydantic import JsonValue

    from executors.training.spec.trainer_specs import RewardedSpec

Columns = Mapping[str, Sequence[object]]
"""Cells of the rows' further columns, one for each completion."""

_ANSWER_COLUMNS: Final = ("response", "answer")

Literals = Annotated[
    tuple[Annotated[str, StringConstraints(min_length=1, max_length=1000)], ...],
    BeforeValidator(as_list),
    Field(min_length=1, max_length=100),
]


class RewardFunction(BaseModel, ABC):
    """One way to judge a completion; its fields are the options that a task gives beside `name` and `weight`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @abstractmethod
    def score(self, completion: str, row: Mapping[str, object]) -> float:
        """Judge one completion.

        Args:
            completion: what the model wrote, without special tokens.
            row: the further columns of the prompt's row.
        """

    def column(self, available: Collection[str]) -> str | None:
        """The column that is read; None if none is, or if it is missing.

        Args:
            available: names of the rows' columns.
        """
        del available
        return None

    reads_column: ClassVar[bool] = False
    """Whether a column of the rows is needed."""


class Length(RewardFunction):
    """1 at the target length, less the further away, 0 at none or at twice the target."""

    target: int = Field(ge=1)
    unit: Annotated[Literal["characters", "words"], BeforeValidator(lower)] = "characters"

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        del row
        length = len(completion if self.unit == "characters" else completion.split())
        return max(0.0, 1.0 - abs(length - self.target) / self.target)


class Contains(RewardFunction):
    """The share of the words that occur in the completion, also inside longer words."""

    words: Literals
    ignore_case: bool = True

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        del row
        return _found(self.words, completion, ignore_case=self.ignore_case) / len(self.words)


class NotContains(Contains):
    """1 minus the share of the words that occur in the completion."""

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        return 1.0 - super().score(completion, row)


class ExactMatch(RewardFunction):
    """1 if the completion is the text of a column, blanks around both left aside; else 0.

    Attributes:
        answer_column: absent: `response`, or `answer` where there is no such column.
    """

    reads_column: ClassVar[bool] = True

    answer_column: str | None = Field(default=None, alias="column", min_length=1)
    ignore_case: bool = False

    def column(self, available: Collection[str]) -> str | None:
        wanted = (self.answer_column,) if self.answer_column else _ANSWER_COLUMNS
        return next((name for name in wanted if name in available), None)

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        column = self.column(row)
        answer = row[column] if column else None
        if answer is None:
            return 0.0
        texts = (completion.strip(), str(answer).strip())
        written, expected = (text.casefold() for text in texts) if self.ignore_case else texts
        return float(written == expected)


class JsonValid(RewardFunction):
    """1 if the completion is one JSON value of the wanted kind, blanks around it left aside; else 0."""

    kind: Annotated[Literal["any", "object", "array"], BeforeValidator(lower)] = "any"

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        del row
        try:
            value: object = json.loads(completion, parse_constant=_no_constant)
        except (ValueError, RecursionError):  # not JSON, a number of thousands of digits, or nested beyond reason
            return 0.0
        wanted: type = {"any": object, "object": dict, "array": list}[self.kind]
        return float(isinstance(value, wanted))


class CharacterShare(RewardFunction):
    """The share of the completion's characters that are among the given ones; 0 for an empty completion."""

    characters: Annotated[str, StringConstraints(min_length=1, max_length=1000)]

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        del row
        wanted = frozenset(self.characters)
        return sum(character in wanted for character in completion) / len(completion) if completion else 0.0


class RepetitionPenalty(RewardFunction):
    """Minus the share of word sequences of length `size` that repeat an earlier one: from 0, good, towards -1."""

    size: int = Field(default=3, ge=1, le=20)

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        del row
        words = completion.split()
        seen = Counter(tuple(words[place : place + self.size]) for place in range(len(words) - self.size + 1))
        return len(seen) / seen.total() - 1.0 if seen else 0.0


REWARD_FUNCTIONS: Final[Mapping[str, type[RewardFunction]]] = {
    "length": Length,
    "contains": Contains,
    "not_contains": NotContains,
    "exact_match": ExactMatch,
    "json_valid": JsonValid,
    "character_share": CharacterShare,
    "repetition_penalty": RepetitionPenalty,
}
"""All that a task may name."""


@dataclass(frozen=True)
class WeightedReward:
    """A reward function of a task with its options.

    Attributes:
        label: the function's name; a second one of the same name has its number behind it.
        field: where it stands in the spec.
        weight: what its scores count in the sum.
    """

    label: str
    field: str
    weight: float
    function: RewardFunction

    def score(self, prompts: Sequence[object], completions: Sequence[str], columns: Columns) -> list[float]:
        """Judge completions, not yet multiplied by the weight.

        Args:
            prompts: what the completions go on from.
            completions: one for each prompt.
            columns: the rows' further columns, a cell for each prompt.
        """
        rows = ({name: cells[place] for name, cells in columns.items()} for place in range(len(prompts)))
        return [self.function.score(text, row) for text, row in zip(completions, rows, strict=True)]


def reward_functions_for(spec: RewardedSpec) -> list[WeightedReward]:
    """The reward functions that a spec names, in its order; none if it names none.

    Raises:
        BadSpecError: an unknown name, or wrong options.
    """
    rewards: list[WeightedReward] = []
    count: Counter[str] = Counter()
    for place, asked in enumerate(spec.reward_functions):
        field = f"spec.reward_functions[{place}]"
        function = _function(asked.name, asked.options, field)
        count[asked.name] += 1
        label = asked.name if count[asked.name] == 1 else f"{asked.name}_{count[asked.name]}"
        rewards.append(WeightedReward(label, field, asked.weight, function))
    return rewards


def columns_read(rewards: Sequence[WeightedReward], available: Collection[str]) -> list[str]:
    """The columns that reward functions read, each once.

    Raises:
        BadDataError: one is missing.
    """
    names: list[str] = []
    for reward in rewards:
        if not reward.function.reads_column:
            continue
        name = reward.function.column(available)
        if name is None:
            wanted = getattr(reward.function, "answer_column", None) or " or ".join(_ANSWER_COLUMNS)
            raise BadDataError(
                f"{reward.field} ({reward.label}) reads the column {wanted}, which the data lacks; "
                f"available: {', '.join(sorted(available)) or 'none'}",
                hint=f"Name the column with the answers in {reward.field}.column.",
            )
        names.append(name)
    return list(dict.fromkeys(names))


def _function(name: str, options: Mapping[str, JsonValue], field: str) -> RewardFunction:
    kind = REWARD_FUNCTIONS.get(name)
    if kind is None:
        raise BadSpecError(f"{field}.name is {name!r}; expected one of {', '.join(REWARD_FUNCTIONS)}")
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        _refuse(error, kind, f"{field} ({name})")


def _refuse(error: ValidationError, kind: type[RewardFunction], field: str) -> NoReturn:
    problems = "; ".join(
        f"{'.'.join(map(str, found['loc'])) or 'options'}: {found['msg']} (got {found['input']!r:.100})"
        for found in error.errors()
    )
    known = ", ".join(info.alias or key for key, info in kind.model_fields.items()) or "none"
    raise BadSpecError(f"{field}: {problems}", hint=f"Its options: {known}.") from error


def _found(words: Sequence[str], text: str, *, ignore_case: bool) -> int:
    if not ignore_case:
        return sum(word in text for word in words)
    folded = text.casefold()
    return sum(word.casefold() in folded for word in words)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
