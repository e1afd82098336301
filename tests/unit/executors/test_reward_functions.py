from collections.abc import Mapping

import pytest

from executors.errors import BadDataError, BadSpecError
from executors.training.rewards.reward_functions import (
    REWARD_FUNCTIONS,
    Columns,
    WeightedReward,
    columns_read,
    reward_functions_for,
)
from executors.training.spec.trainer_specs import GrpoSpec, RewardedSpec


def spec_with(*functions: object) -> RewardedSpec:
    return GrpoSpec.model_validate(
        {
            "model": {"source": {"identifier": "a/b"}},
            "data": {"prompts": ["x"]},
            "reward_functions": list(functions),
        }
    )


def reward(**options: object) -> WeightedReward:
    (found,) = reward_functions_for(spec_with(options))
    return found


def judged(options: Mapping[str, object], completion: str, columns: Columns | None = None) -> float:
    (score,) = reward(**options).score(["a prompt"], [completion], columns or {})
    return score


@pytest.mark.parametrize(
    ("options", "completion", "score"),
    [
        ({"name": "length", "target": 4}, "four", 1),
        ({"name": "length", "target": 4}, "fo", 0.5),
        ({"name": "length", "target": 4}, "four and more", 0),
        ({"name": "length", "target": 4}, "", 0),
        ({"name": "length", "target": 2, "unit": "Words"}, "two words", 1),
        ({"name": "contains", "words": ["sun", "moon"]}, "The Sunday", 0.5),
        ({"name": "contains", "words": "sun"}, "sun", 1),
        ({"name": "contains", "words": ["Sun"], "ignore_case": False}, "sun", 0),
        ({"name": "contains", "words": ["a+b?"]}, "is a+b? taken literally", 1),
        ({"name": "not_contains", "words": ["sun", "moon"]}, "only the moon", 0.5),
        ({"name": "not_contains", "words": ["sun"]}, "", 1),
        ({"name": "json_valid"}, ' {"a": [1, 2.5e3, null]}\n', 1),
        ({"name": "json_valid"}, '{"a": 1} and more', 0),
        ({"name": "json_valid"}, '{"a": NaN}', 0),
        ({"name": "json_valid"}, "", 0),
        ({"name": "json_valid", "kind": "array"}, "[]", 1),
        ({"name": "json_valid", "kind": "object"}, "[]", 0),
        ({"name": "character_share", "characters": "ae"}, "area", 0.75),
        ({"name": "character_share", "characters": "a"}, "", 0),
        ({"name": "repetition_penalty", "size": 1}, "so so so so", -0.75),
        ({"name": "repetition_penalty", "size": 2}, "a b c a b", -0.25),
        ({"name": "repetition_penalty"}, "too short", 0),
    ],
)
def test_what_a_function_gives(options: dict[str, object], completion: str, score: float):
    assert judged(options, completion) == pytest.approx(score)


def test_hostile_json_is_no_json():
    assert judged({"name": "json_valid"}, "[" * 200_000) == 0
    assert judged({"name": "json_valid"}, "9" * 10_000) == 0


@pytest.mark.parametrize(
    ("options", "columns", "score"),
    [
        ({}, {"response": ["42"], "answer": ["7"]}, 1),
        ({}, {"answer": ["42"]}, 1),
        ({}, {"answer": [42]}, 1),
        ({}, {"answer": [None]}, 0),
        ({"column": "gold"}, {"answer": ["42"], "gold": ["7"]}, 0),
    ],
)
def test_an_exact_match_reads_a_column(options: dict[str, object], columns: Columns, score: float):
    assert judged({"name": "exact_match", **options}, " 42\n", columns) == score


def test_an_exact_match_may_ignore_the_case():
    options = {"name": "exact_match", "ignore_case": True}
    assert judged(options, "STRASSE", {"answer": ["Straße"]}) == 1


def test_each_completion_is_judged_with_its_own_row():
    scores = reward(name="exact_match").score(["p", "p", "q"], ["a", "b", "b"], {"answer": ["a", "a", "b"]})
    assert scores == [1, 0, 1]


def test_weights_and_labels_of_two_functions_of_one_name():
    first, second = reward_functions_for(
        spec_with({"name": "contains", "words": ["a"]}, {"name": "contains", "words": ["b"], "weight": -2})
    )
    assert (first.label, first.weight) == ("contains", 1)
    assert (second.label, second.weight) == ("contains_2", -2)


def test_an_unknown_name_is_answered_with_the_list():
    with pytest.raises(BadSpecError) as caught:
        reward_functions_for(spec_with({"name": "lenght", "target": 3}))
    assert "spec.reward_functions[0].name is 'lenght'" in caught.value.message
    assert all(name in caught.value.message for name in REWARD_FUNCTIONS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "length"}, "target"),
        ({"name": "length", "target": 0}, "target"),
        ({"name": "length", "target": 3, "unit": "miles"}, "unit"),
        ({"name": "length", "target": 3, "targets": 4}, "targets"),
        ({"name": "contains", "words": []}, "words"),
        ({"name": "contains", "words": [""]}, "words"),
        ({"name": "contains", "pattern": "(a+)+$"}, "pattern"),
        ({"name": "contains", "words": ["a"] * 101}, "words"),
        ({"name": "character_share", "characters": ""}, "characters"),
        ({"name": "repetition_penalty", "size": 0}, "size"),
        ({"name": "exact_match", "column": ""}, "column"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], told: str):
    with pytest.raises(BadSpecError, match=rf"spec\.reward_functions\[0\] \({options['name']}\).*{told}"):
        reward_functions_for(spec_with(options))


def test_columns_that_are_read():
    rewards = reward_functions_for(
        spec_with({"name": "exact_match"}, {"name": "exact_match", "column": "gold"}, {"name": "json_valid"})
    )
    assert columns_read(rewards, ["answer", "gold", "topic"]) == ["answer", "gold"]
    with pytest.raises(BadDataError, match=r"reads the column gold, which the data lacks; available: answer"):
        columns_read(rewards, ["answer"])
    with pytest.raises(BadDataError, match=r"reads the column response or answer"):
        columns_read(rewards, ["gold"])
