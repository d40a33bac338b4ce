"""Errors of a build."""

from typing import TYPE_CHECKING

from inplace.errors import InplaceError

if TYPE_CHECKING:  # a client has no pydantic
    from pydantic import ValidationError


class BuildError(InplaceError):
    """The model cannot be built, and nothing was written.

    The message says what is wrong, what was expected and what to do.
    """


class LoweringError(BuildError):
    """TensorRT cannot run the model: it lacks an operator, a way to update a state, or a kernel.

    The PyTorch engine may run it.
    """


def rejected(reason: str) -> BuildError:
    """The error of an engine that was built and fails verification."""
    return BuildError(f"{reason}; the engine is not written")


def brief(error: BaseException) -> str:
    """The type and the first line of another library's error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:1000]


def validation_reasons(error: "ValidationError") -> str:
    """Why a description is not valid, without pydantic's own words and links."""
    return "; ".join(str(each["msg"]).removeprefix("Value error, ") for each in error.errors())
