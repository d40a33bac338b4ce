"""Generations beside one with a grammar, on the CPU: what the others notice.

    python -m benchmarks.grammars --model model_repository/my-stream-model

The model is a decoder that was built with a tokenizer, ``--serve stream`` and at least four rows.
Three generations run alone, beside a fourth one, and beside one that follows a JSON schema; the
three cases alternate round by round, so that a change of the machine's speed affects all. Measured
is the time between two tokens of the three. Writes ``benchmarks/results/grammars.json``.
"""

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from inplace.drivers import StreamDriver, TokenizerConfig
from inplace.drivers.detokenizer import load_tokenizer
from inplace.drivers.reply import Outputs
from inplace.errors import RequestError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest

from benchmarks.record import facts

RESULT = Path(__file__).parent / "results" / "grammars.json"
PLAIN, TOKENS, ROUNDS = 3, 100, 5
SCHEMA = json.dumps(
    {
        "type": "array",
        "items": {"type": "string", "minLength": 20},
        "minItems": 100,
    }
)


class TokenTimes:
    """The channel of a generation, which notes when tokens arrive."""

    requested_outputs = frozenset({"tokens", "finish_reason"})

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: RequestError | None = None
        self.done = threading.Event()

    def send(self, outputs: Outputs, *, final: bool) -> None:
        """Note the time, once for each token."""
        tokens = outputs["tokens"]
        assert isinstance(tokens, torch.Tensor)
        self.times += [time.perf_counter()] * tokens.shape[1]
        if final:
            self.done.set()

    def send_error(self, error: RequestError) -> None:
        """Keep the error."""
        self.error = error
        self.done.set()

    def is_cancelled(self) -> bool:
        """Never."""
        return False

    @property
    def milliseconds(self) -> float:
        """Between two tokens, on average."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) * 1e3


class Bench:
    """Generations of one driver."""

    def __init__(self, driver: StreamDriver) -> None:
        self._driver, self._count = driver, 0

    def run(self, others: list[dict[str, Any]]) -> tuple[float, float]:
        """Three plain generations beside others: milliseconds a token of the three, of the others.

        Args:
            others: the parameters of each other one.
        """
        given = [{"seed": seed, "ignore_eos": True} for seed in range(PLAIN)] + others
        channels = [TokenTimes() for _ in given]
        for parameters, channel in zip(given, channels, strict=True):
            self._count += 1
            request = Request(
                self._count,
                True,
                True,
                {"input_ids": torch.tensor([[5, 6, 7]])},
                parameters={"max_tokens": TOKENS, "temperature": 1.0, **parameters},
            )
            self._driver.submit([(request, {}, channel)])
        for channel in channels:
            channel.done.wait()
            if channel.error is not None:
                raise channel.error
        times = [channel.milliseconds for channel in channels]
        return statistics.mean(times[:PLAIN]), statistics.mean(times[PLAIN:] or [0.0])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    folder = parser.parse_args().model / "1"
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(EngineFolder(folder, None), manifest)
    driver = StreamDriver(ModelInstance.open(folder), TokenizerConfig(tokenizer), 64)
    cases: dict[str, list[dict[str, Any]]] = {
        "alone": [],
        "beside another one": [{"seed": 9, "ignore_eos": True}],
        "beside a grammar": [{"seed": 9, "json": SCHEMA}],
    }
    bench = Bench(driver)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for index in range(ROUNDS + 1):
        for name, others in cases.items():
            times = bench.run(others)
            if index:
                measured[name].append(times)
    driver.close()
    result = facts("generations beside one with a grammar, CPU", "python -m benchmarks.grammars")
    result["cases"] = [
        {
            "case": name,
            "ms_between_tokens": statistics.median(plain for plain, _ in times),
            "ms_between_tokens_of_the_other": statistics.median(other for _, other in times),
        }
        for name, times in measured.items()
    ]
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for case in result["cases"]:
        print(json.dumps(case))


if __name__ == "__main__":
    main()
