"""The states of a user's module, and what the builder did with each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from inplace.schema.specs import AliasKind, Dtype, StateSpec, Update
from inplace.schema.standalone import Owner, Selection, format_selection, select_view
from torch import Tensor

SLOTS = "slots"
"""The placeholder that holds the slot of each row."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor that a module mutates, or reads while another program mutates it.

    Attributes:
        name: the graph's placeholder.
        owner: who owns its memory.
        source: the input's name, or the buffer's qualified name.
        initial: its values at capture, in the module's own shape.
        dynamic_axes: axes whose extent each call chooses (of the caller's tensors only).
        first_write: the module's line that writes it first, as `source_line` gives it.
        unmatched_view: if a part of it is written through a view that no pattern covers, which
            one, in words; else empty.
        whole: the tensor that it is a part of; None if it is a tensor of its own.
        selects: axis and index of each `Tensor.select` that takes the part from the whole: a
            contiguous view of a contiguous tensor.
        only_read: the module does not write it, but another program of the engine does.
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
    only_read: bool = False

    @property
    def module_tensor(self) -> "StateTensor":
        """The tensor as the module has it: the whole of a part, or this one."""
        return self.whole or self

    def select_from(self, tensor: Tensor) -> Tensor:
        """The view of the module's tensor that this state is."""
        return select_view(tensor, self.selects)

    def select(self, axis: int, index: int, name: str) -> "StateTensor":
        """The state at one index of it, under a name of its own."""
        return replace(
            self,
            name=name,
            source=f"{self.source}{format_selection(((axis, index),))}",
            initial=self.initial.select(axis, index),
            whole=self.module_tensor,
            selects=(*self.selects, (axis, index)),
        )

    def has_slot_axis(self, rows: int) -> bool:
        """Whether its first axis counts rows already and becomes the slot axis.

        Otherwise the slot axis is put in front of it.
        """
        return (self.initial.dim() > 1 and self.initial.shape[0] == rows) or rows > 1

    def slot_shape(self, rows: int) -> tuple[int, ...]:
        """Extents of one slot."""
        extents = tuple(self.initial.shape)
        return extents[1:] if self.has_slot_axis(rows) else extents


@dataclass(frozen=True)
class CapturedState:
    """A state of a rewritten graph, and how the graph updates it.

    Attributes:
        tensor: the module's tensor.
        has_slot_axis: the module's own first axis is the slot axis, so the tensor is bound as it
            is; else the runtime binds ``tensor.unsqueeze(0)``. Both are views of the same memory.
        pattern: the matched patterns in order (``slice_scatter``, ``index_copy``, …); ``replace``
            if the module computes the whole value anew, ``window`` if that value is the old one
            without its oldest entries and with new ones behind, ``explicit`` if the module writes
            a part in a way that no pattern covers.
        reason: why, in words, with the module's line.
        operators: the operators that write it, in order: ``update``, ``attention``, or ``user``
            for a user's own operator.
        update: how the manifest describes its updates.
        axis: the axis of a slot that an append grows along, else None.
        is_fixed: every step writes at the same places, or at a remainder (``n % capacity``): the
            state is never full.
        index_sources: the placeholders that the places are computed from; None if unknown.
    """

    tensor: StateTensor
    has_slot_axis: bool
    pattern: str
    reason: str
    operators: tuple[str, ...]
    update: Update
    axis: int | None
    is_fixed: bool = False
    index_sources: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """The graph's placeholder."""
        return self.tensor.name

    @property
    def kind(self) -> AliasKind:
        """The kind of its alias in a PyTorch graph."""
        return "user" if "user" in self.operators else "operator"

    @property
    def is_matched(self) -> bool:
        """Whether a step writes only what the module writes.

        A part of a part counts as the outer part.
        """
        return self.pattern != "explicit"

    def bound(self, tensor: Tensor) -> Tensor:
        """The view of the module's tensor that a runtime binds, ``[slots, ...]``."""
        part = self.tensor.select_from(tensor)
        return part if self.has_slot_axis else part.unsqueeze(0)

    def bound_initial(self) -> Tensor:
        """The tensor that is bound, with the values at capture."""
        return self.bound(self.tensor.module_tensor.initial)

    def spec(self) -> StateSpec:
        """The manifest's description of the state.

        ``fill`` is the initial value if it is the same everywhere. If not, it is 0 and the initial
        tensor must be copied.
        """
        initial = self.tensor.initial
        slot = self.bound_initial()
        first = initial.reshape(-1)[0].item() if initial.numel() else 0.0
        uniform = bool((initial == first).all()) and (
            not isinstance(first, complex) or first.imag == 0
        )
        first = first.real if isinstance(first, complex) else first
        fill: int | float = 0.0
        if uniform:
            is_whole_number = isinstance(first, int) and not isinstance(first, bool)
            fill = int(first) if is_whole_number else float(first)
        return StateSpec(
            name=self.name,
            shape=tuple(slot.shape[1:]),
            dtype=Dtype.of(initial.dtype),
            update=self.update,
            axis=self.axis,
            fill=fill,
        )


def common_rows(states: Sequence[StateTensor]) -> int | None:
    """The extent of the first axis if it is the same and more than 1 for every state."""
    extents = {state.initial.shape[0] if state.initial.dim() > 1 else 1 for state in states}
    return extents.pop() if len(extents) == 1 and 1 not in extents else None
