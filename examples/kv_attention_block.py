"""An attention block over a cache in plain PyTorch: one operator of the engine, in place.

Each call takes any number of tokens, and two conversations alternate, each with its own caches.
"""

import tempfile
from pathlib import Path

import inplace
import inplace_builder as ib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

HEADS, KV_HEADS, DIM, CAPACITY = 8, 2, 16, 64


class Block(nn.Module):
    """Causal attention with grouped heads over the tokens in its caches."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.key_value = nn.Linear(HEADS * DIM, 2 * KV_HEADS * DIM)

    def forward(self, keys: Tensor, values: Tensor, x: Tensor, start: Tensor) -> Tensor:
        """Append tokens to the caches and attend to all tokens up to them.

        Args:
            keys: cache ``[1, 2, 64, 16]``, updated in place.
            values: cache ``[1, 2, 64, 16]``, updated in place.
            x: the tokens, ``[1, tokens, 128]``.
            start: position of the first of them, ``[1]``.
        """
        tokens = x.shape[1]
        positions = start + torch.arange(tokens)
        query = self.query(x).view(1, tokens, HEADS, DIM).transpose(1, 2)
        key, value = (
            self.key_value(x).view(1, tokens, 2 * KV_HEADS, DIM).transpose(1, 2).chunk(2, 1)
        )
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        visible = torch.arange(CAPACITY) <= positions[:, None]
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(1, tokens, HEADS * DIM)


def run(block: Block, engine: inplace.Engine) -> None:
    """Step two conversations in turns, and check every bit of their caches after each call."""
    caches = torch.randn(2, 2, 1, KV_HEADS, CAPACITY, DIM)  # [conversation, keys and values, …]
    eager_caches, address, lengths = caches.clone(), caches.data_ptr(), [0, 0]
    for conversation, tokens in ((0, 5), (1, 9), (0, 1), (1, 1), (0, 30)):
        start, x = lengths[conversation], torch.randn(1, tokens, HEADS * DIM)
        new, position = slice(start, start + tokens), torch.tensor([start])
        expected_bits = caches.clone()
        output = engine(*caches[conversation], x, position)
        torch.testing.assert_close(output, block(*eager_caches[conversation], x, position))
        expected_bits[conversation, :, :, :, new] = caches[conversation, :, :, :, new]
        assert torch.equal(expected_bits.view(torch.int32), caches.view(torch.int32))
        lengths[conversation] += tokens
        print(
            f"conversation {conversation} at {caches[conversation].data_ptr():#x}: "
            f"positions {start} to {start + tokens - 1} are new, no other bit changed"
        )
    torch.testing.assert_close(caches, eager_caches)
    assert caches.data_ptr() == address


def main() -> None:
    """Build, let two conversations take turns, and check what was written and where."""
    torch.manual_seed(0)
    block = Block().eval()
    empty = torch.zeros(2, 1, KV_HEADS, CAPACITY, DIM)
    example = (*empty, torch.randn(1, 3, HEADS * DIM), torch.zeros(1, dtype=torch.int64))
    shapes = (None, None, {1: Dim("tokens", min=1, max=CAPACITY)}, None)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        engine = ib.build(block, example, path=Path(folder) / "engine", dynamic_shapes=shapes)
        print("aliases (output@input@kind):", *engine.manifest.aliases)
        for lowering in engine.manifest.lowering:
            first, last = lowering.reason.partition(" at ")[0], lowering.reason.rpartition("; ")[2]
            print(f"{lowering.state}: {first} … {last}")
        run(block, engine)
    print(
        "nothing was copied: no bit outside the new positions changed, and the caches are where "
        "the caller allocated them"
    )


if __name__ == "__main__":
    main()
