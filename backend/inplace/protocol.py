"""Names of parameters and tensors in requests and responses.

This module imports nothing, so that a client needs no PyTorch. `inplace.parameters` has the types
and limits of the parameters.
"""

SEQUENCE_KEY, POSITION, GROUP = "sequence_key", "position", "group"
"""Parameters of every request."""

INVALID_POSITION = 1 << 62
"""A position above every capacity: an END with it only ends its sequence."""


CACHE_SALT, FORGET = "cache_salt", "forget"
"""Parameters of the reuse of prefixes: of a START, and of an END."""


REUSED_TOKENS = "reused_tokens"
"""The output of a generation, and of a step: how many tokens of its prompt were not computed."""


PREFIX_REUSE, PREFIX_WITHOUT_KEY = "prefix_reuse", "prefix_reuse_without_key"
"""The parameters of config.pbtxt, ``on`` or ``off``, that let prompts use what earlier ones have
computed, and those of sequences without a key too."""


RESTORE = "restore"
"""The parameter of a START that goes on with a sequence from the store of snapshots."""


SNAPSHOT_STORE, SNAPSHOT_EVERY = "snapshot_store", "snapshot_every"
"""Parameters of config.pbtxt: the store, and the positions after which a sequence is stored again.
The client reads whether sequences are stored, and how many of its last requests it must keep."""


FROM = "from"
"""The parameter of a START that begins the sequence as a copy of another one."""


ADD_SPECIAL_TOKENS = "add_special_tokens"
"""The parameter of requests with a text."""


LOGITS = "logits"
"""The parameter of steps that asks for the output of the same name."""


MAX_TOKENS = "max_tokens"
"""The parameter that makes a request a generation."""


IGNORE_EOS, STOP_TOKEN_IDS, STREAM_INTERVAL = "ignore_eos", "stop_token_ids", "stream_interval"
"""Parameters of a generation."""


STREAM = "stream"
"""The parameter of the generate proxy that asks for more than one response."""


FETCH = "fetch"
"""The parameter that buffers a generation's tokens; without ``max_tokens``, it fetches them."""


POSITIONS, REQUESTS = "positions", "requests"
"""The parameter of config.pbtxt that says what ``position`` counts, and its value if that is
requests: in a model that has no tokens, or runs schedules. Without it, it counts tokens where an
input has them."""


LOGPROBS, MIN_TOKENS = "logprobs", "min_tokens"
"""Parameters of steps and generations, and of generations."""


PROMPT_LOGPROBS = "prompt_logprobs"
"""The parameter of steps and generations that asks for log-probabilities of their own tokens."""


LOGIT_BIAS = "logit_bias"
"""The parameter with tokens and what is added to their scores: ``"13:-5,198:2.5"``."""


ALLOWED_TOKEN_IDS, BANNED_TOKEN_IDS = "allowed_token_ids", "banned_token_ids"
"""Parameters that mask tokens."""


NUM_GENERATED = "num_generated"
"""The parameter that says how many of the last tokens count as generated."""


JSON, JSON_OBJECT, REGEX, GRAMMAR, CHOICE = "json", "json_object", "regex", "grammar", "choice"
"""Parameters that say what the text of a generation must be, named as vLLM's structured outputs."""


WINDOW_SAMPLES, CHUNK_SAMPLES = "window_samples", "chunk_samples"
"""Parameters of config.pbtxt of a speech model, which has one of them, with `SAMPLE_RATE`: the most
samples of a request that is a window of its own, or the samples of a stream's chunk."""


INPUT_IDS, TEXT, STOP = "input_ids", "text", "stop"
"""Inputs of a language model."""


AUDIO, AUDIO_INT16 = "audio", "audio_int16"
"""Inputs of a speech model, of which a request has one: float32 in -1 … 1, or int16."""


SAMPLE_RATE, LANGUAGE, TASK, TIMESTAMPS = "sample_rate", "language", "task", "timestamps"
"""Parameters of requests with audio."""


FOREIGN_PROMPTS = ("prompt", "text_input")
"""What other backends call `TEXT`."""


TOKENS, TEXT_OUTPUT, FINISH_REASON = "tokens", "text_output", "finish_reason"
"""Outputs of a generation."""


TOKEN_LOGPROBS, TOP_LOGPROBS, TOP_TOKENS = "token_logprobs", "top_logprobs", "top_tokens"
"""Outputs of requests with `LOGPROBS`."""


PROMPT_TOKENS, PROMPT_TOKEN_LOGPROBS = "prompt_tokens", "prompt_token_logprobs"
PROMPT_RANKS = "prompt_ranks"
PROMPT_TOP_LOGPROBS, PROMPT_TOP_TOKENS = "prompt_top_logprobs", "prompt_top_tokens"
"""Outputs of requests with `PROMPT_LOGPROBS`."""


PROMPT_OUTPUTS = (
    PROMPT_TOKENS,
    PROMPT_TOKEN_LOGPROBS,
    PROMPT_RANKS,
    PROMPT_TOP_LOGPROBS,
    PROMPT_TOP_TOKENS,
)
"""All of them; the last two if the parameter is above 0."""
