"""Which tests run in one process where several processes share them."""

from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import PurePath

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    "step models": (
        "server/test_step_protocol",
        "server/test_bad_input",
        "server/test_sampling",
        "server/test_client_failover",
    ),
    "stream models": (
        "server/test_generate",
        "server/test_generate_proxy",
        "server/test_continued_sequences",
        "server/test_client_generation",
        "server/test_grammars",
        "server/test_openai",
        "server/test_openai_prefixes",
        "server/test_openai_servers",
        "server/test_openai_workers",
        "server/test_prefix_reuse",
        "server/test_prompt_logprobs",
        "server/test_sampling_options",
    ),
}
"""Files whose tests use the same models on a server: one process loads them."""
APART = {
    "build/test_recognition",
    "build/test_engines_of_modules",
    "long/test_random_modules",
    "build/test_random_modules",
    "gpu/test_decoders",
    "gpu/test_float8",
    "gpu/test_float8_cache",
    "gpu/test_grouped_linear",
    "gpu/test_kernels",
    "gpu/test_linear",
    "gpu/test_recurrences",
}
"""Files whose tests share nothing that is expensive: any process may run each test."""


def group(nodeid: str) -> str:
    """The group of a test: its file, the files that share its models, or it alone."""
    file = PurePath(nodeid.partition("::")[0])
    name = f"{file.parent.name}/{file.stem}"
    if name in APART:
        return nodeid
    return next((models for models, files in TOGETHER.items() if name in files), str(file))


def in_order(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests in the order in which free processes take them, group by group.

    The real model comes first. Then groups of servers, the largest first, and groups of slow builds
    (Triton's interpreter first, which is one long test) take turns: a server waits for much of its
    time, and a build uses the cores meanwhile. The many short ones come last, and let all processes
    end together.
    """
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(group(item.nodeid), []).append(item)
    kinds: dict[str, list[list[pytest.Item]]] = {"real_model": [], "server": [], "slow": [], "": []}
    for each in groups.values():
        marks = {mark.name for item in each for mark in item.iter_markers()}
        kinds[next((kind for kind in kinds if kind in marks), "")].append(each)
    servers = sorted(kinds["server"], key=len, reverse=True)
    slow = sorted(kinds["slow"], key=lambda each: "test_interpreter" not in each[0].nodeid)
    turns = chain.from_iterable(zip_longest(servers, slow, fillvalue=[]))
    return list(chain.from_iterable(chain(kinds["real_model"], turns, kinds[""])))


class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped
    """Gives each group of tests to the next free process, in the order of their collection."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
