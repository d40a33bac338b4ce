"""What a client knows of a running generation: its tokens, and how another server continues it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from tritonclient.utils import InferenceServerException

from inplace.client.errors import RefusedError
from inplace.client.logprobs import (
    PromptLogprob,
    TokenLogprob,
    decode_logprobs,
    decode_prompt_logprobs,
    keep_own_tokens,
)
from inplace.client.requests import (
    Array,
    ParameterArgument,
    Segment,
    SequenceRequest,
    decode_text,
    decode_tokens,
)
from inplace.parameters import GRAMMAR_PARAMETERS
from inplace.protocol import (
    FINISH_REASON,
    INPUT_IDS,
    MAX_TOKENS,
    MIN_TOKENS,
    NUM_GENERATED,
    PROMPT_LOGPROBS,
    PROMPT_OUTPUTS,
    REUSED_TOKENS,
    STOP,
    TEXT,
    TEXT_OUTPUT,
)

COUNT_GENERATED = GRAMMAR_PARAMETERS | {"presence_penalty", "frequency_penalty"}
"""Parameters whose effect depends on which tokens were generated."""


REPLAY = "REPLAY"
"""Error code of a replay whose tokens or text differ from what was generated before."""


@dataclass(frozen=True)
class Piece:
    """One response of a generation.

    Attributes:
        tokens: the next tokens; may be empty in the last piece.
        text: the text they add, in whole characters; empty where the model has no tokenizer or
            ``text=False``.
        finish_reason: empty while the generation runs; in the last piece ``length``, ``eos``,
            ``stop``, ``capacity``, ``cancelled`` or ``ended``.
        logprobs: of each of ``tokens``; empty unless they were asked for.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()


class GenerationProgress:
    """What a generation has produced, and the request that makes another server produce the rest.

    That request has the tokens generated so far in its prompt. Random numbers depend on seed and
    position alone, so the rest is the same. Where text is requested, the prompt ends at the last
    checkpoint: the last token known to end a complete text, since half a character or the beginning
    of a stop string may have been held back. Tokens after the checkpoint are generated again,
    compared, and dropped.

    Args:
        request: the generation as the caller asked for it.

    Attributes:
        request: the same.
        tokens: all tokens so far.
        logprobs: of each of them; empty unless they were asked for.
        prompt_logprobs: of the tokens of the prompt; empty unless they were asked for.
        text: all text so far.
        finish_reason: empty while it runs.
        reused_tokens: tokens of the prompt that were not computed; 0 while it runs.
    """

    def __init__(self, request: SequenceRequest) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[PromptLogprob] = []
        self.text = ""
        self.finish_reason = ""
        self.reused_tokens = 0
        self._max_tokens = int(cast(int, request.parameters[MAX_TOKENS]))
        # of the request in flight: how many of `tokens` are in its prompt, and how many it has
        # returned
        self._num_prompted = self._num_returned = 0
        # the text of the tokens in its prompt, and the text it has returned
        self._prompted_text = self._returned_text = ""
        # number of tokens and text where a prompt may end, now and after one more token with a text
        self._checkpoint = self._next_checkpoint = (0, "")

    @property
    def num_fed(self) -> int:
        """How many tokens of the request in flight a server had before: with generated ones, all.

        0 if it has no generated ones.
        """
        if not self._num_prompted or TEXT in self.request.inputs:
            return 0
        return (self.request.num_ids or 0) + self._num_prompted

    def begin(self, *, restores: bool = False) -> tuple[list[Segment], SequenceRequest]:
        """The request for the generation or its rest, and what a new sequence needs before it.

        Args:
            restores: the sequence may be restored: the request has all tokens so far, where no text
                says where it may end.
        """
        self._num_prompted, self._prompted_text = self._checkpoint
        has_text = TEXT_OUTPUT in self.request.outputs or TEXT in self.request.inputs
        if restores and not has_text and len(self.tokens) < self._max_tokens:
            self._num_prompted = len(self.tokens)
        self._num_returned, self._returned_text = 0, ""
        request, prompted = self.request, self.tokens[: self._num_prompted]
        if not prompted:
            return [], request
        parameters = dict(request.parameters) | self._shifted(len(prompted))
        outputs = request.outputs
        if self.prompt_logprobs:  # they came with the first token
            del parameters[PROMPT_LOGPROBS]
            outputs = tuple(name for name in outputs if name not in PROMPT_OUTPUTS)
        rest = replace(request, parameters=parameters, outputs=outputs)
        if INPUT_IDS in request.inputs:
            return [], rest.with_suffix(prompted)
        inputs = {name: array for name, array in request.inputs.items() if name != TEXT}
        inputs[INPUT_IDS] = np.array(prompted, dtype=np.int64)
        return [request.inputs[TEXT].item().decode()], replace(rest, inputs=inputs)

    def _shifted(self, prompted: int) -> dict[str, ParameterArgument]:
        """The parameters that count tokens, for a prompt that ends with generated ones."""
        given = self.request.parameters
        shifted: dict[str, ParameterArgument] = {MAX_TOKENS: self._max_tokens - prompted}
        if MIN_TOKENS in given:
            shifted[MIN_TOKENS] = max(0, int(cast(int, given[MIN_TOKENS])) - prompted)
        if COUNT_GENERATED & given.keys():
            before = int(cast(int, given.get(NUM_GENERATED, 0)))
            shifted[NUM_GENERATED] = before + prompted
        return shifted

    @property
    def partial(self) -> bool:
        """Whether the request in flight has returned tokens."""
        return self._num_returned > 0

    def add_response(self, outputs: Mapping[str, Array]) -> Piece:
        """Add a response of the request in flight, and return what is new in it.

        Raises:
            RefusedError: it differs from what was generated before; retryable where the end of the
                prompt may be the cause.
        """
        tokens, text = decode_tokens(outputs), decode_text(outputs, TEXT_OUTPUT)
        expected = self.tokens[self._num_prompted + self._num_returned :]
        full_text = self._prompted_text + self._returned_text + text
        if tokens[: len(expected)] != expected[: len(tokens)] or (
            len(tokens) >= len(expected) and not full_text.startswith(self.text)
        ):
            raise self._replay_differs(tokens, expected[: len(tokens)])
        self._num_returned += len(tokens)
        self._returned_text += text
        new = tokens[len(expected) :]
        self.tokens += new
        logprobs = decode_logprobs(outputs, tokens)[len(expected) :]
        self.logprobs += logprobs
        self.prompt_logprobs = self.prompt_logprobs or decode_prompt_logprobs(
            keep_own_tokens(outputs, self.request.num_ids)
        )
        reason = decode_text(outputs, FINISH_REASON)
        piece = Piece(new, full_text[len(self.text) :], reason, tuple(logprobs))
        self.text += piece.text
        self.finish_reason = piece.finish_reason
        if REUSED_TOKENS in outputs:  # a prompt that was sent again may have generated tokens
            reused, own = int(outputs[REUSED_TOKENS].item()), self.request.num_ids
            self.reused_tokens = reused if own is None else min(reused, own)
        self._update_checkpoint(len(tokens), text, has_text=TEXT_OUTPUT in outputs)
        return piece

    def _update_checkpoint(self, num_tokens: int, text: str, *, has_text: bool) -> None:
        """Move the checkpoint forward after a response, where that is safe.

        A single token with a text ends a character, but may begin another one. If it does, the text
        of the next token differs. So the checkpoint is the last but one such token.
        """
        end = self._num_prompted + self._num_returned
        if end < len(self.tokens) or end == self._max_tokens:
            return
        if not has_text:
            self._checkpoint = end, ""
        elif num_tokens == 1 and text and STOP not in self.request.inputs:
            self._checkpoint, self._next_checkpoint = self._next_checkpoint, (end, self.text)

    def _replay_differs(self, tokens: list[int], expected: list[int]) -> RefusedError:
        from_checkpoint = self._num_prompted > 0
        self._checkpoint = self._next_checkpoint = (0, "")
        text = (
            f"the replay generated {tokens} instead of {expected}, or another text: "
            "the servers serve different models, or compute differently"
        )
        return RefusedError(
            InferenceServerException(text),
            code=REPLAY,
            reason=text,
            retryable=from_checkpoint,
            sequence="-",
            request=self.request.request_id,
        )
