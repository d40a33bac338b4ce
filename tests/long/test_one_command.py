"""`inplace serve MODEL` as a user runs it: built once, served with the front end, stopped."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from inplace_builder.tools.tritonserver import Ports
from support.fronts import Front
from support.models import greedy
from support.vocabulary import added, llama_with_tokenizer, tiny_tokenizer
from transformers import LlamaForCausalLM

pytestmark = [pytest.mark.server, pytest.mark.long]


def test_a_folder_is_built_once_and_served(tmp_path: Path) -> None:
    source = tmp_path / "tiny llama"
    llama_with_tokenizer(source)
    model = LlamaForCausalLM.from_pretrained(source).eval()
    ids = tiny_tokenizer().encode("Derivative Works").ids
    expected = added(ids, greedy(model, ids, 12))
    for built in ("build into", "built before"):
        ports = Ports(0, 0, 0).resolve()
        front = Front(Ports(0).resolve().grpc)
        command = [sys.executable, "-m", "inplace_builder", "serve", str(source)]
        command += [f"--cache={tmp_path / 'cache'}", f"--openai-port={front.port}"]
        command += [f"--grpc-port={ports.grpc}", f"--http-port={ports.http}", "--capacity=256"]
        command += [f"--metrics-port={ports.metrics}", f"--log-file={tmp_path / 'log'}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                printed = ""
                while "OpenAI's protocol" not in printed:
                    line = process.stdout.readline()
                    assert line, printed
                    printed += line
                assert built in printed
                with front.client() as client:
                    answer = client.completions.create(
                        model="tiny-llama", prompt=ids, temperature=0, max_tokens=12
                    )
                assert answer.choices[0].text == expected
                process.send_signal(signal.SIGTERM)
                begin = time.monotonic()
                process.wait(timeout=60)
                assert time.monotonic() - begin < 40
            finally:
                process.kill()
        with pytest.raises(OSError, match="refused"):
            front.send("/health")
