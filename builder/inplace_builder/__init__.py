"""The offline builder: from a PyTorch module or a Hugging Face decoder to an engine directory.

The names below are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inplace_builder.capture.capture import Capture, capture_module
    from inplace_builder.capture.decoder import DecoderOptions
    from inplace_builder.capture.exported import ExportedCapture, capture_exported
    from inplace_builder.capture.exported_decoder import capture_exported_decoder
    from inplace_builder.capture.exported_rows import RowOptions, capture_exported_rows
    from inplace_builder.capture.huggingface import capture_decoder, load_decoder
    from inplace_builder.capture.inline import inline_lifted_buffers
    from inplace_builder.errors import BuildError
    from inplace_builder.served.build import write_engine
    from inplace_builder.served.decoder import build_decoder
    from inplace_builder.served.options import BuildOptions
    from inplace_builder.standalone.build import build
    from inplace_builder.standalone.serialize import Serialized, serialize
    from inplace_builder.states.user_operators import declare_alias

_HOMES = {
    "BuildError": "errors",
    "BuildOptions": "served.options",
    "Capture": "capture.capture",
    "DecoderOptions": "capture.decoder",
    "ExportedCapture": "capture.exported",
    "RowOptions": "capture.exported_rows",
    "Serialized": "standalone.serialize",
    "build": "standalone.build",
    "build_decoder": "served.decoder",
    "capture_decoder": "capture.huggingface",
    "capture_exported": "capture.exported",
    "capture_exported_decoder": "capture.exported_decoder",
    "capture_exported_rows": "capture.exported_rows",
    "capture_module": "capture.capture",
    "declare_alias": "states.user_operators",
    "inline_lifted_buffers": "capture.inline",
    "load_decoder": "capture.huggingface",
    "serialize": "standalone.serialize",
    "write_engine": "served.build",
}

__all__ = [
    "BuildError",
    "BuildOptions",
    "Capture",
    "DecoderOptions",
    "ExportedCapture",
    "RowOptions",
    "Serialized",
    "build",
    "build_decoder",
    "capture_decoder",
    "capture_exported",
    "capture_exported_decoder",
    "capture_exported_rows",
    "capture_module",
    "declare_alias",
    "inline_lifted_buffers",
    "load_decoder",
    "serialize",
    "write_engine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
