"""How the backend writes what has happened into its log."""

import json
import re

PLAIN_WORD = re.compile(r"(?!\d+$)[\w.:/+-]+")
"""Text that a log line shows without quotes: one word that is not a number."""


def log_line(event: str, **fields: object) -> str:
    """Format a log line: the event, then ``key=value`` for each field.

    Text other than a plain word is written as a JSON string. Ids come from clients, and the text
    ``"12"`` is a different sequence than the number 12.
    """
    values = (f"{name}={_format_value(value)}" for name, value in fields.items())
    return " ".join([f"{event}:", *values])


def _format_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    plain = isinstance(value, int) or (isinstance(value, str) and PLAIN_WORD.fullmatch(value))
    return str(value) if plain else json.dumps(value)
