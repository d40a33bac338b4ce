"""The programs of an engine as TensorRT networks with plugins on the states' own memory.

They are defined and interpreted as `support.plugin_networks` says.
"""

import torch
from inplace.schema.programs import Program
from inplace_builder.capture.programs import ProgramsCapture
from inplace_builder.compare import fill_with_sentinel
from inplace_builder.lower import LoweredNetwork
from torch import Tensor

from support.network_interpreter import interpret
from support.plugin_decoders import plugin_network
from support.plugin_networks import tensorrt_with_plugins

SLOTS = 4


class Networks:
    """Programs over one memory, in which every byte is a sentinel until a sequence starts."""

    def __init__(self, captured: ProgramsCapture) -> None:
        tensorrt = tensorrt_with_plugins()
        self.programs: dict[str, tuple[LoweredNetwork, Program]] = {
            each.program.name: (plugin_network(each, tensorrt), each.program)
            for each in captured.captures
        }
        self.memory, self.initial = {}, {}
        for each in captured.captures:
            for state in each.states:
                tensor = torch.empty((SLOTS, *state.shape), dtype=state.dtype.as_torch)
                fill_with_sentinel(tensor)
                self.memory[state.name] = tensor
                self.initial[state.name] = each.initial.get(state.name, state.fill)

    def start(self, slot: int) -> None:
        for name, initial in self.initial.items():
            self.memory[name][slot] = initial

    def call(self, name: str, slots: list[int], **inputs: Tensor) -> dict[str, Tensor]:
        """A call of rows in these slots; -1 is a null row."""
        network, program = self.programs[name]
        given = {**inputs, "slots": torch.tensor(slots, dtype=torch.int32), **self.memory}
        given |= network.bound_weights
        outputs = interpret(network, {each: given[each] for each in network.inputs})
        for state, output in network.state_outputs.items():
            assert outputs[output].data_ptr() == self.memory[state].data_ptr()
        return {spec.name: outputs[spec.name] for spec in program.outputs}
