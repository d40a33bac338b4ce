"""The processes that compile grammars and follow generations; a program of its own.

One process loads the tokenizer once and then only forks: a child for each grammar. The child
compiles the grammar, and then makes the masks of every generation that has it. So a grammar that
takes too much time or memory, or makes the library crash, ends its own process alone; the limits
are the kernel's. It imports nothing of this project, so that it starts quickly and stays small.

Messages are packets of a socket. The first process gets grammars, each with the socket of a child.
A child answers `COMPILED` or an error; then each packet brings the socket of a generation and the
tokens that end it. There the child takes packets of tokens, and answers each with a mask,
`COMPLETE` or an error.
"""

import array
import json
import os
import resource
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILED, MASK, MASK_AT_END, COMPLETE, ERROR = b"k", b"m", b"a", b"c", b"e"
"""The first byte of an answer. `MASK_AT_END` is a mask where the grammar may end."""


MAX_PACKET = 200_000
"""Bytes of a packet: a grammar, or the mask of a million tokens. Linux sends 212,960 by default."""


GENERATION, TOKENS = b"g", b"t"
"""The first byte of a packet with the socket of a generation and the tokens that end it, and of one
with its next tokens; int32 each."""


MAX_ERROR = 2000
"""Characters of an error."""


WHITESPACE = r"( |\n {0,16})?"
"""What may stand between two tokens of JSON: a bounded part, so that a text ends."""


LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""What the library allows a grammar, as a whole and for each token: with these a token costs some
ten milliseconds at most."""


def main() -> None:
    """Load the tokenizer and fork a process for each grammar until the server closes its socket."""
    from llguidance import LLTokenizer  # here: the server imports the constants above

    jobs = socket.socket(fileno=int(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), encoding="utf-8") as file:
        text = file.read()
    settings = json.loads(sys.argv[3])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when it ends
    try:
        tokenizer = LLTokenizer(text, settings["vocab_size"], settings["eos"] or None)
    except Exception as error:
        jobs.send(_error(str(error)))
        return
    jobs.send(COMPILED)
    while True:
        packet, descriptors, _, _ = socket.recv_fds(jobs, MAX_PACKET, 1)
        if not packet:
            return
        if os.fork() == 0:
            jobs.close()
            status = 1
            try:
                _Grammar(socket.socket(fileno=descriptors[0]), tokenizer, settings).serve(
                    *packet.decode().split("\n", 1)
                )
                status = 0
            finally:
                os._exit(status)
        os.close(descriptors[0])


def _limit_memory(megabytes: int) -> None:
    """Let this process allocate so much more than it has."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    size = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    """End this process if it works for so long from now on; 0 for no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


class _Grammar:
    """The process of one grammar.

    Args:
        control: brings the sockets of generations.
        tokenizer: of the model.
        settings: the limits.
    """

    def __init__(
        self, control: socket.socket, tokenizer: "LLTokenizer", settings: dict[str, Any]
    ) -> None:
        self._control, self._tokenizer, self._settings = control, tokenizer, settings
        self._bytes: int = -(-settings["vocab_size"] // 32) * 4
        self._known = (1 << settings["vocab_size"]) - 1
        self._matcher: LLMatcher | None = None
        self._generations: dict[socket.socket, tuple[LLMatcher, int, int]] = {}
        self._selector = selectors.DefaultSelector()

    def serve(self, kind: str, source: str) -> None:
        """Compile the grammar and serve generations until neither they nor the server are left."""
        _limit_memory(self._settings["megabytes"])
        _limit_time(self._settings["compile_seconds"])
        answer = self._compile(kind, source)
        _limit_time(0)
        self._control.send(answer)
        if self._matcher is None:
            return
        self._selector.register(self._control, selectors.EVENT_READ)
        while self._selector.get_map():
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                _limit_time(self._settings["token_seconds"])
                if key.fileobj is self._control:
                    self._add()
                else:
                    self._answer(key.fileobj)
                _limit_time(0)

    def _compile(self, kind: str, source: str) -> bytes:
        from llguidance import LLMatcher, LLParserLimits

        try:
            if kind == "json":
                grammar = LLMatcher.grammar_from_json_schema(
                    source, overrides={"whitespace_pattern": WHITESPACE}
                )
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(source)
            else:
                grammar = LLMatcher.grammar_from_lark(source)
            limits = LLParserLimits(**LIMITS)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
            if matcher.get_grammar_warnings():
                return _error("\n".join(matcher.get_grammar_warnings()))
            # the first mask is part of what is limited here
            answer = self._masked(matcher.deep_copy(), 0, 0)
        except Exception as error:
            return _error(str(error))
        if answer[:1] == ERROR:
            return answer
        if answer[:1] == COMPLETE:
            return _error("only the empty text is possible")
        self._matcher = matcher
        return COMPILED

    def _add(self) -> None:
        """Take the socket of a generation."""
        packet, descriptors, _, _ = socket.recv_fds(self._control, MAX_PACKET, 1)
        if not packet:
            self._selector.unregister(self._control)
            self._control.close()
            return
        assert self._matcher is not None
        connection = socket.socket(fileno=descriptors[0])
        ends = array.array("i", packet[1:]).tolist()
        never = _bits({*ends, *self._tokenizer.eos_tokens})
        generation = (self._matcher.deep_copy(), _bits(set(ends)) & self._known, never)
        self._generations[connection] = generation
        self._selector.register(connection, selectors.EVENT_READ)

    def _answer(self, connection: socket.socket) -> None:
        """Take tokens of a generation, and send what may come next."""
        try:
            packet = connection.recv(MAX_PACKET)
        except ConnectionResetError:  # it was closed with an answer that nobody has read
            packet = b""
        if not packet:
            self._selector.unregister(connection)
            del self._generations[connection]
            connection.close()
            return
        matcher, ends, never = self._generations[connection]
        tokens = array.array("i", packet[1:]).tolist()
        if tokens:
            matcher.consume_tokens(tokens)
        self._send(connection, self._masked(matcher, ends, never))

    def _send(self, connection: socket.socket, answer: bytes) -> None:
        try:
            connection.send(answer)
        except OSError:  # the generation has ended meanwhile; its socket is read as empty next
            return

    def _masked(self, matcher: "LLMatcher", ends: int, never: int) -> bytes:
        """What may come next: a token that ends the generation only where the grammar may end."""
        if matcher.is_error():
            return _error(matcher.get_error())
        if matcher.is_stopped():
            return COMPLETE
        mask = matcher.compute_bitmask()[: self._bytes]
        if matcher.is_error():
            return _error(matcher.get_error())
        at_end = matcher.is_accepting()
        bits: int = int.from_bytes(mask, "little") & ~never & self._known
        if at_end:
            bits |= ends
        mask = bits.to_bytes(self._bytes, "little")
        return MASK_AT_END + mask if at_end else MASK + mask


def _error(text: str) -> bytes:
    return ERROR + text[:MAX_ERROR].encode(errors="replace")


def _bits(tokens: set[int]) -> int:
    return sum(1 << token for token in tokens)


if __name__ == "__main__":
    main()
