"""The front that is written beside a stream model: a model of its own in the repository, that HTTP clients generate with."""

import contextlib
import shutil
from pathlib import Path

from inplace.errors import LoadError
from inplace.schema.proxy import FILE_NAME, SUFFIX, ProxyFile
from inplace.schema.publish import replace_conflict
from inplace.schema.served import Manifest
from inplace.server.settings import MAX_WAITING

from inplace_builder.served.model_config import TextSettings, proxy_config

MODEL_VERSION = "1"
"""Triton's model version, the folder that an engine or a front lies in."""


def proxy_of(model: Path) -> Path:
    """Where the front of a model lies."""
    return model.with_name(model.name + SUFFIX)


def proxy_occupied(model: Path) -> str | None:
    """Why the front of a model cannot be written; None where it can."""
    reason = replace_conflict(proxy_of(model), Path(MODEL_VERSION, FILE_NAME))
    return reason and f"{reason}; a stream model's front is written there"


def write_proxy(draft: Path, manifest: Manifest, language: TextSettings) -> None:
    """Write the front of a model into a draft of its folder.

    Raises:
        OSError: it cannot be written.
    """
    (draft / MODEL_VERSION).mkdir()
    ProxyFile(model=manifest.name, max_requests=manifest.slots + MAX_WAITING).save(
        draft / MODEL_VERSION
    )
    (draft / "config.pbtxt").write_text(proxy_config(manifest.name + SUFFIX, language).text())


def remove_proxy(model: Path) -> None:
    """Remove the front of an earlier build, which would now pass requests on to a model that takes none."""
    front = proxy_of(model)
    with contextlib.suppress(LoadError, OSError):
        if ProxyFile.load(front / MODEL_VERSION).model == model.name:
            shutil.rmtree(front)
