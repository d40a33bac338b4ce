"""Where the original model runs while an engine is verified against it."""

import copy
from typing import TypeVar

import torch
from inplace.schema.dtypes import Dtype
from torch import Tensor, nn

TOLERANCE = {Dtype.FLOAT64: 1e-9, Dtype.FLOAT32: 1e-4, Dtype.FLOAT16: 1e-2, Dtype.BFLOAT16: 8e-2}
"""Largest relative error ``‖out − ref‖ / ‖ref‖`` of an output that needs no further look, by the dtype of the weights."""


def is_inexact(tensor: Tensor) -> bool:
    """Whether its numbers are rounded: real or complex ones."""
    return tensor.is_floating_point() or tensor.is_complex()


def poison(tensor: Tensor) -> None:
    """Fill with what must never reach a result: NaN, or the largest value of an integer type."""
    tensor.fill_(
        float("nan")
        if is_inexact(tensor)
        else tensor.dtype != torch.bool and torch.iinfo(tensor.dtype).max
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN payloads included."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _relative(found: Tensor, wanted: Tensor) -> float:
    """``‖found − wanted‖ / ‖wanted‖``."""
    wanted = wanted.float()
    return float((found.float() - wanted).norm() / wanted.norm().clamp(min=1e-12))


Model = TypeVar("Model", bound=nn.Module)


def beside_engine(model: nn.Module, device: str) -> None:
    """Move the model to the engine's GPU, where it is many times faster, if that leaves the engine at least as much again."""
    if device == "cuda" and _free("cuda") > 3 * _held(model):
        model.to(device)


def in_float32(model: Model) -> Model:
    """A copy that computes in float32, where the model is if there is room for twice its size and as much again, else on the CPU."""
    device = next(model.parameters()).device
    copied = copy.deepcopy(model).to(device if _free(device.type) > 4 * _held(model) else "cpu")
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():
            tensor.data = (
                tensor.data.float()
            )  # transformers forbids `float()` where the weights were quantized in their file
    return copied


def _held(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _free(device: str) -> float:
    """Bytes; of a CPU nothing is known."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")
