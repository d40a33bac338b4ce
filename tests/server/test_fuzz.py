"""Random requests over gRPC and HTTP against a real tritonserver.

Replay: ``PYTHONPATH=tests:tests/long python -m fuzz --requests 10000 --seed N``.
"""

import os
import random
from pathlib import Path

import grpc
import numpy as np
import pytest
from fuzz.run import SHARE, fuzz
from fuzz.server import Watch, built
from fuzz.wire import message
from inplace_builder.tools.tritonserver import Ports, TritonServer
from support.long import long_except
from tritonclient.grpc import service_pb2_grpc

pytestmark = pytest.mark.server


@pytest.mark.parametrize("requests", long_except([150], [150, 10_000]))
def test_random_requests_get_a_result_or_a_clear_error_and_harm_no_other(
    requests: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("INPLACE_FUZZ_SEED", random.SystemRandom().randrange(10**6)))
    print(f"PYTHONPATH=tests:tests/long python -m fuzz --requests {requests} --seed {seed}")
    repository = built(tmp_path)
    with TritonServer(repository, Ports(0, 0, 0), log=tmp_path / "log") as server:
        watch = Watch(server)
        findings = fuzz(server, repository, requests, seed)
        assert findings.wrong + watch.complaints() == []
        _batch_of_none(server.grpc_url)
        _bytes_that_wrap(server.grpc_url)
        server.stop(timeout=0)  # with a dead stub it would wait until its exit timeout
    answers = findings.answers
    assert answers.total() >= 0.95 * requests
    assert answers["result"] > 0.5 * SHARE * requests  # what good clients sent came through
    common = {"BAD_PARAMETER", "triton", "page"}
    rare = {"CAPACITY", "UNKNOWN_SEQUENCE", "page BAD_PARAMETER", "page refused by triton", "left"}
    rare |= {"EMPTY_INPUT", "VALUE_RANGE"}
    assert common <= set(answers)
    assert requests < 10_000 or rare <= set(answers)


def _batch_of_none(url: str) -> None:
    """A fault of tritonserver 2.51: ``[0, n]`` passes as a batch of 0, then is taken for one of n.

    When this fails, the server refuses it: `fuzz.damage` may then make such shapes too.
    """
    request = message(
        "llama", {"input_ids": np.ones((1, 65), np.int64)}, "none", start=True, end=True
    )
    request.inputs[0].shape[:] = [0, 65]
    with grpc.insecure_channel(url) as channel, pytest.raises(grpc.RpcError) as refused:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    assert "batch size 65 for 'llama_0_0', max allowed is 8" in str(refused.value)


def _bytes_that_wrap(url: str) -> None:
    """Another one: it takes 2**64 bytes for none, and the Python stub aborts over the shape.

    When this fails, the server refuses it (docs/failures.md): `fuzz.damage` may then make such
    shapes too.
    """
    request = message(
        "llama", {"input_ids": np.ones((1, 0), np.int64)}, "none", start=True, end=True
    )
    request.inputs[0].shape[:] = [1, 2**61]
    with grpc.insecure_channel(url) as channel, pytest.raises(grpc.RpcError) as refused:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    assert "Stub process 'llama_0_0' is not healthy" in str(refused.value)
