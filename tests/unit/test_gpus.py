"""An engine is compared with the GPU that its instance runs on."""

from dataclasses import replace

import pytest
from inplace.engines.gpus import Gpu, check_memory, check_plan
from inplace.errors import LoadError
from inplace.schema.artifacts import EngineFile, Plan, Profile
from inplace.schema.files import FileRecord
from inplace.schema.programs import CompiledProgram
from inplace.schema.served import Manifest
from inplace.schema.specs import Alias, Dtype, Lowering, Role, StateSpec, TensorSpec, Update

WEIGHTS = 10_000
STEP = CompiledProgram(
    name="step",
    row_layout="rectangular",
    inputs=(
        TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(3,)),
        TensorSpec(name="slots", role=Role.SLOTS, dtype=Dtype.INT32),
    ),
    outputs=(TensorSpec(name="sum", role=Role.VALUE, dtype=Dtype.FLOAT32, shape=(3,)),),
    aliases=(Alias(output="total_updated", input="total", kind="operator"),),
    max_rows=4,
    chunk=1,
    states=("total",),
    engine=EngineFile(file="engine.safetensors", kind="torch", device="cuda", dtype=Dtype.FLOAT32),
    lowering=(Lowering(state="total", kind="operator", reason="it can"),),
)
MANIFEST = Manifest(
    name="model",
    slots=4,
    capacity=None,
    states=(StateSpec(name="total", shape=(3,), dtype=Dtype.FLOAT32, update=Update.REPLACE),),
    programs=(STEP,),
    files=(FileRecord(name="engine.safetensors", bytes=WEIGHTS, sha256="0" * 64),),
    verified="executed",
    built_with={},
)
H200 = Gpu(1, "NVIDIA H200", "9.0", free=0, total=150_000)


def plan(gpu: str, capability: str) -> Plan:
    profile = Profile(rows=(1, 8), tokens=(1, 8))
    return Plan(
        flavor="tensorrt",
        version="10.6",
        gpu=gpu,
        compute_capability=capability,
        profiles=(profile,),
    )


@pytest.mark.parametrize("gpu", ["NVIDIA H200", ""])
def test_a_plan_for_this_gpu_is_taken(gpu: str) -> None:
    check_plan("engine.plan", plan(gpu, "9.0"), H200)


@pytest.mark.parametrize(
    ("gpu", "capability"), [("NVIDIA H100", "9.0"), ("", "8.9"), ("NVIDIA H200", "10.0")]
)
def test_a_plan_for_another_is_refused_with_both(gpu: str, capability: str) -> None:
    with pytest.raises(LoadError) as refusal:
        check_plan("engine.plan", plan(gpu, capability), H200)
    assert f"for {gpu or 'a GPU'} (compute capability {capability})" in str(refusal.value)
    assert "runs on GPU 1 (NVIDIA H200, compute capability 9.0)" in str(refusal.value)


def on_a_gpu(free: int) -> Gpu:
    return replace(H200, free=free)


def test_what_does_not_fit_one_gpu_is_refused_with_the_number_of_gpus_that_would_do() -> None:
    manifest, slot = MANIFEST, MANIFEST.slot_bytes
    check_memory("m", manifest, 10, on_a_gpu(WEIGHTS + 10 * slot))
    with pytest.raises(LoadError) as refusal:
        check_memory("m", manifest, 10, on_a_gpu(WEIGHTS + 10 * slot - 1))
    text = str(refusal.value)
    assert f"{WEIGHTS:,} bytes of weights and {10 * slot:,} of state for 10 slots" in text
    assert f"has {WEIGHTS + 10 * slot - 1:,} of 150,000 bytes free, room for 9 slots" in text
    assert "would fit on 2 such GPUs, with an instance of 5 slots on each" in text


def test_weights_that_do_not_fit_are_not_divided() -> None:
    with pytest.raises(LoadError, match="would fill 3 such GPUs, but an engine is not divided"):
        check_memory("m", MANIFEST, 4, on_a_gpu(WEIGHTS // 2))
