"""The same generations by transformers' ``generate`` with a static cache, as one batch.

This is what a script without a server does. ``python -m benchmarks.generation.beside SOURCE DTYPE
DEVICE ROWS[,ROWS…] PROMPT TOKENS`` prints a line of JSON for each number of rows.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from inplace.schema.specs import Dtype
from inplace_builder import load_decoder
from transformers import PreTrainedModel, StoppingCriteria

from benchmarks.perf.generator import percentiles


class Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Is asked after every token, and takes the time; it never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """No row is to stop."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measured(model: PreTrainedModel, rows: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Times of the second of two rounds: the first compiles, where transformers does that."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (rows, prompt), generator=generator
    ).to(model.device)
    for _ in range(2):
        clock, begin = Clock(), time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        seconds = time.perf_counter() - begin
    assert out.shape == (rows, prompt + tokens)
    gaps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {
        "seconds": seconds,
        "tokens_per_second": rows * tokens / seconds,
        "first_token_us": percentiles([clock.times[0] - begin] * rows),
        "inter_token_us": percentiles(gaps),
    }


def main(source: Path, dtype: str, device: str, counts: str, prompt: int, tokens: int) -> None:
    """One model, each number of rows after the other."""
    model, _ = load_decoder(source, Dtype(dtype))
    model = model.to(device)
    for rows in map(int, counts.split(",")):
        print(json.dumps(measured(model, rows, prompt, tokens)), flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
    )
