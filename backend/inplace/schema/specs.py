"""What the tensors of a program are: states, and what a step takes and returns. Shapes leave out the batch."""

from enum import StrEnum
from math import prod
from typing import Self

from pydantic import model_validator

from inplace.schema.dtypes import Dtype
from inplace.schema.records import Frozen


class Update(StrEnum):
    """How a step changes a state."""

    APPEND = "append"
    """Rows are written along one axis at the sequence's write index; what was written stays."""
    RING = "ring"
    """The same, modulo the length of that axis: the newest rows replace the oldest."""
    REPLACE = "replace"
    """The whole slot is rewritten in each step."""


class Role(StrEnum):
    """What an input of a program carries, and therefore who fills it."""

    TOKENS = "tokens"
    """From the client: a variable number of entries a request, packed along axis 0 over all rows of a step."""
    ROW = "row"
    """From the client: one entry of a fixed shape a request."""
    POSITIONS = "positions"
    """From the runtime, ``[tokens]``: each token's position in its sequence."""
    ROW_OFFSETS = "row_offsets"
    """From the runtime, ``[rows + 1]``: row r owns tokens ``row_offsets[r]:row_offsets[r + 1]``."""
    LAST_TOKENS = "last_tokens"
    """From the runtime, ``[rows]``: the index of each row's last token in the packed axis."""
    SLOTS = "slots"
    """From the runtime, ``[rows]``: the slot of each row; -1 is a null row."""
    WRITE_INDICES = "write_indices"
    """From the runtime, ``[rows]``: the cached length of each row before the step, where its append starts."""
    NEXT_POSITIONS = "next_positions"
    """From the runtime, ``[rows]``: the cached length of each row after the step, which is the position of the token it chooses."""
    TEMPERATURE = "temperature"
    """From the runtime, ``[rows]``, like the next three what each request asks for, see `inplace.runtime.sampling`; 0 where it chooses no token."""
    TOP_K = "top_k"
    TOP_P = "top_p"
    SEED = "seed"


CLIENT_ROLES = frozenset({Role.TOKENS, Role.ROW})


SAMPLING_ROLES = (Role.TEMPERATURE, Role.TOP_K, Role.TOP_P, Role.SEED, Role.NEXT_POSITIONS)
"""What `inplace.operators.sample` takes beside scores, in its order."""


class StateSpec(Frozen):
    """One state tensor of a model.

    Attributes:
        name: the state's name, also that of the graph's input it is bound to.
        shape: extent of one slot, without the slot axis.
        dtype: element type.
        update: how a step changes it.
        axis: for ``append`` and ``ring``, the axis of ``shape`` that grows; None for ``replace``.
        fill: the value a fresh slot holds.
        reset: whether a slot must be refilled when a sequence starts. False only where the program provably never reads
            what the sequence has not written itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    update: Update
    axis: int | None = None
    fill: int | float = 0.0  # a whole number is exact beyond 2**53
    reset: bool = True

    @model_validator(mode="after")
    def _axis_fits(self) -> Self:
        if (self.axis is None) != (self.update is Update.REPLACE):
            raise ValueError(
                f"state {self.name}: an axis belongs to append and ring, not to replace"
            )
        if self.axis is not None and not 0 <= self.axis < len(self.shape):
            raise ValueError(
                f"state {self.name}: axis {self.axis} is outside its shape {self.shape}"
            )
        if any(extent < 1 for extent in self.shape):
            raise ValueError(f"state {self.name}: every extent of {self.shape} must be at least 1")
        return self

    @property
    def slot_bytes(self) -> int:
        """Bytes one slot of this state takes."""
        return prod(self.shape) * self.dtype.as_torch.itemsize


class TensorSpec(Frozen):
    """One input or output of a program.

    Attributes:
        name: name of the graph's placeholder (inputs) and of the server's tensor (where a client sees it).
        role: what it carries.
        dtype: element type.
        shape: extent for one request; -1 (only first, only for ``tokens``) is the number of tokens.
        minimum, maximum: inclusive limits of the values a client may send; None is no limit.
        on_request: an output that is only sent when the request has a parameter of its name with the value true.
        argmax_of: an integer output that is the index of the largest value of this other output.
        sampled_from: an integer output that `inplace.operators.sample` chooses from the scores in this other output, as the request asks.
    """

    name: str
    role: Role
    dtype: Dtype
    shape: tuple[int, ...] = ()
    minimum: int | None = None
    maximum: int | None = None
    on_request: bool = False
    argmax_of: str | None = None
    sampled_from: str | None = None
