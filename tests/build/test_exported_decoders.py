"""Decoders as transformers exports them: every layer recognised, packed, verified, and as good as generate."""

import runpy
from pathlib import Path

import pytest
import torch
from inplace.schema.dtypes import Dtype
from inplace.schema.specs import Update
from inplace_builder import (
    Capture,
    DecoderOptions,
    capture_decoder,
    capture_exported,
    capture_exported_decoder,
    load_decoder,
)
from inplace_builder.fusion.fuse import fuse
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from support.exported_decoders import (
    FAMILIES,
    PROMPTS,
    WINDOW,
    WINDOWED,
    decoder,
    exported,
    rows_say,
)
from support.models import greedy, open_instance
from support.state_modules import operators

CAPACITY, CHUNK, TOKENS = 40, 6, 20
OPTIONS = DecoderOptions(CAPACITY, max_rows=8, chunk=CHUNK)


@pytest.mark.parametrize(
    ("family", "dynamic"),
    [*((name, True) for name in FAMILIES), ("llama", False), ("gemma2", False), ("gpt2", False)],
)
def test_eight_ragged_rows_say_what_generate_says(
    family: str, dynamic: bool, tmp_path: Path
) -> None:
    """Chunks of six of programs that transformers exported for one token too, and 37 positions where windows have 8."""
    model = decoder(family)
    capture = capture_exported_decoder(exported(model, dynamic=dynamic), OPTIONS)
    assert operators(capture) == {"attention": model.config.num_hidden_layers, "sample": 1}
    rings = [state for state in capture.states if state.update is Update.RING]
    assert len(rings) == 2 * WINDOWED.get(family, 0)
    assert all(state.shape[1] == WINDOW + CHUNK - 1 for state in rings)
    write_engine(
        capture,
        tmp_path / family,
        BuildOptions(capacity=CAPACITY, chunk=CHUNK, slots=9, max_rows=8),
    )
    instance = open_instance(tmp_path / family)
    assert rows_say(instance, PROMPTS, TOKENS) == [
        greedy(model, prompt, TOKENS) for prompt in PROMPTS
    ]


def test_an_export_that_is_not_strict_has_its_caches_as_constants_and_is_the_same() -> None:
    model = decoder("llama")
    one, other = (
        capture_exported_decoder(exported(model, dynamic=True, strict=strict), OPTIONS)
        for strict in (True, False)
    )
    assert [node.target for node in one.exported.graph.nodes if node.op == "call_function"] == [
        node.target for node in other.exported.graph.nodes if node.op == "call_function"
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_what_is_fused_of_it_is_what_is_fused_of_the_model_itself(family: str) -> None:
    model = decoder(family)
    own = capture_decoder(model, OPTIONS)
    found = capture_exported_decoder(exported(model, dynamic=True), OPTIONS)
    assert _kernels(found) == _kernels(own)
    assert found.program == own.program
    assert found.states == own.states


def _kernels(capture: Capture) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in fuse(capture.exported).graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "inplace":
            found[node.target._opname] = found.get(node.target._opname, 0) + 1
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_server_every_layer_with_a_dynamic_number_of_tokens_is_one_operator(
    family: str,
) -> None:
    """`capture_exported`: one sequence, the caller's own step; the module's caches and counters are its states."""
    model = decoder(family)
    capture = capture_exported(exported(model, dynamic=True))
    counts = operators(capture)
    assert counts.pop("attention") == model.config.num_hidden_layers
    assert counts == {"update": model.config.num_hidden_layers}, "each layer's count of positions"
    memory = [state.bound_initial().clone() for state in capture.states]
    graph, ids = capture.exported.module(), torch.randint(0, 64, (1, 20))
    assert isinstance(graph, torch.fx.GraphModule)
    with torch.no_grad():
        wanted = model(ids).logits
        for first, last in ((0, 7), (7, 9), (9, 20)):
            given = {"input_ids": ids[:, first:last], "cache_position": torch.arange(first, last)}
            (found,) = torch.utils._pytree.tree_leaves(
                torch.fx.Interpreter(graph).run(
                    *(given[name] for name in capture.inputs), capture.slots(), *memory
                )
            )
            torch.testing.assert_close(found, wanted[:, first:last], rtol=1e-4, atol=1e-4)


@pytest.mark.real_model
def test_smollm2_exported_for_one_token_says_what_generate_says(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    model, _ = load_decoder(smollm2_folder, Dtype.FLOAT32)
    capture = capture_exported_decoder(
        exported(model, dynamic=False, capacity=64), DecoderOptions(64, max_rows=8, chunk=16)
    )
    assert operators(capture) == {"attention": model.config.num_hidden_layers, "sample": 1}
    write_engine(
        capture, tmp_path / "smollm2", BuildOptions(capacity=64, chunk=16, slots=8, max_rows=8)
    )
    prompts = [[100 + 7 * token for token in prompt] for prompt in PROMPTS]
    assert rows_say(open_instance(tmp_path / "smollm2"), prompts, 8) == [
        greedy(model, prompt, 8) for prompt in prompts
    ]


@pytest.mark.parametrize("name", ["hf_decoder", "kv_attention_block"])
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / f"{name}.py"
    assert len(script.read_text().splitlines()) < 80
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "nothing was copied" in printed and "@operator" in printed
