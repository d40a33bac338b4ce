"""Bad input on a real tritonserver: a clear error each, and no harm to other sequences."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from inplace.client import Sequence
from inplace_builder.tools.tritonserver import TritonServer
from numpy.typing import NDArray
from support.models import CAPACITY, VOCABULARY, Repository, greedy
from support.pool import Deployment, ServerPool
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

pytestmark = pytest.mark.server

PROMPT = [7, 3, 99, 12, 400]


@pytest.fixture
def live(client: InferenceServerClient, repository: Repository) -> Iterator[Sequence]:
    """A sequence that has been fed the prompt; afterwards it must go on as before."""
    expected = greedy(repository.llama, PROMPT, 6)
    with Sequence(client, "llama", id="victim", key="") as sequence:  # `send` has no key
        generated = [sequence.tokens(PROMPT)]
        yield sequence
        while len(generated) < 6:
            generated.append(sequence.tokens(generated[-1:]))
        assert generated == expected


def send(
    client: InferenceServerClient,
    ids: NDArray[np.generic],
    sequence: int | str = "victim",
    start: bool = False,
    end: bool = False,
    parameters: dict[str, str | int | float] | None = None,
    **options: Any,
) -> Any:
    tensor = InferInput("input_ids", list(ids.shape), np_to_triton_dtype(ids.dtype))
    tensor.set_data_from_numpy(ids)
    return client.infer(
        options.pop("model", "llama"),
        [tensor],
        sequence_id=sequence,
        sequence_start=start,
        sequence_end=end,
        request_id="r1",
        parameters=parameters,
        **options,
    )


def tokens(*ids: int) -> NDArray[np.generic]:
    return np.array([ids], dtype=np.int64)


@pytest.mark.parametrize(
    ("ids", "parameters", "code", "expected_output"),
    [
        (
            tokens(1, VOCABULARY),
            {},
            "VALUE_RANGE",
            f"holds {VOCABULARY}; expected values from 0 to {VOCABULARY - 1}",
        ),
        (tokens(-1), {}, "VALUE_RANGE", "holds -1;"),
        (
            tokens(*[1] * CAPACITY),
            {},
            "CAPACITY",
            f"{CAPACITY} tokens do not fit: the sequence holds 5 of {CAPACITY} positions",
        ),
        (np.zeros((1, 0), np.int64), {}, "EMPTY_INPUT", "send at least 1 token"),
        (
            tokens(1),
            {"logits": "perhaps"},
            "BAD_PARAMETER",
            "parameter 'logits' is 'perhaps'; expected true or false",
        ),
        (tokens(1), {"position": 17}, "POSITION", "meant for position 17, the sequence holds 5"),
        (
            tokens(1),
            {"temprature": "0.8"},
            "BAD_PARAMETER",
            "'temprature' is unknown, did you mean 'temperature'\\? a step takes \\['sequence_key'",
        ),
        (tokens(1), {"n": 2}, "BAD_PARAMETER", "parameter 'n' is unknown; a step takes"),
        (tokens(1), {"restore": "a"}, "BAD_PARAMETER", "'restore' is 'a'; expected true or false"),
        (tokens(1), {"min_p": "1.1"}, "BAD_PARAMETER", "expected a number from 0 \\(all\\) to 1"),
        (
            tokens(1),
            {"banned_token_ids": "0,9999"},
            "BAD_PARAMETER",
            "'banned_token_ids' is '0,9999'; expected token ids below",
        ),
        (tokens(1), {"ignore_eos": True}, "BAD_PARAMETER", "belongs to generations"),
        (tokens(1), {"position": "9" * 5000}, "BAD_PARAMETER", "expected a whole number of at"),
        (tokens(1), {"temperature": float("nan")}, "BAD_PARAMETER", "expected a finite number"),
    ],
)
def test_ours_names_the_request_and_changes_nothing(
    client: InferenceServerClient,
    live: Sequence,
    ids: NDArray[np.generic],
    parameters: dict[str, str | int | float],
    code: str,
    expected_output: str,
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        send(client, ids, parameters=parameters or None)
    assert re.search(
        rf"INPLACE-{code} retryable=0 sequence=victim request=r1: .*{expected_output}",
        refused.value.message(),
    )
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("ids", "sequence", "start", "expected_output"),
    [
        (tokens(1), 4242, False, "must specify the START flag"),
        (tokens(1), 0, True, "must specify a non-zero or non-empty correlation ID"),
        (
            np.array([[1.5]], np.float32),
            "victim",
            False,
            "data-type is 'FP32', but the model 'llama' expects 'INT64'|expects 'INT64'",
        ),
        (np.zeros((1, 2, 2), np.int64), "victim", False, "unexpected shape"),
        (np.zeros((2, 3), np.int64), "victim", False, "must specify batch-size 1"),
    ],
)
def test_triton_itself_refuses_the_rest(
    client: InferenceServerClient,
    live: Sequence,
    ids: NDArray[np.generic],
    sequence: int | str,
    start: bool,
    expected_output: str,
) -> None:
    with pytest.raises(InferenceServerException, match=expected_output) as refused:
        send(client, ids, sequence, start=start)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_step_after_end_is_refused(client: InferenceServerClient, live: Sequence) -> None:
    Sequence(client, "llama", id=31).tokens([1], end=True)
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        send(client, tokens(1), 31)


def test_a_refused_start_leaves_no_slot_and_can_be_repeated(
    client: InferenceServerClient, live: Sequence
) -> None:
    for attempt in range(20):  # more often than there are slots
        with pytest.raises(InferenceServerException, match="INPLACE-VALUE_RANGE"):
            send(client, tokens(-1), 500 + attempt, start=True)
    # Until the backend has ended the sequence in Triton, it answers; afterwards Triton does.
    unknown = "INPLACE-UNKNOWN_SEQUENCE .*its START was refused|must specify the START flag"
    with pytest.raises(InferenceServerException, match=unknown):
        send(client, tokens(1), 500)
    send(client, tokens(1), 500, start=True)
    send(client, tokens(1), 500, end=True)


def test_a_refused_end_still_frees(client: InferenceServerClient, live: Sequence) -> None:
    for attempt in range(20):
        send(client, tokens(1), 600 + attempt, start=True)
        with pytest.raises(InferenceServerException, match="INPLACE-VALUE_RANGE"):
            send(client, tokens(-1), 600 + attempt, end=True)


def test_batch_mates_of_a_bad_request_are_unharmed(
    client: InferenceServerClient, live: Sequence, repository: Repository
) -> None:
    """Four good streams in step with two that send garbage every time."""
    expected = greedy(repository.llama, PROMPT, 16)

    def good(seed: int) -> list[int]:
        with Sequence(client, "llama", id=800 + seed) as sequence:
            generated = [sequence.tokens(PROMPT)]
            while len(generated) < 16:
                generated.append(sequence.tokens(generated[-1:]))
            return generated

    def bad(seed: int) -> int:
        refusals = 0
        send(client, tokens(1), 900 + seed, start=True)
        for _ in range(30):
            with pytest.raises(InferenceServerException, match="INPLACE-VALUE_RANGE"):
                send(client, tokens(VOCABULARY + 1), 900 + seed)
            refusals += 1
        send(client, tokens(1), 900 + seed, end=True)
        return refusals

    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(good, seed) for seed in range(4)]
        garbage = [pool.submit(bad, seed) for seed in range(2)]
        assert [stream.result() for stream in streams] == [expected] * 4
        assert [stream.result() for stream in garbage] == [30, 30]


@pytest.mark.parametrize(
    "parameters",
    [{"position": "9" * 5000}, {"seed": float("inf")}, {"n": 1}, {"top_k": ""}],
)
def test_an_end_with_bad_parameters_frees_its_slot(
    client: InferenceServerClient, live: Sequence, parameters: dict[str, str | int | float]
) -> None:
    for attempt in range(20):  # more often than there are slots
        send(client, tokens(1), 700 + attempt, start=True)
        with pytest.raises(InferenceServerException, match="INPLACE-BAD_PARAMETER"):
            send(client, tokens(1), 700 + attempt, end=True, parameters=parameters)


def test_logits_are_returned_to_a_client_that_requests_them(
    client: InferenceServerClient, live: Sequence
) -> None:
    for index, (names, parameters, expected) in enumerate(
        (
            (["logits"], {}, {"logits"}),
            (["next_token", "logits"], {}, {"next_token", "logits"}),
            (["next_token"], {}, {"next_token"}),
            ([], {}, {"next_token", "logits"}),  # Triton passes on all names then
            ([], {"logits": False}, {"next_token"}),
        )
    ):
        outputs = [InferRequestedOutput(name) for name in names] or None
        result = send(client, tokens(1), 650 + index, True, True, dict(parameters), outputs=outputs)
        assert {output.name for output in result.get_response().outputs} == expected
    outputs = [InferRequestedOutput("token_logprobs")]
    with pytest.raises(InferenceServerException, match=r"INPLACE-BAD_OUTPUT .* need the parameter"):
        send(client, tokens(1), 650, True, True, outputs=outputs)


def test_parameters_of_triton_and_floats_arrive(
    client: InferenceServerClient, live: Sequence
) -> None:
    send(client, tokens(1), 640, start=True, priority=1, timeout=10**9)
    send(client, tokens(1), 640, parameters={"temperature": 0.5})
    with pytest.raises(InferenceServerException, match=r"parameter 'temperature' is -0\.5"):
        send(client, tokens(1), 640, end=True, parameters={"temperature": -0.5})


def test_forwarded_headers_are_accepted_where_the_operator_says_so(
    client: InferenceServerClient, repository: Repository, pool: ServerPool, live: Sequence
) -> None:
    headers = {"x-tenant": "one"}
    with pytest.raises(InferenceServerException, match="parameter 'x-tenant' is unknown"):
        send(client, tokens(1), headers=headers)

    def accept(config: Any) -> None:
        config.parameters["forwarded_headers"].string_value = "X-Tenant"

    with pool.serve(Deployment(repository.path / "brief", "behind_a_proxy", accept)):
        arguments: dict[str, Any] = {"model": "behind_a_proxy", "headers": headers}
        send(client, tokens(1), 660, True, True, **arguments)
        with pytest.raises(InferenceServerException, match="parameter 'x-other' is unknown"):
            send(client, tokens(1), 660, True, True, {"x-other": 1}, **arguments)


def test_triton_cuts_ids_at_a_nul_byte_and_the_client_refuses_them(
    client: InferenceServerClient, live: Sequence
) -> None:
    """The first line shows why: the request reaches the sequence "victim"."""
    with pytest.raises(InferenceServerException, match=r"INPLACE-POSITION .* sequence=victim "):
        send(client, tokens(1), "victim\0x", parameters={"position": 17})
    for arguments in ({"id": "victim\0x"}, {"id": "other", "key": "k\0"}):
        with pytest.raises(ValueError, match="has a NUL byte, at which Triton would cut it"):
            Sequence(client, "llama", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InferenceServerException, match="cannot be longer than 128"):
        send(client, tokens(1), "é" * 65, start=True)
    send(client, tokens(1), "é" * 64, start=True, end=True)


@pytest.mark.parametrize(
    ("field", "sequence"),
    [
        (b'"id":"\xff","parameters":{"sequence_id":"victim"}', "victim"),
        (b'"parameters":{"sequence_id":"\xff","sequence_start":true}', "-"),
        (b'"parameters":{"sequence_id":"victim","group":"\xff"}', "victim"),
    ],
)
def test_an_http_request_with_an_id_that_is_no_text_fails_alone(
    client: InferenceServerClient,
    server: TritonServer,
    repository: Repository,
    live: Sequence,
    field: bytes,
    sequence: str,
) -> None:
    """gRPC's texts are UTF-8, those of JSON over HTTP may be any bytes."""
    url = f"http://127.0.0.1:{server.ports.http}/v2/models/llama/infer"
    body = (
        b'{"inputs":[{"name":"input_ids","shape":[1,1],"datatype":"INT64","data":[1]}],%s}' % field
    )

    def bad() -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as page:
                return 200, page.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def good(number: int) -> int:
        with Sequence(client, "llama", id=f"beside {number}") as other:
            return other.tokens([number + 1])

    with ThreadPoolExecutor(8) as pool:
        refused = [pool.submit(bad) for _ in range(4)]
        generated = list(pool.map(good, range(4)))
    assert generated == [greedy(repository.llama, [number + 1], 1)[0] for number in range(4)]
    for answer in refused:
        code, text = answer.result()
        assert code == 400, text
        expected_output = f"INPLACE-BAD_PARAMETER retryable=0 sequence={sequence} request=-: "
        assert f"{expected_output}the request cannot be read: 'utf-8'".encode() in text
