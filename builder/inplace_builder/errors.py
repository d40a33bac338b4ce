"""What a build can fail with."""

from inplace.errors import InplaceError


class BuildError(InplaceError):
    """The model cannot be built; nothing was written. The text says what was found, what was expected and what to do."""


def brief(error: BaseException) -> str:
    """An error of somebody else's in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:500]
