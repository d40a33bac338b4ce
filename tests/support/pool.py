"""One tritonserver for many tests: models are loaded and unloaded while it runs."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf import text_format
from inplace.schema.proxy import SUFFIX, ProxyFile
from inplace_builder.tools.tritonserver import Ports, TritonServer
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import model_config_pb2 as pb

Change = Callable[[pb.ModelConfig], None]
"""Changes a configuration in place."""

EXPLICIT = (
    "--model-control-mode=explicit",
    "--exit-timeout-secs=1",
    "--grpc-header-forward-pattern=x-tenant",
    "--http-header-forward-pattern=x-tenant",
)


def reconfigure(model: Path, change: Change | None = None, name: str = "") -> None:
    """Change a model's config.pbtxt, and its name where one is given."""
    file = model / "config.pbtxt"
    config = text_format.Parse(file.read_text(), pb.ModelConfig())
    config.name = name or config.name
    if change is not None:
        change(config)
    file.write_text(text_format.MessageToString(config))


def warmed(config: pb.ModelConfig) -> None:
    """Let Triton warm the model up with two requests."""
    warmup = config.model_warmup.add(name="warm", batch_size=1, count=2)
    tensor = config.input[0]
    warmup.inputs[tensor.name].data_type = tensor.data_type
    warmup.inputs[tensor.name].dims.extend(max(extent, 1) for extent in tensor.dims)
    warmup.inputs[tensor.name].zero_data = True


@dataclass(frozen=True)
class Deployment:
    """A built model to be served.

    Attributes:
        source: its folder; the server gets a copy.
        name: of the copy; empty keeps the folder's.
        change: made in the configuration of the copy.
        proxy: whether the generate proxy beside it is served too.
    """

    source: Path
    name: str = ""
    change: Change | None = None
    proxy: bool = False

    def copy_to(self, repository: Path) -> list[str]:
        """Copy the model, and its proxy, into a model repository; the names of what was copied."""
        name = self.name or self.source.name
        shutil.copytree(self.source, repository / name)
        reconfigure(repository / name, self.change, name)
        if not self.proxy:
            return [name]
        front = repository / f"{name}{SUFFIX}"
        shutil.copytree(self.source.with_name(self.source.name + SUFFIX), front)
        reconfigure(front, name=front.name)
        version = front / "1"
        ProxyFile.load(version).model_copy(update={"model": name}).save(version)
        return [name, front.name]


class ServerPool:
    """A tritonserver with explicit model control: each test module has its models loaded into it.

    Tests that kill a server, end it, or give it arguments of their own start one of their own.

    Args:
        folder: of the model repository and the log.
    """

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.repository.mkdir()
        self.server = TritonServer(
            self.repository, Ports(0, 0, 0), log=folder / "log", arguments=EXPLICIT
        )

    @contextlib.contextmanager
    def serve(self, *deployments: Deployment) -> Iterator[TritonServer]:
        """Inside the block the server has these models; their names must be free."""
        with InferenceServerClient(self.server.grpc_url) as client:
            loaded: list[str] = []
            for deployment in deployments:
                for name in deployment.copy_to(self.repository):
                    client.load_model(name)
                    loaded.append(name)
            try:
                yield self.server
            finally:
                for name in reversed(loaded):
                    client.unload_model(name)
                    shutil.rmtree(self.repository / name)

    def __enter__(self) -> Self:
        self.server.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.__exit__(kind, error, trace)
