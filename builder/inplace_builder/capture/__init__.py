"""Capture: from a model to a graph on the ``inplace::`` operators."""

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.huggingface import DecoderOptions, capture_decoder
from inplace_builder.capture.loading import load_decoder
from inplace_builder.capture.module import capture_module

__all__ = ["Capture", "DecoderOptions", "capture_decoder", "capture_module", "load_decoder"]
