import json

import pytest

from executors.inference.generation_results import (
    ChosenToken,
    EngineFacts,
    GeneratedItem,
    Sample,
    TokenScore,
    items_json,
    result_of,
)
from executors.inference.prompt_data import Prompt
from executors.inference.prompt_spec import ChatMessage

FACTS = EngineFacts(
    engine_name="transformers", model="acme/tiny-lm", device="cpu", dtype="float32", engine_reason="why"
)


def item(text: str, *, tokens: tuple[int, int] = (3, 2), **metadata: str) -> GeneratedItem:
    return GeneratedItem(
        prompt=Prompt(text=text, metadata={**metadata}),
        rendered=f"Be brief.\n{text}",
        samples=(Sample(text="4", finish_reason="stop", tokens=tokens[1]),),
        prompt_tokens=tokens[0],
    )


def test_the_shape_of_the_wire():
    result = result_of(FACTS, [item("2+2?", source="quiz")], {}, 0.25)
    assert result == {
        "ok": True,
        "model": "acme/tiny-lm",
        "items": [
            {
                "index": 0,
                "prompt": "Be brief.\n2+2?",
                "output": "4",
                "finish_reason": "stop",
                "metadata": {"prompt": "2+2?", "rendered_prompt": "Be brief.\n2+2?", "source": "quiz"},
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "latency_sec": 0.25,
            "num_requests": 1,
        },
        "engine_name": "transformers",
        "engine_reason": "why",
        "device": "cpu",
        "dtype": "float32",
    }


def test_the_totals_of_the_parent_include_the_children():
    result = result_of(FACTS, [item("a")], {"kid": [item("b", tokens=(10, 1)), item("c", tokens=(1, 1))]}, 1.0)
    assert result["usage"] == {
        "prompt_tokens": 14,
        "completion_tokens": 4,
        "total_tokens": 18,
        "latency_sec": 1.0,
        "num_requests": 3,
    }
    child = result["children"]
    assert isinstance(child, dict)
    assert set(child) == {"kid"}
    assert child["kid"] == {
        key: value
        for key, value in result_of(FACTS, [item("b", tokens=(10, 1)), item("c", tokens=(1, 1))], {}, 1.0).items()
        if key in {"items", "usage"}
    }


def test_an_error_appears_only_where_there_is_one():
    broken = GeneratedItem(Prompt(text="x"), "x", error="too long")
    entries = result_of(FACTS, [item("a"), broken], {}, 0.0)["items"]
    assert isinstance(entries, list)
    assert [isinstance(entry, dict) and entry.get("error") for entry in entries] == [None, "too long"]
    assert [isinstance(entry, dict) and entry["finish_reason"] for entry in entries] == ["stop", "error"]


def test_a_conversation_is_kept_as_messages():
    prompt = Prompt(messages=(ChatMessage(role="user", content="hi"),))
    result = result_of(
        FACTS, [GeneratedItem(prompt, "<user>hi", (Sample(text="hello", finish_reason="length", tokens=1),))], {}, 0.0
    )
    assert '"prompt": [{"role": "user", "content": "hi"}]' in json.dumps(result, allow_nan=False)


def test_reserved_metadata_is_the_prompt_itself():
    result = result_of(FACTS, [item("real", prompt="fake", rendered_prompt="fake")], {}, 0.0)
    assert "fake" not in json.dumps(result)


def test_several_outputs_stand_beside_the_first_and_count_all_tokens():
    samples = tuple(Sample(text=text, finish_reason="length", tokens=2) for text in "abc")
    many = GeneratedItem(Prompt(text="x"), "x", samples, prompt_tokens=5)
    (entry,) = items_json([many])
    assert (entry["output"], entry["finish_reason"]) == ("a", "length")
    assert entry["outputs"] == [{"output": text, "finish_reason": "length"} for text in "abc"]
    usage = result_of(FACTS, [many], {}, 0.0)["usage"]
    assert isinstance(usage, dict)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["num_requests"]) == (5, 6, 1)
    assert "outputs" not in items_json([item("a")])[0]


def test_log_probabilities_stand_beside_each_output():
    top = (TokenScore(id=1, token="a", logprob=-0.5), TokenScore(id=2, token="b", logprob=-1.0))
    sample = Sample(
        text="b", finish_reason="stop", tokens=1, logprobs=(ChosenToken(id=2, token="b", logprob=-1.0, top=top),)
    )
    expected = [
        {
            "id": 2,
            "token": "b",
            "logprob": -1.0,
            "top": [{"id": 1, "token": "a", "logprob": -0.5}, {"id": 2, "token": "b", "logprob": -1.0}],
        }
    ]
    (one,) = items_json([GeneratedItem(Prompt(text="x"), "x", (sample,))])
    (two,) = items_json([GeneratedItem(Prompt(text="x"), "x", (sample, sample))])
    assert one["logprobs"] == expected
    assert two["outputs"] == [{"output": "b", "finish_reason": "stop", "logprobs": expected}] * 2


@pytest.mark.parametrize("impossible", [float("-inf"), float("nan")])
def test_a_log_probability_is_a_number_that_json_knows(impossible: float):
    assert TokenScore(id=1, token="a", logprob=impossible).logprob == -9999.0
