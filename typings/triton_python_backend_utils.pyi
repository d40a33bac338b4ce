"""What `inplace.triton` uses of the module that Triton's Python backend provides."""

from typing import Any

TritonError: Any
InferenceResponse: Any
Tensor: Any

class TritonModelException(Exception): ...

class Logger:
    @staticmethod
    def log_error(text: str) -> None: ...
    @staticmethod
    def log_warn(text: str) -> None: ...
    @staticmethod
    def log_info(text: str) -> None: ...
    @staticmethod
    def log_verbose(text: str) -> None: ...
