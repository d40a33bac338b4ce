"""Models that are not transformers decoders, rebuilt from their weights on the state operators."""

from inplace_builder.models.silero import SileroVad, capture_silero, load_silero

__all__ = ["SileroVad", "capture_silero", "load_silero"]
