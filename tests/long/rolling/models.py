"""Models with every kind of state, tiny and random, whose servers share a store."""

import secrets
import shutil
from pathlib import Path

import torch
from inplace_builder import BuildOptions, build_model, capture_decoder, write_engine
from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.capture.nemotron_asr_streaming import capture_nemotron_asr_streaming
from support.decoding import SHAPE
from support.nemotron import tiny_nemotron
from support.pool import reconfigure
from support.recurrent_models import recurrent_model
from support.whisper import save_whisper
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from tritonclient.grpc import model_config_pb2 as pb

CAPACITY, CHUNK, ROWS = 256, 16, 8
LOOKAHEAD = 1
DECODERS = ("kv", "ring", "ssm")
"""Keys and values that append; in a ring; a convolution and a state space."""
EVERY = {"kv": 8, "ring": 8, "ssm": 8, "whisper": 2, "rnnt": 2}
"""Positions after which a sequence is stored again: tokens, or requests with audio."""


INSTANCES = {"kv": 2}
"""Processes that serve a model, with slots of their own; one where it is not named."""


def decoder(kind: str) -> PreTrainedModel:
    """A random decoder whose states are of a kind."""
    torch.manual_seed(0)
    if kind == "kv":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if kind == "ring":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)).eval()
    return recurrent_model("mamba2")


def build(folder: Path, slots: int) -> Path:
    """The model repository.

    Args:
        folder: an empty one; the store is made in it too.
        slots: of each model.
    """
    repository = folder / "repository"
    options = BuildOptions(slots=slots, max_rows=ROWS, chunk=CHUNK, serve="stream")
    with quiet():
        for kind in DECODERS:
            captured = capture_decoder(decoder(kind), DecoderOptions(CAPACITY, ROWS, CHUNK))
            write_engine(captured, repository / kind, options)
        save_whisper(folder / "whisper-source")
        speech = BuildOptions(slots=slots, max_rows=ROWS, serve="stream")
        build_model(folder / "whisper-source", repository / "whisper", speech)
        transducer = capture_nemotron_asr_streaming(tiny_nemotron(), LOOKAHEAD, ROWS)
        write_engine(transducer, repository / "rnnt", BuildOptions(slots=slots, max_rows=ROWS))
    for proxy in repository.glob("*_generate"):  # nobody asks over HTTP
        shutil.rmtree(proxy)
    secret = folder / "secret"
    secret.write_bytes(secrets.token_bytes(64))
    for kind, every in EVERY.items():
        values = {
            "snapshot_store": (folder / "store").as_uri(),
            "snapshot_secret_file": str(secret),
            "snapshot_every": str(every),
        }

        def stored(config: pb.ModelConfig, values: dict[str, str] = values) -> None:
            for name, value in values.items():
                config.parameters[name].string_value = value
            if config.name in INSTANCES:
                config.instance_group[0].count = INSTANCES[config.name]

        reconfigure(repository / kind, stored)
    return repository
