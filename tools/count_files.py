"""Count the files of this project that one job enters: how far a reader has to walk.

``count_files.py token REPOSITORY MODEL`` serves a stream model with the real tritonserver and
streams one sampled generation; it lists the files entered between the request's arrival and the
last response, and beside them the kernels and plugins that the engine recorded while it was loaded
(a CUDA graph replays them without entering Python). Threads that wake by the clock are left out.
It needs what the server needs, and no transformers, so the engine may come from another
environment::

    builder/bin/inplace build MODEL --output REPOSITORY/llama --engine tensorrt --serve stream
    server/bin/python tools/count_files.py token REPOSITORY llama

``count_files.py build`` builds a plain `nn.Module` with `inplace_builder.build`; it also counts
how often the call comes back to a file that it has left.
"""

import argparse
import inspect
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGES = {
    f"{Path(spec.origin).parent}/": f"{name}/"
    for name in ("inplace", "inplace_builder")
    if (spec := find_spec(name)) is not None and spec.origin is not None
}
"""The folder of each package, and how its files are called here."""


CLOCK_THREADS = ("inplace-places", "inplace-metrics")
"""Threads that ask the server whether it stops, and that export metrics, once in a while: no token
passes them."""


LAUNCH = "/triton/runtime/jit.py"
"""The file whose ``run`` launches a kernel. Kernels are compiled, so Python never enters them."""


GENERATION: dict[str, Any] = {
    "max_tokens": 16,
    "ignore_eos": True,
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "seed": 1,
}


TRACED_MODEL = """
import json, sys
sys.path.insert(0, {tools!r})
from count_files import Walk
walk = Walk()
walk.start()
from inplace.model import TritonPythonModel as Model

class TritonPythonModel(Model):
    executions = 0

    def initialize(self, args):
        walk.clear()
        super().initialize(args)
        self.loaded = walk.files()
        self.model_execute, self.execute = self.execute, self.count

    def count(self, requests):
        if self.executions == 0:
            walk.clear()
        elif self.executions == 1:  # END: what came before belongs to the generation
            with open({out!r}, "w") as file:
                json.dump({{"loaded": self.loaded, "served": walk.files()}}, file)
        self.executions += 1
        return self.model_execute(requests)
"""


class Walk:
    """The files of this project in the order in which they are first entered.

    Importing a file does not enter it. Launching a kernel of Triton's language enters its file, and
    those of the device functions that it calls.

    Attributes:
        returns: how often a file was entered again after another one.
    """

    def __init__(self) -> None:
        self._order: dict[str, None] = {}
        self._last: dict[int, str] = {}
        self._imports: dict[int, int] = {}  # thread → modules that are being imported
        self.returns = 0

    def start(self) -> None:
        """Watch this thread and every thread that starts from now on."""
        sys.setprofile(self._enter)
        threading.setprofile(self._enter)

    def stop(self) -> None:
        """Watch nothing any more."""
        sys.setprofile(None)
        threading.setprofile(None)

    def clear(self) -> None:
        """Forget what was entered."""
        self._order.clear()

    def files(self) -> list[str]:
        """Paths from the package's folder, in order."""
        return list(self._order)

    def _enter(self, frame: FrameType, event: str, argument: object) -> None:
        thread, code = threading.get_ident(), frame.f_code
        if event in ("call", "return") and code.co_name == "<module>":
            change = 1 if event == "call" else -1
            # Modules whose import began before the walk return too.
            self._imports[thread] = max(0, self._imports.get(thread, 0) + change)
        if event != "call" or self._imports.get(thread, 0):
            return
        if code.co_name == "run" and code.co_filename.endswith(LAUNCH):
            for kernel in _device_code(frame.f_locals["self"]):
                self._add(thread, kernel)
        elif code.co_flags & inspect.CO_OPTIMIZED:  # a function, not the body of a class
            self._add(thread, code)

    def _add(self, thread: int, code: CodeType) -> None:
        name = code.co_filename
        folder = next((folder for folder in PACKAGES if name.startswith(folder)), None)
        if folder is None or threading.current_thread().name in CLOCK_THREADS:
            return
        name = PACKAGES[folder] + name.removeprefix(folder)
        if name in self._order and self._last.get(thread) != name:
            self.returns += 1
        self._last[thread] = name
        self._order.setdefault(name)


def _device_code(kernel: Any) -> list[CodeType]:
    """The code of a kernel and of all device functions that it calls."""
    todo, seen = [kernel], []
    while todo:
        function = todo.pop().fn
        if function.__code__ in seen:
            continue
        seen.append(function.__code__)
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        todo += [value for value in named if hasattr(value, "fn") and callable(value.fn)]
    return seen


def count_token(repository: Path, model: str) -> dict[str, Any]:
    """Stream one generation of ``model``; the files entered while it was served and loaded."""
    from inplace.client import Client, Sequence
    from inplace_builder.tools.tritonserver import Ports, TritonServer, install_backend

    with tempfile.TemporaryDirectory() as scratch:
        backends, out = Path(scratch) / "backends", Path(scratch) / "files.json"
        install_backend(backends)
        text = TRACED_MODEL.format(tools=str(Path(__file__).resolve().parent), out=str(out))
        (backends / "inplace" / "model.py").write_text(text)
        only = ["--model-control-mode=explicit", f"--load-model={model}"]
        log = Path(scratch) / "server.log"
        with (
            TritonServer(
                repository, Ports(0, 0, 0), log=log, arguments=only, backends=backends
            ) as server,
            Client(server.grpc_url) as client,
            Sequence(client, model) as sequence,
        ):
            tokens = [
                token
                for piece in sequence.generate([1, 2, 3], **GENERATION)
                for token in piece.tokens
            ]
        assert len(tokens) == GENERATION["max_tokens"], tokens
        entered: dict[str, list[str]] = json.loads(out.read_text())
    device = [name for name in entered["loaded"] if "/kernels/" in name or "/plugins/" in name]
    files = [*entered["served"], *(name for name in device if name not in entered["served"])]
    return {"files": files, "count": len(files), "entered_while_serving": entered["served"]}


def count_build() -> dict[str, Any]:
    """Build a module with a cache; the files entered, and how often the call came back to one."""
    import torch
    from inplace_builder import build

    class Cached(torch.nn.Module):
        cache: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.register_buffer("cache", torch.zeros(1, 32, 8))

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            self.cache.index_copy_(1, position, self.linear(x))
            return torch.softmax(x @ self.cache.transpose(1, 2), -1) @ self.cache

    walk = Walk()
    with tempfile.TemporaryDirectory() as scratch:
        walk.start()
        build(Cached(), (torch.zeros(1, 1, 8), torch.tensor([3])), path=Path(scratch) / "engine")
        walk.stop()
    files = walk.files()
    return {"files": files, "count": len(files), "returns": walk.returns}


def main() -> None:
    """Entry point; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    token = what.add_parser("token")
    token.add_argument("repository", type=Path)
    token.add_argument("model")
    what.add_parser("build")
    given = parser.parse_args()
    counts: dict[str, Callable[[], dict[str, Any]]] = {
        "token": lambda: count_token(given.repository, given.model),
        "build": count_build,
    }
    json.dump(counts[given.what](), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
