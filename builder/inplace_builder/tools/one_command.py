"""`inplace serve MODEL`: a model built into a cache."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from inplace import __version__
from inplace.errors import LoadError
from inplace.schema.served import Manifest

from inplace_builder.capture.sources import ModelFiles, locate_model
from inplace_builder.errors import BuildError
from inplace_builder.served.choose import Report, build_with_best_engine
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions


def default_cache() -> Path:
    """The folder of built models: in that of the user's caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "inplace" / "models"


def build_cached(
    source: Path,
    cache: Path,
    options: BuildOptions,
    stage: Callable[[str], None],
    report: Report,
) -> Path:
    """Build a model, unless the cache has it, and return its folder.

    The model repository is the folder around it, and has nothing else but its generate proxy. Its
    name is made of the content of the model's files, the options and what builds and runs them.

    Args:
        source: as of `inplace_builder.build_model`.
        cache: the folder of built models.
        options: what to build for.
        stage: called with the name of each stage of a build.
        report: called with what else there is to say.

    Raises:
        BuildError: the model cannot be built.
    """
    files = locate_model(source)
    stage("read the model's files")
    key = _content_key(files, options)
    folder = cache / key / model_name(source, files)
    try:
        Manifest.load(folder / MODEL_VERSION)
    except LoadError:
        report(f"build into {folder}")
        build_with_best_engine(source, folder, options, stage, report)
    else:
        report(f"built before: {folder}")
    return folder


def model_name(source: Path, files: ModelFiles) -> str:
    """What a model is called when it is served: its folder, or the last part of its id."""
    folder = files.adapter or files.folder
    name = folder.resolve().name
    if folder.parent.name == "snapshots":
        name = folder.parent.parent.name.rpartition("--")[2]
    elif source.suffix == ".gguf":
        name = source.stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
    if not name:
        raise BuildError(f"{source} has no name that a model can have: rename the folder")
    return name


def _content_key(files: ModelFiles, options: BuildOptions) -> str:
    """A digest of all that a built model depends on."""
    digest = hashlib.sha256()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    for part in (__version__, torch.__version__, device, repr(options), repr(files.gguf)):
        digest.update(f"{part}\0".encode())
    for path in _content(files):
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{checksum}\0".encode())
    return digest.hexdigest()[:32]


def _content(files: ModelFiles) -> Iterator[Path]:
    """The files of a model; of a folder with a GGUF file, that one alone."""
    folders = [files.folder]
    if files.adapter is not None and files.adapter != files.folder:
        folders.append(files.adapter)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            other = files.gguf is not None and path.suffix == ".gguf" and path.name != files.gguf
            if path.is_file() and not other:
                yield path
