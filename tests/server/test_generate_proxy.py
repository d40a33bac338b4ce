"""HTTP ``generate_stream`` on a real tritonserver, through the generate proxy."""

import contextlib
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil
import pytest
from inplace.schema.proxy import SUFFIX
from inplace_builder.tools.tritonserver import TritonServer
from support.faults import eventually
from support.long import long_except
from support.models import greedy
from support.served import CAPACITY, MODEL, SLOTS, Served, Stream
from support.streams import prompt
from support.vocabulary import added, tiny_tokenizer
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.server


def test_http_generates_the_same_tokens_as_grpc(served: Served) -> None:
    ids = tiny_tokenizer().encode("Subject to the terms").ids
    events = served.events(
        text="Subject to the terms", max_tokens=20, ignore_eos=True, stream_interval=4
    )
    tokens = [
        token
        for event in events
        for token in (event["tokens"] if isinstance(event["tokens"], list) else [event["tokens"]])
    ]
    assert tokens == greedy(served.llama, ids, 20)
    assert "".join(event["text_output"] for event in events) == added(ids, tokens)
    assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + ["length"]
    assert len(events) <= 6  # the first token alone, four at a time, and the end
    one = served.events(
        input_ids=[5, 6, 7],
        max_tokens=3,
        ignore_eos=True,
        stream_interval=3,
        temperature=0.8,
        seed=3,
    )
    other = served.events(
        input_ids=[5, 6, 7],
        max_tokens=3,
        ignore_eos=True,
        stream_interval=3,
        temperature="0.8",
        seed=3,
    )
    assert one == other


def have_pytorch(server: TritonServer) -> list[bool]:
    """Of each process of a model instance, whether it has loaded PyTorch."""
    assert server.process is not None
    have = []
    for process in psutil.Process(server.process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.name().startswith("triton_python"):
                files = {Path(file.path).name for file in process.memory_maps()}
                have.append("libtorch_python.so" in files)
    return have


def test_the_process_of_a_proxy_has_no_pytorch(served: Served) -> None:
    with InferenceServerClient(served.server.grpc_url) as client:
        models = client.get_model_repository_index().models
    proxies = sum(model.state == "READY" and model.name.endswith(SUFFIX) for model in models)
    assert proxies == 1
    eventually(
        lambda: have_pytorch(served.server).count(False) == 1, "one process is without PyTorch"
    )
    assert any(have_pytorch(served.server))


def test_a_refused_http_request_gets_the_reason_and_keeps_no_slot(served: Served) -> None:
    for _ in range(2 * SLOTS):
        [event] = served.events(text="x", max_tokens=3, temperature="hot")
        assert "parameter 'temperature' is 'hot'" in event["error"]
    [event] = served.events(text="x")
    assert event["error"].startswith("INPLACE-BAD_PARAMETER retryable=0")
    assert "parameter 'max_tokens' is missing" in event["error"]
    with ThreadPoolExecutor(2 * SLOTS) as pool:
        responses = list(
            pool.map(
                lambda seed: served.events(
                    input_ids=prompt(seed, 5), max_tokens=6, ignore_eos=True
                ),
                range(2 * SLOTS),
            )
        )
    assert all(events[-1]["finish_reason"] == "length" for events in responses)


def test_many_http_generations_wait_for_a_slot_and_all_are_served(served: Served) -> None:
    """More of them than the server has threads for a model.

    40 at once, with 8 slots, once stopped the proxy and the model for good.
    """
    with ThreadPoolExecutor(48) as pool:
        responses = list(
            pool.map(
                lambda seed: served.events(
                    input_ids=prompt(seed, 5), max_tokens=30, ignore_eos=True
                ),
                range(48),
            )
        )
    assert [events[-1]["finish_reason"] for events in responses] == ["length"] * 48
    with Stream(served) as stream:
        assert stream.ask("after", [1], end=True).error == ""


def generated(served: Served, **body: object) -> tuple[int, dict[str, Any]]:
    """The status and the answer of HTTP generate, which has one response."""
    url = served.generate_url.removesuffix("_stream")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode()), timeout=60
        ) as page:
            return page.status, json.loads(page.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_http_generate_answers_with_all_tokens_and_the_whole_text(served: Served) -> None:
    ids = tiny_tokenizer().encode("Subject to the terms").ids
    arguments: dict[str, Any] = {
        "text": "Subject to the terms",
        "max_tokens": 40,
        "ignore_eos": True,
    }
    expected = greedy(served.llama, ids, 40)
    for more in ({}, {"stream": False, "stream_interval": 3}, {"priority": 1, "timeout": 9}):
        status, answer = generated(served, **arguments, **more)
        assert (status, answer["tokens"], answer["finish_reason"]) == (200, expected, "length")
        assert answer["text_output"] == added(ids, expected)
    [event] = served.events(**arguments, stream=False)
    assert event["tokens"] == expected
    status, answer = generated(served, **arguments, temperature="hot")
    assert (status, "parameter 'temperature' is 'hot'" in answer["error"]) == (400, True)


def test_http_generations_that_are_not_streamed_run_side_by_side(served: Served) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(
            pool.map(
                lambda seed: generated(
                    served, input_ids=prompt(seed, 5), max_tokens=20, ignore_eos=True
                ),
                range(32),
            )
        )
    for seed, (status, answer) in enumerate(answers):
        assert (status, answer["tokens"]) == (200, greedy(served.llama, prompt(seed, 5), 20))


@pytest.mark.parametrize("name", ["prompt", "text_input"])
def test_the_names_that_other_backends_have_for_a_prompt_get_help(
    served: Served, name: str
) -> None:
    status, answer = generated(served, **{name: "x"}, max_tokens=2)
    assert status == 400
    assert answer["error"].startswith("INPLACE-BAD_INPUT retryable=0 ")
    assert "send the text as 'text'" in answer["error"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 2}, "'max_new_tokens' is unknown, did you mean 'max_tokens'?"),
        ({"logits": True}, "parameter 'logits' belongs to steps"),
        ({"stop_token_ids": "x"}, "parameter 'stop_token_ids' is 'x'; expected a token id"),
    ],
)
def test_http_parameters_that_are_unknown_or_wrong_are_refused(
    served: Served, parameters: dict[str, Any], message: str
) -> None:
    status, answer = generated(served, text="x", max_tokens=2, **parameters)
    assert (status, message in answer["error"]) == (400, True), answer


@pytest.mark.parametrize(
    "parameter",
    [{"sequence_key": "mine"}, {"position": 3}, {"fetch": True}, {"sequence_id": 7}],
)
def test_parameters_that_name_a_sequence_are_refused_over_http(
    served: Served, parameter: dict[str, Any]
) -> None:
    for _ in range(2 * SLOTS):  # more than would fit, if any kept its slot
        [event] = served.events(text="x", max_tokens=3, **parameter)
        assert "INPLACE-BAD_PARAMETER" in event["error"]
        assert "for clients that name a sequence" in event["error"]
    assert (
        served.events(input_ids=[1, 2], max_tokens=3, ignore_eos=True)[-1]["finish_reason"]
        == "length"
    )


def test_a_request_that_names_a_sequence_is_refused(served: Served) -> None:
    tensor = InferInput("input_ids", [1, 2], "INT64")
    tensor.set_data_from_numpy(np.array([[1, 2]]))
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()
    with InferenceServerClient(served.server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer(
            f"{MODEL}_generate",
            [tensor],
            sequence_id=7,
            sequence_start=True,
            parameters={"max_tokens": 2},
        )
        error = str(answers.get(timeout=60))
    assert "INPLACE-BAD_PARAMETER" in error
    assert "this model takes no correlation id and no sequence flags" in error


def test_log_probabilities_that_a_request_does_not_ask_for_are_refused(served: Served) -> None:
    tensor = InferInput("input_ids", [1, 2], "INT64")
    tensor.set_data_from_numpy(np.array([[1, 2]]))
    answers: SimpleQueue[InferenceServerException | None] = SimpleQueue()
    with InferenceServerClient(served.server.grpc_url) as client:
        client.start_stream(lambda result, error: answers.put(error))
        for parameters in ({"max_tokens": 1}, {"max_tokens": 1, "logprobs": 0}):
            outputs = [InferRequestedOutput("tokens"), InferRequestedOutput("token_logprobs")]
            client.async_stream_infer(
                f"{MODEL}_generate", [tensor], outputs=outputs, parameters=parameters
            )
            error = answers.get(timeout=60)
            if "logprobs" in parameters:
                assert error is None
            else:
                assert "INPLACE-BAD_OUTPUT" in str(error)
                assert "['token_logprobs'] need the parameters ['logprobs']" in str(error)


def test_a_closed_http_connection_frees_its_slot(served: Served) -> None:
    body = json.dumps(
        {"input_ids": [1, 2], "max_tokens": CAPACITY - 2, "ignore_eos": True, "stream": True}
    ).encode()
    pages = [
        urllib.request.urlopen(urllib.request.Request(served.generate_url, body), timeout=60)
        for _ in range(SLOTS)
    ]
    for page in pages:
        page.readline()
        page.close()
    begin = time.monotonic()
    with Stream(served) as stream:
        while (answer := stream.ask("next", [1], end=True)).error:
            assert "INPLACE-NO_FREE_SLOT" in answer.error
            assert time.monotonic() - begin < 60.0
            time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [b'{"id":"\xff","text":"x","max_tokens":2}', b'{"text":"x","max_tokens":2,"group":"\xff"}'],
)
def test_an_http_request_that_is_not_utf8_is_refused_and_nothing_waits_for_it(
    served: Served, body: bytes
) -> None:
    for _ in range(2 * SLOTS):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(served.generate_url, body), timeout=60)
        with refused.value as page:
            assert page.code == 400
            message = b"INPLACE-BAD_PARAMETER retryable=0 sequence=- request=-: "
            assert message + b"the request cannot be read: 'utf-8'" in page.read()
    assert served.events(text="x", max_tokens=2, ignore_eos=True)[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("rounds", long_except([4], [4, 20]))
def test_clients_that_come_and_go_never_stop_the_proxy(served: Served, rounds: int) -> None:
    """It deadlocked, and the model with it, when its requests had several responses.

    That took some hundred generations.
    """

    def one(client: int) -> list[str]:
        responses = [
            served.events(input_ids=prompt(client, 4), max_tokens=24, ignore_eos=True)
            for _ in range(rounds)
        ]
        return [events[-1]["finish_reason"] for events in responses]

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(one, range(32))) == [["length"] * rounds] * 32
