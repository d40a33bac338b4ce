"""An OpenAI front end in a thread of the tests, over HTTP."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import openai
from inplace.openai import Frontend


@dataclass(frozen=True)
class Front:
    """A front end that runs."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def send(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """The status, headers and JSON (or text) of an answer; a POST where there is a body."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(self.url + path, body, named)
        try:
            with urllib.request.urlopen(request, timeout=60) as page:
                status, answered, content = page.status, dict(page.headers), page.read()
        except urllib.error.HTTPError as error:
            status, answered, content = error.code, dict(error.headers), error.read()
        with contextlib.suppress(ValueError):
            return status, answered, json.loads(content)
        return status, answered, content.decode()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """The status and JSON of the answer to a JSON body."""
        status, _, answer = self.send(path, json.dumps(body).encode())
        return status, answer

    def metric(self, name: str) -> float:
        """A number of /metrics, by its name and labels."""
        _, _, text = self.send("/metrics")
        return next(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith(f"{name} ")
        )

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 60
        while self.metric(name) != value:
            assert time.monotonic() < deadline, (name, self.metric(name))
            time.sleep(0.02)


@contextlib.contextmanager
def running(frontend: Frontend) -> Iterator[Front]:
    """Run a front end on a free port."""
    server = replace(frontend, port=0).server()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield Front(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    assert not thread.is_alive()
