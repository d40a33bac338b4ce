"""SmolLM2-135M-Instruct, real weights, on a real tritonserver, against transformers' own greedy decoding in float32."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from inplace.client import Sequence
from inplace.drivers.detokenizer import TOKENIZER_FOLDER
from inplace.schema.dtypes import Dtype
from inplace_builder import load_decoder
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from inplace_builder.tools.chat import Conversation, load_tokenizer
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.models import greedy
from support.streams import batch_counts, generate, split
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from tritonclient.grpc import InferenceServerClient

pytestmark = [pytest.mark.server, pytest.mark.real_model]

TOKENS = 64
PROMPTS = (
    "Gravity is",
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who owned nothing but a boat and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "A key-value cache stores the keys and values of every token that a decoder has seen, so that a step computes only what is new. "
    "Without one, each step would have to run the whole model over the whole text again, which costs time that grows with its length. "
    "The price is memory: for every sequence, every layer keeps two rows for every token, and a server that holds many conversations "
    "at once spends most of its memory on caches rather than on weights. The engineering question is therefore how to",
)


@dataclass(frozen=True)
class Served:
    """The served model, transformers' own, and what it says to each prompt."""

    server: TritonServer
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def served(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    repository = tmp_path_factory.mktemp("smollm2")
    build_decoder(
        smollm2_folder,
        repository / "smollm2",
        BuildOptions(chunk=32, queue_delay_microseconds=20_000),
    )
    model, _ = load_decoder(smollm2_folder, Dtype.FLOAT32)
    tokenizer = load_tokenizer(repository / "smollm2" / MODEL_VERSION / TOKENIZER_FOLDER)
    prompts = [list(tokenizer(text)["input_ids"]) for text in PROMPTS]
    expected = [greedy(model, ids, TOKENS) for ids in prompts]
    with TritonServer(repository, Ports(0, 0, 0), log=repository.parent / "smollm2.log") as server:
        yield Served(server, model, tokenizer, prompts, expected)


@pytest.fixture
def own_client(served: Served) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(served.server.grpc_url) as client:
        yield client


def test_one_sequence_alone(served: Served, own_client: InferenceServerClient) -> None:
    assert len({len(ids) for ids in served.prompts}) == len(PROMPTS)
    assert max(map(len, served.prompts)) > 3 * 32  # fed in several chunks
    for ids, expected in zip(served.prompts, served.expected, strict=True):
        with Sequence(own_client, "smollm2") as sequence:
            assert generate(sequence, ids, TOKENS) == expected


def test_eight_sequences_interleaved_in_batches(
    served: Served, own_client: InferenceServerClient
) -> None:
    before = batch_counts(own_client, "smollm2").get(8, 0)
    gate = threading.Barrier(8)

    def stream(number: int) -> None:
        ids, expected = served.prompts[number % 5], served.expected[number % 5]
        with (
            InferenceServerClient(served.server.grpc_url) as client,
            Sequence(client, "smollm2") as sequence,
        ):
            gate.wait()
            assert generate(sequence, ids, TOKENS) == expected

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(stream, range(8)))
    assert batch_counts(own_client, "smollm2").get(8, 0) > before + TOKENS // 4


def test_prompts_in_random_chunks(served: Served, own_client: InferenceServerClient) -> None:
    rng = random.Random(0)
    for ids, expected in zip(served.prompts, served.expected, strict=True):
        with Sequence(own_client, "smollm2") as sequence:
            parts = split(ids, rng)
            for part in parts[:-1]:
                sequence.tokens(part)
            assert generate(sequence, parts[-1], 16) == expected[:16]


def test_a_second_turn_is_what_the_whole_history_would_say(
    served: Served, own_client: InferenceServerClient
) -> None:
    turns = ["What is the capital of France?", "And of Italy? One sentence."]
    history: list[dict[str, str]] = []
    with Sequence(own_client, "smollm2") as sequence:
        conversation = Conversation(sequence, served.tokenizer)
        for turn in turns:
            history.append({"role": "user", "content": turn})
            reply = "".join(conversation.say(turn, max_tokens=24))
            rendered = str(
                served.tokenizer.apply_chat_template(
                    history, tokenize=False, add_generation_prompt=True
                )
            )
            ids = served.tokenizer(rendered, add_special_tokens=False)["input_ids"]
            said = greedy(served.model, ids, 24)
            end = served.tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert end in said  # both replies are finished sentences
            assert reply == served.tokenizer.decode(said[: said.index(end)])
            history.append({"role": "assistant", "content": reply})
        assert sequence.length is not None
        assert sequence.length < len(ids) + 24  # the first turn was not sent again
