"""From which folders a server loads TensorRT plans, which are code."""

import os
from collections.abc import Mapping
from pathlib import Path

TRUST_MODELS = "INPLACE_TRUST_MODELS"
"""The environment variable with these folders, separated by ``:``.

Empty, no plan is loaded; unset, the model repositories of the server's command line are trusted. A
model that was uploaded through the server's repository API is in neither.
"""

_OPTIONS = ("--model-repository", "--model-store")


def trusted_folders(
    server: int, environment: Mapping[str, str] = os.environ, proc: Path = Path("/proc")
) -> tuple[Path, ...]:
    """The folders from which plans are loaded.

    Args:
        server: process id of tritonserver.
        environment: of this process.
        proc: where the process file system is.
    """
    if (text := environment.get(TRUST_MODELS)) is not None:
        return tuple(Path(part) for part in text.split(os.pathsep) if part)
    try:
        words = (proc / str(server) / "cmdline").read_text().split("\0")
        start = (proc / str(server) / "cwd").readlink()
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(start / repository for repository in _repositories(words))


def _repositories(words: list[str]) -> list[str]:
    """The model repositories in a command line, ``--option=value`` or ``--option value``."""
    found = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in _OPTIONS and (repository := value if equals else following):
            found.append(repository)
    return found
