"""Calls of tools in the text of a reply, which arrives in pieces."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from inplace.openai.calls import CallFormat

SPACES = " \t\n\r"
"""White space of JSON."""


@dataclass(frozen=True)
class Content:
    """Text of the reply that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """A call begins; its arguments follow.

    Attributes:
        function: the name of the function.
    """

    function: str


@dataclass(frozen=True)
class Arguments:
    """The next characters of the arguments of the call that began last, as they were written."""

    text: str


Event = Content | CallBegin | Arguments


class _State(Enum):
    BEGIN = auto()
    """Of a reply that is calls as a whole, or none."""
    TEXT = auto()
    ARGUMENTS = auto()
    CLOSE = auto()
    """Behind arguments."""
    BETWEEN = auto()
    """Behind a call."""


class _Fit(Enum):
    NO = auto()
    MAYBE = auto()
    """As far as the text goes."""
    YES = auto()


Part = tuple[str, ...]
"""A part of a call's text: one of these."""


class CallReader:
    """Reads the calls of a reply, whatever pieces it comes in.

    What may be a call waits for the next pieces, until the name of the function and the key of its
    arguments are there. What only looks like a call, or ends before that, is content. White space
    around a call belongs to it.

    Args:
        format: of the calls.
        functions: the names of the functions.
    """

    def __init__(self, format: CallFormat, functions: Collection[str]) -> None:
        self._names: Part = tuple(f'"{name}"' for name in functions)
        head: tuple[Part, ...] = (("{",), ('"name"',), (":",), self._names, (",",))
        head += ((f'"{format.arguments}"',), (":",), ("{",))
        opening, brackets = (format.opening,), [(each,) for each in format.brackets]
        self._format = format
        self._opened = (opening, *brackets[:1], *head)
        self._begins = (head, self._opened) if format.opening else (head,)
        self._next = ((format.separator,), *head) if format.separator else None
        self._end = (*brackets[1:], *([(format.closing,)] if format.closing else []))
        self._state = _State.TEXT if format.needs_opening else _State.BEGIN
        self._text = ""  # not read yet
        self._is_behind_call = False
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self._events: list[Event] = []

    @property
    def is_inside_call(self) -> bool:
        """Whether arguments have begun and not ended."""
        return self._state is _State.ARGUMENTS

    def append(self, text: str) -> list[Event]:
        """Read the next piece."""
        self._text += text
        steps = {
            _State.BEGIN: self._read_begin,
            _State.TEXT: self._read_text,
            _State.ARGUMENTS: self._read_arguments,
            _State.CLOSE: self._read_close,
            _State.BETWEEN: self._read_between,
        }
        while self._text and steps[self._state]():
            pass
        events, self._events = self._events, []
        return events

    def flush(self) -> list[Event]:
        """Read the end of the reply."""
        is_end = self._state is _State.BETWEEN and self._fit(self._end)[0] is _Fit.MAYBE
        if is_end or (self._is_behind_call and not self._text.strip(SPACES)):
            self._text = ""
        self._add_content(len(self._text))
        events, self._events = self._events, []
        return events

    def _read_begin(self) -> bool:
        if self._begin_call(*self._begins) is _Fit.NO:
            self._state = _State.TEXT
        return self._state is not _State.BEGIN

    def _read_text(self) -> bool:
        opening = self._format.opening
        if not self._format.needs_opening:
            self._add_content(len(self._text))
            return False
        place = self._text.find(opening)
        if place < 0:
            sizes = range(len(opening) - 1, 0, -1)
            kept_back = next((n for n in sizes if self._text.endswith(opening[:n])), 0)
            place = len(self._text) - kept_back
            self._add_content(len(self._text[:place].rstrip(SPACES)))
            return False
        self._add_content(len(self._text[:place].rstrip(SPACES)))
        fit = self._begin_call(self._opened)
        if fit is _Fit.NO:
            self._add_content(self._text.index(opening) + len(opening))
        return fit is not _Fit.MAYBE

    def _read_arguments(self) -> bool:
        """Characters up to the end of a JSON object."""
        for end, character in enumerate(self._text, start=1):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                else:
                    self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._state, self._is_behind_call = _State.CLOSE, True
                    self._events.append(Arguments(self._take(end)))
                    return True
        self._events.append(Arguments(self._take(len(self._text))))
        return False

    def _read_close(self) -> bool:
        fit, end, _ = self._fit((("}",),))
        if fit is _Fit.YES:
            self._take(end)
        if fit is not _Fit.MAYBE:
            self._state = _State.BETWEEN if fit is _Fit.YES else _State.TEXT
        return fit is not _Fit.MAYBE

    def _read_between(self) -> bool:
        fits = [_Fit.NO]
        if self._next is not None:
            fits.append(self._begin_call(self._next))
            if fits[-1] is _Fit.YES:
                return True
        if self._end:
            fit, end, _ = self._fit(self._end)
            fits.append(fit)
            if fit is _Fit.YES:
                self._take(end)
        if _Fit.MAYBE in fits:
            return False
        self._state = _State.TEXT
        return True

    def _begin_call(self, *heads: Sequence[Part]) -> _Fit:
        """Begin a call if the text begins with one of these."""
        fits = [self._fit(head) for head in heads]
        for fit, end, name in fits:
            if fit is _Fit.YES:
                self._take(end - 1)  # arguments begin with the last part
                self._events.append(CallBegin(name))
                self._state, self._depth = _State.ARGUMENTS, 0
                return fit
        return _Fit.MAYBE if any(fit is _Fit.MAYBE for fit, _, _ in fits) else _Fit.NO

    def _fit(self, parts: Sequence[Part]) -> tuple[_Fit, int, str]:
        """Whether the text begins with these parts, where they end, and the name among them."""
        place, name = 0, ""
        for part in parts:
            while self._text[place : place + 1] and self._text[place] in SPACES:
                place += 1
            rest = self._text[place:]
            found = next((each for each in part if rest.startswith(each)), None)
            if found is None:
                begins = any(each.startswith(rest) for each in part)
                return (_Fit.MAYBE if begins else _Fit.NO), 0, ""
            place += len(found)
            name = found[1:-1] if part is self._names else name
        return _Fit.YES, place, name

    def _take(self, size: int) -> str:
        taken, self._text = self._text[:size], self._text[size:]
        return taken

    def _add_content(self, size: int) -> None:
        if size:
            self._events.append(Content(self._take(size)))
            self._is_behind_call = False
