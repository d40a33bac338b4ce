"""From which folders a server loads TensorRT plans, which are code."""

import os
from collections.abc import Mapping
from pathlib import Path

from inplace.server.command_line import CommandLine

TRUST_MODELS = "INPLACE_TRUST_MODELS"
"""The environment variable with these folders, separated by ``:``.

Empty, no plan is loaded; unset, the model repositories of the server's command line are trusted. A
model that was uploaded through the server's repository API is in neither.
"""


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
        command_line = CommandLine.of_process(server, proc)
    except OSError:
        return ()
    repositories = command_line.values("model-repository", "model-store")
    return tuple(command_line.folder / repository for repository in repositories)
