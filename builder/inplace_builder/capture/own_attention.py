"""Decoders whose attention is code of their own: products and a softmax, or PyTorch's function.

GPT-J, CodeGen, GPT-Neo, XGLM and Falcon do not call transformers' attention interface. They still
hand keys and values to a cache, which returns `Tracked` tensors here. These compute what the model
computes on the tokens of the step alone, and note what becomes of them: keys times a query are
scores, their softmax are weights, and weights times values is where the result of
``inplace::attention`` takes the place of the model's own. So is PyTorch's fused attention.

The factor of the scores and what is added to them are noted too. A run on the values of one
sequence proves that attention with this factor and this mask gives what the model's own code gives.
Where that lets tokens see later ones, as transformers' code of some encoders does for a decoder
too, the operator does so as well (lookahead).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from inplace.operators import attention
from torch import Tensor

from inplace_builder.capture.masks import MaskOptions
from inplace_builder.errors import BuildError

Kind = Literal["keys", "values", "scores", "weights"]

VIEWS = frozenset(
    {"view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "flatten"}
)
CASTS = frozenset({"to", "float", "half", "bfloat16", "type", "type_as", "dropout", "clone"})
PRODUCTS = frozenset({"matmul", "bmm", "__matmul__", "__rmatmul__"})
FUSED = "scaled_dot_product_attention"
FACTORS = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "__imul__", "mul_"), 1),
    **dict.fromkeys(("div", "true_divide", "__truediv__", "__itruediv__", "div_"), -1),
}
SUMS = frozenset({"add", "__add__", "__radd__", "__iadd__", "add_"})
CLAMPS = frozenset({"max", "maximum", "clamp", "clamp_min"})
PROPERTIES = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad"})
QUESTIONS = frozenset({"size", "dim", "numel", "is_floating_point", "stride"})

LOWEST = -1e4
"""What is added to a score that is masked is below this in every type."""


@dataclass(frozen=True)
class Calculation:
    """How scores come about: ``scale * query @ keys + added``.

    Attributes:
        query: as the model multiplies it.
        scale: the factor.
        added: masks and biases, or None.
    """

    query: Tensor
    scale: float = 1.0
    added: Tensor | None = None


class Tracked:
    """A tensor that comes from cached keys or values.

    Args:
        tensor: its value for the tokens of the step alone.
        kind: what it is.
        layer: the layer that it belongs to.
        calculation: of scores and weights.
    """

    def __init__(
        self,
        tensor: Tensor,
        kind: Kind,
        layer: "OwnAttention",
        calculation: Calculation | None = None,
    ) -> None:
        self._tensor, self._kind, self._layer = tensor, kind, layer
        self._calculation = calculation

    def __getattr__(self, name: str) -> Any:
        if name in PROPERTIES:
            return getattr(self._tensor, name)
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        function = getattr(Tensor, name)
        return lambda *args, **kwargs: self.__torch_function__(function, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute, and note what the result is."""
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        inputs = [each for each in (*args, *kwargs.values()) if isinstance(each, Tracked)]
        plain = [_plain(each) for each in args]
        plain_kwargs = {key: _plain(value) for key, value in kwargs.items()}
        if name == FUSED:
            return _fused(*args, **kwargs)
        if inputs[0]._layer.traces and name in (*PRODUCTS, "baddbmm"):
            factors = [x for x in (*plain, *plain_kwargs.values()) if isinstance(x, Tensor)]
            result = _empty_product(*factors[-2:])
        elif name == "dropout":  # the model is in evaluation mode
            result = plain[0]
        else:
            result = function(*plain, **plain_kwargs)
        if name in QUESTIONS:
            return result
        return _noted(name, inputs, args, kwargs, result)


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name.replace("__i", "__") if name.startswith("__i") else name)

    def call(self: Tracked, *args: Any) -> Any:
        return Tracked.__torch_function__(function, (), (self, *args))

    return call


for _name in ("add", "radd", "iadd", "mul", "rmul", "imul", "truediv", "itruediv", "matmul"):
    setattr(Tracked, f"__{_name}__", _operator(f"__{_name}__"))


def _empty_product(a: Tensor, b: Tensor) -> Tensor:
    """A tensor of the shape of a product.

    While a graph is traced nothing uses the value, and a product would ask whether there is more
    than one token.
    """
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _fused(
    query: Tensor,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """``scaled_dot_product_attention`` with tracked keys and values; it takes its arguments.

    Raises:
        BuildError: what it gets are not the cached keys and values.
    """
    inputs = [each for each in (query, key, value) if isinstance(each, Tracked)]
    layer, kinds = inputs[0]._layer, [each._kind for each in inputs]
    if kinds != ["keys", "values"] or inputs != [key, value]:
        raise BuildError(
            f"attention of {layer.name} hands its {', '.join(kinds)} to {FUSED}; a query of the "
            f"step, cached keys and cached values are expected"
        )
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    if layer.traces:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        return layer.attend(Calculation(query, scale), result)
    if attn_mask is None and is_causal:
        attn_mask = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
    result = torch.nn.functional.scaled_dot_product_attention(
        query, _plain(key), _plain(value), attn_mask, **kwargs
    )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = layer.hidden(~attn_mask, float("-inf"))
    added = None if attn_mask is None else layer.keep(attn_mask)
    return layer.attend(Calculation(query, scale, added), result)


def _plain(value: Any) -> Any:
    return value._tensor if isinstance(value, Tracked) else value


def _noted(
    name: str, inputs: list[Tracked], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> Any:
    """The result of an operator on tracked tensors, as a tracked tensor.

    Raises:
        BuildError: attention has no such operator.
    """
    first = inputs[0]
    kinds = [each._kind for each in inputs]
    layer, calculation = first._layer, first._calculation
    others = [each for each in (*args, *kwargs.values()) if not isinstance(each, Tracked)]
    if len(inputs) == 1 and name in VIEWS | CASTS:
        if name in VIEWS and calculation is not None and calculation.added is not None:
            added = calculation.added.expand(first._tensor.shape)
            moved = getattr(added, name if name != "view" else "reshape")(*args[1:], **kwargs)
            calculation = replace(calculation, added=moved)
        return Tracked(result, first._kind, layer, calculation)
    if name in PRODUCTS and kinds == ["keys"]:
        query = next(each for each in others if isinstance(each, Tensor))
        return Tracked(result, "scores", layer, Calculation(query))
    if name == "baddbmm" and kinds == ["keys"]:
        added, query = (each for each in others if isinstance(each, Tensor))
        beta, alpha = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
        return Tracked(result, "scores", layer, Calculation(query, alpha, layer.keep(added, beta)))
    if name in PRODUCTS and kinds == ["weights", "values"]:
        assert calculation is not None
        return layer.attend(calculation, result)
    if kinds == ["scores"] and calculation is not None:
        if name == "softmax":
            return Tracked(result, "weights", layer, calculation)
        changed = _changed(name, calculation, args, others, layer)
        if changed is not None:
            return Tracked(result, "scores", layer, changed)
    raise BuildError(
        f"attention of {layer.name} computes {name} of its {', '.join(kinds)}, which "
        f"inplace::attention does not have; it has a product with a query, factors, a mask, a "
        f"softmax and a product with values"
    )


def _changed(
    name: str,
    calculation: Calculation,
    args: Sequence[Any],
    others: list[Any],
    layer: "OwnAttention",
) -> Calculation | None:
    """How scores come about after an elementwise operator; None if it is not part of attention."""
    if name in FACTORS and len(others) == 1 and _is_number(others[0]):
        factor = layer.number(others[0]) ** FACTORS[name]
        added = calculation.added
        return Calculation(
            calculation.query,
            calculation.scale * factor,
            None if added is None else added * factor,
        )
    if name in SUMS and len(others) == 1 and isinstance(others[0], Tensor):
        term, added = layer.keep(others[0]), calculation.added
        total = term if added is None or term is None else added + term
        return replace(calculation, added=total)
    if name in CLAMPS:
        return calculation
    if name in ("where", "masked_fill", "masked_fill_"):
        mask, low = (args[0], args[2]) if name == "where" else (args[1], args[2])
        hidden = layer.hidden(~mask if name == "where" else mask, low)
        added = calculation.added
        total = hidden if added is None or hidden is None else added + hidden
        return replace(calculation, added=total)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention on packed queries, keys and values ``[tokens, heads, dim]``."""


@dataclass(frozen=True)
class Scores:
    """How a layer computes scores from queries and keys.

    Attributes:
        scale: their factor.
        slopes: for each query head what is added for each position of the key (ALiBi,
            arXiv:2108.12409); None for nothing.
    """

    scale: float = 1.0
    slopes: tuple[float, ...] | None = None

    @property
    def key_components(self) -> int:
        """Components that a cached key has beside its own."""
        return 0 if self.slopes is None else 4

    def attended(
        self, query: Tensor, key: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Query, key and factor with which attention without slopes gives the same.

        ``slope * position`` is a product like any other. Slope and position are divided in two, so
        that bfloat16 holds the parts of a position below 32768 and 16 bits of a slope.

        Args:
            query, key: ``[tokens, heads, dim]``.
            positions: of the tokens, ``[tokens]``.
        """
        if self.slopes is None:
            return query, key, self.scale
        slopes = torch.tensor(self.slopes, dtype=torch.float32, device=query.device)
        high = slopes.to(query.dtype)
        low = (slopes - high.float()).to(query.dtype)
        parts = torch.stack([high, high, low, low], -1)
        rest = positions % 128
        place = torch.stack([positions - rest, rest] * 2, -1).to(key.dtype)
        tokens = query.shape[0]
        return (
            torch.cat([query * self.scale, parts[None].expand(tokens, -1, -1)], -1),
            torch.cat([key, place[:, None].expand(-1, key.shape[1], -1)], -1),
            1.0,
        )


Proved = Callable[[Scores, MaskOptions], None]
"""Called with how a layer computes scores, and what a token may see."""


class OwnAttention:
    """The attention of one layer.

    Args:
        name: of the model, for errors.
        key, value: ``[1, kv_heads, tokens, dim]``, what the layer hands to its cache.
        attend: attention on the layer's states; None for a run on values, which proves what the
            layer computes.
        proved: called with the result of that run.
    """

    def __init__(
        self, name: str, key: Tensor, value: Tensor, *, attend: Attend | None, proved: Proved
    ) -> None:
        self.name, self.key, self.value = name, key, value
        self._attend, self._proved = attend, proved

    @property
    def traces(self) -> bool:
        """Whether a graph is traced, in which only the result of attention matters."""
        return self._attend is not None

    def tracked(self) -> tuple[Any, Any]:
        """What the cache returns."""
        return Tracked(self.key, "keys", self), Tracked(self.value, "values", self)

    def keep(self, added: Tensor, factor: float = 1.0) -> Tensor | None:
        """A term of the scores, where it has a value."""
        return added.float() * factor if not self.traces else None

    def hidden(self, mask: Tensor, low: Any) -> Tensor | None:
        """A mask as a term of the scores, where it has a value."""
        if self.traces:
            return None
        if float(low) > LOWEST:
            raise BuildError(f"attention of {self.name} replaces scores by {float(low)}")
        return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))

    def number(self, value: Any) -> float:
        """The value of a factor, where it is needed."""
        return 1.0 if self.traces else float(value)

    def attend(self, calculation: Calculation, own: Tensor) -> Tensor:
        """The result of attention, in the form of the model's own result."""
        # no reshape: it would ask whether there is more than one token
        query = calculation.query[0] if calculation.query.dim() == 4 else calculation.query
        query = query.transpose(0, 1).to(self.key.dtype)
        key, value = self.key[0].transpose(0, 1), self.value[0].transpose(0, 1)
        if self._attend is not None:
            out = self._attend(query, key, value).transpose(0, 1).to(own.dtype)
            return out.unsqueeze(0) if own.dim() == 4 else out
        mask, slopes = _mask(calculation.added, len(query), self.name)
        scores = Scores(calculation.scale, slopes)
        _prove(self.name, query, key, value, scores, mask, own)
        self._proved(scores, mask)
        return own


def _rounding_of_scores(query: Tensor, key: Tensor, scale: float) -> float:
    """How far attention weights may be off, relatively, where scores are rounded to 16 bits.

    A weight is the exponential of a score over a sum of such: it changes by at most
    ``exp(2 r) - 1`` if no score changes by more than r.
    """
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1).float()
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * scale
    return math.expm1(2 * float(scores.abs().max()) * torch.finfo(query.dtype).eps / 2)


def _prove(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    mask: MaskOptions,
    own: Tensor,
) -> None:
    """Check that attention of one sequence gives the model's own result.

    Args:
        name: of the model.
        query, key, value: ``[tokens, heads, dim]``.
        scores, mask: of the layer.
        own: the model's result.

    Raises:
        BuildError: it differs.
    """
    tokens = len(query)
    positions = torch.arange(tokens, device=query.device)
    query, key, scale = scores.attended(query, key, positions)

    def state(x: Tensor) -> Tensor:
        return torch.zeros((1, x.shape[1], tokens, x.shape[2]), dtype=x.dtype, device=x.device)

    zero = torch.zeros(1, dtype=torch.int32, device=query.device)
    expected = attention(
        query,
        key,
        value,
        state(key),
        state(value),
        zero,
        torch.tensor([0, tokens], dtype=torch.int32, device=query.device),
        zero,
        scale=scale,
        causal=not mask.lookahead,
        window=mask.window,
    )
    actual = own.reshape(-1, tokens, own.shape[-1]).transpose(0, 1).to(expected.dtype)
    difference = (expected - actual).abs().max() / actual.abs().max().clamp_min(1e-6)
    allowed = 1e-3 if own.dtype == torch.float32 else 5e-2 + _rounding_of_scores(query, key, scale)
    if not difference < allowed:
        raise BuildError(
            f"attention of {name} gives another result than softmax attention with the factor "
            f"{scores.scale} where a token sees {mask}: they differ by "
            f"{float(difference):.1e}"
        )


def _mask(
    added: Tensor | None, tokens: int, name: str
) -> tuple[MaskOptions, tuple[float, ...] | None]:
    """What is added to scores: a mask, and slopes.

    Raises:
        BuildError: the operator does not have the mask, or it is another bias than slopes.
    """
    if added is None:
        return MaskOptions(lookahead=True), None
    added = added.expand((*added.shape[:-2], tokens, tokens)).cpu()
    added = added.reshape(-1, tokens, tokens)
    seen = added > LOWEST
    size = int(seen[0, -1].sum())
    if bool(seen.all()):
        mask = MaskOptions(lookahead=True)
    else:
        mask = MaskOptions(window=size if size < tokens else 0)
    positions = torch.arange(tokens)
    if not torch.equal(seen, mask.visible(positions, positions).expand_as(seen)):
        raise BuildError(
            f"attention of {name} has a mask that is neither causal nor a sliding window, and does "
            f"not let all tokens see each other either"
        )
    if not bool((added[seen] != 0).any()):
        return mask, None
    # a term that is the same for all keys changes no weight
    bias = added.double() - added[:, :, :1].double()
    slopes = bias[:, -1, -1] / max(tokens - 1, 1)
    linear = slopes[:, None, None] * torch.arange(tokens)
    wrong = (bias - linear).abs() > 1e-5 * linear.abs().clamp_min(1.0)
    if mask.window or bool((wrong & seen).any()):
        raise BuildError(
            f"attention of {name} adds a bias to its scores that is not a multiple of the key's "
            f"position; of biases inplace::attention has slopes only (ALiBi), without a window"
        )
    return mask, tuple(slopes.tolist())
