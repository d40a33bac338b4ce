"""Names of parameters and tensors in requests and responses.

This module imports nothing, so that a client needs no PyTorch.
"""

SEQUENCE_KEY, POSITION = "sequence_key", "position"
"""Parameters of every request."""


MAX_TOKENS = "max_tokens"
"""The parameter that makes a request a generation."""


IGNORE_EOS, STREAM_INTERVAL = "ignore_eos", "stream_interval"
"""Parameters of a generation."""


FETCH = "fetch"
"""The parameter that buffers a generation's tokens; without ``max_tokens``, it fetches them."""


INPUT_IDS, TEXT, STOP = "input_ids", "text", "stop"
"""Inputs of a language model."""


TOKENS, TEXT_OUTPUT, FINISH_REASON = "tokens", "text_output", "finish_reason"
"""Outputs of a generation."""
