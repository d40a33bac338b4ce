"""The ``inplace`` operator library."""

import torch

NAMESPACE = "inplace"


# Kept for the life of the process: dropping it unregisters the operators.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str) -> None:
    """Define the operator ``inplace::name``; its implementations are registered beside it."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
