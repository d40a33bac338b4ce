"""The soak as a command.

``PYTHONPATH=tests:tests/long python -m soak --seconds 600 --clients 500 [--seed N] [--out FILE]``
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from soak.run import soak

from benchmarks.record import facts


def main() -> None:
    """Soak, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument(
        "--growth",
        type=float,
        default=0.02,
        help="how much processes may have grown since the middle of the run",
    )
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    arguments = [
        "--seconds",
        f"{given.seconds:g}",
        "--clients",
        str(given.clients),
        "--seed",
        str(given.seed),
    ]
    print(
        f"seed {given.seed}: PYTHONPATH=tests:tests/long python -m soak {' '.join(arguments)}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = soak(
            Path(folder),
            seconds=given.seconds,
            seed=given.seed,
            clients=given.clients,
            growth=given.growth,
        )
    what = (
        "tiny random Llama as a stream model on the CPU, concurrent clients with random "
        "behaviour over gRPC streams"
    )
    record = facts(what, "PYTHONPATH=tests:tests/long python -m soak", arguments) | {
        "seed": given.seed,
        "clients": given.clients,
        **result.numbers,
        "faults": result.faults,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    record["memory"] = {
        name: value
        for name, value in result.numbers["memory"].items()
        if name not in ("seconds", "bytes")
    }
    print(json.dumps(record, indent=1))
    sys.exit(bool(result.faults))


if __name__ == "__main__":
    main()
