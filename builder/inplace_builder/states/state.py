"""The states of a user's own module, and what was found out about each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from inplace.schema.dtypes import Dtype
from inplace.schema.served import AliasKind
from inplace.schema.specs import StateSpec, Update
from inplace.schema.standalone import Selection, format_selection, select_view
from torch import Tensor


class Owner(StrEnum):
    """Whose memory a state is."""

    CALLER = "caller"
    """An input that the module mutates: the caller's own tensor is bound."""
    MODULE = "module"
    """A buffer that the module mutates: the engine keeps it."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a module mutates.

    Attributes:
        name: the graph's placeholder.
        owner: whose memory it is.
        source: the input's name, or the buffer's qualified name.
        initial: what it held at capture, in the module's own shape.
        dynamic_axes: axes of which a call chooses the extent (of the caller's tensors only).
        first_write: the module's line that writes it first, as `source_line` has it.
        unmatched_view: where a part of it is written through a view that no pattern follows: which, in words; else empty.
        whole: the tensor that it is a part of; None where it is one of its own.
        selects: axis and index of each `Tensor.select` that makes the part of the whole: a view that is contiguous, as the whole is.
    """

    name: str
    owner: Owner
    source: str
    initial: Tensor
    dynamic_axes: frozenset[int] = frozenset()
    first_write: str = ""
    unmatched_view: str = ""
    whole: "StateTensor | None" = None
    selects: Selection = ()

    @property
    def module_tensor(self) -> "StateTensor":
        """The tensor as the module has it."""
        return self.whole or self

    def select_from(self, tensor: Tensor) -> Tensor:
        """Its part of the module's tensor: the same memory."""
        return select_view(tensor, self.selects)

    def select(self, axis: int, index: int, name: str) -> "StateTensor":
        """What lies at an index of it."""
        return replace(
            self,
            name=name,
            source=f"{self.source}{format_selection(((axis, index),))}",
            initial=self.initial.select(axis, index),
            whole=self.module_tensor,
            selects=(*self.selects, (axis, index)),
        )

    def has_slot_axis(self, rows: int) -> bool:
        """Whether its first axis already counts rows, so that it serves as the slot axis; otherwise one is put in front of it."""
        return (self.initial.dim() > 1 and self.initial.shape[0] == rows) or rows > 1

    def slot_shape(self, rows: int) -> tuple[int, ...]:
        """Extents of one slot."""
        return (
            tuple(self.initial.shape[1:]) if self.has_slot_axis(rows) else tuple(self.initial.shape)
        )


@dataclass(frozen=True)
class CapturedState:
    """A state of a rewritten graph, and the verdict on its updates.

    Attributes:
        tensor: where it comes from.
        has_slot_axis: the module's own first axis is the slot axis, so the tensor is bound as it is; else the runtime binds
            ``tensor.unsqueeze(0)``. Both are the tensor's own memory.
        pattern: the recognised patterns in order (``slice_scatter``, ``index_copy``, …); ``replace`` for a state whose whole value is
            computed anew, ``window`` where that value is the state moved on by new entries, ``explicit`` where the module writes a part in
            a way that no pattern covers.
        reason: in words, with the module's line where a pattern was refused.
        operators: the operators that write it, in order: ``update``, ``attention``, or ``user`` for one of the user's own.
        update: what the manifest says of it.
        axis: the axis of a slot that an append grows along, else None.
    """

    tensor: StateTensor
    has_slot_axis: bool
    pattern: str
    reason: str
    operators: tuple[str, ...]
    update: Update
    axis: int | None

    @property
    def name(self) -> str:
        """The graph's placeholder."""
        return self.tensor.name

    @property
    def kind(self) -> AliasKind:
        """The kind of its alias in a graph of PyTorch."""
        return "user" if "user" in self.operators else "operator"

    @property
    def is_matched(self) -> bool:
        """Whether no part of the state is rewritten that the module did not write."""
        return self.pattern != "explicit"

    def bound(self, tensor: Tensor) -> Tensor:
        """What a runtime binds for the tensor as the module has it: the same memory."""
        part = self.tensor.select_from(tensor)
        return part if self.has_slot_axis else part.unsqueeze(0)

    def bound_initial(self) -> Tensor:
        """What is bound, with the values at capture."""
        return self.bound(self.tensor.module_tensor.initial)

    def spec(self) -> StateSpec:
        """The manifest's description; ``fill`` is the initial value where one number says it (else the initial tensor must be copied)."""
        initial = self.tensor.initial
        slot = self.bound_initial()
        first = initial.reshape(-1)[0].item() if initial.numel() else 0.0
        uniform = bool((initial == first).all()) and (
            not isinstance(first, complex) or first.imag == 0
        )
        first = first.real if isinstance(first, complex) else first
        return StateSpec(
            name=self.name,
            shape=tuple(slot.shape[1:]),
            dtype=Dtype.of(initial.dtype),
            update=self.update,
            axis=self.axis,
            fill=(first if isinstance(first, int) and not isinstance(first, bool) else float(first))
            if uniform
            else 0.0,
        )


def common_rows(states: Sequence[StateTensor]) -> int | None:
    """The extent of the first axis, where it is the same and more than 1 for every state."""
    extents = {state.initial.shape[0] if state.initial.dim() > 1 else 1 for state in states}
    return extents.pop() if len(extents) == 1 and 1 not in extents else None
