"""The comparison with another server: what clients read, what is made of it, results that go on."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.generation.arrivals import Arrivals
from benchmarks.generation.clients import OpenAIClient, Target, openai_request, responses_of
from benchmarks.generation.comparison import CELLS, Results, cell_key
from benchmarks.generation.comparison_report import behind, cells_table, draw, mixed_table
from benchmarks.generation.measured import described, requests_per_second
from benchmarks.generation.sources import spaced_tokenizer
from benchmarks.generation.vllm_server import VllmOptions

TARGET = Target("vllm", "127.0.0.1:1", "m", 500)


def event(**body: Any) -> bytes:
    return f"data: {json.dumps(body)}\n".encode()


def ids(*tokens: int) -> bytes:
    return event(choices=[{"index": 0, "text": "", "token_ids": list(tokens)}])


def usage(tokens: int) -> bytes:
    return event(choices=[], usage={"completion_tokens": tokens})


DONE = b"data: [DONE]\n"


def test_tokens_are_counted_by_ids_or_by_the_spaces_of_the_text() -> None:
    by_ids = [(1.0, ids(5)), (2.0, ids(6, 7)), (3.0, ids()), (3.0, usage(3)), (3.0, DONE)]
    assert responses_of(by_ids) == [(1.0, 1), (2.0, 2)]
    texts = [" t5", " t6 t7", "é", ""]
    events = [(float(at), event(choices=[{"text": text}])) for at, text in enumerate(texts)]
    assert responses_of([*events, (4.0, usage(4)), (4.0, DONE)]) == [(0.0, 1), (1.0, 2), (2.0, 1)]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([ids(5), event(error={"message": "no memory"}), DONE], "no memory"),
        ([ids(5), usage(1)], "ended early"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error(events: list[bytes], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        responses_of([(0.0, one) for one in events])


def test_a_tokenizer_writes_a_space_for_each_token() -> None:
    tokenizer = spaced_tokenizer(512)
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.decode([3, 17, 255]) == " t3 t17 t255"


def test_a_connection_is_used_again_and_an_error_is_read() -> None:
    heard: list[Any] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append("connection")
        for status in ("200 OK", "200 OK", "400 Bad Request"):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            heard.append(json.loads(await reader.readexactly(length)))
            writer.write(f"HTTP/1.1 {status}\r\n".encode())
            if status == "200 OK":
                writer.write(b"transfer-encoding: chunked\r\n\r\n")
                for part in (ids(5) + b"\n", ids(6) + usage(2) + b"\n", DONE + b"\n"):
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                writer.write(b"0\r\n\r\n")
            else:
                writer.write(b"content-length: 8\r\n\r\ntoo long")
        writer.close()

    async def run() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            target = Target("vllm", f"127.0.0.1:{port}", "m", 500)
            async with OpenAIClient(target) as client:
                for _ in range(2):
                    generation = await client.generate(openai_request(target, [1, 2], 2))
                    assert [tokens for _, tokens in generation.responses] == [1, 1]
                    assert generation.sent <= generation.responses[0][0]
                with pytest.raises(RuntimeError, match=r"400.*too long"):
                    await client.generate(openai_request(target, [1, 2], 2))

    asyncio.run(run())
    assert heard[0] == "connection" and heard.count("connection") == 1
    assert heard[1]["prompt"] == [1, 2] and heard[1]["return_token_ids"] is True


def test_arrivals_are_the_same_for_each_target_and_as_many_as_the_rate_says() -> None:
    load = Arrivals(TARGET, 50.0, 1000, (64, 4096), 128, 20.0)
    other = Arrivals(Target("grpc", "x", "y", 9), 50.0, 1000, (64, 4096), 128, 20.0)
    schedule = list(load.schedule())
    assert schedule == list(other.schedule())
    assert schedule[-1][0] == pytest.approx(20.0, rel=0.1)
    lengths = [length for _, length in schedule]
    assert min(lengths) >= 64 and max(lengths) <= 4096
    assert sorted(lengths)[500] == pytest.approx(512, rel=0.15)  # the middle of the logarithms
    assert load.end == schedule[-1][0] + 20.0
    at_once = Arrivals(TARGET, None, 3, (64, 4096), 128, 20.0)
    assert [at for at, _ in at_once.schedule()] == [0.0, 0.0, 0.0]


def test_a_response_of_two_tokens_counts_as_two_gaps_of_a_half() -> None:
    whole = {"sent": 0.0, "responses": [(0.1, 1), (0.3, 2), (0.4, 1)], "late": 0.0, "error": ""}
    result = described([whole])
    assert result["tokens_per_second"] == pytest.approx(10.0)
    assert result["first_token_us"]["p99"] == pytest.approx(1e5)
    assert result["inter_token_us"]["mean"] == pytest.approx(1e5)
    assert "not_answered" not in result
    given_up = {"sent": 1.0, "responses": [], "late": 0.0, "error": "not answered in time"}
    result = described([whole, given_up], end=21.0)
    assert result["not_answered"] == 1
    assert result["first_token_us"]["p99"] == pytest.approx(20e6)


def test_saturation_is_the_rate_between_a_tenth_and_nine_tenths() -> None:
    ends = [5.0, *(6.0 + one / 4 for one in range(9)), 30.0]
    generations = [{"responses": [(end, 1)], "error": ""} for end in ends]
    assert requests_per_second(generations) == pytest.approx(4.0)
    with pytest.raises(RuntimeError, match="0 generations of 1 ended"):
        requests_per_second([{"responses": [], "error": "late"}])


def test_runs_that_write_into_one_file_keep_each_others_results(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    head = {"command": "c", "commit": "a", "date": "d", "runs": [], "cells": []}
    one = Results(path, dict(head, runs=[]), "alone")
    other = Results(path, dict(head, runs=[]), "")
    key = cell_key("tiny", CELLS["tiny"][0])
    one.add("cells", key, "vllm", {"tokens_per_second": 1.0})
    other.add("cells", key, "inplace", {"tokens_per_second": 2.0})
    assert one.has("cells", key, "inplace") and not one.has("cells", key, "inplace_openai")
    document = one.read()
    assert [run["note"] for run in document["runs"]] == ["alone", ""]
    assert document["cells"] == [
        key | {"vllm": {"tokens_per_second": 1.0}, "inplace": {"tokens_per_second": 2.0}}
    ]


def test_the_other_server_has_its_own_packages_and_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    python = tmp_path / "bin" / "python3"
    options = VllmOptions(
        python, tmp_path / "1b", 4352, 64, 0.5, tmp_path / "caches", tmp_path / "log", ("-O3",)
    )
    environment = options.environment()
    assert "PYTHONPATH" not in environment
    assert environment["PATH"].startswith(str(tmp_path / "bin"))
    assert environment["VLLM_CACHE_ROOT"] == str(tmp_path / "caches" / "vllm")
    command = options.command(8000)
    assert command[0] == str(python) and command[-1] == "-O3"
    assert "--max-model-len=4352" in command and "--max-num-seqs=64" in command


def test_tables_have_all_ways_and_say_where_the_other_is_ahead(tmp_path: Path) -> None:
    def result(speed: float, p99: float) -> dict[str, Any]:
        times = {"p50": p99 / 2, "p99": p99}
        return {"tokens_per_second": speed, "first_token_us": times, "inter_token_us": times}

    cell = {"shape": "1b", "prompt": 128, "tokens": 256, "streams": 8}
    mixed = {"shape": "1b", "share": 0.9}
    document: dict[str, Any] = {
        "cells": [cell | {"inplace": result(900.0, 2000.0), "vllm": result(1234.5, 3000.0)}],
        "mixed": [
            mixed | {way: result(1.0, p99) | {"rate": 50.0}}
            for way, p99 in (("inplace", 4000.0), ("vllm", 3000.0))
        ],
        "machine": {"GPU": "G"},
        "commit": "abc",
    }
    document["mixed"] = [document["mixed"][0] | document["mixed"][1]]
    row = "| Llama 1B, 128 + 256 | 8 | 900 · – · 1,234 | 1 / 2 · – / – · 2 / 3 |"
    assert list(cells_table(document))[2].startswith(row)
    assert list(mixed_table(document))[2].startswith("| Llama 1B, 90% | 50.0 | 2 / 4 · – / –")
    assert behind(document, "inplace") == [
        "Llama 1B 128 + 256, 8 streams: 900 tokens a second, 1,234",
        "Llama 1B at 90%, first_token_us p99: 4.0 ms, 3.0",
        "Llama 1B at 90%, inter_token_us p99: 4.0 ms, 3.0",
    ]
    assert behind(document, "inplace_openai") == []
    draw(document, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
