"""An attention block over a cache, as a model's author writes it: one operator in the engine, which appends in place and attends.

Each call takes any number of tokens, and two conversations take turns in caches of their own.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from inplace_builder.standalone.build import build
from torch import Tensor, nn
from torch.export import Dim

HEADS, KV_HEADS, DIM, CAPACITY = 8, 2, 16, 64


class Block(nn.Module):
    """Causal attention with grouped heads over everything that its cache holds."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.key_value = nn.Linear(HEADS * DIM, 2 * KV_HEADS * DIM)

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, start: Tensor) -> Tensor:
        """Attend with tokens ``x [1, tokens, 128]`` at positions from ``start [1]``; the caches ``[1, 2, 64, 16]`` are written."""
        tokens = x.shape[1]
        places = start + torch.arange(tokens)
        query = self.query(x).view(1, tokens, HEADS, DIM).transpose(1, 2)
        key, value = (
            self.key_value(x).view(1, tokens, 2 * KV_HEADS, DIM).transpose(1, 2).chunk(2, 1)
        )
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        visible = torch.arange(CAPACITY) <= places[:, None]
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(1, tokens, HEADS * DIM)


def main() -> None:
    """Build, let two conversations take turns, and show what was written and where."""
    torch.manual_seed(0)
    block = Block().eval()
    empty = torch.zeros(2, 1, KV_HEADS, CAPACITY, DIM)
    example = (*empty, torch.randn(1, 3, HEADS * DIM), torch.zeros(1, dtype=torch.int64))
    shapes = (None, None, {1: Dim("tokens", min=1, max=CAPACITY)}, None)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        engine = build(block, example, path=Path(folder) / "engine", dynamic_shapes=shapes)
        print("aliases (output@input@kind):", *engine.manifest.aliases)
        for verdict in engine.manifest.lowering:
            print(
                f"{verdict.state}: {verdict.reason.partition(' at ')[0]} … {verdict.reason.rpartition('; ')[2]}"
            )
        mine, eager = (
            torch.randn(2, 2, 1, KV_HEADS, CAPACITY, DIM) for _ in range(2)
        )  # [conversation, keys and values, …]
        eager.copy_(mine)
        held, address = [0, 0], mine.data_ptr()
        for conversation, tokens in ((0, 5), (1, 9), (0, 1), (1, 1), (0, 30)):
            start, x = held[conversation], torch.randn(1, tokens, HEADS * DIM)
            before = mine.clone()
            found = engine(*mine[conversation], x, torch.tensor([start]))
            torch.testing.assert_close(found, block(*eager[conversation], x, torch.tensor([start])))
            before[conversation, :, :, :, start : start + tokens] = mine[
                conversation, :, :, :, start : start + tokens
            ]
            assert torch.equal(before.view(torch.int32), mine.view(torch.int32)), (
                "something else changed"
            )
            held[conversation] += tokens
            where = mine[conversation].data_ptr()
            print(
                f"conversation {conversation} at {where:#x}: positions {start} to {held[conversation] - 1} are new, no other bit changed"
            )
        torch.testing.assert_close(mine, eager)
    assert mine.data_ptr() == address
    print(
        "nothing was copied: every bit outside the new positions is what it was, and the caches lie where the caller put them"
    )


if __name__ == "__main__":
    main()
