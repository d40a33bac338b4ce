"""The offline builder: from a PyTorch module or a Hugging Face decoder to an engine directory.

::

    import inplace_builder as ib

    ib.build_decoder("path/to/model", "model_repository/my-model", ib.BuildOptions(slots=16))

The names below are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inplace.schema.schedule import Call, Loop, Schedule
    from inplace.schema.specs import Dtype, Role, StateSpec, TensorSpec, Update

    from inplace_builder.capture.capture import Capture, capture_module, control_input
    from inplace_builder.capture.checkpoint import load_decoder
    from inplace_builder.capture.decoder import DecoderOptions
    from inplace_builder.capture.experts import grouped_experts
    from inplace_builder.capture.exported import ExportedCapture, capture_exported
    from inplace_builder.capture.exported_decoder import capture_exported_decoder
    from inplace_builder.capture.exported_rows import RowOptions, capture_exported_rows
    from inplace_builder.capture.huggingface import capture_decoder
    from inplace_builder.capture.inline import inline_lifted_buffers
    from inplace_builder.capture.programs import ProgramsCapture, capture_programs
    from inplace_builder.errors import BuildError
    from inplace_builder.served.build import write_engine
    from inplace_builder.served.decoder import build_decoder
    from inplace_builder.served.model import build_model
    from inplace_builder.served.options import BuildOptions
    from inplace_builder.standalone.build import build
    from inplace_builder.standalone.serialize import Serialized, serialize
    from inplace_builder.states.lift import lift_mutated_buffers
    from inplace_builder.states.user_operators import declare_alias
    from inplace_builder.tools.chat import Conversation, load_chat_tokenizer
    from inplace_builder.tools.report import summary_table
    from inplace_builder.tools.tritonserver import Ports, ServerError, TritonServer

_MODULES = {
    "BuildError": "inplace_builder.errors",
    "BuildOptions": "inplace_builder.served.options",
    "Call": "inplace.schema.schedule",
    "Capture": "inplace_builder.capture.capture",
    "Conversation": "inplace_builder.tools.chat",
    "DecoderOptions": "inplace_builder.capture.decoder",
    "Dtype": "inplace.schema.specs",
    "ExportedCapture": "inplace_builder.capture.exported",
    "Loop": "inplace.schema.schedule",
    "Ports": "inplace_builder.tools.tritonserver",
    "ProgramsCapture": "inplace_builder.capture.programs",
    "Role": "inplace.schema.specs",
    "RowOptions": "inplace_builder.capture.exported_rows",
    "Schedule": "inplace.schema.schedule",
    "Serialized": "inplace_builder.standalone.serialize",
    "ServerError": "inplace_builder.tools.tritonserver",
    "StateSpec": "inplace.schema.specs",
    "TensorSpec": "inplace.schema.specs",
    "TritonServer": "inplace_builder.tools.tritonserver",
    "Update": "inplace.schema.specs",
    "build": "inplace_builder.standalone.build",
    "build_decoder": "inplace_builder.served.decoder",
    "build_model": "inplace_builder.served.model",
    "capture_decoder": "inplace_builder.capture.huggingface",
    "capture_exported": "inplace_builder.capture.exported",
    "capture_exported_decoder": "inplace_builder.capture.exported_decoder",
    "capture_exported_rows": "inplace_builder.capture.exported_rows",
    "capture_module": "inplace_builder.capture.capture",
    "capture_programs": "inplace_builder.capture.programs",
    "control_input": "inplace_builder.capture.capture",
    "declare_alias": "inplace_builder.states.user_operators",
    "grouped_experts": "inplace_builder.capture.experts",
    "inline_lifted_buffers": "inplace_builder.capture.inline",
    "lift_mutated_buffers": "inplace_builder.states.lift",
    "load_decoder": "inplace_builder.capture.checkpoint",
    "load_chat_tokenizer": "inplace_builder.tools.chat",
    "serialize": "inplace_builder.standalone.serialize",
    "summary_table": "inplace_builder.tools.report",
    "write_engine": "inplace_builder.served.build",
}
"""The module of each name."""


__all__ = [
    "BuildError",
    "BuildOptions",
    "Call",
    "Capture",
    "Conversation",
    "DecoderOptions",
    "Dtype",
    "ExportedCapture",
    "Loop",
    "Ports",
    "ProgramsCapture",
    "Role",
    "RowOptions",
    "Schedule",
    "Serialized",
    "ServerError",
    "StateSpec",
    "TensorSpec",
    "TritonServer",
    "Update",
    "build",
    "build_decoder",
    "build_model",
    "capture_decoder",
    "capture_exported",
    "capture_exported_decoder",
    "capture_exported_rows",
    "capture_module",
    "capture_programs",
    "control_input",
    "declare_alias",
    "grouped_experts",
    "inline_lifted_buffers",
    "lift_mutated_buffers",
    "load_chat_tokenizer",
    "load_decoder",
    "serialize",
    "summary_table",
    "write_engine",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
