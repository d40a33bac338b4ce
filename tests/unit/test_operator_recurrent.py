"""Convolutions and recurrences over ragged packed rows equal transformers' functions on each row.

Every row goes through two steps, so that the second one continues from the state of its slot.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from inplace.operators import causal_conv1d, delta_rule, linear_recurrence, selective_scan
from support.attention_case import NAN, indices
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

STEPS = [[70, 1, 3, 2, 0], [3, 1, 20, 5, 2], [1, 1, 1, 1, 1]]
"""Tokens of each row in each step; the last step decodes."""
SLOTS = (4, 0, -1, 2, 5)
"""The slot of each row; the third one is null."""
NUM_SLOTS = 7

Operator = Callable[..., Tensor]


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
) -> None:
    """Compare an operator with a reference of one row: its outputs and its last state.

    Args:
        operator, inputs: as `over_steps` takes them.
        shape: of one slot.
        reference: from inputs ``[1, tokens, ...]`` to outputs ``[1, tokens, ...]`` and a state.
        dtype: of the state.
        tolerance: of outputs and states.
    """
    state = torch.full((NUM_SLOTS, *shape), NAN, dtype=dtype)
    state[[slot for slot in SLOTS if slot >= 0]] = 0
    with torch.no_grad():
        outputs = over_steps(operator, inputs, state)
        for row, slot in enumerate(SLOTS):
            if slot < 0:
                assert not outputs[row].any()
                continue
            tokens = sum(counts[row] for counts in STEPS)
            out, last = reference(*(x[row : row + 1, :tokens] for x in inputs))
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


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_causal_conv1d_continues_each_row(
    dtype: torch.dtype, tolerance: float, with_bias: bool, silu: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4).to(dtype)
    bias = torch.randn(6).to(dtype) if with_bias else None

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        activation = "silu" if silu else None
        out = mamba2.causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation)
        return out.transpose(1, 2), F.pad(x, (0, 0, 3, 0))[:, -3:]

    check(
        lambda x, *rest: causal_conv1d(x, weight, bias, *rest, silu=silu),
        [random(6).to(dtype)],
        (3, 6),
        reference,
        dtype,
        tolerance,
    )


def test_selective_scan_with_one_decay_a_head_is_that_of_mamba_2() -> None:
    heads, dim, groups, size = 4, 8, 2, 5
    rates, skip = -torch.rand(heads) - 0.1, torch.randn(heads)

    def reference(x: Tensor, dt: Tensor, key: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = mamba2.mamba2_chunk_scan(
            x, dt, rates, key, query, chunk_size=16, D=skip, return_final_states=True
        )
        return out

    check(
        lambda x, dt, key, query, *rest: selective_scan(
            x, dt, rates[:, None, None], key, query, skip, *rest
        ),
        [
            random(heads, dim),
            random(heads, seed=1).exp(),
            random(groups, size, seed=2),
            random(groups, size, seed=3),
        ],
        (heads, dim, size),
        reference,
    )


def test_selective_scan_with_a_decay_for_each_element_is_that_of_mamba() -> None:
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
        lambda x, dt, key, query, *rest: selective_scan(
            x, dt, rates[:, None], key, query, skip, *rest
        ),
        [
            random(channels, 1),
            random(channels, seed=1).exp(),
            random(1, size, seed=2),
            random(1, size, seed=3),
        ],
        (channels, 1, size),
        reference,
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


@pytest.mark.parametrize(
    ("decays", "reference"),
    [
        ((), qwen3_next.torch_chunk_gated_delta_rule),
        ((KEY_DIM,), kimi_linear.chunk_kimi_delta_attention),
    ],
    ids=["gated", "kda"],
)
def test_delta_rule_is_that_of_transformers(
    decays: tuple[int, ...], reference: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    scale = KEY_DIM**-0.5
    check(
        lambda query, *rest: delta_rule(query * scale, *rest),
        delta_inputs(*decays),
        (HEADS, KEY_DIM, VALUE_DIM),
        lambda *inputs: reference(*inputs, output_final_state=True),
    )


def test_linear_recurrence_is_the_loop_over_tokens() -> None:
    def reference(decay: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        states = [torch.zeros_like(x[:, 0])]
        for token in range(x.shape[1]):
            states.append(states[-1] * decay[:, token] + x[:, token])
        return torch.stack(states[1:], 1), states[-1]

    check(linear_recurrence, [random(5).sigmoid(), random(5, seed=1)], (5,), reference)


ROWS = (indices(1, 0), indices(0, 2, 3))
CALLS: dict[str, tuple[tuple[Tensor | None, ...], dict[str, object]]] = {
    "causal_conv1d": (
        (torch.randn(3, 6), torch.randn(6, 4), torch.randn(6), torch.zeros(2, 3, 6), *ROWS),
        {"silu": True},
    ),
    "selective_scan": (
        (
            torch.randn(3, 4, 2),
            torch.rand(3, 4),
            -torch.rand(4, 1, 1),
            torch.randn(3, 2, 5),
            torch.randn(3, 2, 5),
            None,
            torch.zeros(2, 4, 2, 5),
            *ROWS,
        ),
        {},
    ),
    "delta_rule": (
        (
            torch.randn(3, 2, 4),
            torch.randn(3, 2, 4),
            torch.randn(3, 2, 5),
            -torch.rand(3, 2),
            torch.rand(3, 2),
            torch.zeros(2, 2, 4, 5),
            *ROWS,
        ),
        {},
    ),
    "linear_recurrence": ((torch.rand(3, 4), torch.randn(3, 4), torch.zeros(2, 4), *ROWS), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_accepts_them(name: str) -> None:
    arguments, keywords = CALLS[name]
    operator = getattr(torch.ops.inplace, name).default
    torch.library.opcheck(operator, arguments, keywords)


@pytest.mark.parametrize(
    ("name", "index", "wrong", "text"),
    [
        ("causal_conv1d", 3, (2, 4, 6), r"state \[slots, 3, 6\]"),
        ("causal_conv1d", 0, (3, 5), r"x must be \[tokens, 6\]"),
        ("causal_conv1d", 2, (5,), r"bias must be \[6\]"),
        ("selective_scan", 6, (2, 4, 2, 6), r"the state holds \[4, 2, 6\] \(heads, dim, size\)"),
        ("selective_scan", 0, (3, 8), r"x must be \[tokens, heads, dim\]"),
        ("delta_rule", 5, (2, 2, 5, 4), r"the state holds \[2, 5, 4\] \(heads, key_dim, value_di"),
        ("linear_recurrence", 2, (2, 5), r"state \[slots, channels\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_while_a_graph_is_traced(
    name: str, index: int, wrong: tuple[int, ...], text: str
) -> None:
    arguments = list(CALLS[name][0])
    arguments[index] = torch.zeros(wrong)
    operator = getattr(torch.ops.inplace, name)
    with pytest.raises(RuntimeError, match=text):
        operator(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=text):
        operator(*arguments)
