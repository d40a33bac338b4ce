"""Options of a build for a server."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from inplace.schema.snapshots import SnapshotOptions
from inplace.schema.specs import AliasKind, Dtype

from inplace_builder.choices import (
    Cache,
    Device,
    EngineKind,
    Protocol,
    WeightOptions,
    Weights,
)
from inplace_builder.errors import BuildError

DTYPES = {
    "cpu": (Dtype.FLOAT32, Dtype.BFLOAT16),
    "cuda": (Dtype.FLOAT16, Dtype.BFLOAT16, Dtype.FLOAT32),
}
"""Element types of weights and states, by device."""


MAX_SECONDS = 1e12
"""Triton keeps times as 64-bit numbers of microseconds."""


DRAFT_TOKENS = 4
"""Tokens that a draft proposes in a round, where the options do not say."""


FP8_CAPABILITY = (8, 9)
"""The first compute capability (Ada, then Hopper) whose kernels have e4m3 in Triton's language."""


FP8_ACTIVATION_ROWS = 65
"""Tokens of a step on a GPU from which on they become 8-bit floats, if weights are such.

Up to 64 tokens a step's time is that of reading the weights.
"""


@dataclass(frozen=True)
class BuildOptions:
    """What to build for.

    Attributes:
        dtype: element type of weights and states.
        weights: whether weights of a decoder's linear layers, but for its head, and of its experts
            are 8-bit floats (e4m3 with scales): ``fp8``, as the checkpoint has them or rounded;
            ``dequantized``: they are not; ``auto``: as ``dequantized``.
        cache: whether keys and values of a decoder are cached as 8-bit floats (e4m3) with a scale
            for each layer and head: ``fp8``; ``auto``: in ``dtype``.
        device: ``cpu`` or ``cuda``.
        slots: sequences that can live at the same time.
        max_rows: most sequences in one step (the server's max_batch_size), at most ``slots``.
        capacity: positions a sequence may hold.
        min_capacity: the least capacity that a deployment may choose (parameter ``capacity`` in
            config.pbtxt) instead of ``capacity``; None fixes it.
        chunk: most tokens of one sequence in one step; longer prompts are fed in several.
        idle_timeout: seconds after its last response at which a sequence loses its slot.
        step_tokens: most tokens of one step; None is four chunks, and at least one token for each
            row.
        queue_delay_microseconds: how long the server may hold back a batch that is not full
            (``step``).
        instances: processes that serve the model, each with weights and ``slots`` slots of its own,
            on each GPU; see docs/operations.md.
        share_engine: the instances of a GPU have weights and ``slots`` slots in common.
        gpus: the GPUs that serve it, by their numbers on the server; empty for all.
        serve: the protocol: ``step``, or ``stream`` with generations beside steps; see
            docs/protocol.md.
        engine: ``torch``, ``tensorrt``, or ``tensorrt_rtx``.
        alias: the only mechanism allowed to update states (TensorRT); None takes the first that
            can.
        strict: never copy a state (TensorRT).
        lookahead: of a streaming speech model: how many encoded frames a frame sees ahead of it;
            None for the model's default.
        prompt_logprobs: of a language model: a second program that computes log-probabilities of
            every token that a request feeds, for requests that ask for them.
        compute_capability: compile for this GPU, for example ``8.9``, without having it (TensorRT
            for RTX); such an engine is not verified.
        draft: files of a smaller decoder that drafts tokens (speculative decoding); as
            `build_decoder` takes them.
        draft_layers: the draft is the model's own first layers, so many.
        draft_tokens: how many tokens are drafted in a round; None for `DRAFT_TOKENS` where there is
            a draft.
        snapshots: where servers store its sequences, see docs/sequences.md; None if they do not.

    Raises:
        BuildError: an option is out of range, or options do not fit together.
    """

    dtype: Dtype = Dtype.FLOAT32
    device: Device = "cpu"
    slots: int = 8
    max_rows: int = 8
    capacity: int = 1024
    chunk: int = 128
    idle_timeout: float = 600.0
    queue_delay_microseconds: int = 500
    step_tokens: int | None = None
    instances: int = 1
    share_engine: bool = False
    serve: Protocol = "step"
    engine: EngineKind = "torch"
    alias: AliasKind | None = None
    strict: bool = False
    compute_capability: str | None = None
    min_capacity: int | None = None
    lookahead: int | None = None
    prompt_logprobs: bool = False
    draft: Path | str | None = None
    draft_layers: int | None = None
    draft_tokens: int | None = None
    gpus: tuple[int, ...] = ()
    weights: Weights = "auto"
    cache: Cache = "auto"
    snapshots: SnapshotOptions | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_device()
        self._check_serving()
        self._check_draft()
        self._check_engine()
        if self.engine == "torch" and self.device == "cuda" and not torch.cuda.is_available():
            raise BuildError(
                "an engine for a GPU is built and verified on one, and PyTorch sees none here; "
                "choose device cpu"
            )

    @property
    def weight_options(self) -> WeightOptions:
        """What becomes of weights and activations of linear layers.

        Activations are rounded only on a GPU, where that is faster, and only where they have 16
        bits.
        """
        if self.weights != "fp8":
            return WeightOptions()
        rounds = self.device == "cuda" and self.dtype is not Dtype.FLOAT32
        return WeightOptions("fp8", FP8_ACTIVATION_ROWS if rounds else 0)

    def check_no_lookahead(self, source: Path, model_type: str) -> None:
        """BuildError if there is a lookahead, which models of this type do not have."""
        if self.lookahead is not None:
            raise BuildError(
                f"lookahead is {self.lookahead}; {source} holds a {model_type!r} model, which has "
                f"none: leave it out"
            )

    @property
    def has_draft(self) -> bool:
        """Whether tokens are drafted by a second program."""
        return self.draft is not None or self.draft_layers is not None

    @property
    def tokens_per_round(self) -> int:
        """The most tokens of a generation that a step is fed."""
        return 1 + (self.draft_tokens or DRAFT_TOKENS) if self.has_draft else 1

    def check_no_fp8(self, source: Path, model_type: str) -> None:
        """BuildError if weights or caches are to be 8-bit floats, as only those of decoders are."""
        if self.cache == "fp8":
            raise BuildError(
                f"cache is fp8; {source} holds a {model_type!r} model, whose states are not "
                f"rounded: leave it out"
            )
        if self.weights == "fp8":
            raise BuildError(
                f"weights is fp8; {source} holds a {model_type!r} model, whose weights are not "
                f"rounded: leave it out"
            )

    def check_no_draft(self, source: Path, model_type: str) -> None:
        """BuildError if there is a draft, which only decoders have."""
        if self.has_draft:
            raise BuildError(
                f"{source} holds a {model_type!r} model, whose tokens are not drafted: leave draft "
                f"and draft_layers out"
            )

    def _check_draft(self) -> None:
        if self.draft is not None and self.draft_layers is not None:
            raise BuildError(
                "there are draft and draft_layers; a draft is another model or the model's own "
                "first layers: leave one out"
            )
        if self.draft_tokens is not None and not self.has_draft:
            raise BuildError(
                f"draft_tokens is {self.draft_tokens}, and there is no draft: name one (draft), or "
                f"the number of the model's own first layers (draft_layers)"
            )
        for name in ("draft_layers", "draft_tokens"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise BuildError(f"{name} is {given}; it must be at least 1")
        if self.has_draft and self.prompt_logprobs:
            raise BuildError(
                "there are prompt_logprobs and a draft; the program that scores prompts takes the "
                "place of a step that verifies no drafted tokens: leave one out"
            )
        if self.has_draft and self.serve != "stream":
            raise BuildError(
                "a draft is for generations, which a model has that is served as stream: choose "
                "serve stream, or leave the draft out"
            )

    def _check_sizes(self) -> None:
        for name in ("slots", "max_rows", "capacity", "chunk", "instances"):
            if getattr(self, name) < 1:
                raise BuildError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.share_engine and self.instances == 1:
            raise BuildError(
                "share_engine is for several instances of a GPU: set instances, or leave it out"
            )
        if self.min_capacity is not None and not 1 <= self.min_capacity <= self.capacity:
            raise BuildError(
                f"min_capacity is {self.min_capacity}; "
                f"it must be from 1 to the capacity of {self.capacity}"
            )
        if self.max_rows > self.slots:
            raise BuildError(
                f"a batch of {self.max_rows} rows needs as many slots; there are {self.slots}: "
                f"raise slots or lower the batch"
            )

    def _check_device(self) -> None:
        if self.device not in DTYPES:
            raise BuildError(f"device is {self.device!r}; choose one of {list(DTYPES)}")
        if self.dtype not in DTYPES[self.device]:
            known = [str(dtype) for dtype in DTYPES[self.device]]
            raise BuildError(
                f"dtype {self.dtype} is not supported on device {self.device!r}; "
                f"choose one of {known}"
            )

    def _check_serving(self) -> None:
        if not 0 < self.idle_timeout < MAX_SECONDS:
            raise BuildError(
                f"idle_timeout is {self.idle_timeout}; "
                f"it must be a number of seconds above 0 and below {MAX_SECONDS:.0e}"
            )
        if not 0 <= self.queue_delay_microseconds < MAX_SECONDS * 1e6:
            raise BuildError(
                f"queue_delay_microseconds is {self.queue_delay_microseconds}; "
                f"it must be at least 0"
            )
        if self.gpus and self.device != "cuda":
            raise BuildError(
                f"gpus is {list(self.gpus)}; a model on device {self.device!r} is served on no GPU:"
                f" leave it out, or build for cuda"
            )
        if min(self.gpus, default=0) < 0 or len(set(self.gpus)) < len(self.gpus):
            raise BuildError(
                f"gpus is {list(self.gpus)}; expected different numbers of at least 0 "
                f"(several engines on one GPU: instances)"
            )
        if self.serve not in ("step", "stream"):
            raise BuildError(f"serve is {self.serve!r}; choose step or stream")
        self._check_snapshots()

    def _check_snapshots(self) -> None:
        snapshots = self.snapshots
        if snapshots is None:
            return
        if "://" not in snapshots.store:
            raise BuildError(
                f"the store of the snapshots is {snapshots.store!r}; expected the URL of a folder:"
                f" file:///… or s3://bucket/…"
            )
        if not snapshots.secret_file:
            raise BuildError(
                "the snapshots have no secret_file; name a file with 32 random bytes or more, the"
                " same for all servers of the store"
            )
        for name in ("every", "seconds", "quota_bytes"):
            if (given := getattr(snapshots, name)) is not None and not given > 0:
                raise BuildError(f"{name} of the snapshots is {given}; it must be above 0")

    def _check_engine(self) -> None:
        if self.weights not in get_args(Weights):
            raise BuildError(
                f"weights is {self.weights!r}; choose one of {list(get_args(Weights))}"
            )
        if self.cache not in get_args(Cache):
            raise BuildError(f"cache is {self.cache!r}; choose one of {list(get_args(Cache))}")
        for name in ("weights", "cache"):
            if getattr(self, name) == "fp8" and self.engine == "tensorrt_rtx":
                raise BuildError(
                    f"{name} fp8 needs the plugins of TensorRT, which TensorRT for RTX does not "
                    f"take; choose engine tensorrt or torch, or leave {name} out"
                )
        rounded = [name for name in ("weights", "cache") if getattr(self, name) == "fp8"]
        if rounded and self.device == "cuda" and torch.cuda.is_available():
            found = torch.cuda.get_device_capability()
            if found < FP8_CAPABILITY:
                raise BuildError(
                    f"{' and '.join(rounded)} fp8 needs a GPU of compute capability "
                    f"{'.'.join(map(str, FP8_CAPABILITY))} or later, and this one has "
                    f"{'.'.join(map(str, found))}: leave it out, or build elsewhere"
                )
        if self.cache == "fp8" and self.alias not in (None, "plugin"):
            raise BuildError(
                f"cache fp8 needs the mechanism plugin, and alias is {self.alias}: leave one out"
            )
        if self.engine not in get_args(EngineKind):
            raise BuildError(
                f"engine is {self.engine!r}; choose one of {list(get_args(EngineKind))}"
            )
        if self.engine == "torch" and (self.alias or self.strict or self.compute_capability):
            raise BuildError(
                "alias, strict and compute_capability belong to TensorRT engines; "
                "the PyTorch engine has no choice of mechanism"
            )
        if self.engine != "torch" and self.device != "cuda":
            raise BuildError(f"a {self.engine} engine runs on a GPU; choose device cuda")
        if self.step_tokens is not None and self.step_tokens < self.max_rows:
            raise BuildError(
                f"step_tokens is {self.step_tokens}; "
                f"a step of {self.max_rows} rows has at least as many tokens"
            )

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest step."""
        tokens = self.step_tokens
        if tokens is None:
            tokens = max(self.max_rows, 4 * self.chunk)
        return min(tokens, self.max_rows * self.chunk)
