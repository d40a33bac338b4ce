"""What the recurrent layers of a Hugging Face decoder call in place of transformers' functions.

Layers of convolutions, state space models and linear attention keep states of fixed size beside, or
in place of, keys and values. transformers computes them in functions of the model's module, which
know nothing of rows: while a model is captured, these functions are replaced by ones that call the
operators of `inplace.operators` on the layer's state in the engine.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from inplace.operators import causal_conv1d, delta_rule, linear_recurrence, selective_scan
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from inplace_builder.capture.slot_cache import SlotCache, step_cache

CONV, RECURRENT = "conv_states", "recurrent_states"
"""The beginnings of the names of states: the inputs of a convolution, the state of a recurrence."""


def _causal_conv1d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: object,
) -> Tensor:
    """``causal_conv1d_fn``: x ``[1, channels, tokens]``, weight ``[channels, width]``."""
    cache = step_cache()
    name = cache.convolution()
    x = hidden_states[0].T
    channels, width = weight.shape
    state = cache.state(f"{CONV}_{name}", (width - 1, channels), x.dtype)
    slots, row_offsets = cache.rows()
    silu = activation in ("silu", "swish")
    out = causal_conv1d(x, weight, bias, state, slots, row_offsets, silu=silu).T[None]
    return out if silu or activation is None else ACT2FN[activation](out)


def _mamba2_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  the names of the function that is replaced
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: object,
) -> Any:
    """``mamba2_chunk_scan``: x ``[1, tokens, heads, dim]``, A ``[heads]``."""
    dt = _step_sizes(dt[0], dt_bias, softplus=dt_softplus).clamp(*dt_limit)
    out = _scan(hidden_states[0], dt, A[:, None, None], B[0], C[0], D)[None]
    return (out, _final_state(out)) if return_final_states else out


def _mamba_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: object,
) -> Any:
    """``mamba_selective_scan``: x ``[1, channels, tokens]``, A ``[channels, size]``."""
    dt = _step_sizes(dt[0].T, delta_bias, softplus=delta_softplus)
    key, query = (each[0].T[:, None] for each in (B, C))
    scanned = _scan(hidden_states[0].T[..., None], dt, A[:, None], key, query, D)
    out = scanned[..., 0].T[None]
    if z is not None:
        out = out * F.silu(z)
    return (out, _final_state(out)) if return_last_state else out


def _step_sizes(dt: Tensor, bias: Tensor | None, *, softplus: bool) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None,  # noqa: N803
) -> Tensor:
    cache = step_cache()
    shape = (*x.shape[1:], B.shape[-1])
    state = cache.state(f"{RECURRENT}_{cache.recurrence()}", shape, torch.float32)
    return selective_scan(x, dt, A, B, C, D, state, *cache.rows())


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor | None]:
    """``torch_chunk_gated_delta_rule`` and ``chunk_kimi_delta_attention``.

    Query and key ``[1, tokens, heads, key_dim]``, value ``[1, tokens, heads, value_dim]``.
    """
    dtype = query.dtype
    query, key = query[0].float(), key[0].float()
    if use_qk_l2norm_in_kernel:
        query, key = (
            each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (query, key)
        )
    query = query * query.shape[-1] ** -0.5
    cache = step_cache()
    shape = (*key.shape[1:], value.shape[-1])
    state = cache.state(f"{RECURRENT}_{cache.recurrence()}", shape, torch.float32)
    out = delta_rule(query, key, value[0], g[0].float(), beta[0], state, *cache.rows())
    out = out.to(dtype)[None]
    return out, _final_state(out) if output_final_state else None


def _final_state(out: Tensor) -> Tensor:
    """What a model hands to its cache as the state after the last token: nothing reads it."""
    return out.new_empty(0)


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d,
    "mamba2_chunk_scan": _mamba2_scan,
    "mamba_selective_scan": _mamba_scan,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "MiniMaxCache": SlotCache,
}
"""Functions and classes of transformers' model modules, and what stands in for them."""


class _GriffinBlock:
    """What replaces methods of a recurrent block of RecurrentGemma, which keeps its own states.

    Args:
        block: the module.
        layer: its index.
    """

    def __init__(self, block: torch.nn.Module, layer: int) -> None:
        self._block, self._layer = block, layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward as without a cache; its states are ours."""
        return type(self._block).forward(self._block, *args, **(kwargs | {"use_cache": False}))

    def convolve(self, x: Tensor) -> Tensor:
        """``conv_1d``: x ``[1, channels, tokens]``."""
        convolution: Any = self._block.conv_1d
        step_cache().update_conv_state(x, self._layer)
        return _causal_conv1d(x, convolution.weight[:, 0], convolution.bias)

    def scan(
        self, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, **_: object
    ) -> tuple[Tensor, None]:
        """``_rnn_scan``: tensors ``[1, tokens, channels]``."""
        cache = step_cache()
        name, channels = cache.recurrence(), hidden_states.shape[-1]
        state = cache.state(f"{RECURRENT}_{name}", (channels,), torch.float32)
        decay = (recurrent_gate * ~reset)[0].float()
        return linear_recurrence(decay, hidden_states[0], state, *cache.rows())[None], None


def _lightning_attention(
    layer: Any, hidden_states: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    """``MiniMaxLightningAttention``: ``state = decay * state + k ⊗ v``, ``out = q · state``.

    It is a scan of equal steps (arXiv:2501.08313, section 2.2).

    Args:
        layer: the module.
        hidden_states: ``[1, tokens, hidden]``.
    """
    heads, dim = layer.num_attention_heads, layer.head_dim
    projected = layer.act_fn(layer.qkv_proj(hidden_states[0])).unflatten(-1, (heads, 3 * dim))
    query, key, value = projected.split(dim, -1)
    cache = step_cache()
    state = cache.state(f"{RECURRENT}_{layer.layer_idx}", (heads, dim, dim), torch.float32)
    steps, rates = torch.ones_like(value[..., 0]), -layer.slope_rate.float()
    out = selective_scan(value, steps, rates, key, query, None, state, *cache.rows())
    out = layer.norm(out.flatten(1)) * torch.sigmoid(layer.output_gate(hidden_states))
    return layer.out_proj(out), _final_state(out)


@contextmanager
def _own_layers(model: PreTrainedModel) -> Iterator[None]:
    """Let recurrent layers with methods of their own compute through the operators.

    They are those of RecurrentGemma and MiniMax.
    """
    patched: list[tuple[Any, str]] = []
    for name, module in model.named_modules():
        if type(module).__name__ == "MiniMaxLightningAttention":
            module.__dict__["forward"] = partial(_lightning_attention, module)
            patched.append((module, "forward"))
        if type(module).__name__ != "RecurrentGemmaRecurrentBlock":
            continue
        layer = int(name.rpartition("layers.")[2].partition(".")[0])
        block, ours = module, _GriffinBlock(module, layer)
        for owner, method, replacement in (
            (block, "forward", ours.forward),
            (block.conv_1d, "forward", ours.convolve),
            (block.rg_lru, "_rnn_scan", ours.scan),
        ):
            owner.__dict__[method] = replacement
            patched.append((owner, method))
    try:
        yield
    finally:
        for owner, method in patched:
            del owner.__dict__[method]


@contextmanager
def slot_recurrences(model: PreTrainedModel) -> Iterator[None]:
    """Let the recurrent layers of a model compute through the operators."""
    names = {type(module).__module__ for module in model.modules()}
    modules = [sys.modules[name] for name in names if name.startswith("transformers.")]
    originals = [
        (module, name, getattr(module, name))
        for module in modules
        for name in REPLACEMENTS
        if hasattr(module, name)
    ]
    try:
        for module, name, _ in originals:
            setattr(module, name, REPLACEMENTS[name])
        with _own_layers(model):
            yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
