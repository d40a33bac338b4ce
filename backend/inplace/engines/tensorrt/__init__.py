"""The TensorRT engine: a plan whose states are bound to the arena once, replayed as CUDA graphs."""

from inplace.engines.tensorrt.engine import TensorRtEngine

__all__ = ["TensorRtEngine"]
