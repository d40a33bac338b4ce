"""config.pbtxt: what the server must know of a model, as dataclasses, written through Triton's own protobuf schema."""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf import text_format
from inplace.protocol import FINISH_REASON, STOP, TEXT, TEXT_OUTPUT, TOKENS
from inplace.schema.dtypes import Dtype
from inplace.schema.served import Manifest
from inplace.schema.specs import Role, TensorSpec
from inplace.server.settings import EOS, IDLE_TIMEOUT, MAX_WAITING, QUEUE, SERVE
from tritonclient.grpc import model_config_pb2 as pb

from inplace_builder.errors import BuildError

BACKEND = "inplace"


CANDIDATES = 16384
"""Sequences that Triton accepts at the same time. With all of them taken a START waits in Triton, in silence, where the backend would have
refused it or put it into a queue of its own. A sequence that the backend refused, or whose client vanished, holds its place until it is
idle for too long, so there must be far more than slots. 65536 cost the server 50 MB and no measurable time."""


LONGEST_GENERATION = 3600
"""Seconds. Triton's idle clock runs while a generation does: after a longer one Triton has forgotten its sequence."""


TRITON_TYPES = {
    Dtype.BOOL: pb.TYPE_BOOL,
    Dtype.INT8: pb.TYPE_INT8,
    Dtype.UINT8: pb.TYPE_UINT8,
    Dtype.INT16: pb.TYPE_INT16,
    Dtype.UINT16: pb.TYPE_UINT16,
    Dtype.INT32: pb.TYPE_INT32,
    Dtype.INT64: pb.TYPE_INT64,
    Dtype.FLOAT16: pb.TYPE_FP16,
    Dtype.BFLOAT16: pb.TYPE_BF16,
    Dtype.FLOAT32: pb.TYPE_FP32,
    Dtype.FLOAT64: pb.TYPE_FP64,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of the server's model; ``dims`` without the batch axis, ``type`` Triton's."""

    name: str
    type: int
    dims: tuple[int, ...]
    ragged: bool = False
    optional: bool = False

    @classmethod
    def of(cls, spec: TensorSpec, *, optional: bool = False) -> "Tensor":
        """The server's view of a program's tensor; BuildError where Triton has no such type."""
        if spec.dtype not in TRITON_TYPES:
            raise BuildError(
                f"{spec.name} is {spec.dtype}, which Triton has no type for: convert it in the module (view_as_real, to)"
            )
        return cls(
            spec.name,
            TRITON_TYPES[spec.dtype],
            spec.shape,
            ragged=spec.role is Role.TOKENS,
            optional=optional,
        )


@dataclass(frozen=True)
class SequenceBatching:
    """Strategy Oldest.

    Attributes:
        candidates: sequences Triton accepts at the same time.
        idle_microseconds: Triton's own idle timeout.
        queue_delay_microseconds: how long a batch that is not full may wait for more rows.
    """

    candidates: int
    idle_microseconds: int
    queue_delay_microseconds: int


@dataclass(frozen=True)
class ModelConfig:
    """One config.pbtxt.

    Attributes:
        sequence_batching: None in a model without sequences.
        decoupled: a request may have any number of responses.
        parameters: for the backend, see `inplace.server.settings`.
        instances: processes that serve it.
    """

    name: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sequence_batching: SequenceBatching | None
    decoupled: bool
    device: str
    parameters: Mapping[str, str]
    instances: int = 1

    def proto(self) -> pb.ModelConfig:
        """As Triton's ModelConfig message."""
        config = pb.ModelConfig(name=self.name, backend=BACKEND, max_batch_size=self.max_batch_size)
        for tensor in self.inputs:
            config.input.add(
                name=tensor.name,
                data_type=tensor.type,
                dims=tensor.dims,
                allow_ragged_batch=tensor.ragged,
                optional=tensor.optional,
            )
        for tensor in self.outputs:
            config.output.add(name=tensor.name, data_type=tensor.type, dims=tensor.dims)
        if self.sequence_batching is not None:
            batching = config.sequence_batching
            batching.max_sequence_idle_microseconds = self.sequence_batching.idle_microseconds
            batching.oldest.max_candidate_sequences = self.sequence_batching.candidates
            batching.oldest.max_queue_delay_microseconds = (
                self.sequence_batching.queue_delay_microseconds
            )
        if self.decoupled:
            config.model_transaction_policy.decoupled = True
        kind = (
            pb.ModelInstanceGroup.KIND_CPU
            if self.device == "cpu"
            else pb.ModelInstanceGroup.KIND_GPU
        )
        config.instance_group.add(kind=kind, count=self.instances)
        for name, value in self.parameters.items():
            config.parameters[name].string_value = value
        return config

    def text(self) -> str:
        """As the text of config.pbtxt."""
        return text_format.MessageToString(self.proto())


@dataclass(frozen=True)
class TextSettings:
    """What the server must know of a model that generates.

    Attributes:
        eos: end tokens.
        text: there is a tokenizer beside the engine.
    """

    eos: tuple[int, ...] = ()
    text: bool = False


def model_config(
    manifest: Manifest,
    *,
    serve: str,
    idle_timeout: float,
    queue_delay_microseconds: int,
    instances: int = 1,
    language: TextSettings | None = None,
) -> ModelConfig:
    """The configuration that serves an engine.

    Args:
        manifest: the engine.
        serve: ``step`` or ``stream``.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        queue_delay_microseconds: how long the server may hold back a batch that is not full; a stream model makes its batches itself.
        instances: processes that serve it, each with an engine and slots of its own.
        language: of a model that generates, for ``stream``.

    Raises:
        BuildError: a tensor of the model has a name that the generate protocol needs.
    """
    program = manifest.program("step")
    stream = serve == "stream"
    inputs = tuple(Tensor.of(spec, optional=language is not None) for spec in program.client_inputs)
    outputs = tuple(Tensor.of(spec) for spec in program.outputs)
    parameters = {SERVE: serve, IDLE_TIMEOUT: f"{idle_timeout:g}"}
    if language is not None:
        inputs += _texts(language, ragged=True)
        outputs += _generated(language)
        parameters |= {QUEUE: str(MAX_WAITING)} | (
            {EOS: ",".join(map(str, language.eos))} if language.eos else {}
        )
    names = [tensor.name for tensor in (*inputs, *outputs)]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        raise BuildError(
            f"{shared} are names of the generate protocol and of tensors of this model: give those others"
        )
    return ModelConfig(
        name=manifest.name,
        max_batch_size=program.max_rows,
        inputs=inputs,
        outputs=outputs,
        sequence_batching=SequenceBatching(
            candidates=CANDIDATES,
            idle_microseconds=int((idle_timeout + (LONGEST_GENERATION if stream else 0)) * 1e6),
            queue_delay_microseconds=0 if stream else queue_delay_microseconds,
        ),
        decoupled=stream,
        device=manifest.engine.device,
        parameters=parameters,
        instances=instances,
    )


def proxy_config(name: str, language: TextSettings) -> ModelConfig:
    """The configuration of a stream model's front: generations without sequences."""
    return ModelConfig(
        name=name,
        max_batch_size=1,  # so that tensors have the stream model's shapes and are passed on as they are
        inputs=(Tensor("input_ids", pb.TYPE_INT64, (-1,), optional=True), *_texts(language)),
        outputs=_generated(language),
        sequence_batching=None,
        decoupled=True,
        device="cpu",
        parameters={SERVE: "front"},
    )


def _texts(language: TextSettings, *, ragged: bool = False) -> tuple[Tensor, ...]:
    if not language.text:
        return ()
    return tuple(
        Tensor(name, pb.TYPE_STRING, dims, ragged, optional=True)
        for name, dims in ((TEXT, (1,)), (STOP, (-1,)))
    )


def _generated(language: TextSettings) -> tuple[Tensor, ...]:
    text = (Tensor(TEXT_OUTPUT, pb.TYPE_STRING, (1,)),) if language.text else ()
    return (
        Tensor(TOKENS, pb.TYPE_INT64, (-1,)),
        *text,
        Tensor(FINISH_REASON, pb.TYPE_STRING, (1,)),
    )
