"""Checkpoints with weights in fp8, quantized here; the models get what they stand for."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from support.models import change_config

COMPRESSED: dict[str, object] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
WHOLE = 1 << 20


def fp8_format(name: str, block: tuple[int, int]) -> tuple[dict[str, object], tuple[int, int], str]:
    """``quantization_config``, the extents with one scale, and how scales are called."""
    formats: dict[str, tuple[dict[str, object], tuple[int, int], str]] = {
        "blocks": (
            {"quant_method": "fp8", "weight_block_size": [*block], "activation_scheme": "dynamic"},
            block,
            "_scale_inv",
        ),
        "rows": ({"quant_method": "fbgemm_fp8"}, (1, WHOLE), "_scale"),
        "compressed rows": (COMPRESSED, (1, WHOLE), "_scale"),
        "compressed tensor": (COMPRESSED, (WHOLE, WHOLE), "_scale"),
    }
    return formats[name]


def quantize(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """In fp8: the weight, one scale of each block, and what the two stand for."""
    whole = torch.zeros_like(weight)
    grid: list[list[Tensor]] = []
    quantized = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for top in range(0, weight.shape[0], rows):
        grid.append([])
        for left in range(0, weight.shape[1], columns):
            block = (slice(top, top + rows), slice(left, left + columns))
            scale = weight[block].abs().max() / 448
            quantized[block] = (weight[block] / scale).to(torch.float8_e4m3fn)
            whole[block] = quantized[block].float() * scale
            grid[-1].append(scale)
    return quantized, torch.tensor(grid), whole


def save_fp8(
    model: PreTrainedModel, folder: Path, name: str, block: tuple[int, int]
) -> dict[str, Tensor]:
    """Write a model as a checkpoint in fp8, and give it the weights that this stands for.

    Returns:
        The tensors of the checkpoint.
    """
    fields, extents, suffix = fp8_format(name, block)
    stored = {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            stored[key] = parameter.clone()
            if key.endswith("_proj.weight"):
                stored[key], scale, whole = quantize(parameter, *extents)
                stored[key + suffix] = scale[0, 0] if scale.numel() == 1 else scale
                stored[key.replace("weight", "input_scale")] = torch.ones(1)
                parameter.copy_(whole)
    model.save_pretrained(folder)
    change_config(folder, quantization_config=fields)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return stored
