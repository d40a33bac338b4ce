"""Write the generate proxy of a stream model: a model beside it that HTTP clients generate with."""

import contextlib
import shutil
from pathlib import Path

from inplace.errors import LoadError
from inplace.schema.proxy import FILE_NAME, SUFFIX, ProxyFile
from inplace.schema.served import Manifest
from inplace.server.settings import MAX_WAITING

from inplace_builder.engine_files import check_target
from inplace_builder.errors import BuildError
from inplace_builder.served.model_config import MODEL_VERSION, TextSettings, proxy_config


def proxy_folder(model: Path) -> Path:
    """The folder of a model's proxy."""
    return model.with_name(model.name + SUFFIX)


def check_proxy_target(model: Path) -> None:
    """Raise BuildError if the place of the model's proxy is taken by something else."""
    try:
        check_target(proxy_folder(model), Path(MODEL_VERSION, FILE_NAME))
    except BuildError as error:
        raise BuildError(f"{error}; a stream model's generate proxy is written there") from error


def write_proxy(draft: Path, manifest: Manifest, text: TextSettings) -> None:
    """Write the proxy of a model into a draft of its folder.

    Raises:
        OSError: it cannot be written.
    """
    (draft / MODEL_VERSION).mkdir()
    record = ProxyFile(
        model=manifest.name,
        has_tokenizer=text.has_tokenizer,
        has_logprobs=manifest.interface.max_adjusted > 0,
        max_requests=manifest.slots + MAX_WAITING,
    )
    record.save(draft / MODEL_VERSION)
    config = proxy_config(manifest.name + SUFFIX, text, has_logprobs=record.has_logprobs)
    (draft / "config.pbtxt").write_text(config.text())


def remove_proxy(model: Path) -> None:
    """Remove the proxy of an earlier build, if there is one.

    It would forward requests to a model that does not generate any more.
    """
    folder = proxy_folder(model)
    with contextlib.suppress(LoadError, OSError):
        if ProxyFile.load(folder / MODEL_VERSION).model == model.name:
            shutil.rmtree(folder)
