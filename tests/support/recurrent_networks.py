"""A convolution or recurrence as a network of the mechanism ``plugin``."""

from dataclasses import dataclass
from typing import Any

import torch
from inplace import operators
from inplace.schema.specs import Dtype, StateSpec, Update
from inplace.trt import TensorRT
from inplace_builder.graph.export import size_oblivious
from inplace_builder.lower import LoweredNetwork, choose_mechanisms, lower, lowerable
from inplace_builder.lower.compile import Range
from torch import Tensor, nn
from torch.export import Dim

WEIGHTS = ("weight", "bias", "A", "D")
"""Arguments of the operators that have no axis of tokens."""
ROWS = ("state", "slots", "row_offsets")
MAX_ROWS, MAX_TOKENS, MAX_SLOTS = 8, 512, 8


class _Call(nn.Module):
    def __init__(self, name: str, weights: dict[str, Tensor | None], options: dict[str, Any]):
        super().__init__()
        self.operator, self.options = getattr(operators, name), options
        self.names = list(weights)
        for each, weight in weights.items():
            self.register_buffer(each, weight)

    def forward(self, slots: Tensor, row_offsets: Tensor, state: Tensor, *inputs: Tensor) -> Tensor:
        packed, arguments = iter(inputs), []
        for name in argument_names(self.operator.__name__):
            if name not in ROWS:
                arguments.append(getattr(self, name) if name in self.names else next(packed))
        out = self.operator(*arguments, state, slots, row_offsets, **self.options)
        assert isinstance(out, Tensor)
        return out


def argument_names(operator: str) -> list[str]:
    """The positional arguments of an operator."""
    schema = getattr(torch.ops.inplace, operator).default._schema
    return [argument.name for argument in schema.arguments if not argument.kwarg_only]


@dataclass(frozen=True)
class RecurrenceNetwork:
    """The network of one operator, whose weights are constants.

    Attributes:
        lowered: the network. Its inputs are those of `inputs`, its output is ``out``.
        operator: the operator's name.
    """

    lowered: LoweredNetwork
    operator: str

    @classmethod
    def of(
        cls, tensorrt: TensorRT, operator: str, arguments: list[Any], options: dict[str, Any]
    ) -> "RecurrenceNetwork":
        """The network of a call; numbers of tokens, rows and slots may vary."""
        named = dict(zip(argument_names(operator), arguments, strict=True))
        weights = {name: named[name] for name in WEIGHTS if name in named}
        state = named["state"]
        packed = [x for name, x in named.items() if name not in (*WEIGHTS, *ROWS)]
        rows: Any = Dim("rows", min=1, max=MAX_ROWS)
        tokens = Dim("tokens", min=1, max=MAX_TOKENS)
        example = [x.new_zeros(3, *x.shape[1:]) for x in packed]
        control = (torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32))
        with torch.no_grad(), size_oblivious():
            exported = torch.export.export(
                _Call(operator, weights, options),
                (*control, state.new_zeros(4, *state.shape[1:]), *example),
                dynamic_shapes=(
                    {0: rows},
                    {0: rows + 1},
                    {0: Dim("slots", min=1, max=MAX_SLOTS)},
                    tuple({0: tokens} for _ in packed),
                ),
            )
        spec = StateSpec(
            name="state",
            shape=tuple(state.shape[1:]),
            dtype=Dtype.of(state.dtype),
            update=Update.REPLACE,
        )
        (record,) = choose_mechanisms(exported.graph, [spec], tensorrt, order=("plugin",))
        kinds = {"state": record.kind}
        program = lowerable(exported, kinds)
        lowered = lower(program, outputs=["out"], states=[spec], kinds=kinds, tensorrt=tensorrt)
        return cls(lowered, operator)

    def inputs(self, arguments: list[Any]) -> dict[str, Tensor]:
        """The network's inputs for a call; the state is bound as it is."""
        named = dict(zip(argument_names(self.operator), arguments, strict=True))
        packed = [x for name, x in named.items() if name not in (*WEIGHTS, *ROWS)]
        rows = {name: named[name].int() for name in ("slots", "row_offsets")}
        return {
            "state": named["state"],
            **rows,
            **{f"inputs_{index}": x for index, x in enumerate(packed)},
        }

    def profile(self) -> dict[str, Range]:
        """Shapes of the inputs, for all steps of up to `MAX_TOKENS` tokens in `MAX_ROWS` rows."""
        ends = {"slots": (1, MAX_ROWS), "row_offsets": (2, MAX_ROWS + 1), "state": (1, MAX_SLOTS)}
        ranges: dict[str, Range] = {}
        for index in range(self.lowered.network.num_inputs):
            tensor = self.lowered.network.get_input(index)
            low, high = ends.get(tensor.name, (1, MAX_TOKENS))
            rest = tuple(tensor.shape)[1:]
            ranges[tensor.name] = ((low, *rest), (high, *rest), (high, *rest))
        return ranges
