"""Small real models the tests build and serve."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from inplace.operators import read, update
from inplace.runtime.instance import ModelInstance
from inplace.schema.artifacts import EngineFile
from inplace.schema.files import FileRecord
from inplace.schema.programs import CompiledProgram, Program
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype, Role, StateSpec, TensorSpec, Update
from inplace_builder import BuildOptions, Capture, capture_module
from inplace_builder.capture.capture import control_input
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
CAPACITY, CHUNK, SLOTS = 64, 8, 8
"""Of the model ``llama``."""
BRIEF_SLOTS, BRIEF_IDLE = 2, 2.0
"""Of the model ``brief``: its slots, and the seconds after which an idle sequence loses one."""
STEP_MODELS = {
    "llama": BuildOptions(
        slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=CHUNK, queue_delay_microseconds=20_000
    ),
    "brief": BuildOptions(
        slots=BRIEF_SLOTS,
        max_rows=BRIEF_SLOTS,
        capacity=1024,
        chunk=CHUNK,
        idle_timeout=BRIEF_IDLE,
    ),
}
"""The tiny Llamas of a `Repository`."""


RECTANGULAR = Program(
    name="step",
    row_layout="rectangular",
    inputs=(TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(4,)),),
    outputs=(),
    aliases=(),
    max_rows=4,
    chunk=1,
)
"""The description of a program that takes four numbers and returns nothing."""


LOADABLE = Manifest(
    name="model",
    slots=8,
    states=(),
    programs=(
        CompiledProgram.of(
            RECTANGULAR,
            EngineFile(kind="torch", file="engine.safetensors", device="cpu", dtype=Dtype.FLOAT32),
            lowering=(),
            states=[],
        ),
    ),
    files=(FileRecord(name="engine.safetensors", bytes=0, sha256="0" * 64),),
    verified="executed",
    built_with={},
)
"""The manifest of an engine of that program."""


@dataclass(frozen=True)
class Repository:
    """Built models for steps: ``llama``, ``brief`` and ``accumulator``.

    Attributes:
        path: a model repository.
        llama: the model that ``llama`` and ``brief`` were built from.
        llama_folder: where that model is saved.
    """

    path: Path
    llama: LlamaForCausalLM
    llama_folder: Path


def tiny_llama(folder: Path, **changes: object) -> LlamaForCausalLM:
    """A random Llama of two layers with grouped heads, saved; its greedy tokens vary."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | changes))).eval()
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **fields: object) -> None:
    """Set fields of a saved model's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def late_token(generated: list[int]) -> int:
    """A token that a generation has first after some others: as an end token it ends there."""
    return next(
        token
        for place, token in enumerate(generated)
        if place >= 4 and token not in generated[:place]
    )


def greedy(model: torch.nn.Module, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own greedy continuation with a static cache; it never stops early."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation="static",
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=True,
    )
    result: list[int] = out[0, len(prompt) :].tolist()
    return result


class Accumulator(torch.nn.Module):
    """Not a language model: a sum that lives in a ``replace`` state, and a count beside it."""

    def forward(
        self, value: Tensor, slots: Tensor, total: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the new sums ``[rows, 4]`` and how many values they hold ``[rows, 1]``."""
        sums = read(total, slots) + value
        counts = read(count, slots) + 1
        update(total, slots, sums)
        update(count, slots, counts)
        return sums * 1.0, counts * 1


def accumulator(max_rows: int = 4) -> Capture:
    """The captured `Accumulator`."""
    return capture_module(
        Accumulator(),
        inputs=[
            TensorSpec(name="value", role=Role.ROW, dtype=Dtype.FLOAT32, shape=(4,)),
            control_input("slots", Role.SLOTS),
        ],
        outputs=[
            TensorSpec(name="sum", role=Role.VALUE, dtype=Dtype.FLOAT32, shape=(4,)),
            TensorSpec(name="values", role=Role.VALUE, dtype=Dtype.INT32, shape=(1,)),
        ],
        states=[
            StateSpec(name="total", shape=(4,), dtype=Dtype.FLOAT32, update=Update.REPLACE),
            StateSpec(name="count", shape=(1,), dtype=Dtype.INT32, update=Update.REPLACE),
        ],
        max_rows=max_rows,
    )


def open_instance(model: Path, slots: int | None = None) -> ModelInstance:
    """A built model as the backend opens it, without a server."""
    return ModelInstance.open(model / "1", slots=slots)


def captured(
    module: torch.nn.Module, *, reset: bool = True, dtype: Dtype = Dtype.FLOAT32
) -> Capture:
    """A captured module of ``value [4]`` with a state ``total [4]``, which returns a ``sum``."""
    return capture_module(
        module,
        inputs=[
            TensorSpec(name="value", role=Role.ROW, dtype=dtype, shape=(4,)),
            control_input("slots", Role.SLOTS),
        ],
        outputs=[TensorSpec(name="sum", role=Role.VALUE, dtype=dtype, shape=(4,))],
        states=[
            StateSpec(name="total", shape=(4,), dtype=dtype, update=Update.REPLACE, reset=reset)
        ],
        max_rows=4,
    )
