"""GPU kernels in Triton language, and the functions that launch them.

Their callers are TensorRT plugins, which have addresses (`inplace.kernels.memory.Pointer`), and the CUDA implementations of the
operators, which have tensors. Nothing here synchronises with the host, so every launch can be captured into a CUDA graph.
"""
