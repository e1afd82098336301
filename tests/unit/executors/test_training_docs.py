"""docs/training.md names every option of a training, with the default that it really has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic.fields import FieldInfo

from executors.training.spec.kind_options import PpoOptions, RewardedOptions
from executors.training.spec.trainer_specs import SPEC_TYPES, TrainingKind
from executors.training.spec.training_options import LoraOptions, TrainingOptions

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
KINDS = "|".join(SPEC_TYPES)


def rows(section: str) -> list[list[str]]:
    """The cells of all table rows below a heading."""
    text = PAGE.partition(f"\n{section}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([a-z_\d]+)`", cell)


def documented(cell: str, kind: str) -> str:
    """The default of a kind, out of a cell such as "2; dpo and reward 4; ppo 1"."""
    first, *others = (part.strip() for part in cell.split(";"))
    for part in others:
        if kind in re.findall(rf"\b(?:{KINDS})\b", part):
            return part.split()[-1].strip("`")
    return first.strip("`")


def shown(field: FieldInfo) -> str:
    """A default as the page writes it; what is empty or made by a function is told in words there."""
    value = field.get_default(call_default_factory=False)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | str) else ""


def check(field: FieldInfo, cell: str, kind: str) -> None:
    wanted, told = shown(field), documented(cell, kind)
    if wanted.replace(".", "").replace("e-", "").isdigit():
        assert float(told) == float(wanted)
    elif wanted:
        assert told == wanted


@pytest.mark.parametrize("kind", SPEC_TYPES)
def test_options_of_a_kind(kind: TrainingKind):
    options = type(SPEC_TYPES[kind].model_validate(_smallest(kind)).training)
    table = rows("## Options: `training`") + rows("## Devices")
    for name, field in options.model_fields.items():
        if name in TrainingOptions.model_fields and name != "beta":
            cells = [row for row in table if name in names_in(row[0])]
            assert cells, f"{name} is not documented"
            check(field, cells[-1][1], kind)
        elif name != "beta" or kind in {"dpo", "grpo"}:
            own = [row for row in table if row[0] == f"`{name}`" and kind in row[1].split(", ")]
            assert own, f"{name} of {kind} is not documented"
            check(field, own[0][2], kind)


def test_options_of_lora():
    table = {names_in(row[0])[0]: row for row in rows("## Options: `training`")}
    for name, field in LoraOptions.model_fields.items():
        assert name in table, f"lora.{name} is not documented"
        check(field, table[name][1], "lora_sft")


def test_the_page_has_no_option_that_is_not_there():
    known = {*TrainingOptions.model_fields, *LoraOptions.model_fields, *RewardedOptions.model_fields}
    known |= {*PpoOptions.model_fields, "num_generations", "per_device_train_batch_size", "save_freq"}
    told = {name for row in rows("## Options: `training`") for name in names_in(row[0])}
    assert told <= known


def _smallest(kind: str) -> dict[str, object]:
    data = {"preferences": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}
    return {
        "taskType": kind,
        "model": {"source": {"identifier": "x/y"}},
        "data": data if kind in {"dpo", "reward"} else {"prompts": ["a"]},
        **({"reward_functions": ["json_valid"]} if kind in {"ppo", "grpo"} else {}),
    }


def test_examples_of_the_page():
    base = _smallest("ppo")
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    assert len(examples) > 3
    for example in examples:
        kind = example.get("taskType") or ("ppo" if "reward_model" in example else "sft")
        spec = SPEC_TYPES[kind].model_validate({**base, **example})
        assert not set(example) - set(type(spec).model_fields) - {"taskType"}
