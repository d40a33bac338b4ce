"""Models whose instances share the engine of the first."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from inplace.server.settings import SHARE_ENGINE
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.tritonserver import TritonServer
from transformers import LlamaForCausalLM
from tritonclient.grpc import model_config_pb2 as pb

from support.engines import Engines
from support.faults import idle_after
from support.generating import long_stream
from support.models import accumulator
from support.observed import by_instance
from support.pool import Deployment, ServerPool

SLOTS = 4


@dataclass(frozen=True)
class Shared:
    """A server with ``shared_<kind>`` for each kind that was asked for."""

    server: TritonServer
    llama: LlamaForCausalLM

    def sums(self, model: str, name: str) -> list[float]:
        """A metric, in the order of the instances' names; of several labels the sum."""
        sums = by_instance(self.server, model, name)
        return [sums[instance] for instance in sorted(sums)]


def share(config: pb.ModelConfig, instances: int) -> None:
    """Let so many instances use one engine; sequences stay until they end."""
    config.instance_group[0].count = instances
    config.parameters[SHARE_ENGINE].string_value = "on"
    idle_after(config, 3600.0)


def shared_models(engines: Engines, kinds: Sequence[str], instances: int) -> list[Deployment]:
    """Deployments: ``unary`` and ``flow`` are accumulators, ``text`` is a language model."""

    def build(path: Path) -> None:
        options = BuildOptions(slots=SLOTS, max_rows=SLOTS, capacity=1)
        model = accumulator(max_rows=SLOTS)
        write_engine(model, path / "unary", options)
        write_engine(model, path / "flow", replace(options, serve="stream"))

    folder = engines.get("shared-accumulators", build)
    sources = {kind: folder / kind for kind in ("unary", "flow")}
    sources["text"] = long_stream(engines, SLOTS)[1]
    return [
        Deployment(sources[kind], f"shared_{kind}", partial(share, instances=instances))
        for kind in kinds
    ]


@contextmanager
def serve_shared(
    engines: Engines, pool: ServerPool, instances: int, kinds: Sequence[str]
) -> Iterator[Shared]:
    """Serve these kinds by so many instances each."""
    with pool.serve(*shared_models(engines, kinds, instances)) as server:
        yield Shared(server, long_stream(engines, SLOTS)[0])
