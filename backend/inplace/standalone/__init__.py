"""Engines that run without a server, called like the module they were built from."""

from inplace.standalone.engine import Engine

__all__ = ["Engine"]
