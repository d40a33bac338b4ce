"""What `inplace.triton` and `inplace.triton_reports` use of the module that Triton's Python backend provides."""

from typing import Any

TritonError: Any
InferenceResponse: Any
Tensor: Any
MetricFamily: Any

class TritonModelException(Exception): ...

class Logger:
    @staticmethod
    def log_error(text: str) -> None: ...
    @staticmethod
    def log_warn(text: str) -> None: ...
    @staticmethod
    def log_info(text: str) -> None: ...
