"""config.pbtxt: what the server must know of a model, as dataclasses, written through Triton's own protobuf schema."""

from dataclasses import dataclass

from google.protobuf import text_format
from inplace.dtypes import Dtype
from inplace.manifest import Manifest
from inplace.settings import IDLE_TIMEOUT
from inplace.specs import Role, TensorSpec
from tritonclient.grpc import model_config_pb2 as pb

BACKEND = "inplace"
CANDIDATES_PER_SLOT = 4
"""Triton queues a START in silence when all its candidates are taken; more candidates than slots let the backend refuse it."""

TRITON_TYPES = {
    Dtype.BOOL: pb.TYPE_BOOL,
    Dtype.INT8: pb.TYPE_INT8,
    Dtype.UINT8: pb.TYPE_UINT8,
    Dtype.INT32: pb.TYPE_INT32,
    Dtype.INT64: pb.TYPE_INT64,
    Dtype.FLOAT16: pb.TYPE_FP16,
    Dtype.BFLOAT16: pb.TYPE_BF16,
    Dtype.FLOAT32: pb.TYPE_FP32,
    Dtype.FLOAT64: pb.TYPE_FP64,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of the server's model; ``dims`` without the batch axis."""

    name: str
    dtype: Dtype
    dims: tuple[int, ...]
    ragged: bool = False

    @classmethod
    def of(cls, spec: TensorSpec) -> "Tensor":
        """The server's view of a program's tensor."""
        return cls(spec.name, spec.dtype, spec.shape, ragged=spec.role is Role.TOKENS)


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
    """One config.pbtxt."""

    name: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    sequence_batching: SequenceBatching
    device: str
    idle_timeout: float

    def proto(self) -> pb.ModelConfig:
        """As Triton's ModelConfig message."""
        config = pb.ModelConfig(name=self.name, backend=BACKEND, max_batch_size=self.max_batch_size)
        for tensor in self.inputs:
            config.input.add(name=tensor.name, data_type=TRITON_TYPES[tensor.dtype], dims=tensor.dims, allow_ragged_batch=tensor.ragged)
        for tensor in self.outputs:
            config.output.add(name=tensor.name, data_type=TRITON_TYPES[tensor.dtype], dims=tensor.dims)
        batching = config.sequence_batching
        batching.max_sequence_idle_microseconds = self.sequence_batching.idle_microseconds
        batching.oldest.max_candidate_sequences = self.sequence_batching.candidates
        batching.oldest.max_queue_delay_microseconds = self.sequence_batching.queue_delay_microseconds
        kind = pb.ModelInstanceGroup.KIND_CPU if self.device == "cpu" else pb.ModelInstanceGroup.KIND_GPU
        config.instance_group.add(kind=kind, count=1)
        config.parameters[IDLE_TIMEOUT].string_value = f"{self.idle_timeout:g}"
        return config

    def text(self) -> str:
        """As the text of config.pbtxt."""
        return text_format.MessageToString(self.proto())


def model_config(manifest: Manifest, *, idle_timeout: float, queue_delay_microseconds: int) -> ModelConfig:
    """The configuration that serves an engine."""
    program = manifest.program("step")
    return ModelConfig(
        name=manifest.name,
        max_batch_size=program.max_rows,
        inputs=tuple(Tensor.of(spec) for spec in program.client_inputs),
        outputs=tuple(Tensor.of(spec) for spec in program.outputs),
        sequence_batching=SequenceBatching(
            candidates=CANDIDATES_PER_SLOT * manifest.slots,
            idle_microseconds=int(idle_timeout * 1e6),
            queue_delay_microseconds=queue_delay_microseconds,
        ),
        device=manifest.engine.device,
        idle_timeout=idle_timeout,
    )
