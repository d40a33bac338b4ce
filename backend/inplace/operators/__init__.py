"""The three operators through which a captured graph touches state, and nothing else does.

Every one takes the whole arena tensor ``[slots, ...]`` and the slots of the step's rows, so the same graph serves any rows in
any slots, and mutates in place, so no state is ever an output that must be copied back. Importing this package registers
``torch.ops.inplace.{read,update,attention}``.

The implementations here are plain PyTorch and run on every device. They read the row bounds on the host.
"""

from inplace.operators.attention import attention
from inplace.operators.library import NAMESPACE, written_states
from inplace.operators.read import read
from inplace.operators.update import update

__all__ = ["NAMESPACE", "attention", "read", "update", "written_states"]
