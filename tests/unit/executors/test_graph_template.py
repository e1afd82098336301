import pytest
from pydantic import JsonValue

from executors.errors import BadDataError, BadSpecError
from executors.inference.graph_template import render_template
from executors.inference.prompt_spec import GraphTemplate

ITEMS: JsonValue = [{"output": "cats purr"}, {"output": "dogs\nbark"}]
WRAPPED: dict[str, JsonValue] = {
    "ask": {"task_id": "1", "result": {"items": ITEMS, "usage": {"total_tokens": 7}, "score": 0.5, "nothing": None}}
}
BARE: dict[str, JsonValue] = {"ask": {"items": ITEMS, "usage": {"total_tokens": 7}}}


def rendered(columns: list[dict[str, object]], upstream: dict[str, JsonValue], **template: object) -> str:
    return render_template(GraphTemplate.model_validate({"columns": columns, **template}), upstream)


def one(expr: str, upstream: dict[str, JsonValue] = WRAPPED, **column: object) -> str:
    return rendered([{"expr": expr, **column}], upstream, name="mine", text="{col1_value}")


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        ("ask.result.items[0].output", "cats purr"),
        ("ask.result.items.1.output", "dogs\nbark"),
        ("${ask.result.items[0].output}", "cats purr"),
        ("ask.result.usage.total_tokens", "7"),
        ("ask.result.score", "0.5"),
        ("ask.result.usage", '{"total_tokens": 7}'),
        ("ask.task_id", "1"),
    ],
)
def test_paths_start_at_the_wrapper(expr: str, value: str):
    assert one(expr) == value


def test_node_and_path_apart():
    column = {"node": "ask", "path": "result.items[1].output"}
    assert rendered([column], WRAPPED, name="mine", text="<{col1_label}={col1_value}>") == "<Column 1=dogs\nbark>"


@pytest.mark.parametrize("upstream", [WRAPPED, BARE])
@pytest.mark.parametrize("expr", ["ask.result.items[0].output", "ask.items[0].output"])
def test_the_leading_result_may_be_there_or_not(expr: str, upstream: dict[str, JsonValue]):
    assert one(expr, upstream) == "cats purr"


@pytest.mark.parametrize(
    "expr", ["ask.result.nothing", "ask.result.items[9].output", "other.result.x", "ask.task_id.x"]
)
def test_null_or_missing_without_default_is_an_error(expr: str):
    with pytest.raises(BadDataError, match=r"columns\[0\].*missing or null") as caught:
        one(expr)
    assert "Stages with results: ask" in caught.value.hint


def test_a_default_replaces_null():
    assert one("ask.result.nothing", default="n/a") == "n/a"
    assert one("other.x", default=3) == "3"
    assert one("other.x", default="") == ""


@pytest.mark.parametrize("expr", ["ask.result..items", "ask.items[x]", "ask.items[0"])
def test_a_malformed_path_is_refused(expr: str):
    with pytest.raises(BadSpecError, match="has the path"):
        one(expr)


def test_no_upstream_is_an_error():
    with pytest.raises(BadDataError, match="_upstreamResults is empty"):
        one("ask.result", {}, default="x")


COLUMNS: list[dict[str, object]] = [
    {"label": "First", "expr": "ask.result.items[0].output"},
    {"expr": "ask.result.items[1].output"},
]


def test_the_briefing_with_given_sentences():
    text = rendered(COLUMNS, WRAPPED, options={"intro": ["Read.", "Think."], "closing": "Answer."})
    assert text == "Read.\nThink.\n• First: cats purr\n• Column 2: dogs\n  bark\nAnswer."


def test_the_briefing_makes_up_what_is_not_given():
    lines = rendered(COLUMNS, WRAPPED, options={"role": "vet"}).split("\n")
    assert "vet" in lines[0]
    assert "First" in lines[-1]
    assert "Column 2" in lines[-1]


def test_the_briefing_needs_two_columns():
    with pytest.raises(BadSpecError, match="has 1 entries"):
        rendered(COLUMNS[:1], WRAPPED)


def test_text_is_used_for_unregistered_names_only():
    assert rendered(COLUMNS, WRAPPED, name="mine", text="hello") == "hello"
    assert "cats purr" in rendered(COLUMNS, WRAPPED, text="hello")


def test_values_are_not_filled_in_twice():
    upstream: dict[str, JsonValue] = {"ask": {"a": "{col2_value}", "b": "secret"}}
    columns: list[dict[str, object]] = [{"expr": "ask.a"}, {"expr": "ask.b"}]
    assert rendered(columns, upstream, name="mine", text="{col1_value} {x}") == "{col2_value} {x}"


def test_an_unknown_name_without_text_is_refused():
    with pytest.raises(BadSpecError, match="two_column_briefing"):
        rendered(COLUMNS, WRAPPED, name="mine")


def test_a_placeholder_beyond_the_columns_is_refused():
    with pytest.raises(BadSpecError, match=r"col3_value.*2 columns"):
        rendered(COLUMNS, WRAPPED, name="mine", text="{col3_value}")
