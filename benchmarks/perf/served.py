"""A built decoder on a real tritonserver, with the configuration that a measurement needs."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from google.protobuf import text_format
from inplace.schema.served import Manifest
from inplace.server.settings import SHARE_ENGINE
from inplace_builder.served.model_config import TextSettings, model_config
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import Ports, TritonServer
from tritonclient.grpc import model_config_pb2 as pb

from benchmarks.perf.nothing import write_nothing

Serve = Literal["step", "stream"]


@contextmanager
def served(
    model: Path,
    manifest: Manifest,
    serve: Serve,
    *,
    instances: int = 1,
    gpus: tuple[int, ...] = (),
    shared: bool = False,
    nothing: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Iterator[TritonServer]:
    """Serve it under the name of its manifest.

    Args:
        model: a built decoder in a model repository; its own configuration is used if it was built
            for this protocol.
        manifest: of its engine.
        serve: the protocol.
        instances: processes on each GPU, each with an engine and an arena of its own.
        gpus: those that serve it; empty for those of the model's own configuration.
        shared: they use the engine and the arena of the first.
        nothing: a model with the same configuration that computes nothing, in its place.
        settings: further parameters of its configuration.
    """
    config = text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())
    if config.model_transaction_policy.decoupled != (serve == "stream"):
        text_settings = TextSettings() if serve == "stream" else None
        config = model_config(manifest, BuildOptions(serve=serve), text_settings).proto()
    config.instance_group[0].count = instances
    if gpus:
        config.instance_group[0].gpus[:] = gpus
    if shared:
        config.parameters[SHARE_ENGINE].string_value = "on"
    for name, value in (settings or {}).items():
        config.parameters[name].string_value = value
    text = text_format.MessageToString(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repository" / manifest.name
        if nothing:
            names = manifest.program("step").decoder_io
            assert names is not None
            write_nothing(folder, text, names[1], decoupled=serve == "stream")
        else:
            folder.mkdir(parents=True)
            (folder / "1").symlink_to((model / "1").resolve())
            (folder / "config.pbtxt").write_text(text)
        with TritonServer(
            folder.parent, Ports(0, 0, 0), log=Path(scratch) / "log", trust_models=[model]
        ) as server:
            yield server
