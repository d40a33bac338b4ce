"""Merge a LoRA adapter, as peft saves it, into the weights of a decoder.

A layer's weight becomes ``W + s B A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank
stabilised LoRA (arXiv:2106.09685, 2312.03732). With DoRA (arXiv:2402.09353) each row of the sum is
then scaled to the length that the adapter holds for it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inplace_builder.errors import BuildError, brief

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_FILES = (ADAPTER_CONFIG, *_WEIGHTS)
"""The files of a LoRA or another adapter, as peft writes them."""


_SUPPORTED_FIELDS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
"""Fields of `ADAPTER_CONFIG` that are followed, or that change nothing at inference."""


_PRESERVING_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model's weights as they are."""


_LAYERS = (nn.Linear, nn.Embedding, Conv1D)


_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.weight|(?P<bias>\.bias))?"
)


@dataclass(frozen=True)
class LoraConfig:
    """What `ADAPTER_CONFIG` says of the merge.

    Attributes:
        rank, alpha: of layers that no pattern names.
        rank_pattern, alpha_pattern: those of layers, by an expression for the end of their names.
        stabilized: whether the scale has the rank's square root.
        saved_modules: ends of the names of modules that the adapter holds whole.
        parameters: ends of the names of parameters that are changed in modules which are not linear
            layers: routers, and tensors with the weights of all experts.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    stabilized: bool
    saved_modules: tuple[str, ...]
    parameters: tuple[str, ...]

    def layer(self, module: str) -> tuple[int, float]:
        """The rank of a layer, and the scale of its product."""
        rank = _by_pattern(self.rank_pattern, module, self.rank)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.stabilized else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first pattern's value that the end of a module's name matches, as peft looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_fields(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BuildError(f"{path} cannot be read: {brief(error)}") from error
    if not isinstance(fields, dict):
        raise BuildError(f"{path} holds no JSON object")
    return fields


def base_model(folder: Path) -> str:
    """The path or id of the model that an adapter was trained on.

    Raises:
        BuildError: the adapter does not name it.
    """
    base = _read_fields(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise BuildError(
            f"{folder} holds an adapter without the model it was trained on, and {ADAPTER_CONFIG} "
            f"has no base_model_name_or_path; name the model's folder there"
        )
    return base


def read_lora_config(folder: Path) -> LoraConfig:
    """Read how an adapter is merged.

    Raises:
        BuildError: it is not a LoRA, or has something that cannot be merged here.
    """
    fields = _read_fields(folder)
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise BuildError(
            f"the adapter in {folder} is of type {kind!r}; only LORA is merged. Merge it yourself "
            f"(peft: merge_and_unload, then save_pretrained), or remove {', '.join(ADAPTER_FILES)}"
        )
    unknown = sorted(key for key in fields if fields[key] and key not in _SUPPORTED_FIELDS)
    initial = fields.get("init_lora_weights", True)
    if initial not in _PRESERVING_INITIALIZATIONS:
        unknown.append(f"init_lora_weights={initial} (it changes the base model's weights)")
    if unknown:
        raise BuildError(
            f"the LoRA adapter in {folder} uses {', '.join(unknown)}, which the build does not "
            f"merge; merge it with peft (merge_and_unload, then save_pretrained)"
        )
    try:
        return LoraConfig(
            int(fields["r"]),
            float(fields["lora_alpha"]),
            fields.get("rank_pattern") or {},
            fields.get("alpha_pattern") or {},
            bool(fields.get("use_rslora")),
            tuple(fields.get("modules_to_save") or ()),
            tuple(fields.get("target_parameters") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BuildError(
            f"{folder / ADAPTER_CONFIG} has no usable r and lora_alpha: {error!r}"
        ) from error


def merge_lora(model: PreTrainedModel, folder: Path) -> str:
    """Merge an adapter into a model's weights, each sum computed in float32.

    Embeddings and output layer no longer share a weight if the adapter changes one of them.

    Returns:
        What was merged, for people.

    Raises:
        BuildError: the adapter does not fit the model.
    """
    config = read_lora_config(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(folder).items():
        name = key.removeprefix("base_model.model.")
        if match := _LORA_KEY.fullmatch(name):
            part = match["part"].replace("lora_embedding", "lora") + (match["bias"] or "")
            layers.setdefault(match["module"], {})[part] = tensor
        else:
            whole[name] = tensor
    if not layers and not whole:
        raise BuildError(f"the adapter in {folder} holds no tensors")
    for name, tensor in whole.items():  # first: a layer's product is added to a replaced weight
        _replace(model, name, tensor, config, folder)
    for key, parts in layers.items():
        name = key.removesuffix(".base_layer")  # of a module with two changed parameters
        module = _module(model, name, folder)
        merge = _merge_layer if isinstance(module, _LAYERS) else _merge_parameter
        merge(module, name, parts, config, folder)
    _untie(model)
    ranks = sorted({config.rank, *config.rank_pattern.values()})
    return (
        f"LoRA of rank {', '.join(map(str, ranks))}, alpha {config.alpha:g}"
        f"{' (rank stabilised)' if config.stabilized else ''}, merged layers: {len(layers)}"
        + (f", replaced tensors: {len(whole)}" if whole else "")
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise BuildError(f"{folder} holds {ADAPTER_CONFIG}, but neither of {', '.join(_WEIGHTS)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise BuildError(f"{path} cannot be read: {brief(error)}") from error


def _module(model: PreTrainedModel, name: str, folder: Path) -> nn.Module:
    try:
        module: nn.Module = model.get_submodule(name)
    except AttributeError:
        raise BuildError(
            f"the adapter in {folder} changes {name}, which {type(model).__name__} does not have "
            f"(transformers may keep several layers in one tensor); merge it with the versions of "
            f"peft and transformers that it was trained with"
        ) from None
    return module


def _replace(
    model: PreTrainedModel, name: str, tensor: Tensor, config: LoraConfig, folder: Path
) -> None:
    """Replace a tensor by the adapter's: of a module that it holds whole, or a bias."""
    module_name, _, parameter = name.replace(".base_layer.", ".").rpartition(".")
    module = _module(model, module_name, folder)
    old = getattr(module, parameter, None)
    if not isinstance(old, Tensor) or old.shape != tensor.shape:
        shape = tuple(old.shape) if isinstance(old, Tensor) else "no such tensor"
        raise BuildError(
            f"the adapter in {folder} has {name} {tuple(tensor.shape)}; the model has {shape} "
            f"there: its base is another model, or one with a resized vocabulary"
        )
    saved = any(
        module_name == end or f".{end}." in f".{module_name}." for end in config.saved_modules
    )
    if saved and isinstance(old, nn.Parameter):
        _set(module, parameter, tensor.to(old.dtype))
    else:
        old.data.copy_(tensor)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module a parameter of its own, so that another one that shared it keeps the old."""
    setattr(module, name, nn.Parameter(tensor.contiguous(), requires_grad=False))


def _merge_layer(
    module: nn.Module, name: str, parts: dict[str, Tensor], config: LoraConfig, folder: Path
) -> None:
    where = f"the adapter in {folder} for {name}"
    rank, scale = config.layer(name)
    try:
        a, b = parts.pop("lora_A").float(), parts.pop("lora_B").float()
    except KeyError as error:
        raise BuildError(f"{where} has no {error.args[0]}") from None
    bias, magnitude = parts.pop("lora_B.bias", None), parts.pop("lora_magnitude_vector", None)
    if parts or (magnitude is not None and isinstance(module, nn.Embedding)):
        raise BuildError(f"{where} has {sorted(parts) or 'DoRA of an embedding'}, not merged here")
    transposed = isinstance(module, nn.Embedding | Conv1D)  # [in, out]
    stored = module.get_parameter("weight")
    weight = stored.detach().float()
    weight = weight.T if transposed else weight
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise BuildError(
            f"{where} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; {ADAPTER_CONFIG} "
            f"says rank {rank}"
        )
    if (b.shape[0], a.shape[1]) != weight.shape:
        raise BuildError(
            f"{where} is for a weight {(b.shape[0], a.shape[1])}; the model's is "
            f"{tuple(weight.shape)}: its base is another model"
        )
    merged = weight + scale * (b @ a)
    if magnitude is not None:
        merged *= (magnitude.float().flatten() / merged.norm(dim=1))[:, None]
    _set(module, "weight", (merged.T if transposed else merged).to(stored.dtype))
    if bias is not None:
        if not isinstance(module.bias, Tensor):
            raise BuildError(f"{where} has a bias, and the model's layer has none")
        _set(module, "bias", (module.bias + scale * bias.float()).to(module.bias.dtype))


def _merge_parameter(
    module: nn.Module, name: str, parts: dict[str, Tensor], config: LoraConfig, folder: Path
) -> None:
    """Merge the change of a matrix, or of a tensor with a matrix of each expert."""
    where = f"the adapter in {folder} for {name}"
    if parts.keys() != {"lora_A", "lora_B"} or any(part.ndim != 2 for part in parts.values()):
        raise BuildError(
            f"{where}, a {type(module).__name__}, has {sorted(parts)}, not merged here"
        )
    a, b = parts["lora_A"].float(), parts["lora_B"].float()
    named = (target.rpartition(".") for target in config.parameters)
    targets = {leaf for parent, _, leaf in named if f".{name}".endswith(f".{parent}")}
    fitting = []
    for target in sorted(targets):
        parameter = getattr(module, target, None)
        rank, scale = config.layer(f"{name}.{target}")
        if isinstance(parameter, nn.Parameter) and parameter.ndim in (2, 3):
            change = _parameter_change(
                parameter, a, b, rank, getattr(module, "is_transposed", False)
            )
            fitting += [] if change is None else [(target, parameter, scale * change)]
    if len(fitting) != 1:
        raise BuildError(
            f"{where}, a {type(module).__name__}, has lora_A {tuple(a.shape)} and lora_B "
            f"{tuple(b.shape)}, which fit {len(fitting)} of the parameters {sorted(targets)} that "
            f"{ADAPTER_CONFIG} names"
        )
    [(target, parameter, change)] = fitting
    _set(module, target, (parameter.detach().float() + change).to(parameter.dtype))


def _parameter_change(
    parameter: Tensor, a: Tensor, b: Tensor, rank: int, transposed: bool
) -> Tensor | None:
    """The product ``B A`` in the shape of a parameter; None if it does not fit.

    Args:
        parameter: ``[out, in]``; or of experts ``[experts, out, in]``, if ``transposed``
            ``[experts, in, out]``.
        a, b: ``[rank, in]`` and ``[out, rank]``, of experts ``[experts * rank, in]`` and ``[out,
            rank * experts]``, as peft orders them.
        rank: of one matrix.
        transposed: how the experts' matrices lie.
    """
    if parameter.ndim == 2:
        fits = (a.shape[0], b.shape[1]) == (rank, rank)
        return b @ a if fits and (b.shape[0], a.shape[1]) == parameter.shape else None
    experts, *matrix = parameter.shape
    expected = [a.shape[1], b.shape[0]] if transposed else [b.shape[0], a.shape[1]]
    # earlier versions of peft took every tensor for a transposed one
    ambiguous = not transposed and matrix[0] == matrix[1]
    if ambiguous or matrix != expected or {a.shape[0], b.shape[1]} != {experts * rank}:
        return None
    order = "ore,eri->eio" if transposed else "ore,eri->eoi"
    return torch.einsum(
        order, b.reshape(len(b), rank, experts), a.reshape(experts, rank, a.shape[1])
    )


def _untie(model: PreTrainedModel) -> None:
    """Record that embeddings and output layer differ, if they do now."""
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
