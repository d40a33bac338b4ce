"""Compare an engine with the model that it was built from.

Both `inplace_builder.served.verify` and `inplace_builder.standalone.verify` are made of this.
"""

import copy
from typing import TypeVar

import torch
from inplace.schema.programs import CompiledProgram
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from inplace.schema.tensor_file import flat_bytes
from torch import Tensor, nn

TOLERANCE = {
    Dtype.FLOAT64: 1e-9,
    Dtype.COMPLEX128: 1e-9,
    Dtype.FLOAT32: 1e-4,
    Dtype.COMPLEX64: 1e-4,
    Dtype.FLOAT16: 1e-2,
    Dtype.BFLOAT16: 8e-2,
}
"""Largest `relative_error` that rounding explains, by element type; 0 for all other types."""


def tolerance(manifest: Manifest, program: CompiledProgram) -> float:
    """Largest `relative_error` of a program's outputs that rounding explains.

    A module rounds where its weights, its states or its outputs do.
    """
    states = [spec.dtype for spec in manifest.states]
    outputs = [spec.dtype for spec in program.outputs]
    return max(TOLERANCE.get(dtype, 0.0) for dtype in (program.engine.dtype, *states, *outputs))


def is_inexact(tensor: Tensor) -> bool:
    """Whether its elements are rounded: real or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def fill_with_sentinel(tensor: Tensor) -> None:
    """Fill with a value that must never reach a result: NaN, or the largest integer."""
    tensor.fill_(
        float("nan")
        if is_inexact(tensor)
        else tensor.dtype != torch.bool and torch.iinfo(tensor.dtype).max
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal bit for bit, NaN payloads included."""
    return torch.equal(flat_bytes(one), flat_bytes(other))


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``‖result − expected‖ / ‖expected‖`` of two tensors of one shape.

    Elements that are NaN in both, or the same infinity, count as equal. NaN if an element is NaN or
    infinite in one of them only.
    """
    same_dtype = result.dtype == expected.dtype
    if same_dtype and same_bits(result.reshape(-1), expected.reshape(-1)):
        return 0.0
    both_nan = (result != result) & (expected != expected)  # noqa: PLR0124  isnan knows fewer types
    equal = (result == expected) | both_nan
    if is_inexact(result):
        wide = torch.promote_types(torch.promote_types(result.dtype, expected.dtype), torch.float32)
    else:
        wide = torch.float64
    one, other = (
        tensor.masked_fill(equal & ~tensor.isfinite(), 0)
        for tensor in (result.to(wide), expected.to(wide))
    )
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


Model = TypeVar("Model", bound=nn.Module)


def move_to_engine_device(model: nn.Module, device: str) -> None:
    """Move the model to the engine's GPU, where it is many times faster.

    It stays where it is if the GPU would then have less memory left than twice its weights.
    """
    if device == "cuda" and _free_bytes("cuda") > 3 * _weight_bytes(model):
        model.to(device)


def float32_copy(model: Model) -> Model:
    """A copy that computes in float32.

    It is on the model's device if there is memory for four times its weights, else on the CPU.
    """
    device = next(model.parameters()).device
    fits = _free_bytes(device.type) > 4 * _weight_bytes(model)
    copied = copy.deepcopy(model).to(device if fits else "cpu")
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():
            # transformers forbids `model.float()` where a file has quantized weights
            tensor.data = tensor.data.float()
    return copied


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _free_bytes(device: str) -> float:
    """Free memory in bytes; infinite for a CPU, whose free memory is not known."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf")
