"""A streaming transducer (RNN-T) of one's own as two programs of one engine.

``encode`` encodes a chunk of features; ``decode`` is one iteration of greedy search: it emits a
token, or goes to the next frame. A request runs ``encode`` once and ``decode`` until the chunk's
frames are used up, and is answered with the tokens of the chunk.

    python examples/transducer.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import inplace_builder as ib
import torch
from torch import nn

BLANK, VOCABULARY, DIM, FEATURES, FRAMES, MAX_SYMBOLS = 0, 32, 16, 8, 4, 3


class Memory(nn.Module):
    """What both programs know of a chunk: its encoded frames, and which frame is next."""

    frames: torch.Tensor
    frame: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frames", torch.zeros(1, FRAMES, DIM))
        self.register_buffer("frame", torch.full((1,), FRAMES))


class Encode(nn.Module):
    """The encoder: a GRU whose state goes on from chunk to chunk."""

    context: torch.Tensor

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.gru = memory, nn.GRU(FEATURES, DIM, batch_first=True)
        self.register_buffer("context", torch.zeros(1, 1, DIM))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``[1, FRAMES, FEATURES]``; returns the mean of the encoded frames."""
        encoded, context = self.gru(features, self.context)
        self.context.copy_(context)
        self.memory.frames.copy_(encoded)
        self.memory.frame.zero_()
        return torch.mean(encoded, 1)


class Decode(nn.Module):
    """Predictor and joint: one iteration of greedy search. Nothing changes when it is done."""

    hidden: torch.Tensor
    last: torch.Tensor
    symbols: torch.Tensor

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.embedding = memory, nn.Embedding(VOCABULARY, DIM)
        self.cell, self.joint = nn.GRUCell(DIM, DIM), nn.Linear(2 * DIM, VOCABULARY)
        self.register_buffer("hidden", torch.zeros(1, DIM))
        self.register_buffer("last", torch.full((1,), BLANK))
        self.register_buffer("symbols", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The token, -1 for none; and whether the frames are used up."""
        at = self.memory.frame
        active = at < FRAMES
        hidden = self.cell(self.embedding(self.last), self.hidden)
        here = at.clamp(max=FRAMES - 1)[:, None, None].expand(1, 1, DIM)
        frame = self.memory.frames.gather(1, here)[:, 0]
        best = self.joint(torch.cat([frame, hidden], 1)).argmax(1)
        emits = active & (best != BLANK)
        symbols = torch.where(emits, self.symbols + 1, 0)
        leaves = active & (~emits | (symbols >= MAX_SYMBOLS))
        self.hidden.copy_(torch.where(emits[:, None], hidden, self.hidden))
        self.last.copy_(torch.where(emits, best, self.last))
        self.symbols.copy_(torch.where(active & ~leaves, symbols, 0))
        following = torch.where(leaves, at + 1, at)
        self.memory.frame.copy_(following)
        return torch.where(emits, best, -1), following >= FRAMES


def modules() -> tuple[Encode, Decode]:
    """Both modules, with random weights; they share the buffers of one `Memory`."""
    torch.manual_seed(0)
    memory = Memory()
    return Encode(memory).eval(), Decode(memory).eval()


def capture(encoder: Encode, decoder: Decode) -> ib.ProgramsCapture:
    """Both programs, and what a request calls."""
    decode = ib.RowOptions(
        max_rows=4,
        outputs=("tokens", "done"),
        roles={"tokens": ib.Role.TOKENS, "done": ib.Role.DONE},
    )
    encode, chunk = ib.RowOptions(max_rows=4, outputs=("level",)), torch.zeros(1, FRAMES, FEATURES)
    programs = {"encode": (encoder, encode, (chunk,)), "decode": (decoder, decode, ())}
    schedule = [
        ib.Call(program="encode"),
        ib.Call(program="decode", until="done", at_most=FRAMES * MAX_SYMBOLS),
    ]
    return ib.capture_programs(programs, schedule)


def main() -> None:
    """Build the engine, which verifies it against the modules in the same schedule."""
    folder = Path(*sys.argv[1:2] or [tempfile.gettempdir(), "models", "transducer"])
    manifest = ib.write_engine(capture(*modules()), folder, ib.BuildOptions(slots=8, max_rows=4))
    print(f"{folder}: programs {[program.name for program in manifest.programs]}")


if __name__ == "__main__":
    main()
