"""The fuzzer as a command: ``PYTHONPATH=tests python -m fuzz --requests 10000 [--seed N]``."""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from fuzz.run import fuzz
from fuzz.server import Watch, built
from inplace_builder.server import Ports, TritonServer


def main() -> None:
    """Build, serve, fire, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    torch.set_num_threads(1)
    given = parser.parse_args()
    print(f"seed {given.seed}: python -m fuzz --requests {given.requests} --seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        repository, log = built(Path(scratch)), Path(scratch) / "log"
        # its sequences are not ended, and tritonserver waits for those it knows of before it stops
        with TritonServer(repository, Ports(0, 0, 0), log=log, arguments=["--exit-timeout-secs=1"]) as server:
            watch, begin = Watch(server), time.monotonic()
            findings = fuzz(server, repository, given.requests, given.seed)
            print(f"{sum(findings.answers.values())} answers in {time.monotonic() - begin:.0f} s")
            findings.wrong += watch.complaints()
    for kind, count in findings.answers.most_common():
        print(f"{count:8} {kind}")
    print("Triton's own validation, an example each:", *sorted(findings.says.values()), sep="\n  ")
    print(f"{len(findings.wrong)} wrong", *findings.wrong[:20], sep="\n")
    sys.exit(bool(findings.wrong))


if __name__ == "__main__":
    main()
