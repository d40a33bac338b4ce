"""What a build can fail with."""

from inplace.errors import InplaceError


class BuildError(InplaceError):
    """The model cannot be built; nothing was written. The text says what was found, what was expected and what to do."""
