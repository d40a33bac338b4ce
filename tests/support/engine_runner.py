"""Runs a plan on the GPU with PyTorch's tensors, for tests of the builder alone."""

from collections.abc import Mapping
from typing import Any

import torch
from inplace.trt import TensorRT
from torch import Tensor


class PlanRunner:
    """A deserialized plan.

    Args:
        tensorrt: the TensorRT that built it.
        plan: the return value of `compile_network`.
    """

    def __init__(self, tensorrt: TensorRT, plan: Any) -> None:
        self.tensorrt = tensorrt
        self.log = tensorrt.log()
        self.runtime = tensorrt.api.Runtime(self.log.logger)
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        assert self.engine is not None
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        is_input = tensorrt.api.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == is_input]
        self.outputs = [name for name in names if name not in self.inputs]
        self.stream = torch.cuda.Stream()

    def profile(self, index: int) -> None:
        """Switch to an optimization profile."""
        assert self.context.set_optimization_profile_async(index, self.stream.cuda_stream)
        self.stream.synchronize()

    def run(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One step.

        Args:
            inputs: by name, on any device; inputs that the plan does not have are ignored.
            outputs: CUDA tensors to write some of the outputs to; others get new memory.

        Returns:
            Every output by name, on the GPU, after a synchronisation.
        """
        bound = {name: inputs[name].cuda().contiguous() for name in self.inputs}
        for name, tensor in bound.items():
            assert tensor.dtype == self.tensorrt.torch_dtype(self.engine.get_tensor_dtype(name)), (
                name
            )
            assert self.context.set_input_shape(name, tuple(tensor.shape)), (
                f"{name} {tuple(tensor.shape)}"
            )
            assert self.context.set_tensor_address(name, tensor.data_ptr())
        results = dict(outputs or {})
        for name in self.outputs:
            if name not in results:
                dtype = self.tensorrt.torch_dtype(self.engine.get_tensor_dtype(name))
                results[name] = torch.empty(
                    tuple(self.context.get_tensor_shape(name)), dtype=dtype, device="cuda"
                )
            assert self.context.set_tensor_address(name, results[name].data_ptr())
        torch.cuda.synchronize()  # the inputs were made on another stream
        assert self.context.execute_async_v3(self.stream.cuda_stream)
        self.stream.synchronize()
        return results
