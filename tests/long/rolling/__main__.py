"""Rolling updates and kills of replicas under load, as a command.

``PYTHONPATH=tests:tests/long python -m rolling [--servers 3] [--updates 3] [--kills 3]``
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from rolling.run import roll

from benchmarks.record import facts

USERS = {"kv": 16, "ring": 12, "ssm": 12, "whisper": 12, "rnnt": 12}
"""Sequences at a time: 64."""


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--users", type=int, help="of each kind; default: 64 of all together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--folder", type=Path, help="for logs; an empty one")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    users = USERS if given.users is None else dict.fromkeys(USERS, given.users)
    arguments = [
        *("--servers", str(given.servers), "--updates", str(given.updates)),
        *("--kills", str(given.kills), "--seed", str(given.seed)),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        result = roll(
            given.folder or Path(scratch),
            users=users,
            servers=given.servers,
            updates=given.updates,
            kills=given.kills,
            seed=given.seed,
        )
    what = (
        "sequences of every kind of state on replicated tritonservers that share a store, through"
        " rolling updates and kills; every value compared with that of transformers"
    )
    command = "PYTHONPATH=tests:tests/long python -m rolling"
    record = facts(what, command, arguments) | {"note": given.note, "seed": given.seed}
    record |= {**result.numbers, "faults": result.faults}
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(bool(result.faults))


if __name__ == "__main__":
    main()
