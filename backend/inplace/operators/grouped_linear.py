"""A mixture of experts: ``inplace::grouped_linear`` and ``inplace::weighted_sum``.

Every token has some experts, each a layer of its own. `grouped_linear` takes which experts those
are, and computes all of their layers; `weighted_sum` adds the results of a token. Neither touches a
state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace.operators.float8 import FLOAT8
from inplace.operators.library import LIBRARY, define
from inplace.operators.linear import ACTIVATIONS, activate

GROUPED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Element types of inputs and weights."""


define(
    "grouped_linear",
    "(Tensor x, Tensor expert_ids, Tensor weight, Tensor? bias=None, *, Tensor? scale=None, "
    "bool transposed=False, str activation='none', bool gated=False) -> Tensor",
)


def _empty_result(
    x: Tensor,
    expert_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    transposed: bool = False,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """Memory for the result.

    Raises:
        RuntimeError: the arguments do not fit.
    """
    torch._check(
        expert_ids.dim() == 2 and expert_ids.dtype in (torch.int32, torch.int64),
        lambda: (
            f"expert_ids must be [tokens, experts of a token] of int32 or int64, got "
            f"{tuple(expert_ids.shape)} of {expert_ids.dtype}"
        ),
    )
    torch._check(
        x.dtype in GROUPED_DTYPES
        and weight.dtype == (x.dtype if scale is None else FLOAT8)
        and (bias is None or bias.dtype == x.dtype),
        lambda: (
            f"x is {x.dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}; "
            f"they must be the same, one of {GROUPED_DTYPES}, but that weights with a scale are "
            f"{FLOAT8}: load a model with other quantized experts dequantized"
        ),
    )
    torch._check(
        weight.dim() == 3,
        lambda: f"weight must be [experts, out, in], got {tuple(weight.shape)}",
    )
    inputs, outputs = weight.shape[1:] if transposed else reversed(weight.shape[1:])
    torch._check(
        x.dim() in (2, 3) and x.shape[-1] == inputs,
        lambda: f"x {tuple(x.shape)} must be [tokens, {inputs}], or [tokens, experts, {inputs}]",
    )
    for axis in range(x.dim() - 1):
        torch._check(
            x.shape[axis] == expert_ids.shape[axis],
            lambda: f"x {tuple(x.shape)} and expert_ids {tuple(expert_ids.shape)} do not fit",
        )
    torch._check(
        bias is None or tuple(bias.shape) == (weight.shape[0], outputs),
        lambda: (
            f"bias {None if bias is None else tuple(bias.shape)} must be "
            f"[{weight.shape[0]}, {outputs}]"
        ),
    )
    torch._check(
        scale is None
        or (tuple(scale.shape), scale.dtype) == ((weight.shape[0], outputs), torch.float32),
        lambda: (
            f"scale {None if scale is None else (tuple(scale.shape), scale.dtype)} must be "
            f"[{weight.shape[0]}, {outputs}] of torch.float32"
        ),
    )
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"activation {activation!r} must be one of {ACTIVATIONS}",
    )
    torch._check(
        not gated or outputs % 2 == 0,
        lambda: f"weight {tuple(weight.shape)} has no two halves, which gated needs",
    )
    out: Tensor = x.new_empty((*expert_ids.shape, outputs // 2 if gated else outputs))
    return out


@torch.library.impl(LIBRARY, "grouped_linear", "CompositeExplicitAutograd")
def _grouped_linear(
    x: Tensor,
    expert_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    transposed: bool = False,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """Sort the rows by experts; then each used expert is one product, its weight read once."""
    out = _empty_result(
        x, expert_ids, weight, bias,
        scale=scale, transposed=transposed, activation=activation, gated=gated,
    ).zero_()  # fmt: skip
    if not out.numel():
        return out
    results, rows, ids = out.flatten(0, 1), x.flatten(0, -2), expert_ids.flatten()
    order = ids.argsort(stable=True)
    used, counts = ids[order].unique_consecutive(return_counts=True)
    groups = order.split(counts.tolist())
    for expert, group in zip(used.tolist(), groups, strict=True):
        if not 0 <= expert < len(weight):
            continue
        matrix = weight[expert].t() if transposed else weight[expert]
        source = group if x.dim() == 3 else group // expert_ids.shape[1]
        own_bias = None if bias is None else bias[expert]
        if scale is None:
            product = F.linear(rows[source], matrix, own_bias)
        else:
            own_bias = None if own_bias is None else own_bias.float()
            whole = matrix.float() * scale[expert][:, None]
            product = F.linear(rows[source].float(), whole, own_bias).to(x.dtype)
        first, second = product.chunk(2, -1) if gated else (product, None)
        activated = activate(first, activation)
        results[group] = activated if second is None else activated * second
    return out


@torch.library.impl(LIBRARY, "grouped_linear", "CUDA")
def _grouped_linear_on_gpu(
    x: Tensor,
    expert_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    transposed: bool = False,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """`grouped_linear` in Triton-language kernels, without a synchronisation with the host."""
    from inplace.kernels import grouped_linear as kernels  # imports Triton

    out = _empty_result(
        x, expert_ids, weight, bias,
        scale=scale, transposed=transposed, activation=activation, gated=gated,
    )  # fmt: skip
    if not out.numel():
        return out
    pairs, (experts, *extents) = expert_ids.numel(), weight.shape
    inputs, outputs = extents if transposed else reversed(extents)
    spec = kernels.GroupedLinearSpec(
        inputs, outputs, experts, bias is not None, transposed, activation, gated,
        scaled=scale is not None,
    )  # fmt: skip
    kernels.grouped_linear(
        spec,
        x=x.contiguous(),
        expert_ids=expert_ids.contiguous(),
        weight=weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        scale=None if scale is None else scale.contiguous(),
        out=out,
        workspace=torch.empty(
            kernels.grouped_linear_workspace(spec, pairs) // 4, dtype=torch.int32, device=x.device
        ),
        tokens=expert_ids.shape[0],
        experts_per_token=expert_ids.shape[1],
        shared=x.dim() == 2,
    )
    return out


torch.library.register_fake("inplace::grouped_linear", _empty_result, lib=LIBRARY)


def grouped_linear(
    x: Tensor,
    expert_ids: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    transposed: bool = False,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """The linear layers of the experts that tokens are routed to.

    The weight of each expert that some token has is read once, whatever number of tokens have it;
    on a GPU, as long as the step has at most 64 rows for one expert.

    Args:
        x: ``[tokens, in]``, which all experts of a token take, or ``[tokens, k, in]``, a vector for
            each of them. float32, float16 or bfloat16.
        expert_ids: ``[tokens, k]``, int32 or int64: the experts of each token. A token may have an
            expert twice. The result for an id that is not an expert's is 0.
        weight: ``[experts, out, in]``, of x's dtype, or float8_e4m3fn with a ``scale``.
        bias: ``[experts, out]``, of x's dtype.
        scale: ``[experts, out]`` float32, of weights that are float8_e4m3fn: what each output's
            weights are multiplied with. The products are summed in float32 and rounded once.
        transposed: the weight is ``[experts, in, out]``.
        activation: one of `ACTIVATIONS`.
        gated: ``activation(first half of the outputs) * second half``.

    Returns:
        ``[tokens, k, out]``, or ``[tokens, k, out / 2]`` when gated, of x's dtype: the activation
        of ``x @ weight[id].T + bias[id]``.

    Raises:
        RuntimeError: shapes or dtypes do not fit.
    """
    out = torch.ops.inplace.grouped_linear(
        x, expert_ids, weight, bias,
        scale=scale, transposed=transposed, activation=activation, gated=gated,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


define("weighted_sum", "(Tensor x, Tensor weights) -> Tensor")


def _empty_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Memory for the sum.

    Raises:
        RuntimeError: the arguments do not fit.
    """
    torch._check(
        x.dim() == 3 and weights.dim() == 2,
        lambda: (
            f"x must be [tokens, k, width] and weights [tokens, k], got {tuple(x.shape)} and "
            f"{tuple(weights.shape)}"
        ),
    )
    for axis in range(2):
        torch._check(
            x.shape[axis] == weights.shape[axis],
            lambda: f"x {tuple(x.shape)} and weights {tuple(weights.shape)} do not fit",
        )
    return x.new_empty(x.shape[0], x.shape[2])


@torch.library.impl(LIBRARY, "weighted_sum", "CompositeExplicitAutograd")
def _weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    _empty_sum(x, weights)
    return (x * weights.unsqueeze(-1)).sum(1).to(x.dtype)


@torch.library.impl(LIBRARY, "weighted_sum", "CUDA")
def _weighted_sum_on_gpu(x: Tensor, weights: Tensor) -> Tensor:
    """`weighted_sum` in one kernel."""
    from inplace.kernels import grouped_linear as kernels  # imports Triton

    out = _empty_sum(x, weights)
    if out.numel():
        kernels.weighted_sum(
            x=x.contiguous(),
            weights=weights.contiguous(),
            out=out,
            tokens=x.shape[0],
            per_token=x.shape[1],
            width=x.shape[2],
        )
    return out


torch.library.register_fake("inplace::weighted_sum", _empty_sum, lib=LIBRARY)


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over the experts of each token; on a GPU, in float32.

    Args:
        x: ``[tokens, k, width]``.
        weights: ``[tokens, k]``, of any floating-point dtype.

    Returns:
        ``[tokens, width]``, of x's dtype.

    Raises:
        RuntimeError: shapes do not fit.
    """
    out = torch.ops.inplace.weighted_sum(x, weights)
    assert isinstance(out, Tensor)
    return out
