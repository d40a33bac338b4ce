"""GPU kernels in Triton language, and the functions that launch them.

TensorRT plugins call them with addresses (`inplace.kernels.memory.Pointer`), the CUDA
implementations of the operators with tensors. Nothing here synchronises with the host, so every
launch can be captured into a CUDA graph.

``pdl`` is programmatic dependent launch: a kernel starts while its predecessor on the stream still
runs, and waits (``gdc_wait``) before it reads what the predecessor writes.
"""
