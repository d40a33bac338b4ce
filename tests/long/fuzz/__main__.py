"""The fuzzer as a command.

``PYTHONPATH=tests:tests/long python -m fuzz --requests 10000 [--seed N] [--out FILE]``
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from fuzz.run import fuzz
from fuzz.server import Watch, built
from inplace_builder.tools.tritonserver import Ports, TritonServer

from benchmarks.record import facts


def main() -> None:
    """Build, serve, fire, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--out", type=Path)
    torch.set_num_threads(1)
    given = parser.parse_args()
    arguments = ["--requests", str(given.requests), "--seed", str(given.seed)]
    print(
        f"seed {given.seed}: PYTHONPATH=tests:tests/long python -m fuzz {' '.join(arguments)}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        repository, log = built(Path(scratch)), Path(scratch) / "log"
        # its sequences are not ended, and tritonserver waits for those it knows of before it stops
        with TritonServer(
            repository, Ports(0, 0, 0), log=log, arguments=["--exit-timeout-secs=1"]
        ) as server:
            watch, begin = Watch(server), time.monotonic()
            findings = fuzz(server, repository, given.requests, given.seed)
            seconds = time.monotonic() - begin
            print(f"{sum(findings.answers.values())} answers in {seconds:.0f} s")
            findings.wrong += watch.complaints()
    for kind, count in findings.answers.most_common():
        print(f"{count:8} {kind}")
    print(
        "Triton's own validation, an example each:",
        *sorted(findings.triton_messages.values()),
        sep="\n  ",
    )
    print(f"{len(findings.wrong)} wrong", *findings.wrong[:20], sep="\n")
    if given.out is not None:
        what = (
            "random requests over gRPC and HTTP against tritonserver with CPU engines, beside "
            "sequences that must not notice"
        )
        record = facts(what, "PYTHONPATH=tests:tests/long python -m fuzz", arguments) | {
            "seed": given.seed,
            "seconds": seconds,
            "answers": dict(findings.answers.most_common()),
            "wrong": findings.wrong,
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(findings.wrong))


if __name__ == "__main__":
    main()
