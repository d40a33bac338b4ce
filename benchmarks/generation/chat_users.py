"""Users that chat, each turn with the whole history as its prompt: one client process.

``python -m benchmarks.generation.chat_users JSON`` prints the `TimedGeneration` of each turn, the
turns of a user one after the other.
"""

import asyncio
import time
from dataclasses import dataclass

from benchmarks.generation.clients import (
    Target,
    TimedGeneration,
    answer,
    check_whole,
    client_of,
    request_of,
)


@dataclass(frozen=True)
class Chats:
    """What one process of clients does.

    Attributes:
        target: the model.
        users: how many chat at the same time; each has a prompt of its own.
        turns: of each chat, one after the other without a pause.
        system: tokens before the first question.
        question: tokens that each turn brings.
        tokens: tokens of each answer.
        first: the number of the first user.
        begin: Unix time at which all users of all processes begin.
        salt: chats of another salt have other tokens.
    """

    target: Target
    users: int
    turns: int
    system: int
    question: int
    tokens: int
    first: int = 0
    begin: float = 0.0
    salt: str = ""

    @property
    def longest(self) -> int:
        """Tokens of a chat at its end."""
        return self.system + self.turns * (self.question + self.tokens)


async def chat(load: Chats, user: int) -> list[TimedGeneration]:
    """The turns of one user."""
    history = load.target.prompt(f"{load.salt}{user} system", load.system)
    turns: list[TimedGeneration] = []
    async with client_of(load.target, keeps_tokens=True) as client:
        await asyncio.sleep(max(0.0, load.begin - time.time()))
        late = max(0.0, time.time() - load.begin)
        for turn in range(load.turns):
            history += load.target.prompt(f"{load.salt}{user} {turn}", load.question)
            name = f"chat {load.begin} {user} {turn}"
            request = request_of(load.target, name, history, load.tokens)
            if load.target.api == "grpc":
                key = f"{load.salt}user {user}"
                request.parameters["sequence_key"].string_param = key
            generation = await client.generate(request)
            check_whole(generation, load.tokens)
            history += generation.tokens
            generation.tokens, generation.late = [], late
            turns.append(generation)
    if len(history) != load.longest:
        raise RuntimeError(f"a chat has {len(history)} tokens; expected {load.longest}")
    return turns


async def main(load: Chats) -> list[TimedGeneration]:
    """The turns of all users of this process."""
    users = range(load.first, load.first + load.users)
    chats = await asyncio.gather(*(chat(load, user) for user in users))
    return [turn for turns in chats for turn in turns]


if __name__ == "__main__":
    answer(main, Chats)
