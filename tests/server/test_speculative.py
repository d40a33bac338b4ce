"""Speculative decoding as the command line builds it, on a real tritonserver."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from inplace.schema.served import Manifest
from inplace_builder.__main__ import app
from support.engines import Engines
from support.faults import eventually
from support.models import greedy
from support.observed import samples
from support.pool import Deployment, ServerPool
from support.served import Served, Stream
from support.streams import prompt
from support.vocabulary import added, llama_with_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

pytestmark = pytest.mark.server
MODEL = "drafted"


@pytest.fixture(scope="module")
def built(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = engines.get("llama-with-tokenizer", llama_with_tokenizer)
    folder: Path = tmp_path_factory.mktemp("drafted") / MODEL
    arguments = ["build", str(source), "--output", str(folder), "--serve", "stream"]
    arguments += ["--capacity", "128", "--chunk", "16", "--slots", "4"]
    result = CliRunner().invoke(app, [*arguments, "--draft-layers", "1", "--draft-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert re.search(r"draft +the model's first 1 layers, 3 tokens a round", result.output)
    return folder


@pytest.fixture(scope="module")
def drafted(built: Path, engines: Engines, pool: ServerPool) -> Iterator[Served]:
    source = engines.get("llama-with-tokenizer", llama_with_tokenizer)
    with pool.serve(Deployment(built)) as running:
        yield Served(running, LlamaForCausalLM.from_pretrained(source).eval())


def test_tokens_and_text_are_those_of_the_model(drafted: Served, built: Path) -> None:
    ids = prompt(3, 20)
    expected = greedy(drafted.llama, ids, 40)
    with Stream(drafted, MODEL) as stream:
        answer = stream.ask("a", ids, end=True, max_tokens=40, ignore_eos=True)
    assert (answer.tokens, answer.reason, answer.error) == (expected, "length", "")
    assert answer.text == added(ids, expected)

    def drafts_are_counted() -> bool:
        counts = [
            value
            for name, labels, value in samples(drafted.server)
            if name == "inplace_draft_tokens_total" and labels["model"] == MODEL
        ]
        assert len(counts) == 2, "accepted and rejected ones"
        return sum(counts) >= 39 / 4 * 3

    eventually(drafts_are_counted, "metrics have the drafted tokens")
    manifest = Manifest.load(built / "1")
    assert [program.name for program in manifest.programs] == ["step", "draft"]
    assert manifest.built_with["draft"] == "the model's first 1 layers, 3 tokens a round"
    assert manifest.schedules[1].requests == ("decode",)
