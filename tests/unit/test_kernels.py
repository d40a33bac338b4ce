"""The GPU kernels on a CPU, in Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import triton
from inplace.kernels.attention import AttentionSpec, attention, attention_workspace
from inplace.kernels.linear_kernels import gemv_kernel, pipelined_kernel, sliced_k_kernel
from inplace.kernels.memory import Pointer
from inplace.kernels.update import UpdateSpec, update
from torch import bool as torch_bool
from torch import float16, int32
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "5 query heads are not a multiple of 2 kv heads"),
        ({"dim": 513}, "head dimensions 513 and 64 must be from 1 to 512"),
        ({"latent": True}, "head dimensions 0 and 64 must be from 1 to 512"),
        (
            {"latent": True, "dim": 96, "rotary": 32},
            "keys that hold their values are not rotated",
        ),
        ({"rotary": 33}, "rotary is 33; it must be even and at most the head dimension 64"),
        ({"window": -1}, "window -1, attention_chunk 0 and softcap 0.0 must not be neg"),
        ({"attention_chunk": -8}, "window 0, attention_chunk -8 and softcap 0.0 must not be neg"),
        ({"bias_heads": 2}, "a bias is of 1 or 4 heads, not 2"),
        ({"bias_heads": 1, "ring": True}, "and its states are not rings"),
    ],
)
def test_a_spec_the_kernels_do_not_take_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(AttentionSpec(4, 2, 64, 64, 0.125), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "capacity", "missing", "message"),
    [
        (
            AttentionSpec(4, 2, 64, 64, 0.125),
            64,
            "key",
            "key and value must be given exactly when append is True",
        ),
        (
            AttentionSpec(4, 2, 64, 64, 0.125, append=False),
            64,
            "",
            "key and value must be given exactly when append is True",
        ),
        (
            AttentionSpec(4, 2, 64, 64, 0.125, rotary=64),
            64,
            "",
            "cos and sin must be given exactly when rotary is not 0; rotary is 64",
        ),
        (
            AttentionSpec(4, 2, 64, 64, 0.125, sinks=True),
            64,
            "",
            "sinks must be given exactly when the spec has them",
        ),
        (
            AttentionSpec(4, 2, 64, 64, 0.125, bias_heads=1),
            64,
            "",
            "a bias must be given exactly when the spec has heads of one",
        ),
        (
            AttentionSpec(4, 2, 64, 64, 0.125),
            4096,
            "",
            "3 rows over a capacity of 4096 need a workspace of 99840 bytes",
        ),
    ],
)
def test_arguments_that_contradict_the_spec_are_refused_before_a_launch(
    spec: AttentionSpec, capacity: int, missing: str, message: str
) -> None:
    memory, control = Pointer(4096, float16), Pointer(4096, int32)
    with pytest.raises(ValueError, match=message):
        attention(
            spec,
            query=memory,
            key=None if missing else memory,
            value=memory,
            query_stride=512,
            key_stride=512,
            value_stride=512,
            cos=None,
            sin=None,
            key_state=memory,
            value_state=memory,
            capacity=capacity,
            slots=control,
            row_offsets=control,
            write_indices=control,
            sinks=None,
            bias=None,
            out=memory,
            workspace=None,
            locks=control,
            tokens=3,
            rows=3,
        )


def test_a_workspace_is_enough_for_every_smaller_step() -> None:
    spec = AttentionSpec(32, 8, 64, 64, 0.125)
    sizes = [attention_workspace(spec, 64, rows, 4096) for rows in range(1, 65)]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0
    assert attention_workspace(spec, 64, 64, 128) == 0


def test_entries_that_do_not_divide_over_rows_are_refused() -> None:
    memory, control = Pointer(4096, torch_bool), Pointer(4096, int32)
    with pytest.raises(ValueError, match="7 entries are not a multiple of 2 rows"):
        update(
            UpdateSpec(1, 8, 1),
            state=memory,
            slots=control,
            value=memory,
            row_offsets=None,
            write_indices=control,
            rows=2,
            units=7,
        )


@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (gemv_kernel, {"GROUP": 0}),
        (sliced_k_kernel, {"BLOCK_M": 8, "SLICES": 4, "LONG": False}),
        (pipelined_kernel, {"BLOCK_M": 16, "STAGES": 3, "GROUP": 0, "QUANTIZED": False}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_linear_kernels_compile_for_extents_of_one(
    kernel: Any, constants: dict[str, object]
) -> None:
    """Triton compiles an argument of 1 as a Python number; its interpreter does not."""
    constants = {
        "BIAS": True, "NORM": False, "RESIDUAL": False, "SCALED": False, "ACTIVATION": "none",
        "GATED": True, "BLOCK_N": 16, "BLOCK_K": 32, "PDL": True, "inputs": 1, "width": 1,
        **constants,
    }  # fmt: skip
    if "count" in kernel.arg_names:
        constants["count"] = 1
    names = kernel.arg_names
    types = {
        name: "constexpr" if name in constants else "fp32" if name == "eps" else "*fp32"
        for name in names
    }
    source = ASTSource(
        kernel, types, {(names.index(name),): value for name, value in constants.items()}
    )
    assert triton.compile(source, GPUTarget("cuda", 90, 32)).asm["ptx"]
