"""What config.pbtxt must say for an engine: the tensors of the server's model, and its batching.

An operator may edit config.pbtxt, so no checksum covers it. It is compared with the manifest when
the model is loaded: instance groups, parameters, smaller batches, priorities, warm-up and the like
are the operator's; what would answer nothing or refuse everything is refused.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inplace.errors import LoadError
from inplace.protocol import (
    AUDIO,
    AUDIO_INT16,
    FINISH_REASON,
    FOREIGN_PROMPTS,
    INPUT_IDS,
    PROMPT_RANKS,
    PROMPT_TOKEN_LOGPROBS,
    PROMPT_TOKENS,
    PROMPT_TOP_LOGPROBS,
    PROMPT_TOP_TOKENS,
    REUSED_TOKENS,
    STOP,
    TEXT,
    TEXT_OUTPUT,
    TOKENS,
)
from inplace.schema.programs import Program
from inplace.schema.specs import Dtype, Role, TensorSpec
from inplace.server.settings import TRITON_IDLE_MICROSECONDS

TRITON_TYPES = {
    Dtype.BOOL: "TYPE_BOOL",
    Dtype.INT8: "TYPE_INT8",
    Dtype.UINT8: "TYPE_UINT8",
    Dtype.INT16: "TYPE_INT16",
    Dtype.UINT16: "TYPE_UINT16",
    Dtype.INT32: "TYPE_INT32",
    Dtype.INT64: "TYPE_INT64",
    Dtype.FLOAT16: "TYPE_FP16",
    Dtype.BFLOAT16: "TYPE_BF16",
    Dtype.FLOAT32: "TYPE_FP32",
    Dtype.FLOAT64: "TYPE_FP64",
}
"""Triton's names of the element types that it has."""


LOGPROB_DIMS: Mapping[str, tuple[int, ...]] = {
    Role.TOKEN_LOGPROBS.value: (-1,),
    Role.TOP_LOGPROBS.value: (-1, -1),
    Role.TOP_TOKENS.value: (-1, -1),
}
"""The shapes of these outputs: of each token, and of each token so many as the request asks for."""


@dataclass(frozen=True)
class ServerTensor:
    """An input or output of the server's model.

    Attributes:
        name: its name.
        type: its data type, by Triton's name.
        dims: its shape without the batch axis.
        ragged: requests of one batch may have different shapes.
        optional: a request may leave it out.
    """

    name: str
    type: str
    dims: tuple[int, ...]
    ragged: bool = False
    optional: bool = False

    @classmethod
    def of(
        cls, spec: TensorSpec, *, optional: bool = False, may_be_empty: bool = False
    ) -> "ServerTensor":
        """The server's view of a program's tensor.

        An input that may be shorter, or empty because it is absent then, has any number of entries.

        Raises:
            ValueError: Triton has no such type.
        """
        if spec.dtype not in TRITON_TYPES:
            raise ValueError(
                f"{spec.name} is {spec.dtype}, which Triton has no type for: "
                f"convert it in the module (view_as_real, to)"
            )
        varies = spec.shape != () and (spec.shorter != "never" or may_be_empty)
        shape = (-1, *spec.shape[1:]) if varies else spec.shape
        dims = LOGPROB_DIMS.get(spec.role, shape)
        ragged = spec.role is Role.TOKENS or varies
        return cls(spec.name, TRITON_TYPES[spec.dtype], dims, ragged, optional)


PROMPT_LOGPROB_OUTPUTS = tuple(
    ServerTensor(name, TRITON_TYPES[dtype], dims)
    for name, dtype, dims in (
        (PROMPT_TOKENS, Dtype.INT64, (-1,)),
        (PROMPT_TOKEN_LOGPROBS, Dtype.FLOAT32, (-1,)),
        (PROMPT_RANKS, Dtype.INT64, (-1,)),
        (PROMPT_TOP_LOGPROBS, Dtype.FLOAT32, (-1, -1)),
        (PROMPT_TOP_TOKENS, Dtype.INT64, (-1, -1)),
    )
)
"""The outputs of the parameter ``prompt_logprobs``."""


@dataclass(frozen=True)
class ServerTensors:
    """The tensors of the server's model.

    Attributes:
        inputs, outputs: in the order of config.pbtxt.
    """

    inputs: tuple[ServerTensor, ...]
    outputs: tuple[ServerTensor, ...]


def model_tensors(
    program: Program,
    *,
    generates: bool,
    has_tokenizer: bool,
    streams: bool,
    optional: Collection[str] = (),
    prompt_logprobs: bool = False,
) -> ServerTensors:
    """The tensors of an engine's model.

    Args:
        program: the program of a step, or what a request of a schedule takes and is answered with.
        generates: whether it is served for generations too.
        has_tokenizer: whether requests may be texts, and the tokens of a schedule are text.
        streams: whether a request may have several responses.
        optional: the inputs that a request of some schedule leaves out.
        prompt_logprobs: whether requests may ask for log-probabilities of their own tokens.

    Raises:
        ValueError: Triton has no type for a tensor.
    """
    inputs: tuple[ServerTensor, ...] = ()
    for spec in program.client_inputs:
        if spec.role is Role.AUDIO:
            inputs += _AUDIO_INPUTS
        elif spec.role is not Role.OPTION:
            absent = spec.name in optional
            inputs += (ServerTensor.of(spec, optional=generates or absent, may_be_empty=absent),)
    outputs = tuple(ServerTensor.of(spec) for spec in program.outputs)
    outputs += PROMPT_LOGPROB_OUTPUTS if prompt_logprobs else ()
    if generates:
        inputs += _text_inputs(has_tokenizer, ragged=True)
        outputs += (*_generation_outputs(has_tokenizer), REUSED_OUTPUT)
    if any(spec.role is Role.TOKENS for spec in program.outputs):
        outputs += _text_outputs(has_tokenizer)
        outputs += (FINISH_OUTPUT,) if streams else ()
    return ServerTensors(inputs, outputs)


_AUDIO_INPUTS = tuple(
    ServerTensor(name, TRITON_TYPES[dtype], (-1,), ragged=True, optional=True)
    for name, dtype in ((AUDIO, Dtype.FLOAT32), (AUDIO_INT16, Dtype.INT16))
)


def proxy_tensors(*, has_tokenizer: bool, has_logprobs: bool) -> ServerTensors:
    """The tensors of a generate proxy.

    Args:
        has_tokenizer: whether requests may be texts.
        has_logprobs: whether the model has sampling options, and so returns log-probabilities.
    """
    ids = ServerTensor(INPUT_IDS, TRITON_TYPES[Dtype.INT64], (-1,), optional=True)
    # The proxy refuses these, with a sentence that helps.
    foreign = [ServerTensor(name, "TYPE_STRING", (-1,), optional=True) for name in FOREIGN_PROMPTS]
    return ServerTensors(
        (ids, *_text_inputs(has_tokenizer, ragged=False), *foreign),
        _generation_outputs(has_tokenizer) + (_logprob_outputs() if has_logprobs else ()),
    )


def _logprob_outputs() -> tuple[ServerTensor, ...]:
    return tuple(
        ServerTensor(
            role, TRITON_TYPES[Dtype.INT64 if role == Role.TOP_TOKENS else Dtype.FLOAT32], dims
        )
        for role, dims in LOGPROB_DIMS.items()
    )


def _text_inputs(has_tokenizer: bool, *, ragged: bool) -> tuple[ServerTensor, ...]:
    if not has_tokenizer:
        return ()
    return tuple(
        ServerTensor(name, "TYPE_STRING", dims, ragged, optional=True)
        for name, dims in ((TEXT, (1,)), (STOP, (-1,)))
    )


FINISH_OUTPUT = ServerTensor(FINISH_REASON, "TYPE_STRING", (1,))


REUSED_OUTPUT = ServerTensor(REUSED_TOKENS, TRITON_TYPES[Dtype.INT64], (1,))


def _text_outputs(has_tokenizer: bool) -> tuple[ServerTensor, ...]:
    return (ServerTensor(TEXT_OUTPUT, "TYPE_STRING", (1,)),) if has_tokenizer else ()


def _generation_outputs(has_tokenizer: bool) -> tuple[ServerTensor, ...]:
    tokens = ServerTensor(TOKENS, TRITON_TYPES[Dtype.INT64], (-1,))
    return (tokens, *_text_outputs(has_tokenizer), FINISH_OUTPUT)


def check_model_config(
    config: Mapping[str, Any], tensors: ServerTensors, idle_timeout: float | None = None
) -> None:
    """Compare a model configuration with what the backend serves.

    Args:
        config: as Triton passes it, from JSON.
        tensors: what the engine has.
        idle_timeout: seconds after which the backend ends an idle sequence; None for a model
            without sequences.

    Raises:
        LoadError: with every difference that cannot work.
    """
    differences = [
        *_tensor_differences("input", config.get("input", []), tensors.inputs),
        *_tensor_differences("output", config.get("output", []), tensors.outputs),
        *_unsupported(config),
    ]
    if idle_timeout is not None:
        differences += _sequence_differences(config.get("sequence_batching", {}), idle_timeout)
    if differences:
        raise LoadError(
            f"config.pbtxt does not fit the engine: {'; '.join(differences)}: change it back, or "
            "build the model again to restore it"
        )


def _tensor_differences(
    kind: str, configured: Sequence[Mapping[str, Any]], expected: Sequence[ServerTensor]
) -> Iterator[str]:
    """The differences in the inputs or in the outputs; their order is the operator's."""
    by_name = {tensor.name: tensor for tensor in expected}
    names = [entry["name"] for entry in configured]
    for entry in configured:
        name = entry["name"]
        if name not in by_name:
            yield f"{kind} {name} is not one of the engine's {kind}s {list(by_name)}"
            continue
        tensor = by_name[name]
        if entry["data_type"] != tensor.type:
            yield f"{kind} {name} is {entry['data_type']}, the engine's is {tensor.type}"
        # Triton writes 64-bit numbers as numbers or as texts.
        dims = [int(extent) for extent in entry.get("dims", [])]
        if dims != list(tensor.dims):
            yield f"{kind} {name} has dims {dims}, the engine's are {list(tensor.dims)}"
        if entry.get("reshape"):
            yield f"{kind} {name} has a reshape, which the engine does not have"
        if kind == "input" and tensor.optional and not entry.get("optional", False):
            yield f"input {name} is not optional, and requests of one kind leave it out"
    for tensor in expected:
        if tensor.name not in names and not tensor.optional:
            yield f"{kind} {tensor.name} is missing"


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """What Triton can do with a model, and may not with one that keeps state."""
    for name in ("batch_input", "batch_output"):
        if config.get(name):
            yield f"{name} is not used by this backend"
    if config.get("response_cache", {}).get("enable", False):
        yield "response_cache would answer a request without a step of its sequence"


def _sequence_differences(batching: Mapping[str, Any], idle_timeout: float) -> Iterator[str]:
    if "direct" in batching:
        yield "sequence_batching has the strategy direct, the backend needs oldest"
    for name in ("control_input", "state"):
        if batching.get(name):
            names = [entry.get("name", entry.get("input_name", "")) for entry in batching[name]]
            yield f"sequence_batching has the {name} {names}; the backend keeps both itself"
    if batching.get("iterative_sequence", False):
        yield "sequence_batching has iterative_sequence, which the backend does not use"
    configured = int(batching.get("max_sequence_idle_microseconds", 0))
    triton_idle = configured or TRITON_IDLE_MICROSECONDS
    if triton_idle < round(idle_timeout * 1e6):
        yield (
            f"max_sequence_idle_microseconds is {triton_idle}, below the backend's "
            f"idle_timeout_seconds {idle_timeout:.15g}: Triton would forget sequences that the "
            "backend keeps"
        )
