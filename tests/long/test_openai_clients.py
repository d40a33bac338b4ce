"""Clients that no one here wrote, against the OpenAI front end: lm-eval, litellm and aiperf.

`make clients` installs them, in an environment of their own, and runs this.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.openai import Frontend
from support.engines import Engines
from support.fronts import Front, running
from support.models import greedy
from support.served import CAPACITY, MODEL, Served
from support.vocabulary import added, llama_with_tokenizer, tiny_tokenizer

CLIENTS = Path(__file__).parents[2] / "build/clients/bin"

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.skipif(
        not (CLIENTS / "lm_eval").exists(),
        reason="`make clients` installs lm-eval, litellm and aiperf",
    ),
]

DOCUMENTS = [
    {"context": context, "target": target}
    for context, target in (
        ("Derivative Works shall", " mean any work, whether in Source or Object form"),
        ("You may reproduce and distribute copies", " of the Work"),
        ("né à l'École", " 🙂 日本語"),
        ("Licensor", "."),
        ("Subject to the terms and conditions of this License, each Contributor", " hereby grants"),
    )
]


@pytest.fixture(scope="module")
def front(served: Served, stream_models: Path) -> Iterator[Front]:
    with running(Frontend([served.server.grpc_url], stream_models)) as front:
        yield front


@pytest.fixture(scope="module")
def tokenizer(engines: Engines) -> Path:
    """The folder with the tokenizer as transformers has it."""
    return engines.get("llama-with-tokenizer", llama_with_tokenizer)


def run(folder: Path, *command: str, **variables: str) -> str:
    """Run a command of the clients' environment that reaches no hub; returns what it printed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "HOME": str(folder),
        "OPENAI_API_KEY": "none",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    } | variables
    program, *arguments = command
    result = subprocess.run(
        [str(CLIENTS / program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


def tasks(folder: Path) -> None:
    """Two local tasks for lm-eval over the same documents."""
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}}}\n"
    )
    data += 'test_split: test\ndoc_to_text: "{{context}}"\ndoc_to_target: "{{target}}"\n'
    (folder / "likely.yaml").write_text(
        f"task: likely\n{data}output_type: loglikelihood\ntarget_delimiter: ''\n"
        "metric_list: [{metric: perplexity}]\n"
    )
    (folder / "continued.yaml").write_text(
        f"task: continued\n{data}output_type: generate_until\n"
        "generation_kwargs: {until: ['###'], do_sample: false, max_gen_toks: 12}\n"
        "metric_list: [{metric: exact_match}]\n"
    )


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """What lm-eval wrote of each document, in their order."""
    [file] = folder.glob(f"out/**/samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: int(line["doc_id"]))


def test_lm_eval_gets_the_log_likelihoods_of_transformers(
    front: Front, served: Served, tokenizer: Path, tmp_path: Path
) -> None:
    tasks(tmp_path)
    url = f"{front.url}/v1/completions"
    model = f"model={MODEL},base_url={url},tokenizer={tokenizer},tokenizer_backend=huggingface"
    run(
        tmp_path,
        "lm_eval",
        "--model=local-completions",
        f"--model_args={model},max_length={CAPACITY},num_concurrent=2",
        "--batch_size=2",
        "--tasks=likely,continued",
        f"--include_path={tmp_path}",
        f"--output_path={tmp_path / 'out'}",
        "--log_samples",
    )

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tiny_tokenizer().encode(text, add_special_tokens=False).ids
        return ids

    for document, sample in zip(DOCUMENTS, samples(tmp_path, "likely"), strict=True):
        context = len(ids_of(document["context"]))
        ids = ids_of(document["context"] + document["target"])
        with torch.no_grad():
            logits = served.llama(torch.tensor([ids])).logits[0, context - 1 : -1]
        values = torch.log_softmax(logits.double(), -1)
        targets = torch.tensor(ids[context:])
        [[[likelihood, is_greedy]]] = sample["resps"]
        expected = values.gather(1, targets[:, None]).sum().item()
        assert float(likelihood) == pytest.approx(expected, abs=1e-4)
        assert str(is_greedy) == str(bool((values.argmax(-1) == targets).all()))
    for document, sample in zip(DOCUMENTS, samples(tmp_path, "continued"), strict=True):
        ids = ids_of(document["context"])
        assert sample["resps"] == [[added(ids, greedy(served.llama, ids, 12))]]


LITELLM = """
import json, sys
import litellm

url, model = sys.argv[1:]
chat = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "temperature": 0}
chat |= {"messages": [{"role": "user", "content": "Works"}], "max_tokens": 9}
whole = litellm.completion(**chat, logprobs=True, top_logprobs=2)
pieces = [
    chunk.choices[0].delta.content or ""
    for chunk in litellm.completion(**chat, stream=True)
]
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", api_base=url, api_key="none", prompt="Works",
    temperature=0, max_tokens=9,
)
schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
          "additionalProperties": False}
formed = litellm.completion(**(chat | {"max_tokens": 60}), response_format={
    "type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}})
try:
    litellm.completion(**(chat | {"temperature": -1}))
    error = ""
except litellm.BadRequestError as refused:
    error = str(refused)
print(json.dumps({
    "chat": whole.choices[0].message.content,
    "logprobs": len(whole.choices[0].logprobs.content),
    "usage": whole.usage.total_tokens - whole.usage.prompt_tokens,
    "stream": "".join(pieces),
    "completion": text.choices[0].text,
    "json": formed.choices[0].message.content,
    "error": error,
}))
"""


def test_litellm(front: Front, served: Served, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LITELLM)
    printed = run(tmp_path, "python", "script.py", f"{front.url}/v1", MODEL)
    result = json.loads(printed.splitlines()[-1])
    ids = tiny_tokenizer().encode("Works").ids
    assert result["completion"] == added(ids, greedy(served.llama, ids, 9))
    assert result["stream"] == result["chat"]
    assert (result["logprobs"], result["usage"]) == (9, 9)
    assert json.loads(result["json"])["a"] in (True, False)
    assert "at least 0" in result["error"]


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_aiperf_writes_its_report(front: Front, tokenizer: Path, kind: str, tmp_path: Path) -> None:
    run(
        tmp_path,
        "aiperf",
        "profile",
        f"--model={MODEL}",
        f"--url={front.url}",
        f"--endpoint-type={kind}",
        "--streaming",
        f"--tokenizer={tokenizer}",
        "--concurrency=4",
        "--request-count=16",
        "--synthetic-input-tokens-mean=20",
        "--synthetic-input-tokens-stddev=0",
        "--output-tokens-mean=8",
        "--extra-inputs=ignore_eos:true",
        f"--output-artifact-dir={tmp_path / 'out'}",
        "--ui=none",
        "--no-gpu-telemetry",
        "--no-server-metrics",
        HF_HUB_OFFLINE="",  # with it, the folder is looked for in the cache
    )
    [file] = (tmp_path / "out").glob("**/profile_export_aiperf.json")
    report = json.loads(file.read_text())
    assert report["request_count"]["avg"] == 16
    assert report.get("error_request_count", {"avg": 0})["avg"] == 0
    assert report["time_to_first_token"]["avg"] > 0
    assert report["output_token_throughput"]["avg"] > 0
