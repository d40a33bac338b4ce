"""The containers of `deploy/kubernetes` as processes: command lines, probes, ends."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest
from inplace.openai.keys import KeyFile, new_key
from inplace_builder.tools.tritonserver import Ports
from openai.types.chat import ChatCompletionChunk
from support.containers import FrontContainer, ServerContainer
from support.fronts import Front
from support.served import MODEL

pytestmark = [pytest.mark.server, pytest.mark.long]


class Secret:
    """A folder with the file of keys, as the kubelet mounts a secret.

    The file is a link to one in ``..data``, which is a link that is exchanged as a whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, 0
        folder.mkdir()
        (folder / "keys.json").symlink_to("..data/keys.json")

    def draw(self) -> str:
        """A new key, which is the only one from now on."""
        key, record = new_key("client")
        self._number += 1
        version = self.folder / f"..version{self._number}"
        version.mkdir()
        (version / "keys.json").write_text(KeyFile(keys=(record,)).model_dump_json())
        link = self.folder / "..new"
        link.symlink_to(version.name)
        link.rename(self.folder / "..data")
        return key


@contextmanager
def chat(front: FrontContainer, key: str) -> Iterator[openai.Stream[ChatCompletionChunk]]:
    """A long reply, of which the first chunk was read."""
    with (
        Front(front.port).client(key) as client,
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is a Derivative Work?"}],
            stream=True,
            extra_body={"max_tokens": 200, "ignore_eos": True},
        ) as stream,
    ):
        assert next(stream).choices[0].delta.role == "assistant"
        yield stream


def models(front: FrontContainer, key: str = "none") -> list[str]:
    """The models that a client sees."""
    with Front(front.port).client(key) as client:
        return [model.id for model in client.models.list()]


def last_reason(stream: "openai.Stream[ChatCompletionChunk]") -> str | None:
    *_, last = stream
    return last.choices[0].finish_reason


def test_containers_start_are_probed_and_drain(stream_models: Path, tmp_path: Path) -> None:
    """Two front ends and a server; the other replica of the server is never there."""
    secret = Secret(tmp_path / "keys")
    key = secret.draw()
    server = ServerContainer(stream_models, tmp_path / "log")
    urls = [server.grpc_url, f"127.0.0.1:{Ports(0).resolve().grpc}"]
    fronts = [FrontContainer(urls, stream_models, secret.folder) for _ in range(2)]
    with ExitStack() as stack:
        first, second = map(stack.enter_context, fronts)
        stack.callback(server.stop, 5)
        server.start()
        for front in fronts:
            front.wait_for("startupProbe")
            assert front.passes("livenessProbe")
        server.container.wait_for("startupProbe")
        assert server.container.passes("readinessProbe")
        assert server.container.passes("livenessProbe", server.grpc_url)
        for front in fronts:
            front.wait_for("readinessProbe")

        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            models(first)
        old, key = key, secret.draw()
        time.sleep(1.5)  # the file is looked at once a second
        with pytest.raises(openai.AuthenticationError):
            models(first, old)
        assert MODEL in models(first, key)

        with chat(first, key) as stream:
            first.terminate()
            assert last_reason(stream) == "length"
        assert first.process.wait(first.seconds_to_end) == 0
        with pytest.raises(OSError, match="refused"):
            Front(first.port).send("/health")

        with chat(second, key) as stream:
            assert server.process is not None
            server.process.terminate()
            assert last_reason(stream) == "length"
        assert server.process.wait(server.container.seconds_to_end) == 0
        second.wait_for("readinessProbe", passes=False)
        assert second.passes("livenessProbe")
        second.terminate()
        assert second.process.wait(second.seconds_to_end) == 0
