"""Buffers that a module assigns anew, in the graph of its export.

``self.hidden = new`` puts another tensor in a buffer's place. torch.export of PyTorch 2.11 follows
that in the root of a module only, and not where one of its buffers is None. `assigned_buffers` lets
an export copy the new tensors into all of them, at the end of the graph.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.export._trace
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils.hooks import RemovableHandle

aten = torch.ops.aten


@contextlib.contextmanager
def assigned_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Let an export copy what a module assigns to its buffers, and those of its parts."""
    tracing: Any = torch.export._trace
    original = tracing.register_buffer_assignment_hook
    assigned = _Assigned(module)
    tracing.register_buffer_assignment_hook = lambda *_: RemovableHandle(OrderedDict())
    before = module.register_forward_pre_hook(assigned.before, prepend=True)
    after = module.register_forward_hook(assigned.after)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        tracing.register_buffer_assignment_hook = original


class _Assigned:
    """Adds the copies to the graph while a module is traced."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._places = [
            (part._buffers, name)
            for part in module.modules()
            for name, tensor in part._buffers.items()
            if tensor is not None
        ]
        self._held: list[tuple[dict[str, Tensor | None], str, Tensor, Node]] = []

    def before(self, *given: Any) -> None:
        """Note the tensors that are traced in the buffers' places."""
        mode = get_proxy_mode()
        self._held = []
        for buffers, name in self._places:
            tensor = buffers.get(name)
            node = None if tensor is None else _node(tensor, mode)
            if tensor is not None and node is not None:
                self._held.append((buffers, name, tensor, node))

    def after(self, *given: Any) -> None:
        """Copy the tensors that are there now into those."""
        mode = get_proxy_mode()
        changed = [
            (old, node, new)
            for buffers, name, old, node in self._held
            if isinstance(new := buffers.get(name), Tensor) and new is not old
        ]
        memory = {old.untyped_storage()._cdata for old, _, _ in changed}
        # what another copy writes, and an input, which has no line in the module
        fresh = [
            new.clone() if _is_input(new, mode) or new.untyped_storage()._cdata in memory else new
            for _, _, new in changed
        ]
        for (old, node, _), new in zip(changed, fresh, strict=True):
            source = _node(new, mode)
            if source is None:
                old.copy_(new)
            else:  # no call, as the extents may differ; the metadata tells that no line wrote it
                copy = node.graph.call_function(aten.copy_.default, (node, source))
                copy.meta = source.meta


def _is_input(tensor: Tensor, mode: Any) -> bool:
    node = _node(tensor, mode)
    return node is not None and node.op == "placeholder"


def _node(tensor: Tensor, mode: Any) -> Node | None:
    """The node of a tensor that is traced; None for another tensor."""
    slot: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else slot.proxy.node
