"""How the instances of a model find each other, and what passes between them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from inplace.errors import Code, RequestError
from inplace.protocol import FROM, POSITION, SEQUENCE_KEY
from inplace.runtime.requests import Request
from inplace.server.addresses import Address, is_child_of, listening_sockets
from inplace.server.frames import decode, encode, read_request, read_texts, request_frame
from inplace.server.relay import engine_owner
from torch import Tensor

HERE = Address(server=7, model="m", instance="a", since=5, process=100)


class Silent:
    """A channel that nothing is sent through."""

    requested_outputs = frozenset({"sum"})

    def send(self, outputs: Mapping[str, Tensor | str], *, final: bool) -> None:
        raise AssertionError

    def send_error(self, error: RequestError) -> None:
        raise AssertionError

    def is_cancelled(self) -> bool:
        return False


def test_the_newest_of_each_other_instance_is_one_of_the_others() -> None:
    old = replace(HERE, instance="b", since=1, process=101)
    new = replace(old, since=6, process=102)
    third = replace(HERE, instance="c", process=103)
    strangers = [replace(third, server=8), replace(third, model="n"), replace(HERE, since=1)]
    names = [each.name for each in (third, new, old, HERE, *strangers)]
    assert HERE.others([*names, "inplace/7/m/d/x/1", "/run/other"]) == [new, third]
    assert all(Address.read(name) is not None for name in names)


def test_only_processes_of_the_same_server_are_spoken_to() -> None:
    name = f"inplace-test-{os.getpid()}"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0{name}'); s.recv(1)"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        assert name not in listening_sockets()
        listener.listen()
        assert name in listening_sockets()
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            connected, _ = listener.accept()
            with connected:
                assert is_child_of(os.getpid(), connected)
                assert not is_child_of(os.getppid(), connected)
            child.wait(30)


def test_a_request_arrives_as_it_was_sent_whatever_the_pieces() -> None:
    inputs = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(1, 2, 3).transpose(1, 2),
        "none": torch.zeros(1, 0, dtype=torch.int64),
        "flag": torch.tensor(True),
    }
    refusal = RequestError(Code.BAD_SHAPE, "it is \N{LATIN SMALL LETTER E WITH ACUTE}")
    sent = Request(
        "id\udcff",
        start=True,
        end=False,
        inputs=inputs,
        parameters={"seed": 2**63, "text": "x", "flag": True, "p": 0.1},
        requested_outputs=Silent.requested_outputs,
        refusal=refusal,
        offered=True,
    )
    frame = request_frame(3, (sent, {"text": (b"\xff\0", b"")}, Silent()))
    received, frames = bytearray(), []
    for byte in frame + encode({"type": "cancel", "number": 3}, {}):
        received.append(byte)
        frames += decode(received)
    (header, tensors), (cancel, _) = frames
    assert (header["number"], cancel["type"]) == (3, "cancel")
    assert read_texts(header) == {"text": (b"\xff\0", b"")}
    got = read_request(header, tensors)
    for name, tensor in inputs.items():
        assert torch.equal(got.inputs[name], tensor)
        assert got.inputs[name].dtype == tensor.dtype
    assert got.refusal is not None
    assert (got.refusal.code, str(got.refusal)) == (refusal.code, str(refusal))
    assert replace(got, inputs=inputs, refusal=refusal) == sent


@pytest.mark.parametrize(
    ("code", "parameters", "elsewhere"),
    [
        (Code.NO_FREE_SLOT, {}, True),
        (Code.UNKNOWN_SEQUENCE, {FROM: 3}, True),
        (Code.UNKNOWN_SEQUENCE, {}, False),
        (Code.POSITION, {SEQUENCE_KEY: "k", POSITION: 4}, True),
        (Code.POSITION, {POSITION: 0}, False),
        (Code.BAD_INPUT, {}, False),
    ],
)
def test_only_what_another_instance_may_have_is_asked_for_there(
    code: Code, parameters: dict[str, str | int], elsewhere: bool
) -> None:
    offered = Request(1, True, False, {}, parameters=parameters, offered=True)
    error = RequestError(code, "no")
    assert offered.may_succeed_elsewhere(error) is elsewhere
    assert not replace(offered, offered=False).may_succeed_elsewhere(error)
    assert not replace(offered, start=False).may_succeed_elsewhere(error)


@pytest.mark.parametrize(
    ("instance", "owner"),
    [("m_0_0", "m_0_0"), ("m_0_12", "m_0_0"), ("m_1_2", "m_1_0"), ("a_3_b_0_1", "a_3_b_0_0")],
)
def test_the_first_instance_of_a_group_owns_the_engine(instance: str, owner: str) -> None:
    assert engine_owner(instance) == owner


def test_the_newest_process_of_the_owner_is_relayed_to() -> None:
    old, new = (replace(HERE, since=since, process=since) for since in (3, 8))
    assert HERE.listener([new.name, old.name, replace(new, instance="b", since=9).name]) == new
    assert HERE.listener([]) is None
