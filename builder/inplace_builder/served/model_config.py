"""config.pbtxt as dataclasses, written through Triton's own protobuf schema."""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf import text_format
from inplace.drivers.detokenizer import TOKENIZER_NAME
from inplace.protocol import (
    CHUNK_SAMPLES,
    POSITIONS,
    REQUESTS,
    SAMPLE_RATE,
    SNAPSHOT_EVERY,
    SNAPSHOT_STORE,
    WINDOW_SAMPLES,
)
from inplace.runtime.audio import audio_spec
from inplace.schema.served import Manifest
from inplace.schema.snapshots import SnapshotOptions
from inplace.server.model_config import ServerTensor, model_tensors, proxy_tensors
from inplace.server.settings import (
    EOS,
    GENERATE_PROXY,
    IDLE_TIMEOUT,
    MAX_WAITING,
    QUEUE,
    SERVE,
    SHARE_ENGINE,
    SNAPSHOT_QUOTA,
    SNAPSHOT_SECONDS,
    SNAPSHOT_SECRET,
)
from tritonclient.grpc import model_config_pb2 as pb

from inplace_builder.errors import BuildError
from inplace_builder.served.options import BuildOptions

BACKEND = "inplace"


MODEL_VERSION = "1"
"""Triton's version of a model: the folder of an engine, or of a generate proxy."""


MAX_CANDIDATE_SEQUENCES = 16384
"""Sequences that Triton accepts at the same time.

If all are taken, a START waits in Triton without an answer, where the backend would refuse or queue
it. A sequence that the backend refused, or whose client vanished, keeps its place until Triton's
idle timeout, so there must be far more places than slots. 65536 cost the server 50 MB and no
measurable time.
"""


MAX_GENERATION_SECONDS = 3600
"""Triton's idle clock runs during a generation; it forgets the sequence of a longer one."""


@dataclass(frozen=True)
class SequenceBatching:
    """Triton's sequence batcher with the strategy Oldest.

    Attributes:
        candidates: sequences that Triton accepts at the same time.
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
        name: the model's name.
        max_batch_size: most requests of one batch.
        inputs, outputs: its tensors.
        sequence_batching: None in a model without sequences.
        decoupled: a request may have any number of responses.
        device: ``cpu`` or ``cuda``.
        parameters: for the backend, see `inplace.server.settings`.
        instances: processes that serve it, on each GPU.
        gpus: those it is served on; empty for all that the server sees.
    """

    name: str
    max_batch_size: int
    inputs: tuple[ServerTensor, ...]
    outputs: tuple[ServerTensor, ...]
    sequence_batching: SequenceBatching | None
    decoupled: bool
    device: str
    parameters: Mapping[str, str]
    instances: int = 1
    gpus: tuple[int, ...] = ()

    def proto(self) -> pb.ModelConfig:
        """As Triton's ModelConfig message."""
        config = pb.ModelConfig(name=self.name, backend=BACKEND, max_batch_size=self.max_batch_size)
        for tensor in self.inputs:
            config.input.add(
                name=tensor.name,
                data_type=pb.DataType.Value(tensor.type),
                dims=tensor.dims,
                allow_ragged_batch=tensor.ragged,
                optional=tensor.optional,
            )
        for tensor in self.outputs:
            config.output.add(
                name=tensor.name, data_type=pb.DataType.Value(tensor.type), dims=tensor.dims
            )
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
        config.instance_group.add(kind=kind, count=self.instances, gpus=self.gpus)
        for name, value in self.parameters.items():
            config.parameters[name].string_value = value
        return config

    def text(self) -> str:
        """As the text of config.pbtxt."""
        return text_format.MessageToString(self.proto())


@dataclass(frozen=True)
class TextSettings:
    """Settings of a model that generates.

    Attributes:
        eos_token_ids: tokens that end a generation.
        has_tokenizer: there is a tokenizer beside the engine, so requests may be texts.
    """

    eos_token_ids: tuple[int, ...] = ()
    has_tokenizer: bool = False


def model_config(
    manifest: Manifest, options: BuildOptions, text: TextSettings | None = None
) -> ModelConfig:
    """The configuration that serves an engine.

    Args:
        manifest: the engine.
        options: how it is served: ``serve``, ``idle_timeout``, ``queue_delay_microseconds``,
            ``instances``, ``share_engine``, ``gpus`` and ``snapshots``.
        text: of a model that generates, which is served as ``stream``.

    Raises:
        BuildError: a tensor of the model has a name of the generate protocol.
    """
    program = manifest.interface
    stream = options.serve == "stream"
    try:
        tensors = model_tensors(
            program,
            generates=text is not None,
            has_tokenizer=manifest.has_file(TOKENIZER_NAME),
            streams=stream,
            optional=manifest.optional_inputs,
            prompt_logprobs=manifest.prompt_program is not None,
        )
    except ValueError as error:
        raise BuildError(str(error)) from error
    parameters = {SERVE: options.serve, IDLE_TIMEOUT: f"{options.idle_timeout:.15g}"}
    if options.share_engine:
        parameters[SHARE_ENGINE] = "on"
    if options.snapshots is not None:
        parameters |= snapshot_parameters(options.snapshots)
    if manifest.is_scheduled:
        parameters[POSITIONS] = REQUESTS
    if (audio := audio_spec(program)) is not None:
        parameters[SAMPLE_RATE] = str(audio.sample_rate)
        extent = WINDOW_SAMPLES if audio.lead is None else CHUNK_SAMPLES
        parameters[extent] = str(audio.shape[0])
    if text is not None:
        parameters[QUEUE] = str(MAX_WAITING)
        if text.eos_token_ids:
            parameters[EOS] = ",".join(map(str, text.eos_token_ids))
    names = [tensor.name for tensor in (*tensors.inputs, *tensors.outputs)]
    if shared := sorted({name for name in names if names.count(name) > 1}):
        raise BuildError(
            f"{shared} are names of the generate protocol and of tensors of this model: "
            f"rename the tensors"
        )
    idle_seconds = options.idle_timeout + (MAX_GENERATION_SECONDS if stream else 0)
    return ModelConfig(
        name=manifest.name,
        max_batch_size=manifest.max_sequences,
        inputs=tensors.inputs,
        outputs=tensors.outputs,
        sequence_batching=SequenceBatching(
            candidates=MAX_CANDIDATE_SEQUENCES,
            idle_microseconds=round(idle_seconds * 1e6),
            # a stream model forms its batches itself
            queue_delay_microseconds=0 if stream else options.queue_delay_microseconds,
        ),
        decoupled=stream,
        device=manifest.device,
        parameters=parameters,
        instances=options.instances,
        gpus=options.gpus,
    )


def snapshot_parameters(options: SnapshotOptions) -> dict[str, str]:
    """What config.pbtxt says of the store of sequences."""
    given = {
        SNAPSHOT_STORE: options.store,
        SNAPSHOT_SECRET: options.secret_file,
        SNAPSHOT_EVERY: options.every,
        SNAPSHOT_SECONDS: None if options.seconds == SnapshotOptions.seconds else options.seconds,
        SNAPSHOT_QUOTA: options.quota_bytes,
    }
    return {name: f"{value}" for name, value in given.items() if value is not None}


def proxy_config(name: str, text: TextSettings, *, has_logprobs: bool) -> ModelConfig:
    """The configuration of a stream model's generate proxy: generations without sequences."""
    tensors = proxy_tensors(has_tokenizer=text.has_tokenizer, has_logprobs=has_logprobs)
    return ModelConfig(
        name=name,
        max_batch_size=1,  # so that tensors have the stream model's shapes and are forwarded as is
        inputs=tensors.inputs,
        outputs=tensors.outputs,
        sequence_batching=None,
        decoupled=True,
        device="cpu",
        parameters={SERVE: GENERATE_PROXY},
    )
