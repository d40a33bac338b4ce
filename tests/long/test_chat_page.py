"""The page to chat with, in Chromium over a real server. `make clients` installs the browser."""

import json
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from inplace.openai import Frontend
from inplace.openai.keys import KeyFile, new_key
from support.fronts import Front, running
from support.served import MODEL, Served

CLIENTS = Path(__file__).parents[2] / "build/clients/bin/python"
BROWSER = Path(__file__).parent / "browser/visit.py"

pytestmark = [
    pytest.mark.server,
    pytest.mark.long,
    pytest.mark.skipif(not CLIENTS.exists(), reason="`make clients` installs a browser"),
]


def visit(front: Front, key: str) -> dict[str, Any]:
    result = subprocess.run(
        [str(CLIENTS), str(BROWSER), front.url, key],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shown: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return shown


def reply(client: openai.OpenAI, messages: list[Any], tokens: int) -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=tokens
    )
    return answer.choices[0].message.content or ""


def test_a_visitor_chats(served: Served, stream_models: Path, tmp_path: Path) -> None:
    key, record = new_key("visitor")
    file = tmp_path / "keys.json"
    file.write_text(KeyFile(keys=(record,)).model_dump_json())
    with (
        running(Frontend([served.server.grpc_url], stream_models, keys=file)) as front,
        front.client(key) as client,
    ):
        shown = visit(front, key)
        messages = [{"role": "user", "content": "What is a Derivative Work?"}]
        first = reply(client, messages, 12)
        messages += [
            {"role": "assistant", "content": first},
            {"role": "user", "content": "And a Source?"},
        ]
        second = reply(client, messages, 12)
        models = [each.id for each in client.models.list().data]
    assert "API key is missing or wrong" in shown["without a key"]["error"]
    assert shown["models"] == models
    chat = [["user", "What is a Derivative Work?"], ["assistant", first]]
    assert shown["first"]["messages"] == chat
    assert shown["first"]["status"].startswith("12 tokens, ")
    assert shown["first"]["status"].endswith(" tokens/s, ended by length")
    chat += [["user", "And a Source?"], ["assistant", second]]
    assert shown["second"]["messages"] == chat
    assert "max_tokens" in shown["refused"]["error"]
    # what people and models write is text
    assert shown["markup"]["messages"][-2][1].startswith("<img src=x")
    assert (shown["markup"]["elements"], shown["markup"]["title"]) == (0, "Inplace")
    assert shown["stopped"]["status"] == "stopped"
    assert [each[0] for each in shown["stopped"]["messages"]] == ["user", "assistant"]
    assert [text for text in shown["console"] if "status of 4" not in text] == []
