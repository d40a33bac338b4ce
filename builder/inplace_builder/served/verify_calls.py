"""Compare single calls of programs in 16 bits, where rounding may decide a token.

Greedy search takes the largest score. Where the two largest differ by less than 16 bits round, an
engine that adds in another order may rightly take the other one, and everything after that token
differs. So each call begins with the states that the engine had, and a token that differs must be
one that the original module gives too if each of its operators rounds otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from inplace.schema.programs import CompiledProgram
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from inplace_builder.capture.programs import ProgramsCapture
from inplace_builder.compare import TOLERANCE, is_inexact, relative_error, tolerance
from inplace_builder.errors import rejected

DRAWS = 32
"""How often a module is called with other roundings."""


def rounds_tokens(manifest: Manifest) -> bool:
    """Whether calls are compared one by one: the engine computes in 16 bits.

    Not if a state is not refilled at START: the module would read what nobody has written.
    """
    is_rounded = any(
        tolerance(manifest, program) > TOLERANCE[Dtype.FLOAT32] for program in manifest.programs
    )
    return is_rounded and all(state.reset for state in manifest.states)


@dataclass
class CallComparison:
    """Compares calls.

    Attributes:
        manifest: of the engine.
        programs: what it is compared with.
        max_error: the largest relative error of an output or a state so far.
        num_calls: calls of rows that were compared.
        num_ties: how many of them gave what the module gives with other roundings only.
    """

    manifest: Manifest
    programs: ProgramsCapture
    max_error: float = 0.0
    num_calls: int = 0
    num_ties: int = 0

    @property
    def ties(self) -> str:
        """How many calls rounding decided, for the manifest."""
        return f"{self.num_ties} of {self.num_calls}"

    def compare(
        self,
        program: CompiledProgram,
        inputs: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> None:
        """Compare a call of one row.

        Args:
            program: that was called.
            inputs: of its request.
            before: the states of its slot before the call.
            outputs: what the call gave the row.
            after: the states of its slot after it.

        Raises:
            BuildError: an output or a state is not what the module gives.
        """
        self.num_calls += 1
        given = {**outputs, **after}
        expected = self._expected(program.name, inputs, before)
        if not _same_decisions(given, expected):
            expected = self._other_rounding(program.name, inputs, before, given, expected)
            self.num_ties += 1
        for name, reference in expected.items():
            if not is_inexact(reference):
                continue
            error = relative_error(given[name].reshape(reference.shape), reference)
            self.max_error = max(self.max_error, error)
            most = tolerance(self.manifest, program)
            if not error <= most:
                raise rejected(
                    f"program {program.name}: {name} differs from the model by {error:.1e}, more "
                    f"than {most}"
                )

    def _expected(
        self,
        name: str,
        inputs: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
        run: Callable[..., Any] | None = None,
    ) -> dict[str, Tensor]:
        """What the module gives: its outputs, and its states afterwards."""
        rows, names = self.programs.modules[name]
        own = [
            states[state].reshape(each.tensor.initial.shape)
            for state, each in zip(names, rows.states, strict=True)
        ]
        outputs, new = rows.call(inputs, own, run=run)
        return outputs | dict(zip(names, new, strict=True))

    def _other_rounding(
        self,
        name: str,
        inputs: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
        expected: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What the module gives with other roundings, such that it decides as the engine did.

        Raises:
            BuildError: it never does.
        """
        rounded = _OtherRoundings(self.programs.modules[name][0].original)
        for _ in range(DRAWS):
            result = self._expected(name, inputs, before, rounded.run)
            if _same_decisions(given, result):
                return result
        differing = {
            key: (given[key].tolist(), reference.tolist())
            for key, reference in expected.items()
            if not is_inexact(reference) and not _equal(given[key], reference)
        }
        raise rejected(
            f"program {name} gives other values than the model, which no rounding explains "
            f"(given, expected): {differing}"
        )


def _same_decisions(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are the same that are not rounded: tokens, flags, counters."""
    return all(
        is_inexact(reference) or _equal(given[name], reference)
        for name, reference in expected.items()
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1), other.reshape(-1))


class _OtherRoundings(Interpreter):
    """Runs a graph such that what each operator computes in 16 bits is off by up to one rounding.

    Args:
        module: the graph.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self._generator = torch.Generator().manual_seed(0)

    def run_node(self, n: Node) -> Any:
        """Run a node; what it has computed is changed in place."""
        result = super().run_node(n)
        if isinstance(n.target, torch._ops.OpOverload) and isinstance(result, Tensor):
            [returned] = n.target._schema.returns
            if returned.alias_info is None and result.dtype in (torch.float16, torch.bfloat16):
                noise = 2 * torch.rand(result.shape, generator=self._generator) - 1
                result.mul_(1 + torch.finfo(result.dtype).eps * noise)
        return result
