"""Decoders as transformers exports them: recognised, packed, verified, and as ``generate``."""

import runpy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from inplace.schema.specs import Update
from inplace_builder import (
    Capture,
    DecoderOptions,
    capture_decoder,
    capture_exported,
    capture_exported_decoder,
)
from inplace_builder.fusion.fuse import fuse
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from support.comparing import operators
from support.exported_decoders import (
    FAMILIES,
    PROMPTS,
    WINDOW,
    WINDOWED,
    decoder,
    exported,
    generate_as_rows,
)
from support.long import long_except
from support.models import greedy, open_instance

pytestmark = pytest.mark.slow

CAPACITY, CHUNK, TOKENS = 40, 6, 20
OPTIONS = DecoderOptions(CAPACITY, max_rows=8, chunk=CHUNK)


@pytest.mark.parametrize(
    ("family", "dynamic"),
    long_except(
        [("gemma3", True)],
        [(family, dynamic) for family in FAMILIES for dynamic in (True, False)],
    ),
)
def test_eight_ragged_rows_generate_what_transformers_does(
    family: str, dynamic: bool, tmp_path: Path
) -> None:
    """Chunks of six, also of programs exported for one token; 37 positions for windows of 8."""
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
    assert generate_as_rows(instance, PROMPTS, TOKENS) == [
        greedy(model, prompt, TOKENS) for prompt in PROMPTS
    ]


@pytest.mark.long
def test_an_export_that_is_not_strict_has_its_caches_as_constants_and_is_the_same() -> None:
    model = decoder("llama")
    one, other = (
        capture_exported_decoder(exported(model, dynamic=True, strict=strict), OPTIONS)
        for strict in (True, False)
    )
    assert [node.target for node in one.exported.graph.nodes if node.op == "call_function"] == [
        node.target for node in other.exported.graph.nodes if node.op == "call_function"
    ]


@pytest.mark.parametrize("family", long_except(["llama"], ["llama", "gpt2", "gemma3"]))
def test_what_is_fused_of_it_is_what_is_fused_of_the_model_itself(family: str) -> None:
    model = decoder(family)
    own = capture_decoder(model, OPTIONS)
    result = capture_exported_decoder(exported(model, dynamic=True), OPTIONS)
    assert _kernels(result) == _kernels(own)
    assert result.program == own.program
    assert result.states == own.states


def _kernels(capture: Capture) -> dict[str, int]:
    result: dict[str, int] = {}
    for node in fuse(capture.exported).graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "inplace":
            result[node.target._opname] = result.get(node.target._opname, 0) + 1
    return result


ONE_TOKEN, ANY_NUMBER = ("llama", False, range(13)), ("gemma2", True, (0, 7, 9, 20))


@pytest.mark.parametrize(
    ("family", "dynamic", "cuts"),
    long_except([ONE_TOKEN], [ONE_TOKEN, ANY_NUMBER]),
)
def test_without_a_server_every_layer_is_one_operator(
    family: str, dynamic: bool, cuts: Sequence[int]
) -> None:
    """One sequence, the caller's own step: the caches and counters are the module's states."""
    model = decoder(family)
    capture = capture_exported(exported(model, dynamic=dynamic))
    layers = model.config.num_hidden_layers
    counts = operators(capture)
    assert counts.pop("attention") == layers
    assert not dynamic or counts == {"update": layers}, "each layer's count of positions"
    caches = [state for state in capture.states if state.operators == ("attention",)]
    assert len(caches) == 2 * layers
    memory = [torch.cat([state.bound_initial()] * 3) for state in capture.states]
    graph, ids = capture.exported.module(), torch.randint(0, 64, (1, cuts[-1]))
    assert isinstance(graph, torch.fx.GraphModule)
    slots = torch.tensor([1], dtype=torch.int32)
    with torch.no_grad():
        expected = model(ids).logits
        for first, last in pairwise(cuts):
            given = {"input_ids": ids[:, first:last], "cache_position": torch.arange(first, last)}
            named = (given[name] for name in capture.inputs)
            (logits,) = torch.utils._pytree.tree_leaves(
                torch.fx.Interpreter(graph).run(*named, slots, *memory)
            )
            torch.testing.assert_close(logits, expected[:, first:last], rtol=1e-4, atol=1e-4)
    for state, arena in zip(capture.states, memory, strict=True):
        assert torch.equal(arena[[0, 2]], torch.cat([state.bound_initial()] * 2)), state.name


@pytest.mark.parametrize("name", ["hf_decoder", "kv_attention_block"])
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / f"{name}.py"
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "nothing was copied" in printed and "@operator" in printed
