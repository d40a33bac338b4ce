"""Decoders as networks with plugins, interpreted on the CPU: ragged rows beside a null row."""

import torch
from inplace.runtime.prompt import TOKEN_OUTPUTS
from inplace.trt import TensorRT
from inplace_builder import Capture
from inplace_builder.fusion.fuse import bindable_weights, fuse
from inplace_builder.lower import LoweredNetwork, choose_mechanisms, lower, lowerable
from inplace_builder.lower.network import as_words
from torch import Tensor

from support.lowering import greedy_rows
from support.network_interpreter import interpret

SLOTS, NUM_SLOTS = (4, 1), 5
"""The slots of two sequences."""
NULL = [7, 7]
"""The tokens of the null row that is between them; the first where a row has one token a step."""


def plugin_network(capture: Capture, tensorrt: TensorRT) -> LoweredNetwork:
    """The network of a capture as a build for TensorRT makes it.

    Args:
        capture: of a decoder.
        tensorrt: of `support.plugin_networks`.
    """
    records = choose_mechanisms(capture.exported.graph, capture.states, tensorrt)
    assert {record.kind for record in records} == {"plugin"}
    kinds = {record.state: record.kind for record in records}
    graph = fuse(lowerable(capture.exported, kinds))
    return lower(
        graph,
        outputs=[spec.name for spec in capture.program.outputs],
        states=capture.states,
        kinds=kinds,
        tensorrt=tensorrt,
        bind=bindable_weights(graph),
    )


class TwoSequences:
    """Two sequences in the network of a decoder that was captured for three rows or more.

    States of fixed size begin as zeros in the sequences' slots. All else is NaN until it is
    written; other slots stay so.
    """

    def __init__(self, capture: Capture, tensorrt: TensorRT) -> None:
        self.network = plugin_network(capture, tensorrt)
        self.lengths = [0, 0]
        self._null = NULL[: capture.program.chunk]
        self._memory = {
            state.name: torch.full(
                (NUM_SLOTS, *state.shape), float("nan"), dtype=state.dtype.as_torch
            )
            for state in capture.states
        }
        for state in capture.states:
            if state.reset:
                self._memory[state.name][list(SLOTS)] = 0

    def step(self, first: list[int], second: list[int]) -> list[dict[str, Tensor]]:
        """Feed tokens to both sequences; the outputs of each."""
        parts = [first, self._null, second]
        starts = [self.lengths[0], 0, self.lengths[1]]
        offsets = torch.tensor([0, *map(len, parts)]).cumsum(0).int()
        positions = [
            torch.arange(at, at + len(part)) for at, part in zip(starts, parts, strict=True)
        ]
        memory = {name: as_words(state) for name, state in self._memory.items()}
        inputs = {
            "input_ids": torch.tensor([token for part in parts for token in part]),
            "positions": torch.cat(positions).int(),
            "row_offsets": offsets,
            "last_tokens": offsets[1:] - 1,
            "slots": torch.tensor([SLOTS[0], -1, SLOTS[1]], dtype=torch.int32),
            "write_indices": torch.tensor(starts, dtype=torch.int32),
            "following_tokens": torch.cat(
                [torch.tensor([*part[1:], 0], dtype=torch.int32) for part in parts]
            ),
            **greedy_rows(3),
            **memory,
            **{name: as_words(weight) for name, weight in self.network.bound_weights.items()},
        }
        outputs = interpret(self.network, {name: inputs[name] for name in self.network.inputs})
        for name, output in self.network.state_outputs.items():
            assert outputs[output].data_ptr() == memory[name].data_ptr()
        others = sorted(set(range(NUM_SLOTS)) - set(SLOTS))
        assert all(state.float()[others].isnan().all() for state in self._memory.values())
        self.lengths = [self.lengths[0] + len(first), self.lengths[1] + len(second)]
        names = set(outputs) - set(self.network.state_outputs.values())
        return [
            {
                name: outputs[name][offsets[row] : offsets[row + 1]]
                if name in TOKEN_OUTPUTS
                else outputs[name][row]
                for name in names
            }
            for row in (0, 2)
        ]
