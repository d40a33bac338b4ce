"""A cache of the caller: two conversations alternate through one engine, each with its own."""

import tempfile
from pathlib import Path

import inplace
import inplace_builder as ib
import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """One attention head, written for eager PyTorch.

    Its caches of keys and of values are ``[1, capacity, dim]``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, 3 * dim)

    def forward(self, cache: dict[str, Tensor], x: Tensor, position: Tensor) -> Tensor:
        """Append one token ``x [1, 1, dim]`` at ``position [1]`` and attend to all up to it."""
        query, key, value = self.project(x).chunk(3, -1)
        cache["keys"].index_copy_(1, position, key)
        cache["values"].index_copy_(1, position, value)
        scores = query @ cache["keys"].transpose(1, 2) / x.shape[-1] ** 0.5
        visible = torch.arange(cache["keys"].shape[1]) <= position
        attended: Tensor = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ cache["values"]
        return attended


def new_cache(capacity: int, dim: int) -> dict[str, Tensor]:
    """An empty cache."""
    return {"keys": torch.zeros(1, capacity, dim), "values": torch.zeros(1, capacity, dim)}


def main() -> None:
    """Build, load, alternate between two caches, and compare both with eager PyTorch."""
    torch.manual_seed(0)
    dim, capacity, steps = 16, 64, 10
    module = Attention(dim).eval()
    with tempfile.TemporaryDirectory() as folder:
        ib.build(
            module,
            (new_cache(capacity, dim), torch.randn(1, 1, dim), torch.tensor([0])),
            path=Path(folder) / "engine",
        )
        engine = inplace.load(Path(folder) / "engine")
    print("aliases (output@input@kind):", *engine.manifest.aliases)
    caches, eager_caches = ([new_cache(capacity, dim) for _ in range(2)] for _ in range(2))
    addresses = [{name: tensor.data_ptr() for name, tensor in cache.items()} for cache in caches]
    for step in range(steps):
        for which in range(2):
            x, position = torch.randn(1, 1, dim), torch.tensor([step])
            with torch.no_grad():
                expected = module(eager_caches[which], x, position)
            torch.testing.assert_close(engine(caches[which], x, position), expected)
    for which in range(2):
        for name, tensor in caches[which].items():
            torch.testing.assert_close(tensor, eager_caches[which][name])
            assert tensor.data_ptr() == addresses[which][name]
            assert not tensor[:, steps:].any(), "positions after the last token were written"
            print(
                f"cache {which}, {name}: at {tensor.data_ptr():#x} before and after {steps} calls, "
                "equal to eager PyTorch"
            )
    print("nothing was copied: the engine wrote into the caller's tensors and returned its output")


if __name__ == "__main__":
    main()
