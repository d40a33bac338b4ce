"""A cache that the caller owns: two conversations alternate through one engine, each in its own memory."""

import tempfile
from pathlib import Path

import inplace
import torch
from inplace_builder.standalone.build import build
from torch import Tensor, nn


class Attention(nn.Module):
    """One head over a cache ``[1, capacity, dim]`` of keys and one of values, as it might be written for eager PyTorch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 3 * dim)

    def forward(self, cache: dict[str, Tensor], x: Tensor, position: Tensor) -> Tensor:
        """Append one token ``x [1, 1, dim]`` at ``position [1]`` and attend to all tokens up to it."""
        query, key, value = self.project(x).chunk(3, -1)
        cache["keys"].index_copy_(1, position, key)
        cache["values"].index_copy_(1, position, value)
        scores = query @ cache["keys"].transpose(1, 2) / x.shape[-1] ** 0.5
        seen = torch.arange(cache["keys"].shape[1]) <= position
        attended: Tensor = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ cache["values"]
        return attended


def new_cache(capacity: int, dim: int) -> dict[str, Tensor]:
    """An empty cache."""
    return {"keys": torch.zeros(1, capacity, dim), "values": torch.zeros(1, capacity, dim)}


def main() -> None:
    """Build, load, alternate between two caches, and show that each stayed where it was and became what eager PyTorch makes of it."""
    torch.manual_seed(0)
    dim, capacity, steps = 16, 64, 10
    module = Attention(dim).eval()
    with tempfile.TemporaryDirectory() as folder:
        build(
            module,
            (new_cache(capacity, dim), torch.randn(1, 1, dim), torch.tensor([0])),
            path=Path(folder) / "engine",
        )
        engine = inplace.load(Path(folder) / "engine")
    print("aliases (output@input@kind):", *engine.manifest.aliases)
    mine, eager = ([new_cache(capacity, dim) for _ in range(2)] for _ in range(2))
    addresses = [{name: tensor.data_ptr() for name, tensor in cache.items()} for cache in mine]
    for step in range(steps):
        for which in range(2):
            x, position = torch.randn(1, 1, dim), torch.tensor([step])
            with torch.no_grad():
                expected = module(eager[which], x, position)
            torch.testing.assert_close(engine(mine[which], x, position), expected)
    for which in range(2):
        for name, tensor in mine[which].items():
            torch.testing.assert_close(tensor, eager[which][name])
            assert tensor.data_ptr() == addresses[which][name]
            assert not tensor[:, steps:].any(), "beyond the last token nothing was written"
            print(
                f"cache {which}, {name}: at {tensor.data_ptr():#x} before and after {steps} calls, equal to eager PyTorch"
            )
    print(
        "nothing was copied: the engine wrote into the caller's tensors and returned only its output"
    )


if __name__ == "__main__":
    main()
