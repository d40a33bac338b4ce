"""Write the synchronous client from the asynchronous one, as httpcore does.

Usage: python tools/unasync.py [--check]. With --check nothing is written, and the exit status is 1
if the synchronous client is not what would be written.
"""

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[1] / "backend" / "inplace" / "client"
SOURCE, TARGET = CLIENT / "async_client.py", CLIENT / "sync_client.py"


HEADER = '''"""The synchronous client: servers, sequences and generations.

Written from async_client.py by tools/unasync.py: edit that file, then run `make sync-client`.
"""
'''


REPLACEMENTS = [
    (r'\A""".*?"""\n', HEADER),
    (r"\babc\.Awaitable\[(\w+)\]", r"\1"),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync(Client|Sequence|Generation|Connections|Stream|Iterator)\b", r"\1"),
    (r"\basync_retrying\b", "retrying"),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\b__a(enter|exit|iter|next)__\b", r"__\1__"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\btritonclient\.grpc\.aio\b", "tritonclient.grpc"),
    # what differs in the documentation
    (r"For one event loop\.", "Thread-safe."),
    (r"Not safe for several tasks at a time\.", "Not thread-safe."),
    (r"an asynchronous iterator\b", "an iterator"),
]
"""Regular expressions and what replaces them, in this order."""


def synchronous(source: str) -> str:
    """The synchronous module for the asynchronous one, formatted.

    Raises:
        subprocess.CalledProcessError: ruff cannot read the result.
    """
    for pattern, replacement in REPLACEMENTS:
        source, count = re.subn(pattern, replacement, source, flags=re.DOTALL)
        if not count:
            raise ValueError(f"{SOURCE.name} has nothing that {pattern!r} matches: remove the rule")
    for command in (["check", "--fix-only", "--select", "F401,I"], ["format"]):
        source = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", TARGET, "-"],
            input=source,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return source


def main() -> int:
    """Write or check; the exit status."""
    written = synchronous(SOURCE.read_text())
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(written)
    elif not TARGET.is_file() or TARGET.read_text() != written:
        print(f"{TARGET} is not what {SOURCE.name} gives: run `make sync-client`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
