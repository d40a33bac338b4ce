"""The schedule of an engine with several programs: which calls answer a request."""

from functools import cached_property
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from inplace.schema.files import Record

STEP = "step"
"""The program of an engine with one."""


PROMPT_LOGPROBS = "prompt_logprobs"
"""The program that is the step with log-probabilities of every fed token beside its outputs. It
takes the place of the step for rows that ask for them."""


class _Repeated(Record):
    """What a schedule repeats: until an output says that it is done, or a number of times."""

    until: str | None = None
    at_most: int | None = Field(default=None, ge=1)


class Call(_Repeated):
    """Calls of one program in a schedule.

    Attributes:
        program: the name of the program.
        until: the output of the role ``done`` that ends the calls when it is true; None for a
            fixed number.
        at_most: the largest number of calls; the number of calls without ``until``, None for one.
    """

    program: str


class Loop(_Repeated):
    """Calls that are repeated together; loops are not nested.

    Attributes:
        calls: one round.
        until: the output of the role ``done``, of the last call, that ends the rounds when it is
            true; None for a fixed number.
        at_most: the largest number of rounds; the number of rounds without ``until``, None for
            one.
    """

    calls: tuple[Call, ...] = Field(min_length=1)

    @field_validator("calls", mode="before")
    @classmethod
    def _check_not_nested(cls, calls: object) -> object:
        if isinstance(calls, list | tuple) and any(_is_loop(each) for each in calls):
            raise ValueError(
                "loops are not nested, a loop has calls only: let a program count inner rounds, "
                "or write the calls with at_most"
            )
        return calls


def _is_loop(each: object) -> bool:
    return isinstance(each, Loop) or (isinstance(each, dict) and "calls" in each)


RequestFlag = Literal["start", "next", "end", "decode"]
"""What a schedule is for: a request that is a START, an END without START, or neither; or
``decode``: the tokens of a generation after its prompt. The runtime repeats that one until the
generation ends."""


class Schedule(Record):
    """In which order a request runs the programs.

    A request runs the schedule that is for its flag and takes exactly its inputs. An input that is
    empty counts as absent.

    A schedule for ``decode`` is speculative decoding: a program that drafts tokens, a fixed number
    of times, then the step, which is fed the last token and the drafted ones.

    Attributes:
        name: its name, in errors.
        calls: in their order.
        requests: for which requests it is.
    """

    name: str
    calls: tuple[Call | Loop, ...] = Field(min_length=1)
    requests: tuple[RequestFlag, ...] = Field(default=("start", "next", "end"), min_length=1)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The schedule as loops: a call outside one is a loop of one round."""
        return tuple(each if isinstance(each, Loop) else Loop(calls=(each,)) for each in self.calls)

    @cached_property
    def programs(self) -> frozenset[str]:
        """The names of the programs that it calls."""
        return frozenset(call.program for loop in self.loops for call in loop.calls)

    @cached_property
    def decodes(self) -> bool:
        """Whether it is for the tokens of a generation."""
        return "decode" in self.requests

    @cached_property
    def draft(self) -> tuple[str, int]:
        """Of a schedule that decodes: the program that drafts, and how many tokens."""
        call = self.loops[0].calls[0]
        return call.program, call.at_most or 1

    @model_validator(mode="after")
    def _check_decoding(self) -> Self:
        if not self.decodes:
            return self
        if self.requests != ("decode",):
            raise ValueError(
                f"schedule {self.name} is for {list(self.requests)}; one for the tokens of a "
                f"generation (decode) is for nothing else"
            )
        program, count = self.draft
        expected = (Call(program=program, at_most=count), Call(program=STEP))
        flat = tuple(call for loop in self.loops for call in loop.calls)
        repeated = any(loop.until or (loop.at_most or 1) > 1 for loop in self.loops)
        if flat != expected or program == STEP or repeated:
            raise ValueError(
                f"schedule {self.name} is for the tokens of a generation (decode): it has one call "
                f"of a program that drafts, at_most the number of tokens, and one of {STEP!r}"
            )
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        for loop in self.loops:
            for each in (loop, *loop.calls):
                if each.until is not None and each.at_most is None:
                    raise ValueError(
                        f"schedule {self.name}: until {each.until!r} needs an at_most, so that "
                        f"every request ends"
                    )
        return self


DEFAULT_SCHEDULE = Schedule(name="default", calls=(Call(program=STEP),))
"""The schedule of an engine with one program."""
