import json

from executors.generation_results import EngineFacts, GeneratedItem, result_of
from executors.inference_spec import ChatMessage
from executors.prompt_data import Prompt

FACTS = EngineFacts(engine_name="transformers", model="acme/tiny-lm", device="cpu", dtype="float32")


def item(text: str, *, tokens: tuple[int, int] = (3, 2), **metadata: str) -> GeneratedItem:
    return GeneratedItem(
        prompt=Prompt(text=text, metadata={**metadata}),
        rendered=f"Be brief.\n{text}",
        output="4",
        finish_reason="stop",
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
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
    broken = GeneratedItem(Prompt(text="x"), "x", "", "error", error="too long")
    entries = result_of(FACTS, [item("a"), broken], {}, 0.0)["items"]
    assert isinstance(entries, list)
    assert [isinstance(entry, dict) and entry.get("error") for entry in entries] == [None, "too long"]


def test_a_conversation_is_kept_as_messages():
    prompt = Prompt(messages=(ChatMessage(role="user", content="hi"),))
    result = result_of(FACTS, [GeneratedItem(prompt, "<user>hi", "hello", "length")], {}, 0.0)
    assert '"prompt": [{"role": "user", "content": "hi"}]' in json.dumps(result, allow_nan=False)


def test_reserved_metadata_is_the_prompt_itself():
    result = result_of(FACTS, [item("real", prompt="fake", rendered_prompt="fake")], {}, 0.0)
    assert "fake" not in json.dumps(result)
