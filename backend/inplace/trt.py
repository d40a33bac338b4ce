"""The one module that imports TensorRT, or TensorRT for RTX where only that is installed.

Both have the same network API with small differences; `TensorRT` holds the imported module
together with what differs. Their modules are untyped, so their objects have the type ``Any`` here.
"""

import importlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from inplace.errors import LoadError
from inplace.schema.artifacts import Flavor

FLAVORS: tuple[Flavor, ...] = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT.

    Attributes:
        flavor: the name of its package.
        api: the module itself.
    """

    flavor: Flavor
    api: Any

    @cached_property
    def version(self) -> tuple[int, ...]:
        """For example ``(10, 6, 0)``. TensorRT for RTX 1.7 has the API of TensorRT 11."""
        return tuple(int(part) for part in re.findall(r"\d+", self.api.__version__))

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT for RTX, which compiles on a CPU for given GPUs; no plugins."""
        return self.flavor == "tensorrt_rtx"

    def __str__(self) -> str:
        return f"{'TensorRT for RTX' if self.is_rtx else 'TensorRT'} {self.api.__version__}"

    def log(self) -> "Log":
        """A new collector of this TensorRT's errors."""
        return Log(self.api)

    def strongly_typed(self) -> int:
        """Creation flags of a strongly typed network, the only kind in TensorRT 11 and RTX."""
        return 1 << int(self.api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    @cached_property
    def _dtypes(self) -> dict[torch.dtype, Any]:
        kinds = self.api.DataType
        return {
            torch.float32: kinds.FLOAT,
            torch.float16: kinds.HALF,
            torch.bfloat16: kinds.BF16,
            torch.int32: kinds.INT32,
            torch.int64: kinds.INT64,
            torch.int8: kinds.INT8,
            torch.uint8: kinds.UINT8,
            torch.bool: kinds.BOOL,
        }

    def dtype(self, dtype: torch.dtype) -> Any:
        """TensorRT's element type for PyTorch's.

        Raises:
            KeyError: TensorRT has no such type (float64, complex, …).
        """
        return self._dtypes[dtype]

    def torch_dtype(self, dtype: Any) -> torch.dtype:
        """PyTorch's element type for TensorRT's.

        Raises:
            KeyError: fp8 and smaller.
        """
        return {trt: torch_dtype for torch_dtype, trt in self._dtypes.items()}[dtype]

    def has_dtype(self, dtype: torch.dtype) -> bool:
        """Whether tensors of a network may have this element type."""
        return dtype in self._dtypes


class Log:
    """Collects TensorRT's errors with an error recorder, so that an exception can contain them.

    Attributes:
        logger: for builders and runtimes; prints internal errors only.
        errors: texts of the errors that watched objects reported, oldest first.
    """

    def __init__(self, api: Any) -> None:
        self.logger = api.Logger(api.Logger.INTERNAL_ERROR)
        self.errors: list[str] = []
        errors = self.errors

        class Recorder(api.IErrorRecorder):  # type: ignore[misc]
            def __init__(self) -> None:
                api.IErrorRecorder.__init__(self)
                self.codes: list[Any] = []

            def num_errors(self) -> int:
                return len(errors)

            def get_error_code(self, index: int) -> Any:
                return self.codes[index]

            def get_error_desc(self, index: int) -> str:
                return errors[index]

            def has_overflowed(self) -> bool:
                return False

            def clear(self) -> None:
                errors.clear()
                self.codes.clear()

            def report_error(self, code: Any, text: str) -> bool:
                self.codes.append(code)
                errors.append(text)
                return True

        self._recorder = Recorder()

    def watch(self, source: Any) -> Any:
        """Collect the errors of a builder, network, runtime, engine or context, and return it."""
        source.error_recorder = self._recorder
        return source

    def last_errors(self, count: int = 3) -> str:
        """The last errors in one line."""
        return " / ".join(self.errors[-count:]) or "it gave no reason"


def load_tensorrt(flavor: Flavor | None = None) -> TensorRT:
    """Import TensorRT.

    Args:
        flavor: which one; None takes TensorRT where it can be imported, else TensorRT for RTX.

    Raises:
        LoadError: it is not installed, or its libraries cannot be loaded.
    """
    reasons = []
    for name in (flavor,) if flavor else FLAVORS:
        try:
            return TensorRT(name, importlib.import_module(name))
        except (ImportError, OSError) as error:
            reasons.append(f"import {name}: {error}")
    raise LoadError(
        f"TensorRT cannot be imported ({'; '.join(reasons)}); install tensorrt, or "
        "tensorrt-rtx-cu13, which compiles for RTX GPUs"
    )
