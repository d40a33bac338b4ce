"""Verification: a built engine is run, as the server will run it, against the model it was captured from.

Three sequences of different lengths go through ragged steps, prompts cross a chunk, and every byte that no request may touch is
NaN before the first step, including what a fresh slot holds where the engine claims not to need it reset.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from inplace.engines.arena import Arena
from inplace.errors import LoadError
from inplace.operators import sample
from inplace.runtime.batcher import ActiveRequest
from inplace.runtime.instance import ModelInstance
from inplace.runtime.loading import load_engine
from inplace.runtime.requests import Request
from inplace.runtime.sampling import Parameter
from inplace.schema.served import Manifest
from inplace.schema.specs import Role, StateSpec, TensorSpec, Update
from torch import Tensor

from inplace_builder.capture.capture import Capture, Reference
from inplace_builder.compare import TOLERANCE, _relative, poison, same_bits
from inplace_builder.errors import BuildError

ROUNDING = 2.0
"""Where it is larger and the model can be run in float32: how much farther from that than the model itself an output may be."""


SEQUENCES = 3


SAMPLED: tuple[Mapping[str, Parameter], ...] = (
    {},
    {"temperature": 1.3, "seed": -3},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5},
)
"""How each sequence wants its tokens chosen, where the engine samples: greedily, from all scores, from few of them."""


FOREIGN = 2
"""Slots beside those of the three sequences, which nothing may touch."""


def verify(folder: Path, manifest: Manifest, capture: Capture) -> float:
    """Run the engine in ``folder`` against the captured model.

    Returns:
        The largest relative error of an output.

    Raises:
        BuildError: the engine cannot be loaded or fails, an output differs by more than rounding explains, a byte outside the written rows
            changed, or a state moved.
    """
    arena = Arena(manifest.states, SEQUENCES + FOREIGN, torch.device(manifest.engine.device))
    try:
        engine = load_engine(folder, manifest, arena)
    except LoadError as error:
        raise BuildError(f"{error}; the engine is not written") from error
    instance = ModelInstance(manifest, arena, engine, idle_timeout=float("inf"))
    for tensor in arena.tensors.values():
        poison(tensor)
    addresses = arena.addresses()
    judge = _Judge(capture, manifest)
    for requests, compared in _rounds(manifest):
        works = [instance.admit(request) for request in requests]
        while pending := [work for work in works if not work.finished]:
            for first in range(0, len(pending), instance.program.max_rows):
                _step_and_compare_memory(
                    instance, pending[first : first + instance.program.max_rows]
                )
        for work in works:
            judge.heard(work, compared=compared)
            instance.finish(work)
    if arena.addresses() != addresses and not any(
        alias.kind == "copy" for alias in instance.program.aliases
    ):
        raise BuildError("the engine moved a state: its address changed while stepping")
    return judge.worst


def _sampled(work: ActiveRequest, scores: Tensor) -> Tensor:
    """The token that the operator chooses on the CPU from the engine's own scores, which were compared with the model's."""
    wanted = work.sampling_params
    return sample(
        scores,
        torch.tensor([wanted.temperature]),
        torch.tensor([wanted.top_k], dtype=torch.int32),
        torch.tensor([wanted.top_p]),
        torch.tensor([wanted.seed]),
        torch.tensor([work.sequence.length], dtype=torch.int32),
    )[0]


def _rounds(manifest: Manifest) -> Iterator[tuple[list[Request], bool]]:
    """Requests that arrive together, and whether their outputs are compared.

    The third sequence joins late, lengths and positions differ in every step, and the first sequence goes once round every ring.
    Where a request brings one entry that takes a request for each, of which the reference, which begins anew each time, follows only
    the last: those that read what has wrapped.
    """
    program = manifest.program("step")
    room = manifest.capacity if manifest.capacity is not None else 1 << 30
    ring = max(
        (
            state.shape[state.axis]
            for state in manifest.states
            if state.update is Update.RING and state.axis is not None
        ),
        default=0,
    )
    if program.row_layout == "packed":
        long = min(
            max(program.chunk, ring) + 3, max(1, room - 3)
        )  # across a chunk, and once round every ring
        plans = [[1, 1, long, 1], [5, 1, 2, 1], [0, long, 1, 2]]
    else:
        plans = [[1] * (4 + ring), [1] * 4, [0, 1, 1, 1]]
    everything = {spec.name: True for spec in program.outputs if spec.on_request}
    generator = torch.Generator().manual_seed(0)
    held = [0] * SEQUENCES
    last = max(map(len, plans))
    for index, counts in enumerate(itertools.zip_longest(*plans, fillvalue=0)):
        requests = []
        for sequence, planned in enumerate(counts):
            tokens = min(planned, room - held[sequence])
            if tokens < 1:
                continue
            inputs = {
                spec.name: random_input(spec, tokens, generator) for spec in program.client_inputs
            }
            parameters: dict[str, Parameter] = {
                **everything,
                **(SAMPLED[sequence] if program.vocab_size else {}),
            }
            requests.append(
                Request(
                    sequence + 1,
                    start=held[sequence] == 0,
                    end=False,
                    inputs=inputs,
                    parameters=parameters,
                )
            )
            held[sequence] += tokens
        yield requests, index < 4 or index >= last - 4


def random_input(spec: TensorSpec, tokens: int, generator: torch.Generator) -> Tensor:
    """A valid input of one request, with its batch axis."""
    shape = (1, *((tokens, *spec.shape[1:]) if spec.role is Role.TOKENS else spec.shape))
    dtype = spec.dtype.as_torch
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    low = spec.minimum if spec.minimum is not None else 0
    high = spec.maximum if spec.maximum is not None else low + 1
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def _step_and_compare_memory(instance: ModelInstance, rows: list[ActiveRequest]) -> None:
    """One step, after which only what these rows wrote may differ, bit for bit."""
    tensors = instance.arena.tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    starts = [(work, work.sequence.length) for work in rows]
    instance.step(rows)
    for work in rows:
        if work.error is not None:
            raise BuildError(f"{work.error}; the engine is not written")
    for spec in instance.manifest.states:
        allowed = before[spec.name]
        for work, start in starts:
            for part, now in written_parts(
                spec,
                allowed[work.sequence.slot],
                tensors[spec.name][work.sequence.slot],
                start,
                work.sequence.length,
            ):
                part.copy_(now)
        if not same_bits(allowed, tensors[spec.name]):
            raise BuildError(
                f"the engine changed bytes of state {spec.name} outside the rows of its step; it is not written"
            )


def written_parts(
    spec: StateSpec, old: Tensor, new: Tensor, start: int, end: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of what a step from cached length ``start`` to ``end`` may write in one slot, in the old and the new slot."""
    if spec.update is Update.REPLACE:
        yield old, new
        return
    assert spec.axis is not None
    extent = spec.shape[spec.axis]
    for position in range(start, end):
        index = position % extent if spec.update is Update.RING else position
        yield old.narrow(spec.axis, index, 1), new.narrow(spec.axis, index, 1)


class _Judge:
    """Compares what the engine says of each sequence with what the model says.

    Attributes:
        worst: the largest relative error so far.
    """

    def __init__(self, capture: Capture, manifest: Manifest) -> None:
        self._capture, self._outputs = capture, manifest.program("step").outputs
        self._tolerance = TOLERANCE.get(manifest.engine.dtype, 0.0)
        self._history: dict[int, list[dict[str, Tensor]]] = {}
        self._precise: Reference | None = None
        self.worst = 0.0

    def heard(self, work: ActiveRequest, *, compared: bool) -> None:
        """A request was answered; its outputs are as they should be, or BuildError says which are not."""
        assert isinstance(work.request.sequence_id, int)
        history = self._history.setdefault(work.request.sequence_id, [])
        history.append(dict(work.inputs))
        if not compared:
            return
        expected = self._capture.reference(history)
        for spec in self._outputs:
            found, wanted = work.outputs[spec.name][0], expected[spec.name]
            where = f"output {spec.name} of sequence {work.request.sequence_id} after {work.sequence.length} tokens"
            if found.shape != wanted.shape:
                raise BuildError(
                    f"{where} has the shape {tuple(found.shape)}, the model's is {tuple(wanted.shape)}; it is not written"
                )
            if spec.sampled_from is not None:
                wanted = _sampled(work, work.outputs[spec.sampled_from])
            if spec.argmax_of is not None:
                wanted = work.outputs[spec.argmax_of][0].argmax(
                    -1, keepdim=True
                )  # its own scores were compared with the model's
            if found.dtype.is_floating_point:
                self._check_close(where, found, wanted, spec.name, history)
            elif not torch.equal(found, wanted):
                raise BuildError(
                    f"{where} is {found.tolist()}, expected {wanted.tolist()}; the engine is not written"
                )

    def _check_close(
        self, where: str, found: Tensor, wanted: Tensor, name: str, history: list[dict[str, Tensor]]
    ) -> None:
        error = _relative(found, wanted)
        if not error <= self._tolerance:
            said = f"{where} differs from the model by {error:.1e}, more than {self._tolerance:.0e}"
            if self._capture.float32_reference is None:
                raise BuildError(f"{said}; the engine is not written")
            truth = self._in_float32(history)[name]
            own, model = _relative(found, truth), _relative(wanted, truth)
            if not own <= ROUNDING * model:
                raise BuildError(
                    f"{said}, and from the model in float32 by {own:.1e}, where the model's own rounding makes {model:.1e}; "
                    f"the engine is not written"
                )
        self.worst = max(self.worst, error)

    def _in_float32(self, history: list[dict[str, Tensor]]) -> Mapping[str, Tensor]:
        if self._precise is None:
            assert self._capture.float32_reference is not None
            self._precise = self._capture.float32_reference()
        return self._precise(history)
