"""Engines without a server: called like the module they were built from."""

from inplace.direct.engine import Engine

__all__ = ["Engine"]
