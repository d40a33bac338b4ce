"""Fuzz and soak of the OpenAI front end as a command.

``PYTHONPATH=tests:tests/long python -m front_soak --bodies 10000 --seconds 300 [--out FILE]``
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from front_soak.run import dumps, soak

from benchmarks.record import facts


def main() -> None:
    """Soak, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    arguments = [f"--bodies={given.bodies}", f"--seconds={given.seconds:g}"]
    arguments += [f"--clients={given.clients}", f"--seed={given.seed}"]
    with tempfile.TemporaryDirectory() as folder:
        result = soak(
            Path(folder),
            bodies=given.bodies,
            seconds=given.seconds,
            clients=given.clients,
            seed=given.seed,
        )
    what = (
        "random bodies, then concurrent clients of which most leave, for the OpenAI front end "
        "before a tritonserver with a tiny random Llama on the CPU"
    )
    record = facts(what, "PYTHONPATH=tests:tests/long python -m front_soak", arguments) | {
        "seed": given.seed,
        **result.numbers,
        "faults": result.faults,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(dumps(record))
    sys.exit(bool(result.faults))


if __name__ == "__main__":
    main()
