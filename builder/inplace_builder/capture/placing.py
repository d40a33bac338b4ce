"""Where the original model runs while an engine is verified against it."""

import copy
from typing import TypeVar

import torch
from torch import nn

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
            tensor.data = tensor.data.float()  # transformers forbids `float()` where the weights were quantized in their file
    return copied


def _held(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _free(device: str) -> float:
    """Bytes; of a CPU nothing is known."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")
