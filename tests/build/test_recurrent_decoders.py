"""Decoders with convolutions, state space models and linear attention, as rows of a server."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace.engines import Finish, StepEngine
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.specs import StateSpec, Update
from inplace_builder import BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture.slot_cache import SeenLayers, SlotCache
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from support.copying import check_copy, check_prefix
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.long import long_except
from support.models import open_instance
from support.storing import check_snapshot
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.lfm2 import modeling_lfm2

CAPACITY, CHUNK, TOKENS = 72, 8, 24
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)
PROMPTS = [random_prompt(1, 41), random_prompt(2, 3), random_prompt(3, 17)]
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
MAMBA_2 = {
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
NOT_IN_MAMBA = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": (
        "Mamba2Config",
        {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    ),
    "bamba": ("BambaConfig", MAMBA_2 | {"attn_layer_indices": [1]}),
    # each layer attends and scans
    "falcon_h1": ("FalconH1Config", MAMBA_2 | {"head_dim": 8, "mamba_d_ssm": 64}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        MAMBA_2
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "head_dim": 8,
        },
    ),
    "mamba": ("MambaConfig", {"state_size": 8}),
    "falcon_mamba": ("FalconMambaConfig", {"state_size": 8}),
    "jamba": (
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
        },
    ),
    # a recurrence for each of several heads
    "zamba": (
        "ZambaConfig",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_key_value_heads": 4,
            "use_mamba_kernels": False,
        },
    ),
    "qwen3_next": ("Qwen3NextConfig", HYBRID | DELTA | EXPERTS),
    "qwen3_5": ("Qwen3_5TextConfig", HYBRID | DELTA),
    # gated linear recurrences, in code of the model's own
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {
            "num_hidden_layers": 3,
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_window_size": 21,
            "lru_width": 32,
            "head_dim": 8,
        },
    ),
    # linear attention whose states decay, in code of the model's own
    "minimax": (
        "MiniMaxConfig",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "olmo_hybrid": ("OlmoHybridConfig", HYBRID | DELTA | {"linear_num_key_heads": 4}),
}


def model_of(name: str) -> PreTrainedModel:
    """A random decoder; its greedy tokens vary."""
    torch.manual_seed(0)
    config, fields = MODELS[name]
    left_out = NOT_IN_MAMBA if name in ("mamba", "mamba2", "falcon_mamba") else ()
    shape = {key: value for key, value in SHAPE.items() if key not in left_out}
    made = getattr(transformers, config)(**(shape | fields))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(made).eval()
    if name == "recurrent_gemma":  # its own initial weights make few different tokens
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def build(model: PreTrainedModel, folder: Path) -> ModelInstance:
    write_engine(capture_decoder(model, DecoderOptions(CAPACITY, 3, CHUNK)), folder, OPTIONS)
    return open_instance(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    long_except(["lfm2", "mamba2", "qwen3_5", "recurrent_gemma"], MODELS),
)
@pytest.mark.filterwarnings("ignore")
def test_ragged_rows_generate_what_transformers_generates(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    expected = [generate(model, prompt, TOKENS) for prompt in PROMPTS]
    assert len({token for tokens in expected for token in tokens}) >= 8
    instance = build(model, tmp_path / "model")
    assert generate_together(instance, PROMPTS, TOKENS) == expected
    check_copy(instance, 7, 11)
    check_snapshot(instance, 7, 11)
    check_prefix(instance, 7, 16)


@pytest.fixture(scope="module")
def lfm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model, folder = model_of("lfm2"), tmp_path_factory.mktemp("lfm2") / "model"
    write_engine(capture_decoder(model, DecoderOptions(CAPACITY, 3, CHUNK)), folder, OPTIONS)
    return model, folder


def states_of(instance: ModelInstance) -> dict[str, StateSpec]:
    return {state.name: state for state in instance.manifest.states}


def test_states_are_named_by_layer_and_those_of_fixed_size_start_at_zero(
    lfm2: tuple[PreTrainedModel, Path],
) -> None:
    states = states_of(open_instance(lfm2[1]))
    assert list(states) == ["key_states_1", "value_states_1", "conv_states_0"]
    conv = states["conv_states_0"]
    assert (conv.update, conv.shape, conv.fill, conv.reset) == (Update.REPLACE, (2, 32), 0, True)


def test_a_slot_that_is_used_again_starts_at_zero(lfm2: tuple[PreTrainedModel, Path]) -> None:
    model, instance = lfm2[0], open_instance(lfm2[1], slots=3)
    for state in instance.arena.tensors.values():
        state.fill_(float("nan"))
    prompts = [random_prompt(4, 9), random_prompt(5, 4), random_prompt(6, 1)]
    assert generate_together(instance, PROMPTS, 1) == [
        generate(model, prompt, TOKENS)[:1] for prompt in PROMPTS
    ]
    for state in instance.arena.tensors.values():
        assert state.isfinite().any()
    # START on a live sequence begins anew
    assert generate_together(instance, prompts, TOKENS) == [
        generate(model, prompt, TOKENS) for prompt in prompts
    ]


class FailingEngine:
    """A real engine whose next step fails after it has written memory."""

    overlaps = False

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine

    def on_stream(self) -> AbstractContextManager[object]:
        return self._engine.on_stream()

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        launched = self._engine.launch(inputs, requested)

        def finish(gil_released: AbstractContextManager[object]) -> dict[str, Tensor]:
            launched(gil_released)
            raise RuntimeError("out of luck")

        return finish


def test_a_failed_step_ends_its_sequences_because_their_states_are_rewritten(
    lfm2: tuple[PreTrainedModel, Path],
) -> None:
    model, instance = lfm2[0], open_instance(lfm2[1])
    prompt, other = random_prompt(7, 5), random_prompt(8, 6)
    for sequence, tokens in ((1, prompt), (2, other)):
        run(instance, request(sequence, tokens, start=True))
    engine = instance.engine
    instance.engine = FailingEngine(engine)
    failed = instance.admit(request(1, [7]))
    instance.step([failed])
    assert "the sequence has ended, START it again" in str(failed.error)
    instance.engine = engine
    assert instance.table.get(1) is None
    # the other sequence continues, and the first may start again
    assert run(instance, request(2, [9])) == generate(model, [*other, 9], TOKENS)[0]
    assert run(instance, request(1, prompt, start=True)) == generate(model, prompt, TOKENS)[0]


def request(sequence: int, tokens: list[int], *, start: bool = False) -> Request:
    return Request(sequence, start, False, inputs={"input_ids": torch.tensor([tokens])})


def run(instance: ModelInstance, request_: Request) -> int:
    """The next token after a request."""
    active = instance.admit(request_)
    while not active.finished:
        instance.step([active])
    instance.finish(active)
    assert active.error is None
    return int(active.outputs["next_token"])


def test_capture_leaves_the_functions_of_transformers_as_they_were() -> None:
    before = modeling_lfm2.causal_conv1d_fn
    capture_decoder(model_of("lfm2"), DecoderOptions(16, 2, 4))
    assert modeling_lfm2.causal_conv1d_fn is before


def test_a_convolution_or_recurrence_of_the_models_own_is_refused() -> None:
    def cache() -> SlotCache:
        return SlotCache(torch.arange(3), 2, SeenLayers(8))

    x = torch.zeros(1, 4, 3)
    own = cache()
    own.update_conv_state(x, 0)
    with pytest.raises(BuildError, match="layer 0 caches the inputs of a convolution that it co"):
        own.check_states_stored()
    with pytest.raises(BuildError, match="layer 0 caches the inputs of a convolution that it co"):
        own.update_conv_state(x, 1)
    with pytest.raises(BuildError, match="layer 1 computes its recurrent state in code of its own"):
        cache().update_recurrent_state(x, 1)
    with pytest.raises(BuildError, match="without caching the inputs of the convolution"):
        cache().convolution()
    with pytest.raises(BuildError, match="a recurrence without a convolution"):
        cache().recurrence()
