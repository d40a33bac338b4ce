"""Quantized checkpoints: fp8, GPTQ, AWQ and mxfp4 are read, other ones are refused."""

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from inplace_builder.capture.integer_weights import (
    PARTS,
    IntegerFormat,
    integer_format,
    quantized_layers,
    read_layer,
)
from inplace_builder.capture.scaled_linear import ScaledWeight
from inplace_builder.errors import BuildError, brief

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CACHE_SCALES = (
    *(f".{name}_scale" for name in ("q", "k", "v", "kv", "prob")),
    *(f".{name}_proj.output_scale" for name in ("q", "k", "v")),
)
"""Ends of the names of scales with which vLLM and others quantize keys and values to 8 bits."""


_ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".input_scale_ub")


@dataclass(frozen=True)
class DequantizedWeights:
    """What a quantized checkpoint stands for.

    Attributes:
        tensors: all tensors of the model, by their names.
        note: what was done, in words.
        zero_biases: names of biases that are zero, which AutoGPTQ wrote for layers without one.
        scaled: matrices of 8-bit floats as they are stored, by their names.
    """

    tensors: dict[str, Tensor]
    note: str
    zero_biases: frozenset[str] = frozenset()
    scaled: Mapping[str, ScaledWeight] = field(default_factory=dict)


def quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a configuration says of the quantization of its weights; None if it says nothing."""
    for part in (config, config.get_text_config(decoder=True)):
        fields = getattr(part, "quantization_config", None)
        if fields is not None:
            return dict(fields) if isinstance(fields, dict) else fields.to_dict()
    return None


def with_own_file(config: PretrainedConfig, folder: Path) -> PretrainedConfig:
    """The configuration with what older packages wrote into a file beside it.

    Args:
        config: of the model; changed in place where it says nothing of its quantization.
        folder: AutoGPTQ left ``quantize_config.json`` there, AutoAWQ ``quant_config.json``.

    Raises:
        BuildError: there is such a file and it cannot be read.
    """
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        path = folder / name
        if quantization(config) is None and path.is_file():
            try:
                fields = json.loads(path.read_text())
                config.quantization_config = {"quant_method": method, **fields}
            except (OSError, ValueError, TypeError) as error:
                raise BuildError(f"{path} cannot be read: {brief(error)}") from error
    return config


def _method(fields: Mapping[str, Any]) -> str:
    method = fields.get("quant_method")
    method = getattr(method, "value", method)
    if method is None and (fields.get("load_in_8bit") or fields.get("load_in_4bit")):
        return "bitsandbytes"
    return str(method)


def is_fp8(fields: Mapping[str, Any]) -> bool:
    """Whether the weights are 8-bit floats with scales."""
    if _method(fields) == "compressed-tensors":
        return fields.get("format") == "float-quantized"
    return _method(fields) in ("fp8", "fbgemm_fp8")


def is_cache_only(fields: Mapping[str, Any]) -> bool:
    """Whether only keys and values are meant to be quantized, when they are cached."""
    stated = fields.get("kv_cache_scheme") is not None and not fields.get("config_groups")
    return stated and _method(fields) == "compressed-tensors"


def check_quantization(config: PretrainedConfig, source: Path) -> None:
    """BuildError if the weights can be neither dequantized nor computed with."""
    fields = quantization(config)
    if fields is None or is_fp8(fields) or is_cache_only(fields) or _method(fields) == "mxfp4":
        return
    method = _method(fields)
    if method in ("gptq", "awq"):
        if isinstance(reason := integer_format(method, fields), str):
            raise BuildError(
                f"{source} is quantized with {method!r} and cannot be read: {reason}; give the "
                f"checkpoint before its quantization, or another quantization of it"
            )
        return
    details = [f"{key} {fields[key]}" for key in ("format", "bits") if fields.get(key)]
    details += [f"{bits} bits" for bits in (8, 4) if fields.get(f"load_in_{bits}bit")]
    raise BuildError(
        f"{source} is quantized with {method!r}"
        f"{' (' + ', '.join(details) + ')' if details else ''}, which is not read here: only fp8 "
        f"(fp8, fbgemm_fp8, compressed-tensors float-quantized), gptq, awq and mxfp4 are; give the "
        f"checkpoint before its quantization"
    )


def read_quantized(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, *, keep: bool = False
) -> DequantizedWeights | None:
    """Read a checkpoint with 8-bit floats or packed integers; None if transformers reads it.

    Args:
        folder: with one or several safetensors or ``.bin`` files.
        config: the model's, with its quantization; `check_quantization` has accepted it.
        dtype: the type to round to. Other tensors keep their own.
        keep: return matrices of 8-bit floats as they are stored too.

    Raises:
        BuildError: a part of a weight is missing, or does not fit it.
    """
    fields = quantization(config) or {}
    if is_fp8(fields):
        tensors, scaled = read_fp8(folder, config, dtype)
        note = f"fp8 weights, dequantized to {_name(dtype)}"
        return DequantizedWeights(tensors, note, scaled=scaled if keep else {})
    method = _method(fields)
    if method not in ("gptq", "awq"):
        return None
    form = integer_format(method, fields)
    assert isinstance(form, IntegerFormat), "it was checked"
    return _read_integers(folder, form, dtype)


def _read_integers(folder: Path, form: IntegerFormat, dtype: torch.dtype) -> DequantizedWeights:
    """Read a checkpoint of GPTQ or AWQ; layers that it left as they are keep their weights."""
    stored = dict(read_weights(folder))
    layers = quantized_layers(stored)
    if not layers:
        raise BuildError(
            f"{folder} is quantized with {form.method!r} by its config.json, but no tensor there "
            f"ends with .qweight; remove quantization_config"
        )
    tensors: dict[str, Tensor] = {}
    parts: set[str] = set()
    for layer in layers:
        try:
            tensors[f"{layer}.weight"] = read_layer(layer, stored, form).to(dtype)
        except ValueError as error:
            raise BuildError(f"{layer} in {folder} cannot be dequantized: {error}") from None
        parts.update(f"{layer}.{part}" for part in PARTS)
    biases = {f"{layer}.bias" for layer in layers} & stored.keys()
    return DequantizedWeights(
        tensors | {name: tensor for name, tensor in stored.items() if name not in parts},
        f"{form}, dequantized to {_name(dtype)}: {len(layers)} layers",
        frozenset(name for name in biases if not stored[name].any()),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dequantizing_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration with which transformers dequantizes mxfp4 on every machine."""
    changed = copy.deepcopy(config)
    fields = quantization(config) or {}
    changed.quantization_config = fields | {"dequantize": True}
    return changed


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration for weights that are quantized no more."""
    changed = copy.deepcopy(config)
    for part in (changed, changed.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            delattr(part, "quantization_config")
    return changed


def read_fp8(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, ScaledWeight]]:
    """Read a checkpoint whose weights are 8-bit floats, each multiplied by its scales in float32.

    Args:
        folder: with one or several safetensors or ``.bin`` files.
        config: the model's, with its quantization.
        dtype: the type to round the products to. Other tensors keep their own.

    Returns:
        All tensors of the model, and the matrices of e4m3 as they are stored.

    Raises:
        BuildError: a weight has no scales, or scales that do not fit it.
    """
    stored = dict(read_weights(folder))
    block = _block_size(quantization(config) or {})
    result: dict[str, Tensor] = {}
    scaled: dict[str, ScaledWeight] = {}
    scales: set[str] = set()
    for name, tensor in stored.items():
        if tensor.dtype not in FLOAT8:
            continue
        scale = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in stored), None)
        if scale is None:
            raise BuildError(
                f"{folder} holds {name} as {tensor.dtype} without {name}_scale_inv or {name}_scale"
            )
        scales.add(scale)
        try:
            result[name] = dequantize(tensor, stored[scale], block).to(dtype)
        except ValueError as error:
            raise BuildError(f"{name} in {folder} cannot be dequantized: {error}") from None
        if tensor.dtype == torch.float8_e4m3fn and tensor.ndim == 2:
            scaled[name] = scale_each_output(tensor, stored[scale], block)
    if not result:
        raise BuildError(
            f"{folder} is quantized to fp8 by its config.json, but no weight there is an 8-bit "
            f"float; remove quantization_config"
        )
    unchanged = {
        name: tensor
        for name, tensor in stored.items()
        if name not in result and name not in scales and not name.endswith(_ACTIVATION_SCALES)
    }
    return result | unchanged, scaled


def scale_each_output(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> ScaledWeight:
    """A matrix with scales of its outputs alone: rows of a block have the same.

    Args:
        weight: ``[out, in]`` float8_e4m3fn.
        scale, block: as of `dequantize`.

    Raises:
        ValueError: the scales do not fit.
    """
    factors = _factors(weight, scale)
    rows, columns = (_extent_of_block(weight, factors, block, axis) for axis in (-2, -1))
    factors = factors.repeat_interleave(rows, -2)[: weight.shape[0]].contiguous()
    return ScaledWeight(weight, factors, columns if factors.shape[1] > 1 else 0)


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Multiply a weight by its scales.

    Args:
        weight: ``[…, rows, columns]`` 8-bit floats.
        scale: one number, one of each row, or a grid with one number of each block. As bytes:
            exponents of 2 with a bias of 127.
        block: rows and columns of a block; None if the grid divides the weight. The last block of
            an axis may be smaller.

    Returns:
        ``[…, rows, columns]`` float32.

    Raises:
        ValueError: the scales do not fit.
    """
    factors = _factors(weight, scale)
    for axis in (-2, -1):
        size = _extent_of_block(weight, factors, block, axis)
        factors = factors.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return weight.float() * factors


def _factors(weight: Tensor, scale: Tensor) -> Tensor:
    """Scales as numbers, with the axes of the weight.

    Raises:
        ValueError: they have other axes.
    """
    factors = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    if factors.numel() == 1:
        return factors.reshape((1,) * weight.ndim)
    if factors.ndim == weight.ndim - 1:
        factors = factors.unsqueeze(-1)
    leading = weight.shape[:-2]
    if factors.ndim != weight.ndim or (factors.shape[:-2] != leading):
        raise ValueError(f"scales {tuple(scale.shape)} for a weight {tuple(weight.shape)}")
    return factors


def _extent_of_block(
    weight: Tensor, factors: Tensor, block: tuple[int, int] | None, axis: int
) -> int:
    """How many elements along an axis have one scale; the last block may have fewer.

    Raises:
        ValueError: the scales do not fit.
    """
    extent, count = weight.shape[axis], factors.shape[axis]
    if block is not None and math.ceil(extent / block[axis]) == count:
        return block[axis]
    if extent % count:
        raise ValueError(f"scales {tuple(factors.shape)} for a weight {tuple(weight.shape)}")
    return extent // count


def _block_size(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block with one scale."""
    groups = (fields.get("config_groups") or {}).values()
    stated = [(group.get("weights") or {}).get("block_structure") for group in groups]
    for size in (fields.get("weight_block_size"), *stated):
        if size:
            return int(size[0]), int(size[1])
    return None


def _all_names(_: str) -> bool:
    return True


def read_weights(
    folder: Path, wanted: Callable[[str], bool] = _all_names
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint: of the files that its index names, or of its one file.

    AutoGPTQ named the file after the quantization: ``gptq_model-4bit-128g.safetensors``.

    Args:
        folder: with the files.
        wanted: whether a tensor of this name is to be read.

    Raises:
        BuildError: there are no such files.
    """
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    own = others if len(others) == 1 else []
    for name in dict.fromkeys(("model.safetensors", "pytorch_model.bin", *own)):
        index = folder / f"{name}.index.json"
        files = [folder / name]
        if index.is_file():
            files = [
                folder / n
                for n in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
        elif not files[0].is_file():
            continue
        for path in files:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as opened:
                    for key in filter(wanted, opened.keys()):
                        yield key, opened.get_tensor(key)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
                yield from (each for each in tensors.items() if wanted(each[0]))
        return
    raise BuildError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor an index"
    )
