"""What clients and the backend call things in requests and responses. It imports nothing: a client needs no PyTorch."""

SEQUENCE_KEY, POSITION = "sequence_key", "position"
"""Parameters of every request."""


MAX_TOKENS = "max_tokens"
"""The parameter that makes a request a generation."""


IGNORE_EOS, STREAM_INTERVAL = "ignore_eos", "stream_interval"
"""Parameters of a generation."""


FETCH = "fetch"
"""The parameter that asks for a generation whose responses are fetched, and then for what it has said since."""


INPUT_IDS, TEXT, STOP = "input_ids", "text", "stop"
"""Inputs of a language model."""


TOKENS, TEXT_OUTPUT, FINISH_REASON = "tokens", "text_output", "finish_reason"
"""Outputs of a generation."""
