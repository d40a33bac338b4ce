"""The file Triton loads as the backend ``inplace``: ``<backend-directory>/inplace/model.py``."""

from inplace.server.backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
