"""What an operator sets about the reuse of prefixes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixOptions:
    """How prompts use what earlier ones have computed.

    Attributes:
        seconds: for which a free slot is kept after its last use.
        slots: the most slots that are kept with one salt; None for half of all.
        without_key: whether sequences without a ``sequence_key`` share prefixes with each other.
    """

    seconds: float = 600.0
    slots: int | None = None
    without_key: bool = False
