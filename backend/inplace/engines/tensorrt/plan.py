"""From the bytes of a plan to an engine of TensorRT: on the right machine, with the right version, and aliasing what was declared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.served import Alias
from inplace.trt import Log, TensorRT, load_tensorrt


@dataclass(frozen=True)
class OpenPlan:
    """A deserialized plan.

    Attributes:
        tensorrt: what runs it.
        engine: ``ICudaEngine``.
        log: what TensorRT says of it.
        plugins: ours, registered; None for TensorRT for RTX, which takes none.
        runtime: keeps the engine alive.
    """

    tensorrt: TensorRT
    engine: Any
    log: Log
    plugins: Any
    runtime: Any


def open_plan(title: str, read: Callable[[], bytes], plan: Plan) -> OpenPlan:
    """Deserialize a plan.

    Args:
        title: its name in errors.
        read: its content; asked for when everything else is known to fit.
        plan: what the manifest says of it.

    Raises:
        LoadError: there is no GPU, it was built with another TensorRT or for another GPU, or it cannot be read.
    """
    if not torch.cuda.is_available():
        raise LoadError(
            f"{title} was built for a GPU ({plan.gpu or plan.compute_capability}) and this machine has none that PyTorch can use"
        )
    tensorrt = load_tensorrt(plan.flavor)
    _check_machine(title, plan, tensorrt)
    plugins = None
    if not tensorrt.is_rtx:
        from inplace.plugins import plugins as registered

        plugins = registered(tensorrt)
    log = tensorrt.log()
    runtime = log.watch(tensorrt.api.Runtime(log.logger))
    engine = runtime.deserialize_cuda_engine(read())
    if engine is None:
        raise LoadError(
            f"{title} cannot be read by {tensorrt}: {log.last_errors()}; build the model again"
        )
    return OpenPlan(tensorrt, engine, log, plugins, runtime)


def _check_machine(title: str, plan: Plan, tensorrt: TensorRT) -> None:
    found = tensorrt.api.__version__
    if found != plan.version:
        raise LoadError(
            f"{title} was built with {plan.flavor} {plan.version}, this machine has {found}: a plan runs with the version that built it; "
            f"install that one, or build the model again here"
        )
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    name = torch.cuda.get_device_name()
    if capability != plan.compute_capability or (plan.gpu and name != plan.gpu):
        raise LoadError(
            f"{title} was built for {plan.gpu or 'a GPU'} (compute capability {plan.compute_capability}), this machine has {name} "
            f"({capability}): build the model again on this GPU"
        )


def check_native_aliases(title: str, engine: Any, aliases: Sequence[Alias]) -> None:
    """Compare declared aliases with those the plan reports (TensorRT 10.15 and later, TensorRT for RTX).

    Aliases of plugins are compared with the addresses that the plugins see in the first run, see `Contexts.observed`.
    """
    for alias in (alias for alias in aliases if alias.kind == "kv_cache_update"):
        reported = getattr(engine, "get_aliased_input_tensor", None)
        if reported is None:
            raise LoadError(
                f"{title} runs on a TensorRT without cache layers (10.15 has them), the manifest says {alias}; build it again"
            )
        found = reported(alias.output)
        if found != alias.input:
            raise LoadError(
                f"{title}: output {alias.output} is the memory of {found or 'no input'}, the manifest says {alias}; build the model again"
            )
