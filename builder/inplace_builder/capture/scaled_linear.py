"""Linear layers of a captured model whose weights are 8-bit floats with scales.

Such a layer takes the place of an ``nn.Linear``. While the model is exported it is
``inplace::linear``; called otherwise it is the reference: PyTorch's product with the weights that
the 8-bit floats stand for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from inplace.operators import linear
from inplace.operators.float8 import FLOAT8, dequantize, power_of_two, quantize
from inplace.schema.specs import WORD
from torch import Tensor, nn
from transformers import PreTrainedModel

from inplace_builder.choices import WeightOptions
from inplace_builder.errors import BuildError

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""The weights of experts behind transformers' experts interface."""

MIN_GROUP = 32
"""Groups in which rows can be rounded are a multiple."""


@dataclass(frozen=True)
class ScaledWeight:
    """A weight of a checkpoint, as it is stored.

    Attributes:
        values: ``[out, in]`` float8_e4m3fn.
        scale: ``[out, groups]`` float32.
        group: inputs with one scale; 0 for all.
    """

    values: Tensor
    scale: Tensor
    group: int


class ScaledLinear(nn.Module):
    """A linear layer with 8-bit weights.

    Its weight and scale are buffers, so that they are not taken for the model's element type.

    Args:
        weight: its weight.
        bias: ``[out]``.
        activation_rows: as of `WeightOptions`.
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self, weight: ScaledWeight, bias: nn.Parameter | None, activation_rows: int = 0
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.group = weight.group
        self.activation_rows = 0 if weight.group % MIN_GROUP else activation_rows
        self.register_buffer("weight", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, of x's type.

        The reference rounds all rows where an engine would round those of long steps. A copy of the
        model in float32 rounds none.
        """
        if torch.compiler.is_exporting():
            return linear(
                x,
                self.weight,
                self.bias,
                scale=self.scale,
                scale_group=self.group,
                activation_rows=self.activation_rows,
            )
        whole = dequantize(self.weight, self.scale, self.group)
        rows = x.float()
        if self.activation_rows and self.weight.dtype == FLOAT8:
            rows = dequantize(*quantize(rows, self.group), self.group)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(rows, whole, bias).to(x.dtype)

    def extra_repr(self) -> str:
        """The extents, as `nn.Linear` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def use_stored(
    model: PreTrainedModel, stored: Mapping[str, ScaledWeight], options: WeightOptions
) -> str:
    """Give linear layers the 8-bit weights of their checkpoint.

    Args:
        model: with the dequantized weights.
        stored: the weights of the checkpoint by name.
        options: what to do.

    Returns:
        What was done, in words.
    """
    modules = dict(model.named_modules())
    kept = 0
    for name, weight in stored.items():
        path = name.removesuffix(".weight")
        if _takes(model, modules.get(path), weight.values.shape):
            _replace(model, path, weight, options)
            kept += 1
    return _note(model, "as they are stored", kept, options)


def round_all(model: PreTrainedModel, options: WeightOptions) -> str:
    """Round the weights of all linear layers but the head, with a scale for each output.

    Returns:
        What was done, in words.

    Raises:
        BuildError: there is none.
    """
    rounded = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and _takes(model, module, module.weight.shape):
            with torch.no_grad():
                weight = ScaledWeight(*quantize(module.weight), 0)
            _replace(model, path, weight, options)
            rounded += 1
    if not rounded:
        raise BuildError(
            f"weights is fp8, and {type(model).__name__} has no linear layer (nn.Linear) whose "
            f"inputs are a multiple of {WORD} beside its head: leave it out"
        )
    return _note(model, "rounded, with a scale for each output", rounded, options)


def round_experts(model: nn.Module, dtype: torch.dtype) -> str:
    """Round the weights of experts, with a scale for each output.

    Scales are powers of two, so that the model's own weights become what the 8-bit floats stand
    for, in its own type: its code, whatever it does with them, is the reference. The 8-bit floats
    and their scales are buffers beside them, which a captured graph takes in their place.

    Only experts behind transformers' experts interface, of which some projection fills words.

    Args:
        model: the model.
        dtype: its element type.

    Returns:
        What was done, in words; empty if there are no such experts.
    """
    layers = 0
    for module in list(model.modules()):
        parts = [name for name in EXPERT_WEIGHTS if _takes_experts(module, name)]
        for name in parts:
            parameter: Any = getattr(module, name)
            by_output = parameter.data.mT if module.is_transposed else parameter.data
            largest = by_output.float().abs().amax(-1)
            scale = power_of_two(largest)
            values = (by_output.float() / scale[..., None]).to(FLOAT8)
            by_output.copy_((values.float() * scale[..., None]).to(dtype))
            stored = values.mT.contiguous() if module.is_transposed else values
            module.register_buffer(f"{name}_float8", stored)
            module.register_buffer(f"{name}_scale", scale)
        layers += bool(parts)
    return (
        f"; experts of {layers} layers are fp8 too, rounded, with a power of two for each output"
        if layers
        else ""
    )


def is_rounded(module: nn.Module) -> bool:
    """Whether `round_experts` has rounded some weights of these experts."""
    return any(name.endswith("_float8") for name, _ in module.named_buffers(recurse=False))


def _takes_experts(module: Any, name: str) -> bool:
    """Whether a module has such weights of experts ``[experts, out, in]``, or transposed."""
    weight = getattr(module, name, None)
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 3
        and weight.shape[-1] % WORD == 0
    )


def has_scaled(model: nn.Module) -> bool:
    """Whether some weights are 8-bit floats."""
    return any(isinstance(module, ScaledLinear) for module in model.modules())


def _takes(model: PreTrainedModel, module: Any, shape: torch.Size) -> bool:
    """Whether a layer can have 8-bit weights of this shape."""
    return (
        type(module) is nn.Linear
        and module is not model.get_output_embeddings()
        and module.weight.shape == shape
        and shape[1] % WORD == 0
    )


def _replace(
    model: PreTrainedModel, path: str, weight: ScaledWeight, options: WeightOptions
) -> None:
    parent, _, name = path.rpartition(".")
    owner: Any = model.get_submodule(parent)
    layer = ScaledLinear(weight, getattr(owner, name).bias, options.activation_rows)
    setattr(owner, name, layer.train(owner.training))


def _note(model: PreTrainedModel, how: str, count: int, options: WeightOptions) -> str:
    others = str(model.dtype).removeprefix("torch.")
    rows = options.activation_rows
    activations = f"fp8 too in steps of {rows} tokens or more" if rows else others
    return (
        f"fp8 (e4m3) in {count} linear layers, {how}; the head and all others are {others}; "
        f"activations are {activations}"
    )
