"""Capture: from a model to a graph on the ``inplace::`` operators."""

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.capture.exported import ExportedCapture, capture_exported
from inplace_builder.capture.exported_decoder import capture_exported_decoder
from inplace_builder.capture.exported_rows import RowOptions, capture_exported_rows
from inplace_builder.capture.huggingface import capture_decoder, load_decoder
from inplace_builder.capture.inline import inline_lifted_buffers
from inplace_builder.capture.module import capture_module
from inplace_builder.states.lift import FunctionalGraph, lift_mutated_buffers

__all__ = [
    "Capture",
    "DecoderOptions",
    "ExportedCapture",
    "FunctionalGraph",
    "RowOptions",
    "capture_decoder",
    "capture_exported",
    "capture_exported_decoder",
    "capture_exported_rows",
    "capture_module",
    "inline_lifted_buffers",
    "lift_mutated_buffers",
    "load_decoder",
]
