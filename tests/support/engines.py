"""Tiny models, built once a run and shared by the processes that run the tests."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Engines:
    """Folders of built models, each made by the first process that asks for it.

    Args:
        folder: where they lie; the same in every process of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def get(self, name: str, build: Callable[[Path], object]) -> Path:
        """The folder of this name; ``build`` fills it if no process has done so yet.

        Other processes that ask for it wait. Nothing may be changed in it: copy it first.
        """
        path, done = self._folder / name, self._folder / f"{name}.done"
        with FileLock(self._folder / f"{name}.lock"):
            if not done.exists():
                path.mkdir(exist_ok=True)
                build(path)
                done.touch()
        return path
