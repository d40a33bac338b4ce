"""SmolLM2-135M-Instruct, real weights, served, and transformers' own greedy decoding of it."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from inplace.client import Sequence
from inplace.schema.specs import Dtype
from inplace_builder.capture.checkpoint import load_model
from inplace_builder.capture.gguf_files import parsed_once
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.chat import load_chat_tokenizer
from inplace_builder.tools.tritonserver import TritonServer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from tritonclient.grpc import InferenceServerClient

from support.models import greedy
from support.pool import Deployment, ServerPool
from support.streams import batch_counts, generate, split

MODEL, CHUNK, ROWS = "smollm2", 32, 8
PROMPTS = (
    "Gravity is",
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who owned nothing "
    "but a boat and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "A key-value cache stores the keys and values of every token that a decoder has seen, so that "
    "a step computes only what is new. Without one, each step would have to run the whole model "
    "over the whole text again, which costs time that grows with its length. The price is memory: "
    "for every sequence, every layer keeps two rows for every token, and a server that holds many "
    "conversations at once spends most of its memory on caches rather than on weights. The "
    "engineering question is therefore how to",
)


@dataclass(frozen=True)
class SmolLM2:
    """The served model, transformers' own, and how that continues each prompt."""

    server: TritonServer
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    expected: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens that each prompt is continued with."""
        return len(self.expected[0])

    def check_alone(self) -> None:
        """One sequence after another."""
        with InferenceServerClient(self.server.grpc_url) as client:
            for ids, expected in zip(self.prompts, self.expected, strict=True):
                with Sequence(client, MODEL) as sequence:
                    assert generate(sequence, ids, self.tokens) == expected

    def check_together(self) -> None:
        """As many sequences as a step has rows; on average a step has several of them."""
        gate = threading.Barrier(ROWS)

        def stream(number: int) -> None:
            index = number % len(self.prompts)
            with (
                InferenceServerClient(self.server.grpc_url) as client,
                Sequence(client, MODEL) as sequence,
            ):
                gate.wait()
                tokens = generate(sequence, self.prompts[index], self.tokens)
                assert tokens == self.expected[index]

        with InferenceServerClient(self.server.grpc_url) as client:
            before = batch_counts(client, MODEL)
            with ThreadPoolExecutor(ROWS) as pool:
                list(pool.map(stream, range(ROWS)))
            now = batch_counts(client, MODEL)
        steps = {rows: count - before.get(rows, 0) for rows, count in now.items()}
        requests = sum(rows * count for rows, count in steps.items())
        assert requests > 2 * sum(steps.values()), steps

    def check_parts(self, tokens: int) -> None:
        """Prompts that are sent in parts of random length."""
        rng = random.Random(0)
        with InferenceServerClient(self.server.grpc_url) as client:
            for ids, expected in zip(self.prompts, self.expected, strict=True):
                with Sequence(client, MODEL) as sequence:
                    *first, last = split(ids, rng)
                    for part in first:
                        sequence.tokens(part)
                    assert generate(sequence, last, tokens) == expected[:tokens]


@contextmanager
def serve_smollm2(source: Path, folder: Path, pool: ServerPool, tokens: int) -> Iterator[SmolLM2]:
    """Build the model, continue each prompt by so many tokens with transformers, and serve it."""
    options = BuildOptions(
        slots=ROWS, max_rows=ROWS, capacity=256, chunk=CHUNK, queue_delay_microseconds=20_000
    )
    with parsed_once():  # for both
        build_decoder(source, folder / MODEL, options)
        model, _ = load_model(source, Dtype.FLOAT32)
    tokenizer = load_chat_tokenizer(folder / MODEL)
    prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    assert len({len(ids) for ids in prompts}) == len(PROMPTS)
    assert max(map(len, prompts)) > 3 * CHUNK  # one is fed in several chunks
    expected = [greedy(model, ids, tokens) for ids in prompts]
    with pool.serve(Deployment(folder / MODEL)) as server:
        yield SmolLM2(server, model, tokenizer, prompts, expected)
