"""The generate protocol on a real tritonserver, raw gRPC, against transformers itself."""

import json
import queue
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inplace.drivers.detokenizer import TOKENIZER_NAME
from support.manifests import exchange
from support.models import greedy
from support.pool import Deployment, ServerPool
from support.served import (
    CAPACITY,
    MODEL,
    OUTPUTS,
    SLOTS,
    Answer,
    Served,
    Stream,
    bytes_input,
    ids_input,
)
from support.streams import prompt
from support.vocabulary import added, added_to_any_prompt, byte_fallback, tiny_tokenizer
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_greedy_generations_equal_transformers(served: Served, length: int) -> None:
    with Stream(served) as stream:
        answer = stream.ask("a", prompt(length, length), end=True, max_tokens=24, ignore_eos=True)
    expected = greedy(served.llama, prompt(length, length), 24)
    assert (answer.tokens, answer.reason, answer.error) == (expected, "length", "")
    assert answer.text == added_to(prompt(length, length), expected)


def added_to(ids: list[int], tokens: list[int]) -> str:
    """As `added`, where the prompt may end within a character."""
    before: str = tiny_tokenizer().decode(ids)
    whole: str = tiny_tokenizer().decode(ids + tokens)
    return whole[len(before) :]


def test_the_example_of_the_documentation_prints_a_text(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    document = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    code = document.partition("```python\n")[2].partition("```")[0]
    assert "my-model" in code
    exec(code.replace("127.0.0.1:8001", served.server.grpc_url).replace("my-model", MODEL), {})
    assert capsys.readouterr().out


def test_a_text_is_its_tokens_with_the_beginning_of_a_text(served: Served) -> None:
    ids = tiny_tokenizer().encode("Grant of Copyright").ids
    with Stream(served) as stream:
        answer = stream.ask("a", "Grant of Copyright", end=True, max_tokens=30, ignore_eos=True)
    assert answer.tokens == greedy(served.llama, ids, 30)
    assert answer.text == added(ids, answer.tokens)


def test_three_times_as_many_streams_as_slots_each_say_what_they_say_alone(served: Served) -> None:
    def one(seed: int) -> Answer:
        with Stream(served) as stream:
            return stream.ask(
                seed + 1,
                prompt(seed, 1 + seed * 3),
                end=True,
                max_tokens=20 + seed,
                ignore_eos=True,
            )

    with ThreadPoolExecutor(3 * SLOTS) as pool:
        answers = list(pool.map(one, range(3 * SLOTS)))
    for seed, answer in enumerate(answers):
        assert (answer.tokens, answer.error) == (
            greedy(served.llama, prompt(seed, 1 + seed * 3), 20 + seed),
            "",
        )


def test_a_seed_says_the_same_alone_and_in_company(served: Served) -> None:
    def one(number: int) -> list[int]:
        with Stream(served) as stream:
            sampling: dict[str, Any] = {
                "temperature": "0.9",
                "top_k": 64,
                "top_p": "0.95",
                "seed": number % 3,
            }
            return stream.ask(
                f"seed {number}",
                prompt(7, 21),
                end=True,
                max_tokens=16,
                ignore_eos=True,
                **sampling,
            ).tokens

    alone = [one(seed) for seed in range(3)]
    assert len({tuple(generated) for generated in alone}) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(6))) == alone * 2


def test_generations_steps_and_an_end_share_a_sequence(served: Served) -> None:
    ids = prompt(1, 9)
    with Stream(served) as stream:
        first = stream.ask("mixed", ids, max_tokens=5, ignore_eos=True)
        history = [*ids, *first.tokens, 3, 4]
        step = stream.ask("mixed", [3, 4], start=False, position=14)
        assert step.step == greedy(served.llama, history, 1)[0]
        history += [step.step, 9]
        more = stream.ask("mixed", [step.step, 9], start=False, max_tokens=6, ignore_eos=True)
        assert more.tokens == greedy(served.llama, history, 6)
        wrong = stream.ask("mixed", [1], start=False, max_tokens=1, position=3)
        assert wrong.error.startswith("INPLACE-POSITION retryable=0 sequence=mixed request=-: ")
        assert stream.ask("mixed", [], start=False, end=True) == Answer()
        late = stream.ask("mixed", [1], start=True, end=True)
        assert late.step == greedy(served.llama, [1], 1)[0]


def test_a_stop_text_ends_a_generation_and_is_not_said(served: Served) -> None:
    ids = tiny_tokenizer().encode("Derivative Works").ids
    text = added(ids, greedy(served.llama, ids, 40))
    stop = next(
        text[at : at + 3]
        for at in range(8, len(text))
        if text.count(text[at : at + 3]) == 1 and "\ufffd" not in text[at : at + 3]
    )
    with Stream(served) as stream:
        answer = stream.ask(
            "a",
            "Derivative Works",
            end=True,
            stop=("nowhere", stop),
            max_tokens=40,
            ignore_eos=True,
        )
    assert (answer.reason, answer.text) == ("stop", text[: text.index(stop)])


def test_text_of_byte_tokens_is_whole_and_ends_before_a_stop_text(
    served: Served, stream_models: Path, pool: ServerPool, tmp_path: Path
) -> None:
    """As Llama 2, Phi-3 and Gemma have it."""
    folder = shutil.copytree(stream_models / MODEL, tmp_path / "byte_fallback")
    tokenizer = byte_fallback()
    exchange(folder / "1", TOKENIZER_NAME, tokenizer.to_str().encode())
    ids = tokenizer.encode("好a 🙂", add_special_tokens=False).ids
    options: dict[str, Any] = {"max_tokens": 40, "regex": "[ខ你a]{12}", "temperature": "1"}
    with pool.serve(Deployment(folder)), Stream(served, folder.name) as stream:
        for seed, interval in enumerate((1, 2, 5, 40)):
            options |= {"seed": seed, "stream_interval": interval}
            answer = stream.ask("a", ids, end=True, **options)
            assert (len(answer.text), answer.error) == (12, "")
            assert answer.text == added_to_any_prompt(tokenizer, ids, answer.tokens)
            stop = answer.text[3:5]
            stopped = stream.ask("a", ids, end=True, stop=("never", stop), **options)
            text = answer.text[: answer.text.index(stop)]
            assert (stopped.text, stopped.reason) == (text, "stop")


def test_a_special_token_and_stop_token_ids_end_a_generation(served: Served) -> None:
    """No model of the tests generates a special token, so the end tokens of the model serve."""
    ids = prompt(3, 9)
    expected = greedy(served.llama, ids, 20)
    number = next(n for n in range(4, 20) if expected.index(expected[n]) == n)
    with Stream(served) as stream:
        answer = stream.ask(
            "a",
            ids,
            end=True,
            stop=("</s>",),
            max_tokens=20,
            ignore_eos=True,
            stop_token_ids=f"2,{expected[number]}",
        )
        assert (answer.tokens, answer.reason) == (expected[: number + 1], "stop")
        assert answer.text == added_to(ids, expected[:number])
        mixed = stream.ask("b", ids, end=True, stop=("</s> x",), max_tokens=2)
    assert "INPLACE-VALUE_RANGE" in mixed.error
    assert "special tokens add no text, so it would never match" in mixed.error


def test_a_rendered_template_gets_no_second_beginning(served: Served) -> None:
    ids = tiny_tokenizer().encode("Grant of Copyright").ids
    with Stream(served) as stream:
        for text, add, expected in (
            ("<s>Grant of Copyright", True, ids),
            ("Grant of Copyright", False, ids[1:]),
        ):
            answer = stream.ask(
                "a", text, end=True, max_tokens=12, ignore_eos=True, add_special_tokens=add
            )
            assert answer.tokens == greedy(served.llama, expected, 12)


def test_a_generation_goes_on_after_length_without_new_tokens(served: Served) -> None:
    ids = prompt(8, 9)
    with Stream(served) as stream:
        first = stream.ask("a", ids, max_tokens=5, ignore_eos=True)
        more = stream.ask("a", [], start=False, end=True, max_tokens=7, ignore_eos=True)
    assert (first.reason, more.reason, more.error) == ("length", "length", "")
    assert first.tokens + more.tokens == greedy(served.llama, ids, 12)


def test_what_a_request_does_not_use_or_have_is_refused(served: Served) -> None:
    with Stream(served) as stream:
        stop = [ids_input([1]), bytes_input("stop", ["x"])]
        assert (
            "INPLACE-BAD_INPUT retryable=0 sequence=a request=-: the inputs ['stop'] are not used"
            in stream.send(stop, ("next_token",), "a", True, True, {}).error
        )
        cases: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
            (("tokens", "logits"), {"max_tokens": 1}, "a generation has no outputs ['logits']"),
            (("tokens",), {}, "a step has no outputs ['tokens']"),
        ]
        for names, parameters, message in cases:
            error = stream.send([ids_input([1])], names, "a", True, True, parameters).error
            assert error.startswith("INPLACE-BAD_OUTPUT retryable=0 sequence=a request=-: ")
            assert message in error
        answer = stream.send([ids_input([1])], ("logits",), "a", True, True, {})
        assert np.argmax(answer.step) == greedy(served.llama, [1], 1)[0]
        unknown = stream.ask("a", [1], end=True, max_tokens=1, max_new_tokens=3)
        assert "'max_new_tokens' is unknown, did you mean 'max_tokens'?" in unknown.error


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"max_tokens": 0},
            "INPLACE-BAD_PARAMETER retryable=0 sequence=bad request=-: parameter "
            "'max_tokens' is 0; expected",
        ),
        ({"max_tokens": 4, "temperature": "hot"}, "parameter 'temperature' is 'hot'"),
        ({"max_tokens": CAPACITY, "logits": True}, "parameter 'logits' belongs to steps"),
    ],
)
def test_a_generation_that_cannot_be_is_refused(
    served: Served, parameters: dict[str, Any], message: str
) -> None:
    with Stream(served) as stream:
        assert message in stream.ask("bad", [1, 2], end=True, **parameters).error
        both = stream.send(
            [ids_input([1]), bytes_input("text", ["x"])],
            OUTPUTS,
            "bad",
            True,
            True,
            {"max_tokens": 1},
        )
        assert (
            "INPLACE-BAD_PARAMETER retryable=0 sequence=bad request=-: inputs 'input_ids' "
            "and 'text' are both given" in both.error
        )
        assert "INPLACE-EMPTY_INPUT" in stream.ask("bad", [], end=True, max_tokens=1).error
        assert (
            "INPLACE-MISSING_INPUT"
            in stream.send(
                [bytes_input("stop", ["x"])], OUTPUTS, "bad", True, True, {"max_tokens": 1}
            ).error
        )
        assert stream.ask("bad", [1, 2], end=True, max_tokens=1).error == ""


def test_a_model_without_tokens_is_stepped_over_streams_and_generates_nothing(
    served: Served,
) -> None:
    value = InferInput("value", [1, 4], "FP32")
    value.set_data_from_numpy(np.full((1, 4), 2, dtype=np.float32))
    with Stream(served, "sums") as stream:
        assert stream.send([value], ("sum",), "s", True, False, {}).step == [2.0] * 4
        assert (
            "is not a language model and cannot generate"
            in stream.send([value], ("sum",), "s", False, False, {"max_tokens": 1}).error
        )
        assert stream.send([value], ("sum",), "s", False, True, {}).step == [4.0] * 4


def test_http_infer_is_refused_by_triton(served: Served) -> None:
    url = f"http://127.0.0.1:{served.server.ports.http}/v2/models/{MODEL}/infer"
    body = {
        "inputs": [{"name": "input_ids", "shape": [1, 1], "datatype": "INT64", "data": [1]}],
        "parameters": {"sequence_id": 1},
    }
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60)
    with refused.value as page:
        assert page.code == 501


def test_steps_that_are_sent_ahead_of_their_answers_take_effect_in_order(served: Served) -> None:
    """Answers may overtake each other: the request id identifies them."""
    ids = prompt(11, 60)
    answers: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    with InferenceServerClient(served.server.grpc_url) as client:
        client.start_stream(
            lambda result, error: answers.put(
                (result.get_response().id, int(result.as_numpy("next_token")[0, 0]))
            )
        )
        for at, token in enumerate(ids):
            client.async_stream_infer(
                MODEL,
                [ids_input([token])],
                sequence_id="ahead",
                sequence_start=at == 0,
                sequence_end=at == len(ids) - 1,
                request_id=str(at),
                outputs=[InferRequestedOutput("next_token")],
            )
        generated = dict(answers.get(timeout=60) for _ in ids)
        client.stop_stream()
    assert [generated[str(at)] for at in range(len(ids))] == [
        greedy(served.llama, ids[: at + 1], 1)[0] for at in range(len(ids))
    ]


def test_a_unary_request_is_refused_by_triton(served: Served) -> None:
    with (
        InferenceServerClient(served.server.grpc_url) as client,
        pytest.raises(InferenceServerException, match="UNIMPLEMENTED"),
    ):
        client.infer(MODEL, [ids_input([1])], sequence_id=1, sequence_start=True)
