"""SmolLM2-135M-Instruct on a real tritonserver generates what transformers does, in float32.

`tests/long/test_smollm2.py` continues the prompts for longer.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from inplace.client import Sequence
from inplace_builder.tools.chat import Conversation
from support.models import greedy
from support.pool import ServerPool
from support.smollm2 import MODEL, SmolLM2, serve_smollm2
from tritonclient.grpc import InferenceServerClient

pytestmark = [pytest.mark.server, pytest.mark.real_model]


@pytest.fixture(scope="module")
def smollm2(
    smollm2_folder: Path, pool: ServerPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SmolLM2]:
    folder = tmp_path_factory.mktemp("smollm2")
    with serve_smollm2(smollm2_folder, folder, pool, tokens=12) as served:
        yield served


def test_eight_sequences_interleaved_in_batches(smollm2: SmolLM2) -> None:
    smollm2.check_together()


def test_prompts_in_random_parts(smollm2: SmolLM2) -> None:
    smollm2.check_parts(tokens=4)


def test_a_second_turn_is_what_the_whole_history_would_say(smollm2: SmolLM2) -> None:
    turns = ["What is the capital of France?", "And of Italy? One sentence."]
    history: list[dict[str, str]] = []
    tokenizer = smollm2.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with (
        InferenceServerClient(smollm2.server.grpc_url) as client,
        Sequence(client, MODEL) as sequence,
    ):
        conversation = Conversation(sequence, tokenizer)
        for turn in turns:
            history.append({"role": "user", "content": turn})
            reply = "".join(conversation.send(turn, max_tokens=24))
            rendered = str(
                tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
            )
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            expected = greedy(smollm2.model, ids, 24)
            assert end in expected  # both replies are finished sentences
            assert reply == tokenizer.decode(expected[: expected.index(end)])
            history.append({"role": "assistant", "content": reply})
        assert sequence.length is not None
        assert sequence.length < len(ids) + 24  # the first turn was not sent again
