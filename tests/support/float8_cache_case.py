"""One step of attention over caches of 8-bit floats, on a GPU or in Triton's interpreter."""

from dataclasses import replace

import torch
from inplace.kernels.attention import AttentionSpec
from inplace.operators import attention
from inplace.operators.float8 import FLOAT8, quantize_heads
from torch import Tensor

from support.attention_case import Row, bits
from support.kernel_cases import TOLERANCE, AttentionCase, rotate

DECODE = [Row(4, 7, 1), Row(0, 0, 1), Row(-1, 3, 1), Row(2, 47, 1), Row(5, 16, 1)]
MIXED = [Row(4, 7, 1), Row(0, 0, 21), Row(-1, 0, 3), Row(3, 5, 0), Row(2, 30, 17), Row(5, 16, 1)]

SPECS = [
    AttentionSpec(4, 2, 32, 32, 0.2, quantized=True),
    AttentionSpec(4, 2, 32, 16, 0.2, rotary=32, window=20, quantized=True),
    AttentionSpec(3, 3, 40, 24, 0.2, softcap=0.7, sinks=True, bias_heads=1, quantized=True),
    AttentionSpec(6, 2, 32, 32, 0.2, append=False, causal=False, quantized=True),
    AttentionSpec(4, 1, 64, 64, 0.2, attention_chunk=12, rotary=32, quantized=True),
]


def scales(heads: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Of keys and of values: so small in the first head that half of its numbers saturate."""
    own = torch.linspace(0.7, 0.005, heads)
    return (own * 2e-3).to(device), (own.flip(0) * 3e-3).to(device)


def check(
    spec: AttentionSpec, rows: list[Row], *, capacity: int = 48, device: str = "cpu",
    dtype: torch.dtype = torch.float16, pdl: bool = False, exact: bool = True,
) -> None:  # fmt: skip
    """Compare a launch with the operator on the CPU: outputs, and every byte of the states.

    Args:
        spec, rows, capacity, device, dtype, pdl: of the step.
        exact: the rotation is computed as on the CPU, so that what is stored is the same bits.
    """
    case = AttentionCase(
        replace(spec, quantized=False), rows, capacity=capacity, device=device, dtype=dtype, pdl=pdl
    )
    case.spec = spec
    case.merged[1] *= 1000  # beyond the largest 8-bit float
    key_scale, value_scale = scales(spec.kv_heads, device)
    case.key_scale, case.value_scale = key_scale, value_scale
    for name, of_heads in (("key_state", key_scale), ("value_state", value_scale)):
        state = getattr(case, name)
        stored = quantize_heads(state.movedim(1, 2).flatten(0, 1), of_heads)
        stored = stored.unflatten(0, (case.slots, case.capacity)).movedim(1, 2)
        setattr(case, name, stored.contiguous())
    query, key, value = (x.float().cpu() for x in (case.query, case.key, case.value))
    if spec.rotary:
        query, key = (
            rotate(x, case.cos.cpu(), case.sin.cpu()).to(dtype).float() for x in (query, key)
        )
    keys, values = case.key_state.cpu().clone(), case.value_state.cpu().clone()
    assert keys.dtype == FLOAT8
    expected = attention(
        query,
        key if spec.append else None,
        value if spec.append else None,
        keys,
        values,
        *(x.cpu() for x in case.control),
        scale=spec.scale,
        append=spec.append,
        causal=spec.causal,
        window=spec.window,
        ring=spec.ring,
        softcap=spec.softcap,
        attention_chunk=spec.attention_chunk,
        sinks=case.sinks.cpu() if spec.sinks else None,
        bias=case.bias.cpu() if spec.bias_heads else None,
        key_scale=key_scale.cpu(),
        value_scale=value_scale.cpu(),
    )
    out = case.launch().float().cpu()
    for state, stored in ((case.key_state, keys), (case.value_state, values)):
        differ = bits(state.cpu()) != bits(stored)
        assert not differ.any() if exact else differ.float().mean() < 1e-3
    assert not case.locks.any()
    assert torch.isfinite(out).all()
    error = (out - expected).flatten(1).norm(dim=1)
    assert (error <= TOLERANCE[dtype] * expected.flatten(1).norm(dim=1).clamp(min=1e-6)).all()
