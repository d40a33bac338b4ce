"""The compiled files of an engine: what a manifest records of a graph or a TensorRT plan."""

from typing import Literal

from pydantic import Field

from inplace.schema.files import FileName, Record
from inplace.schema.specs import Dtype

Flavor = Literal["tensorrt", "tensorrt_rtx"]
"""The package of a TensorRT: TensorRT itself, or TensorRT for RTX."""


class Profile(Record):
    """A range of step sizes that a TensorRT plan is tuned for.

    Attributes:
        rows: smallest and largest number of rows.
        tokens: smallest and largest number of tokens; equal to ``rows`` in a program that takes
            one entry a row.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]

    def covers(self, rows: int, tokens: int) -> bool:
        """Whether a step of this size can run in the profile."""
        return self.rows[0] <= rows <= self.rows[1] and self.tokens[0] <= tokens <= self.tokens[1]


class Plan(Record):
    """What a TensorRT plan needs to run.

    Attributes:
        flavor: the package it was built with.
        version: that package's version; no other version can run the plan.
        gpu: name of the GPU it was built on; empty if it was compiled for
            ``compute_capability`` without a GPU.
        compute_capability: that of the GPU it runs on, for example ``9.0``.
        profiles: in the plan's order.
        weights: the file with the weights that the plan takes as inputs instead of holding them
            (safetensors), so that all profiles share one copy; None if it holds all.
    """

    flavor: Flavor
    version: str
    gpu: str
    compute_capability: str
    profiles: tuple[Profile, ...] = Field(min_length=1)
    weights: FileName | None = None


class EngineFile(Record):
    """How the file with a compiled graph is loaded.

    Attributes:
        file: its name.
        kind: the engine class that loads it.
        device: where it runs.
        dtype: the element type of its weights, but for those with scales.
        graph: which graph of the file it is, for PyTorch: several that share constants may be in
            one file (`inplace.schema.graph.METADATA`).
        plan: only for TensorRT.
        scales: of weights that are 8-bit floats (float8_e4m3fn): the name of the tensor with the
            scales, by the weight's name; both are constants of the graph, or weights of the plan.
    """

    file: FileName
    kind: Literal["torch", "tensorrt"]
    device: Literal["cpu", "cuda"]
    dtype: Dtype
    graph: str = "graph"
    plan: Plan | None = None
    scales: dict[str, str] = Field(default_factory=dict)
