"""What changes with the position (a window, a temperature) is captured, refused, and verified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace.schema.specs import Role, Update
from inplace_builder import BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture import reference, slot_attention
from inplace_builder.capture.cache_length import CacheLength, OwnCacheLength
from inplace_builder.capture.capture import Capture, control_input
from inplace_builder.capture.masks import LayerMask, MaskOptions, mask_options
from inplace_builder.capture.slot_cache import SeenLayers, SlotCache
from inplace_builder.errors import BuildError
from inplace_builder.served.build import write_engine
from inplace_builder.served.reach import position_constants, positions_to_verify
from support.copying import check_copy, check_prefix
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.long import long_except
from support.models import greedy, open_instance
from support.storing import check_snapshot
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

CAPACITY, CHUNK, WINDOW = 96, 8, 21
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)
DECODER_OPTIONS = DecoderOptions(CAPACITY, 3, CHUNK)
EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LLAMA4 = {
    "layer_types": ["full_attention"] * 2,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 256,
    "floor_scale": 40,
    "attn_scale": 0.5,
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    # the window is in the mask only
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        EXPERTS
        | {
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    # the query's temperature changes at position 40
    "llama4": ("Llama4TextConfig", LLAMA4),
    # the window is in the mask and handed to attention
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": WINDOW}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW}),
    # the rotary embedding depends on the length, beyond what is served
    "longrope": (
        "Phi3Config",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128},
    ),
    "dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
}


def model_of(name: str, **changes: object) -> PreTrainedModel:
    """A random decoder; its greedy tokens vary."""
    torch.manual_seed(0)
    config, fields = MODELS[name]
    made = getattr(transformers, config)(**(SHAPE | fields | changes))
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(made).eval()
    return model


@pytest.fixture(scope="module")
def phimoe() -> PreTrainedModel:
    return model_of("phimoe")


@pytest.mark.slow
@pytest.mark.parametrize("name", long_except(["llama4"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_tokens_past_the_window_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
    prompts = [random_prompt(1, 2 * WINDOW + 5), random_prompt(2, 3)]
    tokens = CAPACITY - len(prompts[0]) + 1
    expected = [greedy(model, prompt, tokens) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, tokens) == expected


def test_a_window_of_the_mask_alone_is_the_window_and_the_ring_of_its_layer() -> None:
    capture = capture_decoder(model_of("qwen2_moe"), DECODER_OPTIONS)
    assert windows_of(capture) == [0, WINDOW]
    assert [state.update for state in capture.states] == [Update.APPEND, Update.RING] * 2


def windows_of(capture: Capture) -> list[int]:
    target = torch.ops.inplace.attention.default
    nodes = capture.exported.graph.find_nodes(op="call_function", target=target)
    return [node.kwargs.get("window", 0) for node in nodes]


@pytest.mark.parametrize("chunk", long_except([8], [1, 8]))
def test_verification_finds_a_window_that_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Outputs are wrong only from position 57 on."""
    model = model_of("phimoe", sliding_window=57)
    monkeypatch.setattr(slot_attention, "_layer_options", lambda *_: MaskOptions())
    capture = capture_decoder(model, DecoderOptions(128, 3, chunk))
    options = BuildOptions(slots=3, max_rows=3, capacity=128, chunk=chunk)
    with pytest.raises(BuildError, match="differs from the model"):
        write_engine(capture, tmp_path / "model", options)


def test_verification_finds_a_temperature_of_the_first_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotCache, "get_seq_length", lambda *_, **__: 0)
    capture = capture_decoder(model_of("llama4"), DECODER_OPTIONS)
    with pytest.raises(BuildError, match=r"after \d\d tokens differs from the model"):
        write_engine(capture, tmp_path / "model", OPTIONS)


def test_verification_runs_past_windows_and_constants_but_not_past_the_capacity() -> None:
    capture = capture_decoder(model_of("llama4"), DECODER_OPTIONS)
    assert 40 in position_constants(capture.exported, capture.program)
    assert positions_to_verify(capture, CAPACITY) > 40 + CHUNK
    assert positions_to_verify(capture, 60) == 60
    windowed = capture_decoder(model_of("mistral"), DECODER_OPTIONS)
    assert positions_to_verify(windowed, CAPACITY) >= 2 * (WINDOW + CHUNK)


@pytest.mark.parametrize(
    ("compute", "constants"),
    [
        (lambda positions: (positions.float() + 1) / 70, {70}),
        (lambda positions: torch.where(positions > 33, 2.0, 1.0), {33}),
        (lambda positions: positions.clamp(max=90).float(), {90}),
        (lambda positions: (positions.float() * 0.02).floor(), {50}),
        (lambda positions: (positions % torch.tensor(31)).float(), {31}),
        (lambda positions: positions.float().cos(), set()),
    ],
)
def test_numbers_that_positions_are_compared_with_are_found(
    compute: Callable[[Tensor], Tensor], constants: set[int]
) -> None:
    class Module(torch.nn.Module):
        def forward(self, value: Tensor, positions: Tensor) -> Tensor:
            return value / 77.0 + compute(positions)

    exported = torch.export.export(Module(), (torch.zeros(3), torch.zeros(3, dtype=torch.int32)))
    program = capture_decoder(model_of("mistral"), DECODER_OPTIONS).program.model_copy(
        update={"inputs": (control_input("positions", Role.POSITIONS),)}
    )
    assert position_constants(exported, program) == constants


def test_a_mask_is_causal_a_window_in_chunks_lookahead_or_refused() -> None:
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_causal_mask_function
    chunked = masking_utils.chunked_causal_mask_function(16, torch.zeros(1, dtype=torch.int64))
    assert mask_options(causal, 50) == MaskOptions()
    assert mask_options(window(7), 50) == MaskOptions(window=7)
    assert mask_options(window(50), 50) == MaskOptions()
    assert mask_options(chunked, 16) == MaskOptions()
    assert mask_options(chunked, 17) == mask_options(chunked, 5000)
    assert mask_options(chunked, 50) == MaskOptions(attention_chunk=16)
    bidirectional = masking_utils.bidirectional_mask_function
    assert mask_options(bidirectional, 50) == MaskOptions(lookahead=True)
    others = [
        masking_utils.and_masks(causal, lambda batch, head, query, key: key % 2 == 0),
        masking_utils.or_masks(causal, lambda batch, head, query, key: key < 4),
        masking_utils.and_masks(window(9), chunked),
        window(0),
    ]
    for mask in others:
        with pytest.raises(BuildError, match="neither causal nor a sliding window nor in chunks"):
            mask_options(mask, 50)


@pytest.mark.filterwarnings("ignore")
def test_attention_in_chunks_starts_anew_in_each(tmp_path: Path) -> None:
    model = chunked_llama(16)
    capture = capture_decoder(model, DECODER_OPTIONS)
    assert chunks_of(capture) == [16, 16]
    assert {state.update for state in capture.states} == {Update.RING}
    write_engine(capture, tmp_path / "model", OPTIONS)  # compares logits with the model's
    prompts = [random_prompt(1, 37), random_prompt(2, 3)]
    expected = [generate(model, prompt, 40) for prompt in prompts]
    instance = open_instance(tmp_path / "model")
    assert generate_together(instance, prompts, 40) == expected
    for length in (9, 37):  # before and after a ring is full
        check_copy(instance, 5, length)
        check_snapshot(instance, 5, length)
    check_prefix(instance, 5, 37)
    whole = capture_decoder(chunked_llama(128), DECODER_OPTIONS)
    assert chunks_of(whole) == windows_of(whole) == [0, 0]


def chunks_of(capture: Capture) -> list[int]:
    target = torch.ops.inplace.attention.default
    nodes = capture.exported.graph.find_nodes(op="call_function", target=target)
    return [node.kwargs.get("attention_chunk", 0) for node in nodes]


def chunked_llama(size: int) -> PreTrainedModel:
    return model_of("llama4", layer_types=["chunked_attention"] * 2, attention_chunk_size=size)


def test_the_length_of_the_cache_is_the_positions_or_an_error() -> None:
    length: Any = CacheLength(torch.tensor([5, 6, 0], dtype=torch.int32))
    for positions in (
        torch.arange(3) + length,
        length + torch.arange(3),
        torch.arange(length, length + 3),
        torch.arange(length + 1, 4 + length, dtype=torch.int64) - 1,
        (torch.arange(3) + (length + 2)) - 2,
    ):
        assert positions.dtype == torch.int64
        assert positions.tolist() == [5, 6, 0]
    uses: list[Callable[[], object]] = [
        lambda: torch.ones(1, length + 1),
        lambda: torch.arange(length, length + 2),
        lambda: torch.arange(length, 8),
        lambda: torch.arange(length + 3),
        lambda: length + 1 > 0,
        lambda: length == 0,
        lambda: bool(length),
        lambda: int(length),
        lambda: torch.arange(2) + length,
        lambda: torch.arange(1, 4) + length,
        lambda: torch.zeros(3, dtype=torch.int64) + length,
        lambda: torch.arange(3.0) + length,
        lambda: torch.arange(3) - length,
        lambda: torch.arange(3) * length,
        lambda: torch.arange(3)[length:],
    ]
    for use in uses:
        with pytest.raises(BuildError, match="the number of cached tokens"):
            use()


def test_a_model_with_attention_of_its_own_sees_an_empty_cache_and_true_positions() -> None:
    length: Any = OwnCacheLength(torch.tensor([5, 6, 0]))
    for positions in (torch.arange(3) + length, torch.arange(length, length + 3)):
        assert positions.tolist() == [5, 6, 0]
    assert (length + 3, 3 + length, 3 - length) == (3, 3, 3)
    assert length == 0
    assert not length > 0
    assert torch.ones(2, length + 3).shape == (2, 3)
    uses: list[Callable[[], object]] = [
        lambda: torch.arange(1, 4) + length,
        lambda: torch.arange(length, 2),
    ]
    for use in uses:
        with pytest.raises(BuildError, match=r"number of cached tokens at .*test_windows.py"):
            use()


def test_what_the_cache_does_not_know_is_an_error() -> None:
    cache = SlotCache(torch.arange(3), 2, SeenLayers(8))
    questions: list[Callable[[], object]] = [
        lambda: cache.layers[0],
        cache.get_max_length,
        cache.reset,
    ]
    for question in questions:
        with pytest.raises(BuildError, match="the model reads the layers of its cache"):
            question()
    assert len(cache) == 2
    assert cache.is_initialized


def test_a_mask_that_the_model_changes_is_an_error() -> None:
    mask = LayerMask(None)
    uses: list[Callable[[], object]] = [
        lambda: mask + torch.ones(2),
        lambda: torch.ones(2) + mask,
        lambda: mask[:, :3],
        lambda: mask.shape,
        lambda: torch.stack([mask, mask]),  # type: ignore[list-item]
        lambda: ~mask,
    ]
    for use in uses:
        with pytest.raises(BuildError, match="the model changes its attention mask itself"):
            use()


def test_states_have_the_heads_of_the_model_whatever_its_configuration_says() -> None:
    config = transformers.GPTNeoXConfig(**SHAPE)
    assert config.num_key_value_heads == 2  # which this model does not read
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    capture = capture_decoder(model, DECODER_OPTIONS)
    assert {state.shape for state in capture.states} == {(4, CAPACITY, 8)}


@pytest.mark.parametrize(
    ("name", "limit"), [("longrope", 128), ("dynamic", 256)], ids=["longrope", "dynamic"]
)
def test_a_rotary_embedding_that_changes_with_the_length_is_refused_where_it_would(
    name: str, limit: int
) -> None:
    with pytest.raises(BuildError, match=rf"more than the {limit} positions: .* changes with the"):
        capture_decoder(model_of(name), DecoderOptions(limit + 1, 2, 8))


def test_capture_leaves_a_rotary_embedding_as_it_was() -> None:
    model = model_of("dynamic")
    capture_decoder(model, DECODER_OPTIONS)
    assert "forward" not in model.model.rotary_emb.__dict__


def test_a_long_sequence_is_fed_to_the_reference_in_parts(
    monkeypatch: pytest.MonkeyPatch, phimoe: PreTrainedModel
) -> None:
    ids = torch.tensor(random_prompt(3, 70))
    model = reference.reference(phimoe, as_fed=False)
    whole = model([{"input_ids": ids}])["logits"]
    monkeypatch.setattr(reference, "REFERENCE_CHUNK", 16)
    torch.testing.assert_close(model([{"input_ids": ids}])["logits"], whole)


@pytest.mark.filterwarnings("ignore")
def test_a_causal_mask_counts_more_than_what_attention_calls_itself(tmp_path: Path) -> None:
    config = transformers.BigBirdPegasusConfig(
        vocab_size=128,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=CAPACITY,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not model.model.decoder.layers[0].self_attn.is_causal
    # compares logits with those of the model
    write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
