"""Decoder families: tiny random models, captured, decode greedily as transformers does."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from inplace.engines.graph_reader import LoadedGraph
from inplace.kernels.gumbel import MAX_LOGPROBS
from inplace.operators import NAMESPACE
from inplace.schema.served import Manifest
from inplace.schema.specs import Role, Update
from inplace_builder import DecoderOptions, capture_decoder
from inplace_builder.capture.decoder import SAMPLING_INPUTS
from inplace_builder.engine_files import TORCH_FILE
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.decoding import SHAPE, generate_together, random_prompt
from support.engine_graph import load_graph
from support.long import long_except
from support.models import greedy, open_instance
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.slow

VOCABULARY, CAPACITY, CHUNK, WINDOW = 128, 96, 8, 12
RING = WINDOW + CHUNK - 1
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)
TOKENS = 40

GEMMA = SHAPE | {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,  # a random tied model repeats its last token
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
UNEVEN = ["sliding_attention", "sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """A configuration, and which of its layers must become rings."""

    config: str
    changes: Mapping[str, object]
    rings: tuple[bool, ...] = (False, False)


FAMILIES = {
    "llama": Family("LlamaConfig", SHAPE),
    "llama_tied": Family("LlamaConfig", SHAPE | {"tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", SHAPE | {"sliding_window": WINDOW}, (True, True)),
    "gemma2": Family(
        "Gemma2Config",
        GEMMA | {"layer_types": ALTERNATING, "attn_logit_softcapping": 2.0},
        (True, False, True),
    ),
    "gemma3": Family("Gemma3TextConfig", GEMMA | {"layer_types": UNEVEN}, (True, True, False)),
    "qwen2": Family("Qwen2Config", SHAPE),
    "qwen3": Family("Qwen3Config", SHAPE | {"head_dim": 8}),
    "gpt2": Family(
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


@dataclass(frozen=True)
class Built:
    """A built family.

    Attributes:
        family: what was built.
        model: transformers' model, with eager attention.
        source: the folder it was saved in.
        path: the engine directory.
        manifest: of the engine.
        graph: its program.
    """

    family: Family
    model: PreTrainedModel
    source: Path
    path: Path
    manifest: Manifest
    graph: LoadedGraph


def save(family: Family, folder: Path) -> PreTrainedModel:
    """A random model of the family, saved in a folder and loaded from it with eager attention."""
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    return model


def build_object(folder: Path, output: Path, options: BuildOptions) -> Manifest:
    """A build of a model as it is loaded by default, with PyTorch's attention."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    decoder = DecoderOptions(options.capacity, options.max_rows, options.chunk)
    manifest = write_engine(capture_decoder(model, decoder), output, options)
    assert model.config._attn_implementation == "sdpa"
    return manifest


@pytest.fixture(scope="module", params=long_except(["gemma2", "qwen3", "gpt2"], FAMILIES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    family, folder, path = (
        FAMILIES[request.param],
        tmp_path_factory.mktemp("source"),
        tmp_path_factory.mktemp("repository") / "model",
    )
    model = save(family, folder)
    # PyTorch's attention has no soft-cap: the reference attends eagerly, as the model here does.
    manifest = (
        build_object(folder, path, OPTIONS)
        if request.param == "gemma2"
        else build_decoder(folder, path, OPTIONS)
    )
    return Built(
        family, model, folder, path, manifest, load_graph(path / MODEL_VERSION / TORCH_FILE)
    )


def states_of(manifest: Manifest) -> list[str]:
    return [state.name for state in manifest.states]


def test_40_greedy_tokens_of_ragged_rows_equal_transformers_beyond_chunk_and_window_up_to_capacity(
    built: Built,
) -> None:
    prompts = [
        random_prompt(1, 5),
        random_prompt(2, CAPACITY - TOKENS + 1),
        random_prompt(3, CHUNK + 1),
    ]
    expected = [greedy(built.model, ids, TOKENS) for ids in prompts]
    assert all(len(set(tokens)) > 5 for tokens in expected), (
        "the model has settled on a few tokens: it proves nothing"
    )
    assert generate_together(open_instance(built.path), prompts, TOKENS) == expected


def test_the_tokens_depend_on_the_window(tmp_path: Path) -> None:
    """The comparison with transformers would notice a window that is ignored."""
    sliding = save(FAMILIES["mistral"], tmp_path / "sliding")
    full = save(Family("MistralConfig", SHAPE | {"sliding_window": None}), tmp_path / "full")
    assert greedy(sliding, random_prompt(1, 5), TOKENS) != greedy(full, random_prompt(1, 5), TOKENS)


def test_sliding_layers_and_no_others_are_rings_of_the_window_and_the_rest_of_a_chunk(
    built: Built,
) -> None:
    rings = built.family.rings
    expected = [
        (Update.RING, RING) if ring else (Update.APPEND, CAPACITY) for ring in (*rings, *rings)
    ]
    assert [(state.update, state.shape[1]) for state in built.manifest.states] == expected
    assert all(state.axis == 1 and not state.reset for state in built.manifest.states)


def windowed(folder: Path, window: int) -> PreTrainedModel:
    """A random decoder whose layers attend to so many positions."""
    return save(Family("MistralConfig", SHAPE | {"sliding_window": window}), folder)


@pytest.mark.parametrize(("window", "ring"), [(25, False), (24, True)])
def test_a_window_is_a_ring_only_where_that_takes_less_than_the_capacity(
    tmp_path: Path, window: int, ring: bool
) -> None:
    states = capture_decoder(windowed(tmp_path, window), DecoderOptions(32, 2, 8)).states
    expected = (Update.RING, 31) if ring else (Update.APPEND, 32)
    assert {(state.update, state.shape[1]) for state in states} == {expected}


@pytest.mark.parametrize("window", long_except([24], [24, 25]))
def test_a_window_of_most_of_the_capacity_equals_transformers(tmp_path: Path, window: int) -> None:
    model = windowed(tmp_path / "source", window)
    options = BuildOptions(slots=2, max_rows=2, capacity=32, chunk=8)
    build_decoder(tmp_path / "source", tmp_path / "model", options)
    ids = random_prompt(5, 9)
    assert generate_together(open_instance(tmp_path / "model"), [ids], 24) == [
        greedy(model, ids, 24)
    ]


@pytest.mark.parametrize(
    ("capacity", "rows", "chunk"),
    long_except([(1, 1, 1)], [(1, 1, 1), (3, 1, 8), (12, 2, 1)]),
)
def test_the_smallest_capacities_batches_and_chunks_build_and_equal_transformers(
    tmp_path: Path, capacity: int, rows: int, chunk: int
) -> None:
    model = save(FAMILIES["llama"], tmp_path / "source")
    manifest = build_decoder(
        tmp_path / "source",
        tmp_path / "model",
        BuildOptions(slots=rows, max_rows=rows, capacity=capacity, chunk=chunk),
    )
    assert (manifest.program("step").max_rows, manifest.program("step").chunk) == (
        rows,
        min(chunk, capacity),
    )
    prompts = [random_prompt(6 + row, 1) for row in range(rows)]
    assert generate_together(open_instance(tmp_path / "model"), prompts, capacity) == [
        greedy(model, ids, capacity) for ids in prompts
    ]


def test_every_layer_is_one_attention_operator(built: Built) -> None:
    result = [
        node
        for node in built.graph.module.graph.nodes
        if node.target is torch.ops.inplace.attention.default
    ]
    assert len(result) == built.model.config.num_hidden_layers == len(built.family.rings)
    assert [node.kwargs.get("ring", False) for node in result] == list(built.family.rings)


def test_the_graph_writes_every_state_and_the_manifest_says_so(built: Built) -> None:
    assert built.graph.written_inputs() == set(states_of(built.manifest))
    assert [alias.input for alias in built.manifest.program("step").aliases] == states_of(
        built.manifest
    )
    assert [entry.state for entry in built.manifest.program("step").lowering] == states_of(
        built.manifest
    )


def test_functionalized_by_torch_the_graph_mutates_the_states_and_nothing_else(
    tmp_path: Path,
) -> None:
    capture = capture_decoder(
        save(FAMILIES["mistral"], tmp_path), DecoderOptions(CAPACITY, 3, CHUNK)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch copies its own deprecated tree specs
        signature = capture.exported.run_decompositions({}).graph_signature
    assert sorted(signature.user_inputs_to_mutate.values()) == sorted(
        state.name for state in capture.states
    )
    assert not signature.buffers_to_mutate


def test_no_metadata_assertion_is_left_in_the_graph(built: Built) -> None:
    targets = [node.target for node in built.graph.module.graph.nodes]
    assert torch.ops.aten.linear.default in targets or torch.ops.aten.addmm.default in targets
    assert torch.ops.aten._assert_tensor_metadata.default not in targets


def test_only_inplace_operators_use_a_state(built: Built) -> None:
    inputs = built.graph.inputs
    states = [inputs[name] for name in states_of(built.manifest)]
    for node in states:
        assert node.users
        targets = {user.target for user in node.users}
        assert {str(target).partition(".")[0] for target in targets} == {NAMESPACE}


def test_the_manifest_says_who_fills_each_input_and_which_ids_are_valid(built: Built) -> None:
    program = built.manifest.program("step")
    assert {spec.name: spec.role for spec in program.inputs} == {
        "input_ids": Role.TOKENS,
        "positions": Role.POSITIONS,
        "row_offsets": Role.ROW_OFFSETS,
        "last_tokens": Role.LAST_TOKENS,
        "slots": Role.SLOTS,
        "write_indices": Role.WRITE_INDICES,
        **{role.value: role for role in SAMPLING_INPUTS},
    }
    [ids] = program.client_inputs
    assert (ids.minimum, ids.maximum) == (0, VOCABULARY - 1)
    assert [(spec.name, spec.shape, spec.on_request) for spec in program.outputs] == [
        ("next_token", (1,), False),
        ("logits", (VOCABULARY,), True),
        ("token_logprobs", (1,), True),
        ("top_logprobs", (MAX_LOGPROBS,), True),
        ("top_tokens", (MAX_LOGPROBS,), True),
    ]


def test_a_tied_embedding_is_written_once(tmp_path: Path) -> None:
    wide = SHAPE | {"vocab_size": 1024}
    sizes = []
    for tied in (False, True):
        save(
            Family("LlamaConfig", wide | {"tie_word_embeddings": tied}), tmp_path / f"source{tied}"
        )
        manifest = build_decoder(tmp_path / f"source{tied}", tmp_path / f"model{tied}", OPTIONS)
        sizes.append(manifest.file(manifest.program("step").engine.file).bytes)
    embedding = 1024 * 32 * 4
    assert sizes[0] - sizes[1] == pytest.approx(embedding, rel=0.05)


def test_capture_leaves_the_model_attending_as_before(tmp_path: Path) -> None:
    model = save(FAMILIES["llama"], tmp_path)
    before = greedy(model, random_prompt(7, 9), 8)
    capture_decoder(model, DecoderOptions(CAPACITY, 2, CHUNK))
    assert model.config._attn_implementation == "eager"
    assert greedy(model, random_prompt(7, 9), 8) == before


@pytest.mark.long
def test_gemma2_builds_from_its_folder(tmp_path: Path) -> None:
    save(FAMILIES["gemma2"], tmp_path / "source")
    build_decoder(tmp_path / "source", tmp_path / "model", OPTIONS)
