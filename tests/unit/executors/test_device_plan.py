"""Which devices a training gets, and how many processes."""

from __future__ import annotations

import pytest

from executors.contract import EnginePolicy
from executors.errors import BadSpecError
from executors.training.device_plan import DevicePlan, plan_devices
from executors.training.spec.trainer_specs import SPEC_TYPES

FOUR = ("GPU-aa", "GPU-bb", "GPU-cc", "GPU-dd")


def plan(
    gpus: tuple[str, ...] = FOUR,
    *,
    kind: str = "sft",
    count: int | None = None,
    enforce_cpu: bool = False,
    cores: int = 8,
    **training: object,
) -> DevicePlan:
    spec = SPEC_TYPES[kind].model_validate(
        {
            "model": {"source": {"identifier": "tiny"}},
            "data": {"prompts": ["a"]},
            "training": training,
            "enforce_cpu": enforce_cpu,
            "resources": {"hardware": {"gpu": {"count": count}}},
        }
    )
    return plan_devices(spec, EnginePolicy(gpus=gpus), cores=cores)


def test_without_a_gpu_one_process_trains_on_the_cpu():
    chosen = plan(())

    assert (chosen.ranks, chosen.use_cpu, chosen.cuda_visible_devices) == (1, True, "")
    assert chosen.why == "CPU, 1 process: this worker has no GPU to use"


def test_each_gpu_has_a_process_of_its_own():
    chosen = plan()

    assert (chosen.ranks, chosen.use_cpu) == (4, False)
    assert chosen.cuda_visible_devices == "GPU-aa,GPU-bb,GPU-cc,GPU-dd"
    assert chosen.why == "4 GPUs, 4 processes: 4 GPUs may be used"


@pytest.mark.parametrize(("count", "gpus"), [(1, FOUR[:1]), (2, FOUR[:2]), (9, FOUR), (0, ())])
def test_the_demanded_number_of_gpus_is_the_most_that_are_used(count: int, gpus: tuple[str, ...]):
    assert plan(count=count).gpus == gpus


def test_the_cpu_can_be_demanded():
    chosen = plan(enforce_cpu=True)

    assert (chosen.gpus, chosen.cuda_visible_devices) == ((), "")
    assert "enforce_cpu" in chosen.why


def test_one_process_is_enough_where_several_gpus_are_forbidden():
    assert plan(allow_multi_gpu=False).gpus == ("GPU-aa",)
    assert plan(allow_multi_gpu=False, primary_gpu=2).gpus == ("GPU-cc",)
    assert plan(allow_multi_gpu=True).ranks == 4


def test_the_first_gpu_is_counted_among_the_visible_ones():
    assert plan(allow_multi_gpu=False, primary_gpu=1, visible_devices="3,1").gpus == ("GPU-bb",)


@pytest.mark.parametrize(
    ("wanted", "gpus"),
    [
        ("2,0", ("GPU-cc", "GPU-aa")),
        ([1], ("GPU-bb",)),
        (["GPU-dd", "gpu-AA"], ("GPU-dd", "GPU-aa")),
        ("1, 1,1", ("GPU-bb",)),
    ],
)
def test_visible_devices_are_numbers_or_names_of_the_workers_own(wanted: object, gpus: tuple[str, ...]):
    assert plan(visible_devices=wanted).gpus == gpus


def test_a_device_that_is_not_the_workers_is_refused_with_those_that_are():
    with pytest.raises(BadSpecError, match=r"names '7', 'GPU-zz'.* 0 \(GPU-aa\), 1 \(GPU-bb\)"):
        plan(("GPU-aa", "GPU-bb"), visible_devices="0,7,GPU-zz")


def test_visible_devices_mean_nothing_on_the_cpu_and_that_is_said():
    chosen = plan((), visible_devices="0,1")

    assert chosen.use_cpu
    assert "visible_devices has no effect" in chosen.warnings[0]


def test_the_number_of_processes_can_be_given():
    assert plan(nproc_per_node=2).gpus == ("GPU-aa", "GPU-bb")
    assert plan(nproc_per_node=1, primary_gpu=3).gpus == ("GPU-dd",)
    assert plan((), nproc_per_node=2).ranks == 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"nproc_per_node": 5}, "is 5, expected at most 4: 4 GPUs may be used"),
        ({"nproc_per_node": 2, "count": 1}, r"expected at most 1: resources.hardware.gpu.count is 1"),
        ({"nproc_per_node": 9, "gpus": ()}, "is 9, expected at most 8"),
        ({"primary_gpu": 4, "count": 1}, r"primary_gpu is 4; .* 3 \(GPU-dd\)"),
    ],
)
def test_more_than_there_is_is_refused(fields: dict[str, object], text: str):
    with pytest.raises(BadSpecError, match=text):
        plan(**fields)  # type: ignore[arg-type]


def test_deepspeed_finds_a_group_also_where_one_process_trains():
    """It would look for MPI otherwise."""
    assert plan(allow_multi_gpu=False, deepspeed={"zero_optimization": {"stage": 2}}).grouped
    assert not plan(allow_multi_gpu=False).grouped
    assert not plan((), deepspeed={"zero_optimization": {"stage": 2}}).grouped


def test_a_lora_uses_one_gpu_unless_the_number_of_processes_is_given():
    assert plan(kind="lora_sft").ranks == 1
    assert plan(kind="lora_sft", allow_multi_gpu=True).ranks == 1
    assert plan(kind="lora_sft", primary_gpu=2).gpus == ("GPU-cc",)
    assert plan(kind="lora_sft", nproc_per_node=3).ranks == 3


def test_slices_of_gpus_do_not_train_together():
    chosen = plan(("MIG-1", "MIG-2"))

    assert chosen.gpus == ("MIG-1",)
    assert "MIG" in chosen.why
