"""A TensorRT plan on this machine: deserialized, and its aliases checked.

A plan runs on the GPU model and with the TensorRT version that built it. `open_plan` refuses any
other, and `check_native_aliases` compares the aliases that the plan itself reports with the
manifest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import Buffer

from inplace.errors import LoadError
from inplace.schema.artifacts import Plan
from inplace.schema.specs import Alias
from inplace.trt import Log, TensorRT, load_tensorrt


@dataclass(frozen=True)
class OpenPlan:
    """A deserialized plan.

    Attributes:
        tensorrt: the TensorRT that deserialized it.
        engine: ``ICudaEngine``.
        log: the errors that TensorRT reports of it.
        plugins: the registered plugins; None for TensorRT for RTX, which has none.
        runtime: ``IRuntime``, which must outlive the engine.
    """

    tensorrt: TensorRT
    engine: Any
    log: Log
    plugins: Any
    runtime: Any


def open_plan(title: str, read: Callable[[], Buffer], plan: Plan) -> OpenPlan:
    """Deserialize a plan.

    Args:
        title: its name in errors.
        read: returns its content; called only if GPU and TensorRT are the right ones.
        plan: its record in the manifest.

    Raises:
        LoadError: there is no GPU, the plan was built with another TensorRT or for another GPU, or
            TensorRT cannot read it.
    """
    if not torch.cuda.is_available():
        raise LoadError(
            f"{title} was built for a GPU ({plan.gpu or plan.compute_capability}) and PyTorch "
            "finds none on this machine"
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
    installed = tensorrt.api.__version__
    if installed != plan.version:
        raise LoadError(
            f"{title} was built with {plan.flavor} {plan.version}, this machine has {installed}: "
            "a plan runs only with the version that built it; install that one, or build the "
            "model again here"
        )
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    name = torch.cuda.get_device_name()
    if capability != plan.compute_capability or (plan.gpu and name != plan.gpu):
        raise LoadError(
            f"{title} was built for {plan.gpu or 'a GPU'} (compute capability "
            f"{plan.compute_capability}), this machine has {name} ({capability}): build the model "
            "again on this GPU"
        )


def check_native_aliases(title: str, engine: Any, aliases: Sequence[Alias]) -> None:
    """Compare the aliases of TensorRT's cache layers with those that the plan reports.

    Plans of TensorRT 10.15 and later and of TensorRT for RTX report them. Aliases of plugins are
    compared in the first step (`inplace.engines.tensorrt.steps.ExecutionContexts.observe_aliases`).

    Raises:
        LoadError: the plan reports another alias, or this TensorRT reports none.
    """
    for alias in (alias for alias in aliases if alias.kind == "kv_cache_update"):
        aliased_input = getattr(engine, "get_aliased_input_tensor", None)
        if aliased_input is None:
            raise LoadError(
                f"{title} needs a TensorRT with cache layers (10.15 or later): the manifest "
                f"declares the alias {alias}; build it again"
            )
        reported = aliased_input(alias.output)
        if reported != alias.input:
            raise LoadError(
                f"{title}: output {alias.output} is the memory of {reported or 'no input'}, the "
                f"manifest declares the alias {alias}; build the model again"
            )


def input_names(engine: Any) -> frozenset[str]:
    """The names of an engine's inputs; its other tensors are outputs."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return frozenset(name for name in names if "INPUT" in str(engine.get_tensor_mode(name)))
