"""Which tests run in one process where several processes share them."""

from pathlib import PurePath

from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    "step models": (
        "test_step_protocol",
        "test_bad_input",
        "test_sampling",
        "test_client_failover",
    ),
    "stream models": (
        "test_generate",
        "test_generate_proxy",
        "test_continued_sequences",
        "test_client_generation",
    ),
}
"""Files whose tests use the same models on a server: one process loads them."""
APART = ("test_recognition", "test_engines_of_modules", "test_random_modules", "test_decoders")
"""Files whose tests share nothing that is expensive: any process may run each test."""


def group(nodeid: str) -> str:
    """The group of a test: its file, the files that share its models, or it alone."""
    file = PurePath(nodeid.partition("::")[0])
    if file.stem in APART:
        return nodeid
    return next((name for name, files in TOGETHER.items() if file.stem in files), str(file))


class Groups(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped
    """Gives each group of tests to the next free process, in the order of their collection."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
