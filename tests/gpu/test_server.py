"""TensorRT engines on a real tritonserver, beside a model that cannot be served."""

import importlib.util
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from inplace.client import Sequence
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.manifests import edit
from support.models import greedy, tiny_llama
from support.streams import generate
from support.vocabulary import llama_with_tokenizer
from transformers import LlamaForCausalLM
from tritonclient.grpc import InferenceServerClient

from tools.count_files import count_token

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt") is None, reason="needs TensorRT; it is not installed"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("pytriton") is None,
        reason="needs nvidia-pytriton; it is not installed",
    ),
]
PROMPTS = [[5, 6, 7], [9], list(range(20, 43)), [1, 2], [100] * 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM
) -> Iterator[TritonServer]:
    folder, repository = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("repository")
    model.save_pretrained(folder)
    options = BuildOptions(
        device="cuda",
        engine="tensorrt",
        capacity=64,
        chunk=8,
        slots=8,
        max_rows=8,
        queue_delay_microseconds=5000,
    )
    build_decoder(folder, repository / "llama", options)
    shutil.copytree(repository / "llama", repository / "elsewhere")
    edit(
        repository / "elsewhere" / MODEL_VERSION,
        lambda fields: fields["programs"][0]["engine"]["plan"].update(gpu="NVIDIA A100"),
    )
    config = repository / "elsewhere" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "llama"', 'name: "elsewhere"'))
    log = tmp_path_factory.mktemp("server") / "tritonserver.log"
    with TritonServer(
        repository,
        Ports(0, 0, 0),
        log=log,
        arguments=["--exit-on-error=false", "--strict-readiness=false"],
    ) as server:
        yield server
    print(log.read_text()[-4000:])


def test_sequences_say_what_transformers_says(
    running: TritonServer, model: LlamaForCausalLM
) -> None:
    def one(prompt: list[int]) -> list[int]:
        with (
            InferenceServerClient(running.grpc_url) as client,
            Sequence(client, "llama") as sequence,
        ):
            return generate(sequence, prompt, 24)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        generated = list(pool.map(one, PROMPTS))
    assert generated == [greedy(model, prompt, 24) for prompt in PROMPTS]


def test_a_plan_for_another_gpu_does_not_load_and_harms_no_other_model(
    running: TritonServer,
) -> None:
    with InferenceServerClient(running.grpc_url) as client:
        assert client.is_model_ready("llama")
        assert not client.is_model_ready("elsewhere")
        assert running.log is not None
        assert "engine.plan was built for NVIDIA A100" in running.log.read_text()
        with Sequence(client, "llama") as sequence:
            assert isinstance(sequence.tokens([5]), int)


def test_a_streamed_token_enters_few_files(tmp_path: Path) -> None:
    llama_with_tokenizer(tmp_path / "source")
    options = BuildOptions(
        device="cuda", engine="tensorrt", capacity=64, chunk=8, slots=4, max_rows=4, serve="stream"
    )
    build_decoder(tmp_path / "source", tmp_path / "repository" / "llama", options)
    files = count_token(tmp_path / "repository", "llama")["files"]
    assert "inplace/engines/tensorrt/steps.py" in files
    assert "inplace/kernels/attention_kernels.py" in files
    assert len(files) <= 30, "\n".join(files)
