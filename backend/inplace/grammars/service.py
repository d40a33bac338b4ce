"""Compiled grammars and the masks of generations, made by processes of their own.

The server's process never compiles a grammar: `inplace.grammars.worker` does, in one process for
each grammar, which ends if it takes too much (docs/adr/0042-grammars.md).
"""

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from time import monotonic

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from inplace.errors import Code, RequestError
from inplace.grammars import worker
from inplace.grammars.source import GrammarSource

COMPILE_SECONDS, TOKEN_SECONDS = 3.0, 1.0
"""Seconds of processor time that a grammar may take to be compiled, and for each token."""


MEMORY_MEGABYTES = 512
"""Megabytes that a grammar may take."""


MAX_WAIT = 10.0
"""How many times as long as its limit a grammar may take on a busy machine, where it gets only part
of a processor."""


MAX_COMPILING, MAX_WAITING = 2, 32
"""Grammars that are compiled at the same time, and those that may wait for it."""


MAX_CACHED = 64
"""Compiled grammars, and errors of others, that are kept for later requests."""


MAX_GENERATED = 32768
"""Tokens that a grammar may follow at once: those of the prompt that count as generated."""


START_SECONDS = 120.0
"""Seconds for which the first process may load the tokenizer."""


@dataclass(frozen=True, slots=True)
class Next:
    """What may come next in a generation.

    Attributes:
        mask: int32 ``[words]``, a bit for each token; None if nothing may come any more.
        may_end: the text may end here.
        error: why the grammar cannot be followed; there is no mask then.
    """

    mask: NDArray[np.int32] | None = None
    may_end: bool = False
    error: RequestError | None = None


class GrammarMatcher:
    """Follows one generation through its grammar.

    After each `advance`, `receive` is to be called once `wait_for_masks` returns it.

    Args:
        connection: to the process of the grammar.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = inf

    def fileno(self) -> int:
        """The descriptor of its socket."""
        return self._connection.fileno()

    @property
    def is_late(self) -> bool:
        """Whether its process should have answered long ago."""
        return monotonic() > self._deadline

    def advance(self, tokens: Sequence[int]) -> None:
        """Send the tokens that were generated since, and ask what may come next."""
        self._deadline = monotonic() + TOKEN_SECONDS * MAX_WAIT
        with contextlib.suppress(OSError):  # `receive` finds that the process has ended
            self._connection.send(worker.TOKENS + array("i", tokens).tobytes())

    def receive(self) -> Next:
        """What may come next. Does not wait."""
        try:
            packet = self._connection.recv(worker.MAX_PACKET, socket.MSG_DONTWAIT)
        except OSError:
            packet = b""
        status, content = packet[:1], packet[1:]
        if status in (worker.MASK, worker.MASK_AT_END):
            mask = np.frombuffer(content, dtype="<i4")
            return Next(mask, status == worker.MASK_AT_END)
        if status == worker.COMPLETE:
            return Next(may_end=True)
        if status == worker.ERROR:
            return Next(error=_refusal(f"cannot be followed any further: {_text(content)}"))
        return Next(
            error=_refusal(
                f"took more than {TOKEN_SECONDS:g} s for a token, or more than"
                f" {MEMORY_MEGABYTES} MB: simplify it"
            )
        )

    def close(self) -> None:
        """End it; the process forgets it."""
        self._connection.close()


def wait_for_masks(matchers: Collection[GrammarMatcher], timeout: float) -> list[GrammarMatcher]:
    """Those to which `GrammarMatcher.receive` has an answer; waits up to ``timeout`` seconds."""
    poll = select.poll()
    by_descriptor = {matcher.fileno(): matcher for matcher in matchers}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    ready = [by_descriptor[descriptor] for descriptor, _ in poll.poll(timeout * 1000)]
    return ready + [each for each in matchers if each.is_late and each not in ready]


class CompiledGrammar:
    """A grammar whose process is ready.

    Args:
        control: to the process.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()

    def matcher(self, end_token_ids: Collection[int]) -> GrammarMatcher:
        """Follow a generation.

        Args:
            end_token_ids: tokens that end it: they may come where the grammar may end, and only
                there.

        Raises:
            OSError: the process has ended.
        """
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            try:
                with self._lock:
                    packet = worker.GENERATION + array("i", sorted(end_token_ids)).tobytes()
                    socket.send_fds(self._control, [packet], [other.fileno()])
            except OSError:
                mine.close()
                raise
        return GrammarMatcher(mine)

    @property
    def is_alive(self) -> bool:
        """Whether its process has not ended."""
        try:
            return bool(self._control.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Let the process end with its last generation."""
        self._control.close()


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps them. Thread-safe.

    Its first process starts with the first grammar.

    Args:
        tokenizer: of the model.
        vocab_size: how many scores the model gives.
        eos_token_ids: the model's end tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos = sorted(token for token in eos_token_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._cache: OrderedDict[GrammarSource, Future[CompiledGrammar]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs: socket.socket | None = None

    def compile(self, source: GrammarSource) -> "Future[CompiledGrammar]":
        """The compiled grammar, soon; or the `RequestError` that it cannot be."""
        with self._lock:
            if (known := self._cache.get(source)) is not None:
                self._cache.move_to_end(source)
                if not _has_died(known):
                    return known
                _close(known)
            waiting = sum(not each.done() for each in self._cache.values())
            if waiting >= MAX_COMPILING + MAX_WAITING:
                refused: Future[CompiledGrammar] = Future()
                refused.set_exception(
                    RequestError(
                        Code.QUEUE_FULL,
                        f"{waiting} grammars wait to be compiled; send it again later",
                        retryable=True,
                    )
                )
                return refused
            if self._threads is None:
                self._threads = ThreadPoolExecutor(MAX_COMPILING, "inplace-grammars")
            future = self._threads.submit(self._compile, source)
            self._cache[source] = future
            self._drop_oldest()
            return future

    def _drop_oldest(self) -> None:
        done = [source for source, future in self._cache.items() if future.done()]
        for source in done[: max(0, len(self._cache) - MAX_CACHED)]:
            _close(self._cache.pop(source))

    def _compile(self, source: GrammarSource) -> CompiledGrammar:
        job = f"{source.kind}\n{source.text}".encode()
        if len(job) > worker.MAX_PACKET:
            raise _refusal(
                f"has {len(job)} bytes with the white space of each of its JSON schemas, and at"
                f" most {worker.MAX_PACKET} are supported: use fewer schemas"
            )
        jobs = self._started()
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            socket.send_fds(jobs, [job], [other.fileno()])
        mine.settimeout(COMPILE_SECONDS * MAX_WAIT)
        try:
            packet = mine.recv(worker.MAX_PACKET)
        except OSError:
            packet = b""
        if packet[:1] == worker.COMPILED:
            mine.setblocking(True)
            return CompiledGrammar(mine)
        mine.close()
        if packet:
            raise _refusal(f"is refused: {_text(packet[1:])}")
        raise _refusal(
            f"took more than {COMPILE_SECONDS:g} s or {MEMORY_MEGABYTES} MB to be compiled:"
            f" simplify it"
        )

    def _started(self) -> socket.socket:
        """The socket of the first process, which is started if it is not running."""
        with self._starting:
            if self._process is not None and self._process.poll() is None:
                assert self._jobs is not None
                return self._jobs
            if self._jobs is not None:
                self._jobs.close()
            self._jobs, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other:
                self._process = self._start(other.fileno())
            self._jobs.settimeout(START_SECONDS)
            try:
                packet = self._jobs.recv(worker.MAX_PACKET)
            except OSError:
                packet = b""
            if packet != worker.COMPILED:
                self._process.kill()
                self._process.wait()
                if not packet:
                    raise OSError("the process that compiles grammars does not start")
                raise RequestError(
                    Code.BAD_PARAMETER,
                    "grammars are not available: the tokenizer of this model is not one of bytes"
                    f" ({_text(packet[1:])}); leave the grammar out",
                )
            self._jobs.settimeout(None)
            return self._jobs

    def _start(self, descriptor: int) -> "subprocess.Popen[bytes]":
        settings = {
            "vocab_size": self._vocab_size,
            "eos": self._eos,
            "megabytes": MEMORY_MEGABYTES,
            "compile_seconds": COMPILE_SECONDS,
            "token_seconds": TOKEN_SECONDS,
        }
        with os.fdopen(os.memfd_create("tokenizer"), "w+", encoding="utf-8") as file:
            file.write(_readable(self._tokenizer))
            file.seek(0)
            return subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # its folder has modules that are none of its own
                    worker.__file__,
                    str(descriptor),
                    str(file.fileno()),
                    json.dumps(settings),
                ],
                pass_fds=[descriptor, file.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            futures = list(self._cache.values())
            self._cache.clear()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for future in futures:
            _close(future)
        if self._jobs is not None:
            self._jobs.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _readable(tokenizer: Tokenizer) -> str:
    """A tokenizer as the library reads it.

    It takes a tokenizer with byte fallback for one whose tokens are not bytes, also where bytes are
    what its decoder ends with, as in those that transformers makes from GGUF files.
    """
    fields = json.loads(tokenizer.to_str())
    parts = (fields["decoder"] or {}).get("decoders", [])
    for byte_level in (each for each in parts if each["type"] == "ByteLevel"):
        fields["decoder"] = byte_level
    return json.dumps(fields)


def _has_died(future: "Future[CompiledGrammar]") -> bool:
    """Whether its process has ended, or was not reached; not if the grammar was refused."""
    if not future.done():
        return False
    if future.cancelled():
        return True
    if (error := future.exception()) is not None:
        return not isinstance(error, RequestError)
    return not future.result().is_alive


def _close(future: "Future[CompiledGrammar]") -> None:
    if future.done() and not future.cancelled() and future.exception() is None:
        future.result().close()


def _text(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())


def _refusal(reason: str) -> RequestError:
    return RequestError(Code.BAD_PARAMETER, f"the grammar {reason}")
