"""Sequences go on in another server: one of two is killed, then one is drained, under load."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inplace.client import Client, Sequence
from inplace_builder import BuildOptions, write_engine
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.engines import Engines
from support.fault_proxy import kill_server
from support.models import Repository, greedy
from support.observed import samples
from support.pool import reconfigure
from support.served import MODEL
from support.storing import left_in_folder
from support.streams import prompt
from support.transducing import GreedySearch, chunks
from support.vocabulary import llama_with_tokenizer
from transducer import Decode, Encode, capture, modules
from transformers import LlamaForCausalLM
from tritonclient.grpc import model_config_pb2 as pb

pytestmark = pytest.mark.server

TURNS, NEW_TOKENS, EVERY = 16, 8, 4
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 64, "seed": 11}


@pytest.fixture(scope="module")
def parts() -> tuple[Encode, Decode]:
    return modules()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("snapshots") / "store"


@pytest.fixture(scope="module")
def stored_models(
    engines: Engines,
    stream_models: Path,
    repository: Repository,
    parts: tuple[Encode, Decode],
    store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A language model and a transducer for streams, and an accumulator for steps."""

    def build(path: Path) -> None:
        options = BuildOptions(slots=4, max_rows=4, serve="stream")
        write_engine(capture(*parts), path / "transducer", options)

    def stored(config: pb.ModelConfig) -> None:
        values = {
            "snapshot_store": store.as_uri(),
            "snapshot_secret_file": str(secret),
            "snapshot_every": str(EVERY),
        }
        for name, value in values.items():
            config.parameters[name].string_value = value

    folder = tmp_path_factory.mktemp("stored-models")
    secret = folder.with_name("secret")
    secret.write_bytes(b"0123456789abcdef" * 2)
    transducers = engines.get("stored-transducer", build)
    sources = (
        stream_models / MODEL, transducers / "transducer", repository.path / "accumulator"
    )  # fmt: skip
    for source in sources:
        shutil.copytree(source, folder / source.name)
        reconfigure(folder / source.name, stored)
    return folder


@dataclass
class Pair:
    """Two servers of the same models, at the same addresses also after a restart."""

    models: Path
    log: Path
    ports: list[Ports] = field(default_factory=lambda: [Ports(0, 0, 0).resolve() for _ in range(2)])
    running: list[TritonServer] = field(default_factory=list)

    def start(self, index: int) -> TritonServer:
        log = self.log.with_name(f"server{index}-{time.monotonic_ns()}.log")
        server = TritonServer(
            self.models, self.ports[index], log=log, arguments=["--exit-timeout-secs=30"]
        )
        server.start()
        self.running.append(server)
        return server

    @property
    def urls(self) -> list[str]:
        return [f"127.0.0.1:{ports.grpc}" for ports in self.ports]


@pytest.fixture
def pair(stored_models: Path, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(stored_models, tmp_path / "log")
    yield pair
    for server in pair.running:
        server.stop(timeout=5)


class Worker:
    """A client that runs turns of a sequence on a thread, up to a number that the test raises."""

    def __init__(self, sequence: Sequence, run: Callable[[Sequence, int], None]) -> None:
        self.sequence, self._run, self.turns, self.allowed = sequence, run, 0, 0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work)
        self.thread.start()

    def _work(self) -> None:
        try:
            for turn in range(TURNS):
                while turn >= self.allowed:
                    time.sleep(0.002)
                self._run(self.sequence, turn)
                self.turns += 1
            self.sequence.close()
        except BaseException as error:
            self.error = error


def allow(workers: list[Worker], turns: int, wait: bool = True) -> None:
    """Let the clients run so many turns, and wait for them."""
    for worker in workers:
        worker.allowed = turns
    if not wait:
        time.sleep(0.1)  # all are in the middle of a turn
        return
    deadline = time.monotonic() + 120
    while any(worker.turns < turns and worker.error is None for worker in workers):
        assert time.monotonic() < deadline, [worker.turns for worker in workers]
        time.sleep(0.005)
    for worker in workers:
        if worker.error is not None:
            raise worker.error


@dataclass
class Chat:
    """A conversation, compared with one that nothing interrupted: each turn brings 5 tokens.

    Attributes:
        seed: of what it brings.
        options: of its generations.
        expected: the tokens and texts of the turns that were run without interruption.
    """

    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    expected: list[tuple[list[int], str]] = field(default_factory=list)

    def __call__(self, sequence: Sequence, turn: int) -> None:
        new = prompt(100 * self.seed + turn, 5)
        generation = sequence.generate(new, NEW_TOKENS, ignore_eos=True, **self.options)
        for _ in generation:
            if turn < len(self.expected):  # so that servers end in the middle of a turn
                time.sleep(0.02)
        if turn == len(self.expected):
            self.expected.append((generation.tokens, generation.text))
        assert (generation.tokens, generation.text) == self.expected[turn], turn

    def history(self) -> list[int]:
        """All tokens before the last answer."""
        history = list[int]()
        for turn, (tokens, _) in enumerate(self.expected):
            history += [*prompt(100 * self.seed + turn, 5), *tokens]
        return history[:-NEW_TOKENS]


class Speech:
    """A transducer's stream, of which the client cannot send everything again."""

    def __init__(self, parts: tuple[Encode, Decode], stream: int) -> None:
        self.search, self.chunks = GreedySearch(*parts), chunks(stream, 2 * TURNS)

    def __call__(self, sequence: Sequence, turn: int) -> None:
        for chunk in self.chunks[2 * turn : 2 * turn + 2]:
            outputs = sequence.step({"features": chunk.numpy()})
            assert outputs["tokens"].tolist() == self.search.feed(chunk), turn
            time.sleep(0.08)


class Sum:
    """A running sum of an accumulator."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, sequence: Sequence, turn: int) -> None:
        for value in range(3):
            self.total += turn + value
            inputs = {"value": np.full(4, turn + value, np.float32)}
            assert sequence.step(inputs)["sum"].tolist() == [self.total] * 4, turn
            time.sleep(0.05)


def test_sequences_go_on_when_a_server_is_killed_and_when_one_is_drained(
    pair: Pair, store: Path, parts: tuple[Encode, Decode], stream_models: Path, engines: Engines
) -> None:
    first, second = pair.start(0), pair.start(1)
    first.wait_ready()
    second.wait_ready()
    chats = [
        Chat(1, {"text": False}),
        Chat(2),
        Chat(3, SAMPLED),
        Chat(4, {**SAMPLED, "text": False}),
    ]
    for chat in chats:
        with Client(pair.urls[1]) as alone, Sequence(alone, MODEL) as sequence:
            for turn in range(TURNS):
                chat(sequence, turn)
    llama = LlamaForCausalLM.from_pretrained(stream_llama(engines)).eval()
    assert chats[0].expected[-1][0] == greedy(llama, chats[0].history(), NEW_TOKENS)
    runs: list[tuple[str, Callable[[Sequence, int], None]]] = [
        *((MODEL, chat) for chat in chats), ("transducer", Speech(parts, 1)),
        ("transducer", Speech(parts, 2)), ("accumulator", Sum()), ("accumulator", Sum()),
    ]  # fmt: skip
    with ExitStack() as stack:
        client = stack.enter_context(Client(pair.urls))
        workers = [
            Worker(Sequence(client, model, server=pair.urls[0], timeout=20.0), run)
            for model, run in runs
        ]
        for worker in workers:
            stack.callback(worker.thread.join, 60)
        stack.callback(allow, workers, TURNS, wait=False)
        allow(workers, 4)
        allow(workers, 8, wait=False)
        kill_server(first)
        allow(workers, 8)
        assert {worker.sequence.server for worker in workers} == {pair.urls[1]}
        assert restored(second) >= len(workers)
        again = pair.start(0)
        again.wait_ready()
        allow(workers, 9)
        allow(workers, TURNS, wait=False)
        drained = threading.Thread(target=second.stop)
        drained.start()
        allow(workers, TURNS)
        drained.join()
        assert second.process is not None
        # It ends by itself: 1 is Triton's exit timeout, which it takes for a START that was
        # cancelled before the backend saw it (docs/failures.md), as clients do when they leave.
        assert second.process.returncode in (0, 1), log_end(second)
        assert restored(again) >= len(workers)
        for worker in workers:
            worker.thread.join(60)
    deadline = time.monotonic() + 60
    while left := left_in_folder(store):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def restored(server: TritonServer) -> int:
    """How many sequences a server has restored."""
    time.sleep(1.2)  # metrics are exported once a second
    values = [
        value
        for name, labels, value in samples(server)
        if name == "inplace_snapshots_total" and "restored" in labels.values()
    ]
    assert values
    return int(sum(values))


def log_end(server: TritonServer) -> str:
    assert server.log is not None
    return server.log.read_text(errors="replace")[-3000:]


def stream_llama(engines: Engines) -> Path:
    return engines.get("llama-with-tokenizer", llama_with_tokenizer)
