"""The command line of a tritonserver."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

PROGRAM = "tritonserver"
"""The server's executable."""


@dataclass(frozen=True)
class CommandLine:
    """The options of a tritonserver, written ``--name=value`` or ``--name value``.

    Attributes:
        options: names without dashes, and values, in their order; a name may occur several times.
        folder: the working directory, to which relative paths refer.
    """

    options: tuple[tuple[str, str], ...]
    folder: Path = Path()

    @classmethod
    def of_process(cls, process: int, proc: Path = Path("/proc")) -> Self:
        """Read the command line of a process.

        Args:
            process: its id.
            proc: where the process file system is.

        Raises:
            OSError: it cannot be read, for example where /proc hides other users' processes, or the
                process runs another program: a server may also be a part of one.
        """
        folder = proc / str(process)
        words = (folder / "cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
        if not any(Path(word).name == PROGRAM for word in words):
            raise OSError(f"process {process} is not a {PROGRAM}: {' '.join(words)[:100]!r}")
        return cls.parse(words[1:], (folder / "cwd").readlink())

    @classmethod
    def parse(cls, words: Sequence[str], folder: Path = Path()) -> Self:
        """Read the words of a command line, without the program."""
        options = []
        for word, following in zip(words, [*words[1:], ""], strict=False):
            if word.startswith("--"):
                name, equals, value = word.removeprefix("--").partition("=")
                options.append((name, value if equals else following))
        return cls(tuple(options), folder)

    def values(self, *names: str) -> list[str]:
        """All values of an option that may have several names, without empty ones."""
        return [value for name, value in self.options if name in names and value]

    def value(self, name: str, default: str) -> str:
        """The last value of an option."""
        return ([default, *self.values(name)])[-1]

    def is_true(self, name: str, default: bool = False) -> bool:
        """Whether a boolean option is on."""
        return self.value(name, str(default)).lower() in ("true", "1")
