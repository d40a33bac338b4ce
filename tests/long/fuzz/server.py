"""The server that is fuzzed, and whether it is still the one that was started."""

import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
from fuzz.wire import message
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import TritonServer
from support.models import CAPACITY, CHUNK, accumulator, tiny_llama
from support.vocabulary import save_byte_fallback, save_tokenizer
from tritonclient.grpc import service_pb2_grpc

SLOTS, IDLE = 32, 15.0


def built(folder: Path) -> Path:
    """A repository with the tiny Llama for steps and for streams, and the accumulator.

    The text of the stream model is made of byte tokens, which characters are divided into.
    """
    repository, source = folder / "repository", folder / "source"
    tiny_llama(source)
    save_tokenizer(source)
    options = BuildOptions(
        slots=SLOTS, max_rows=8, capacity=CAPACITY, chunk=CHUNK, idle_timeout=IDLE
    )
    build_decoder(source, repository / "llama", options)
    save_byte_fallback(source)
    build_decoder(source, repository / "stream", replace(options, serve="stream"))
    write_engine(
        accumulator(),
        repository / "accumulator",
        BuildOptions(slots=SLOTS, max_rows=4, capacity=1, idle_timeout=IDLE),
    )
    return repository


class Watch:
    """Looks at a server before and after."""

    def __init__(self, server: TritonServer) -> None:
        self.server = server
        self.processes = self._processes()
        self.seen_lines = len(self._log())

    def complaints(self) -> list[str]:
        """What is not as it should be after everything has been idle: processes, log, slots."""
        result = []
        if (now := self._processes()) != self.processes:
            result.append(f"the server's processes were {self.processes}, now {now}")
        log = self._log()[self.seen_lines :]
        if not now:
            return [*result, *(f"the end of the log: {line}" for line in log[-30:])]
        result += [
            f"in the log: {line}"
            for line in log
            if re.match(r"E\d{4} ", line) or "Traceback" in line or "ENGINE_FAILED" in line
        ]
        time.sleep(IDLE + 0.5)
        one = {"input_ids": np.array([[1]])}
        try:
            with grpc.insecure_channel(self.server.grpc_url) as channel:
                infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
                for start in (True, False):
                    for number in range(SLOTS):
                        infer(
                            message("llama", one, f"new {number}", start=start, end=not start),
                            timeout=30,
                        )
        except grpc.RpcError as error:
            result.append(f"after all sequences have been idle, not all slots are free: {error}")
        time.sleep(1.5)  # the numbers are handed over once a second
        with urllib.request.urlopen(
            f"http://{self.server.host}:{self.server.ports.metrics}/metrics", timeout=30
        ) as page:
            live = re.findall(
                r"^inplace_(?:sequences_live|requests_waiting)\{.*\} (?!0$).*",
                page.read().decode(),
                re.MULTILINE,
            )
        return [*result, *(f"after all clients have left: {number}" for number in live)]

    def _log(self) -> list[str]:
        assert self.server.log is not None
        return self.server.log.read_text(errors="replace").splitlines()

    def _processes(self) -> list[tuple[int, str]]:
        assert self.server.process is not None
        if self.server.process.poll() is not None:
            return []
        return sorted(
            (child.pid, child.name())
            for child in psutil.Process(self.server.process.pid).children(recursive=True)
        )
