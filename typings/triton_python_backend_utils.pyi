"""What the modules `inplace.triton*` use of the module that Triton's Python backend provides."""

from typing import Any

TritonError: Any
InferenceRequest: Any
InferenceResponse: Any
Tensor: Any
MetricFamily: Any
TRITONSERVER_RESPONSE_COMPLETE_FINAL: int

class TritonModelException(Exception): ...

class Logger:
    @staticmethod
    def log_error(text: str) -> None: ...
    @staticmethod
    def log_warn(text: str) -> None: ...
    @staticmethod
    def log_info(text: str) -> None: ...
