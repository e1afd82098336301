"""One prompt for vLLM: its sampling parameters, and what is put together of its answer."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from executors.inference.generation_results import Sample
from executors.inference.generation_run import PromptRow
from executors.inference.inference_spec import InferenceSpec
from executors.inference.on_vllm.vllm_requests import Answer, sampling_params
from executors.inference.sampling_spec import InferenceOptions

ROW = PromptRow(0, (1, 2), new_tokens=7, seed=3)


def options_of(**inference: object) -> InferenceOptions:
    spec = {"model": {"source": {"identifier": "a/b"}}, "data": {"items": ["x"]}, "inference": inference}
    return InferenceSpec.model_validate(spec).inference


def bit(text: str, ids: list[int], *, index: int = 0, ended: str | None = None, logprobs: Any = None) -> Any:  # noqa: ANN401 - vLLM's
    """What vLLM sends of one output, as far as it is looked at."""
    return SimpleNamespace(index=index, text=text, token_ids=ids, finish_reason=ended, logprobs=logprobs)


def news(*parts: object) -> Any:  # noqa: ANN401 - vLLM's
    return SimpleNamespace(outputs=list(parts))


def score(token: str, logprob: float, rank: int) -> SimpleNamespace:
    return SimpleNamespace(decoded_token=token, logprob=logprob, rank=rank)


def test_an_answer_in_bits_becomes_one_sample():
    answer = Answer(options_of())
    assert answer.add(news(bit("He", [5]))) == 1
    assert answer.add(news(bit("llo", [6, 7], ended="stop"))) == 2
    assert answer.result() == (Sample(text="Hello", finish_reason="stop", tokens=3),)


def test_several_outputs_are_kept_apart_whatever_their_order():
    answer = Answer(options_of(n=2))
    answer.add(news(bit("b", [1], index=1), bit("a", [2], index=0)))
    assert answer.add(news(bit("B", [3, 4], index=1, ended="length"))) == 2
    answer.add(news(bit("A", [5], index=0, ended="stop")))
    assert answer.result() == (
        Sample(text="aA", finish_reason="stop", tokens=2),
        Sample(text="bB", finish_reason="length", tokens=3),
    )


@pytest.mark.parametrize(("ended", "told"), [("abort", "'abort'"), ("error", "'error'"), (None, "no reason")])
def test_an_answer_that_did_not_come_to_its_end_says_so(ended: str | None, told: str):
    answer = Answer(options_of(n=2))
    answer.add(news(bit("a", [1], index=0, ended="stop"), bit("b", [1], index=1, ended=ended)))
    result = answer.result()
    assert isinstance(result, str)
    assert told in result


def test_log_probabilities_are_of_the_chosen_token_with_the_likeliest_beside_it():
    answer = Answer(options_of(logprobs=2))
    # vLLM adds the chosen token to the likeliest ones where it is none of them.
    place = {4: score("d", -3.0, 9), 1: score("a", -0.1, 1), 2: score("b", -2.5, 2)}
    answer.add(news(bit("d", [4], logprobs=[place])))
    answer.add(news(bit("a", [1], logprobs=[{1: score("a", -0.2, 1), 2: score(None, -2.0, 2)}], ended="stop")))  # type: ignore[arg-type]
    (sample,) = answer.result()
    assert isinstance(sample, Sample)
    assert sample.logprobs is not None
    first, second = sample.logprobs
    assert (first.id, first.token, first.logprob) == (4, "d", -3.0)
    assert [token.id for token in first.top] == [1, 2]
    assert [(token.id, token.token) for token in second.top] == [(1, "a"), (2, "")]


def test_without_alternatives_only_the_token_itself_is_scored():
    answer = Answer(options_of(logprobs=0))
    answer.add(news(bit("d", [4], logprobs=[{4: score("d", -3.0, 9)}], ended="length")))
    (sample,) = answer.result()
    assert isinstance(sample, Sample)
    assert sample.logprobs is not None
    assert [(token.logprob, token.top) for token in sample.logprobs] == [(-3.0, ())]


@pytest.fixture
def vllm() -> None:
    """Its modules warn of what they do themselves while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.sampling_params  # noqa: F401


@pytest.mark.vllm
@pytest.mark.usefixtures("vllm")
class TestSamplingParams:
    def test_what_the_task_asks_for(self):
        asked = options_of(
            n=2, temperature=0.5, top_p=0.9, top_k=7, presence_penalty=0.1, frequency_penalty=0.2,
            repetition_penalty=1.1, stop=["END"], logprobs=3,
        )  # fmt: skip
        params = sampling_params(ROW, asked, [2, 9])
        assert (params.n, params.temperature, params.top_p, params.top_k) == (2, 0.5, 0.9, 7)
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.1, 0.2, 1.1)
        assert (params.stop, params.stop_token_ids, params.logprobs) == (["END"], [2, 9], 3)
        assert (params.max_tokens, params.seed) == (7, 3)
        assert params.structured_outputs is None

    @pytest.mark.parametrize("greedy", [{"temperature": 0, "top_p": 0.5, "top_k": 3}, {"do_sample": False}])
    def test_greedy_leaves_nothing_to_chance(self, greedy: dict[str, object]):
        params = sampling_params(ROW, options_of(**greedy), [])
        assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 0)

    @pytest.mark.parametrize("top_k", [None, 0, -1])
    def test_no_limit_on_the_candidates(self, top_k: int | None):
        assert sampling_params(ROW, options_of(top_k=top_k), []).top_k == 0

    @pytest.mark.parametrize(
        ("guided", "field", "value"),
        [
            ({"json": {"type": "object"}}, "json", {"type": "object"}),
            ({"json_object": True}, "json_object", True),
            ({"regex": "[0-9]"}, "regex", "[0-9]"),
            ({"choice": ["a", "b"]}, "choice", ["a", "b"]),
            ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ],
    )
    def test_each_kind_of_structure(self, guided: dict[str, object], field: str, value: object):
        structure = sampling_params(ROW, options_of(guided=guided), []).structured_outputs
        assert structure is not None
        given = {
            name: getattr(structure, name)
            for name in ("json", "json_object", "regex", "choice", "grammar")
            if getattr(structure, name) is not None
        }
        assert given == {field: value}
