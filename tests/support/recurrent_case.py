"""Convolutions and recurrences over ragged packed rows, beside transformers' functions on each row.

Every row goes through several steps, so that a step continues from the state of its slot. The
functions that compute are given by name: the operators themselves, or what lowering makes of them.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from support.attention_case import NAN, indices

STEPS = [[70, 1, 3, 2, 0], [3, 1, 20, 5, 2], [1, 1, 1, 1, 1]]
"""Tokens of each row in each step; the last step decodes."""
SLOTS = (4, 0, -1, 2, 5)
"""The slot of each row; the third one is null."""
NUM_SLOTS = 7

Operator = Callable[..., Tensor]
Operators = Mapping[str, Operator]


def over_steps(operator: Operator, inputs: list[Tensor], state: Tensor) -> list[Tensor]:
    """Run all steps of all rows.

    Args:
        operator: takes inputs ``[tokens, ...]``, the state, slots and row offsets.
        inputs: ``[rows, tokens, ...]`` each, all tokens of every row.
        state: ``[slots, ...]``, zeros where a row has a slot, NaN elsewhere.

    Returns:
        The outputs of each row, ``[tokens, ...]``.
    """
    outputs: list[list[Tensor]] = [[] for _ in SLOTS]
    done = [0] * len(SLOTS)
    for counts in STEPS:
        packed = [
            torch.cat([x[row, done[row] : done[row] + n] for row, n in enumerate(counts)])
            for x in inputs
        ]
        offsets = torch.tensor([0, *counts]).cumsum(0)
        out = operator(*packed, state, indices(*SLOTS), indices(*offsets.tolist()))
        for row, part in enumerate(out.split(counts)):
            outputs[row].append(part)
            done[row] += counts[row]
    return [torch.cat(parts) for parts in outputs]


def check(
    operator: Operator,
    inputs: list[Tensor],
    shape: tuple[int, ...],
    reference: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    state_dtype: torch.dtype = torch.float32,
) -> None:
    """Compare an operator with a reference of one row: its outputs and its last state.

    Args:
        operator, inputs: as `over_steps` takes them.
        shape: of one slot.
        reference: from float32 inputs ``[1, tokens, ...]`` to outputs ``[1, tokens, ...]`` and a
            state.
        dtype: of the inputs.
        tolerance: of outputs and states.
        state_dtype: of the state.
    """
    inputs = [x.to(dtype) for x in inputs]
    state = torch.full((NUM_SLOTS, *shape), NAN, dtype=state_dtype)
    state[[slot for slot in SLOTS if slot >= 0]] = 0
    with torch.no_grad():
        outputs = over_steps(operator, inputs, state)
        for row, slot in enumerate(SLOTS):
            if slot < 0:
                assert not outputs[row].any()
                continue
            tokens = sum(counts[row] for counts in STEPS)
            out, last = reference(*(x[row : row + 1, :tokens].float() for x in inputs))
            torch.testing.assert_close(
                outputs[row].float(), out[0].float(), rtol=tolerance, atol=tolerance
            )
            torch.testing.assert_close(
                state[slot].float(), last[0].float(), rtol=tolerance, atol=tolerance
            )
    unused = set(range(NUM_SLOTS)) - set(SLOTS)
    assert state[sorted(unused)].isnan().all()


def random(*shape: int, seed: int = 0) -> Tensor:
    rows = (len(SLOTS), max(map(sum, zip(*STEPS, strict=True))))
    return torch.randn((*rows, *shape), generator=torch.Generator().manual_seed(seed))


def check_causal_conv1d(
    operators: Operators,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
    *,
    with_bias: bool = True,
    silu: bool = True,
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4).to(dtype)
    bias = torch.randn(6).to(dtype) if with_bias else None

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        activation, exact = "silu" if silu else None, None if bias is None else bias.float()
        out = mamba2.causal_conv1d_fn(x.transpose(1, 2), weight.float(), exact, activation)
        return out.transpose(1, 2), F.pad(x, (0, 0, 3, 0))[:, -3:]

    convolve = operators["causal_conv1d"]
    check(
        lambda x, *rest: convolve(x, weight, bias, *rest, silu=silu),
        [random(6)],
        (3, 6),
        reference,
        dtype,
        tolerance,
        state_dtype=dtype,
    )


def check_mamba_2(
    operators: Operators, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5
) -> None:
    scan = operators["selective_scan"]
    heads, dim, groups, size = 4, 8, 2, 5
    rates, skip = -torch.rand(heads) - 0.1, torch.randn(heads)

    def reference(x: Tensor, dt: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = mamba2.mamba2_chunk_scan(
            x, dt, rates, key, query, chunk_size=16, D=skip, return_final_states=True
        )
        return out

    check(
        lambda x, dt, key, query, *rest: scan(x, dt, rates[:, None, None], key, query, skip, *rest),
        [
            random(heads, dim),
            random(heads, seed=1).exp(),
            random(groups, size, seed=2),
            random(groups, size, seed=3),
        ],
        (heads, dim, size),
        reference,
        dtype,
        tolerance,
    )


def check_mamba(
    operators: Operators, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5
) -> None:
    scan = operators["selective_scan"]
    channels, size = 6, 5
    rates, skip = -torch.rand(channels, size) - 0.1, torch.randn(channels)

    def reference(x: Tensor, dt: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        out, last = mamba.mamba_selective_scan(
            x[..., 0].transpose(1, 2),
            dt.transpose(1, 2),
            rates,
            key[:, :, 0].transpose(1, 2),
            query[:, :, 0].transpose(1, 2),
            D=skip,
            return_last_state=True,
        )
        return out.transpose(1, 2)[..., None], last[:, :, None]

    check(
        lambda x, dt, key, query, *rest: scan(x, dt, rates[:, None], key, query, skip, *rest),
        [
            random(channels, 1),
            random(channels, seed=1).exp(),
            random(1, size, seed=2),
            random(1, size, seed=3),
        ],
        (channels, 1, size),
        reference,
        dtype,
        tolerance,
    )


HEADS, KEY_DIM, VALUE_DIM = 3, 8, 6


def delta_inputs(*decays: int) -> list[Tensor]:
    return [
        F.normalize(random(HEADS, KEY_DIM), dim=-1),
        F.normalize(random(HEADS, KEY_DIM, seed=1), dim=-1),
        random(HEADS, VALUE_DIM, seed=2),
        F.logsigmoid(random(HEADS, *decays, seed=3)),
        random(HEADS, seed=4).sigmoid(),
    ]


def check_delta_rule(
    operators: Operators,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    *,
    reference: Callable[..., tuple[Tensor, Tensor]],
    decays: tuple[int, ...] = (),
    repeated_keys: bool = False,
) -> None:
    scale, rule = KEY_DIM**-0.5, operators["delta_rule"]
    inputs = delta_inputs(*decays)
    if repeated_keys:  # powers of the keys' products, as a series has them, would be huge
        inputs[1] = inputs[1][:, :1].expand_as(inputs[1])
        inputs[3], inputs[4] = inputs[3] / 1000, torch.ones_like(inputs[4])
    check(
        lambda query, *rest: rule(query * scale, *rest),
        inputs,
        (HEADS, KEY_DIM, VALUE_DIM),
        lambda *inputs: reference(*inputs, output_final_state=True),
        dtype,
        tolerance,
    )


def check_linear_recurrence(
    operators: Operators, dtype: torch.dtype = torch.float32, tolerance: float = 2e-5
) -> None:
    def reference(decay: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        states = [torch.zeros_like(x[:, 0])]
        for token in range(x.shape[1]):
            states.append(states[-1] * decay[:, token] + x[:, token])
        return torch.stack(states[1:], 1), states[-1]

    inputs = [random(5).sigmoid(), random(5, seed=1)]
    check(operators["linear_recurrence"], inputs, (5,), reference, dtype, tolerance)


CHECKS: dict[str, Callable[..., None]] = {
    "convolution": check_causal_conv1d,
    "mamba 2": check_mamba_2,
    "mamba": check_mamba,
    "gated delta rule": partial(
        check_delta_rule, reference=qwen3_next.torch_chunk_gated_delta_rule
    ),
    "gated delta rule with repeated keys": partial(
        check_delta_rule,
        reference=qwen3_next.torch_chunk_gated_delta_rule,
        repeated_keys=True,
    ),
    "kimi delta attention": partial(
        check_delta_rule, reference=kimi_linear.chunk_kimi_delta_attention, decays=(KEY_DIM,)
    ),
    "linear recurrence": check_linear_recurrence,
}
"""Comparisons with transformers' functions, or with a loop, in float32.

They take the operators, and optionally the dtype of inputs and the tolerance.
"""
