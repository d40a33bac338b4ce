"""Verify a served engine: run it as the server will, against the model it was captured from.

Three sequences of different lengths go through ragged steps, and prompts cross a chunk. Every byte
that no request may touch is NaN before the first step, also what a fresh slot holds where the
engine claims that it needs no reset.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from inplace.operators import sample, sample_with_options
from inplace.parameters import Parameter
from inplace.protocol import (
    LOGIT_BIAS,
    LOGPROBS,
    PROMPT_LOGPROBS,
    PROMPT_RANKS,
    PROMPT_TOKEN_LOGPROBS,
    PROMPT_TOP_LOGPROBS,
    PROMPT_TOP_TOKENS,
)
from inplace.runtime.batcher import ActiveRequest, sampling_values
from inplace.runtime.instance import ModelInstance
from inplace.runtime.loading import load_engines, make_arena
from inplace.runtime.requests import Request
from inplace.schema.files import EngineFolder
from inplace.schema.programs import Program
from inplace.schema.schedule import PROMPT_LOGPROBS as PROMPT_PROGRAM
from inplace.schema.schedule import STEP
from inplace.schema.served import Manifest
from inplace.schema.specs import (
    LOGPROB_ROLES,
    SAMPLING_OPTION_ROLES,
    SAMPLING_ROLES,
    Dtype,
    Role,
    StateSpec,
    TensorSpec,
    Update,
)
from torch import Tensor

from inplace_builder.capture.capture import Capture, Reference
from inplace_builder.compare import (
    fill_with_sentinel,
    is_inexact,
    relative_error,
    same_bits,
    tolerance,
)
from inplace_builder.engine_files import load_errors
from inplace_builder.errors import rejected
from inplace_builder.graph.nodes import is_call
from inplace_builder.served.reach import positions_to_verify

PERTURBATIONS = 8
"""How many other roundings of its embeddings a discontinuous model is run with at most.

A model with experts, or one that attends to selected positions, computes something else where two
candidates of `topk` are closer than rounding; one that caches 8-bit floats, where a key is as close
to the middle of two of them. The engine's error is then compared with the model's error over these
roundings, too.
"""


MAX_ROUNDING_RATIO = 2.0
"""How much farther than the model an output may be from the model in float32.

Applied where an output's error exceeds the tolerance and the model can be run in float32.
"""


NUM_SEQUENCES = 3


SAMPLING: tuple[Mapping[str, Parameter], ...] = (
    {},
    {"temperature": 1.3, "seed": -3},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5},
)
"""Sampling parameters of each sequence: greedy, from all scores, from few of them."""


OPTIONS: tuple[Mapping[str, Parameter], ...] = (
    {LOGPROBS: 1, "repetition_penalty": 1.7},
    {LOGPROBS: 0, "min_p": 0.1, LOGIT_BIAS: "0:-50,1:3"},
    {},
)
"""Sampling options of each sequence, where the program has them."""


SPARE_SLOTS = 2
"""Slots of the arena that no sequence owns and nothing may touch."""


SINGLE_STEPS = 4
"""Steps of a round after each of which all memory is compared."""


UNLIMITED = 1 << 30
"""Stands for the capacity of an engine that keeps no growing state."""


VERIFIED_TOP = 5
"""Most likely tokens that are compared in the place of a fed one."""


COMPARED_ROUNDS = 4
"""Rounds at the start and at the end whose outputs are compared."""


def verify(folder: Path, manifest: Manifest, capture: Capture) -> dict[str, str]:
    """Run the engine in ``folder`` against the captured model.

    An engine whose capacity is chosen at load is run with the smallest and with the largest one.

    Returns:
        The largest relative error of an output, as the manifest records it.

    Raises:
        BuildError: the engine cannot be loaded or fails, an output differs by more than rounding
            explains, a byte outside the written rows changed, or a state moved.
    """
    chosen = [manifest]
    if manifest.min_capacity is not None and manifest.min_capacity != manifest.capacity:
        chosen.insert(0, manifest.at_capacity(manifest.min_capacity))
    error = max(_verify_at_capacity(folder, each, capture) for each in chosen)
    if manifest.prompt_program is not None:
        error = max(error, _verify_at_capacity(folder, manifest, capture, scores_prompt=True))
    return {"verified_error": f"{error:.1e}"}


def _verify_at_capacity(
    folder: Path, manifest: Manifest, capture: Capture, *, scores_prompt: bool = False
) -> float:
    """The largest relative error of an output.

    Args:
        folder: the engine.
        manifest: its manifest, with the capacity.
        capture: the captured model.
        scores_prompt: ask for log-probabilities of fed tokens, so that the program for that runs.
    """
    files, names = EngineFolder(folder), [STEP, *([PROMPT_PROGRAM] if scores_prompt else [])]
    with load_errors():
        arena = make_arena(files, manifest, NUM_SEQUENCES + SPARE_SLOTS)
        engines = load_engines(files, manifest, arena, names)
    instance = ModelInstance(
        manifest,
        arena,
        engines[STEP],
        idle_timeout=float("inf"),
        prompt_engine=engines.get(PROMPT_PROGRAM),
    )
    for tensor in arena.tensors.values():
        fill_with_sentinel(tensor)
    addresses = arena.addresses()
    max_rows = instance.program.max_rows
    comparison = OutputComparison(capture, manifest)
    capacity = manifest.capacity if manifest.capacity is not None else UNLIMITED
    reach = 0 if scores_prompt else positions_to_verify(capture, capacity)
    for requests, is_compared in _rounds(manifest, reach, scores_prompt=scores_prompt):
        active = [instance.admit(request) for request in requests]
        num_steps = 0
        while unfinished := [request for request in active if not request.finished]:
            # steps of a long prompt are compared together, more and more of them
            together = max(1, num_steps - SINGLE_STEPS)
            num_steps += together
            for first in range(0, len(unfinished), max_rows):
                _step_and_compare_memory(instance, unfinished[first : first + max_rows], together)
        for request in active:
            comparison.add(request)
            if is_compared:
                comparison.compare(request)
            instance.finish(request)
    swaps_buffers = any(alias.kind == "copy" for alias in instance.program.aliases)
    if arena.addresses() != addresses and not swaps_buffers:
        raise rejected("the engine moved a state: its address changed while stepping")
    return comparison.max_error


def _rounds(
    manifest: Manifest, reach: int, *, scores_prompt: bool = False
) -> Iterator[tuple[list[Request], bool]]:
    """Requests that arrive together, and whether their outputs are compared.

    The third sequence joins late, lengths and positions differ in every step, and the first
    sequence wraps around every ring and gets as far as ``reach`` positions. Where a request has one
    entry, that takes a request for each. The reference starts anew for each comparison, so then
    only the first and the last rounds are compared; the last ones read what has wrapped.
    """
    program = manifest.program(STEP)
    capacity = manifest.capacity if manifest.capacity is not None else UNLIMITED
    token_counts = _token_counts(manifest, program, capacity, reach)
    outputs = frozenset(spec.name for spec in program.outputs)
    generator = torch.Generator().manual_seed(0)
    lengths = [0] * NUM_SEQUENCES
    num_rounds = max(map(len, token_counts))
    for index, counts in enumerate(itertools.zip_longest(*token_counts, fillvalue=0)):
        requests = []
        for sequence, count in enumerate(counts):
            tokens = min(count, capacity - lengths[sequence])
            if tokens < 1:
                continue
            inputs = {
                spec.name: random_input(spec, tokens, generator) for spec in program.client_inputs
            }
            sampling = dict(SAMPLING[sequence] if program.vocab_size else {})
            if program.max_adjusted:
                sampling |= OPTIONS[sequence]
            if scores_prompt:
                sampling[PROMPT_LOGPROBS] = min(VERIFIED_TOP, program.vocab_size)
            requests.append(
                Request(
                    sequence + 1,
                    start=lengths[sequence] == 0,
                    end=False,
                    inputs=inputs,
                    parameters=sampling,
                    requested_outputs=outputs,
                )
            )
            lengths[sequence] += tokens
        is_compared = index < COMPARED_ROUNDS or index >= num_rounds - COMPARED_ROUNDS
        yield requests, is_compared


def _token_counts(
    manifest: Manifest, program: Program, capacity: int, reach: int
) -> list[list[int]]:
    """For each sequence the tokens of its requests, one request in each round."""
    ring = max(
        (
            state.shape[state.axis]
            for state in manifest.states
            if state.update is Update.RING and state.axis is not None
        ),
        default=0,
    )
    if program.row_layout == "packed":
        # across a chunk, and around every ring
        long = min(max(program.chunk, ring) + 3, max(1, capacity - 3))
        if program.lookahead:  # tokens of a request are fed together
            long = min(program.chunk, max(1, capacity - 3))
        rest = reach - (long + 4)
        further = [rest, 1] if rest > 0 else []
        if program.lookahead and further:
            further = [*[long] * (rest // long), *([rest % long] if rest % long else []), 1]
        two = min(2, long)
        return [[1, 1, long, 1, *further], [min(5, long), 1, two, 1], [0, long, 1, two]]
    return [[1] * max(4 + ring, reach), [1] * 4, [0, 1, 1, 1]]


def random_input(spec: TensorSpec, tokens: int, generator: torch.Generator) -> Tensor:
    """A valid input of one request, with its batch axis."""
    shape = (1, *((tokens, *spec.shape[1:]) if spec.role is Role.TOKENS else spec.shape))
    dtype = spec.dtype.as_torch
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if spec.choices:
        return torch.randint(len(spec.choices), shape, generator=generator)
    low = spec.minimum if spec.minimum is not None else 0
    high = spec.maximum if spec.maximum is not None else low + 1
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def _step_and_compare_memory(
    instance: ModelInstance, rows: Sequence[ActiveRequest], num_steps: int = 1
) -> None:
    """Run some steps, after which only what their rows wrote may differ, bit for bit."""
    tensors = instance.arena.tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    starts = [(row.sequence, row.sequence.length) for row in rows]
    for _ in range(num_steps):
        instance.step([row for row in rows if not row.finished])
        for row in rows:
            if row.error is not None:
                raise rejected(str(row.error))
        if all(row.finished for row in rows):
            break
    for spec in instance.manifest.states:
        allowed = before[spec.name]
        for sequence, start in starts:
            old, new = allowed[sequence.slot], tensors[spec.name][sequence.slot]
            for old_part, new_part in written_parts(spec, old, new, start, sequence.length):
                old_part.copy_(new_part)
        if not same_bits(allowed, tensors[spec.name]):
            raise rejected(
                f"the engine changed bytes of state {spec.name} outside the rows of its step"
            )


def written_parts(
    spec: StateSpec, old: Tensor, new: Tensor, start: int, end: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of what a step from cached length ``start`` to ``end`` may write in one slot.

    Args:
        spec: the state.
        old, new: the slot before and after the step.
        start, end: cached length before and after the step.

    Returns:
        Pairs of views, of the old and of the new slot.
    """
    if spec.update is Update.REPLACE:
        yield old, new
        return
    assert spec.axis is not None
    extent = spec.shape[spec.axis]
    for position in range(start, end):
        index = position % extent if spec.update is Update.RING else position
        yield old.narrow(spec.axis, index, 1), new.narrow(spec.axis, index, 1)


class OutputComparison:
    """Compares the outputs of every sequence with the model's.

    Attributes:
        max_error: the largest relative error so far.
    """

    def __init__(self, capture: Capture, manifest: Manifest) -> None:
        self._program = program = manifest.program(STEP)
        self._capture, self._inputs, self._outputs = capture, program.inputs, program.outputs
        self._sampled = next((each for each in self._outputs if each.sampled_from), None)
        self._tolerance = tolerance(manifest, program)
        self._history: dict[int | str, list[Mapping[str, Tensor]]] = {}
        self._float32_reference: Reference | None = None
        self._is_discontinuous = any(
            is_call(node, torch.ops.aten.topk.default) for node in capture.exported.graph.nodes
        ) or any(state.dtype is Dtype.FLOAT8_E4M3FN for state in manifest.states)
        self.max_error = 0.0

    def add(self, request: ActiveRequest) -> None:
        """Append a request to the history of its sequence."""
        history = self._history.setdefault(request.request.sequence_id, [])
        history.append(dict(request.inputs))

    def compare(self, request: ActiveRequest) -> None:
        """Compare the outputs of a finished request.

        Raises:
            BuildError: an output differs.
        """
        sequence = request.request.sequence_id
        history = self._history[sequence]
        expected_outputs = dict(self._capture.reference(history))
        sampled: dict[str, Tensor] = {}
        if self._sampled is not None:
            # sampled tokens are compared with what the engine's own scores give: the scores
            # themselves are compared with the model's
            sampled = self._sampled_outputs(request)
            expected_outputs |= {name: value[0] for name, value in sampled.items()}
        for spec in self._outputs:
            if spec.role in LOGPROB_ROLES and spec.name not in request.outputs:
                continue  # this request does not ask for it
            output, expected = request.outputs[spec.name][0], expected_outputs[spec.name]
            where = (
                f"output {spec.name} of sequence {sequence} after {request.sequence.length} tokens"
            )
            if output.shape != expected.shape:
                raise rejected(
                    f"{where} has the shape {tuple(output.shape)}, "
                    f"the model's is {tuple(expected.shape)}"
                )
            if spec.argmax_of is not None:
                expected = request.outputs[spec.argmax_of][0].argmax(-1, keepdim=True)
            if spec.name in sampled:
                if not same_bits(output, expected):
                    raise rejected(f"{where} is {output.tolist()}, expected {expected.tolist()}")
            elif is_inexact(output):
                exact = partial(self.in_float32, history, spec.name)
                others = partial(self.perturbed, history, spec.name)
                self.check_close(where, output, expected, exact, others)
            elif not torch.equal(output, expected):
                raise rejected(f"{where} is {output.tolist()}, expected {expected.tolist()}")

        if request.prompt_logprobs is not None:
            self._compare_prompt(request, history)

    def _compare_prompt(
        self, request: ActiveRequest, history: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Compare the log-probabilities of some tokens of a request: beside chunks, and the last.

        Raises:
            BuildError: one differs.
        """
        [name] = (spec.name for spec in self._inputs if spec.role is Role.TOKENS)
        tokens, chunk = history[-1][name], self._program.chunk
        places = {1, chunk, chunk + 1, len(tokens) - 1} & set(range(1, len(tokens)))
        outputs = {key: value[0] for key, value in request.prompt_outputs.items()}
        for place in sorted(places):
            before = [*history[:-1], {name: tokens[:place]}]
            self._compare_place(
                before, tokens[place], {key: value[place] for key, value in outputs.items()}
            )

    def _compare_place(
        self, before: Sequence[Mapping[str, Tensor]], token: Tensor, outputs: Mapping[str, Tensor]
    ) -> None:
        """Compare the log-probabilities of a token.

        Args:
            before: the requests of its sequence with the tokens before it.
            token: the token.
            outputs: what the engine says of it.

        Raises:
            BuildError: one differs.
        """
        assert self._sampled is not None
        name, likely = self._sampled.sampled_from or "", outputs[PROMPT_TOP_TOKENS]
        where = f"the log-probability of a token of a prompt, {int(token)},"
        top = outputs[PROMPT_TOP_LOGPROBS]
        output = torch.cat([outputs[PROMPT_TOKEN_LOGPROBS][None], top, top])
        logits = self._capture.reference(before)[name].float()
        self.check_close(
            where,
            output,
            _log_probabilities(logits, token, likely),
            lambda: _log_probabilities(self.in_float32(before, name), token, likely),
            lambda: (
                _log_probabilities(other, token, likely) for other in self.perturbed(before, name)
            ),
        )
        self._check_rank(where, int(outputs[PROMPT_RANKS]), logits, int(token))

    def _check_rank(self, where: str, rank: int, logits: Tensor, token: int) -> None:
        """Compare a rank, which may differ where scores are equal but for the errors that are."""
        low, high = rank_limits(logits, token, max(self._tolerance, self.max_error))
        if not low <= rank <= high:
            raise rejected(f"{where} has the rank {rank}, expected {low} to {high}")

    def _sampled_outputs(self, request: ActiveRequest) -> dict[str, Tensor]:
        """What the sampling operator returns on the CPU for the engine's own scores, by output."""
        assert self._sampled is not None
        scores = request.outputs[self._sampled.sampled_from or ""]
        params, length = request.sampling_params, request.sequence.length
        arguments = [
            torch.tensor([length], dtype=spec.dtype.as_torch)
            if role is Role.NEXT_POSITIONS
            else sampling_values(spec, [params], [request.adjustments])
            for role in (*SAMPLING_ROLES, *SAMPLING_OPTION_ROLES)
            for spec in self._inputs
            if spec.role is role
        ]
        if not self._program.max_adjusted:
            return {self._sampled.name: sample(scores, *arguments)}
        tokens, *logprobs = sample_with_options(scores, *arguments)
        outputs = dict(zip(LOGPROB_ROLES, logprobs, strict=True))
        return {self._sampled.name: tokens} | {
            name: request.own_output(name, outputs[Role(name)]) for name in params.outputs
        }

    def check_close(
        self,
        where: str,
        output: Tensor,
        expected: Tensor,
        in_float32: Callable[[], Tensor],
        perturbed: Callable[[], Iterable[Tensor]],
    ) -> None:
        """Compare an output of floating-point numbers with the model's.

        Args:
            where: what it is, in the error.
            output: the output.
            expected: the model's.
            in_float32: gives that of the model in float32.
            perturbed: gives those of the model with other roundings.

        Raises:
            BuildError: it differs by more than rounding explains.
        """
        error = relative_error(output, expected)
        self.max_error = max(self.max_error, error)
        if error <= self._tolerance:
            return
        text = f"{where} differs from the model by {error:.1e}, more than {self._tolerance:.0e}"
        text += self._capture.caveat
        if self._capture.float32_reference is None:
            raise rejected(text)
        exact = in_float32()
        own_error, model_error = relative_error(output, exact), 0.0
        for other in itertools.chain([expected], perturbed()):
            model_error = max(model_error, relative_error(other, exact))
            if own_error <= MAX_ROUNDING_RATIO * model_error:
                return
        raise rejected(
            f"{text}, and from the model in float32 by {own_error:.1e}, where the model's own "
            f"rounding makes {model_error:.1e}"
        )

    def perturbed(self, history: Sequence[Mapping[str, Tensor]], name: str) -> Iterator[Tensor]:
        """An output of the model with other roundings after these, if discontinuous."""
        make = self._capture.perturbed_reference
        if make is not None and self._is_discontinuous:
            for seed in range(PERTURBATIONS):
                yield make(seed)(history)[name]

    def in_float32(self, history: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
        """An output of the model in float32 after these requests."""
        if self._float32_reference is None:
            assert self._capture.float32_reference is not None
            self._float32_reference = self._capture.float32_reference()
        return self._float32_reference(history)[name]


def rank_limits(logits: Tensor, token: int, error: float) -> tuple[int, int]:
    """The smallest and the largest rank of a token among scores with an error.

    Args:
        logits: the scores, ``[vocab_size]``.
        token: the token.
        error: the largest relative error of a score, as a part of the largest one.
    """
    margin = 2 * error * float(logits.abs().max())
    low = int((logits > logits[token] + margin).sum()) + 1
    return low, int((logits >= logits[token] - margin).sum())


def _log_probabilities(logits: Tensor, token: Tensor, likely: Tensor) -> Tensor:
    """Those of a token, of tokens that should be the most likely ones, and of those that are."""
    logprobs = logits.float().log_softmax(-1)
    return torch.cat([logprobs[token][None], logprobs[likely], logprobs.topk(len(likely)).values])
