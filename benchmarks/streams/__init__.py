"""How many streams of speech keep up with a streaming speech model."""

MODEL = "nemotron"
TOKENS_PER_FRAME = 0.3
"""Tokens for each encoded frame of 80 ms: English has about four tokens a second."""
