"""The package `inplace`: its public names, and what importing it loads."""

import subprocess
import sys

import inplace
import pytest


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import inplace", {"torch", "pydantic", "tritonclient"}),
        ("from inplace import Client, Sequence", {"torch", "pydantic"}),
        ("from inplace import Engine", {"tritonclient"}),
        ("import inplace.alive", {"torch", "pydantic"}),
        ("import inplace_builder.tools.front_process", {"transformers"}),
        ("import inplace_builder.tools.tritonserver", {"transformers"}),
    ],
)
def test_an_import_loads_only_what_the_name_needs(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*({absent!r} & set(sys.modules)))"
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == []


def test_every_public_name_exists() -> None:
    assert dir(inplace) == sorted(inplace.__all__)
    for name in inplace.__all__:
        assert getattr(inplace, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'inplace' has no attribute 'nothing'"):
        inplace.nothing  # noqa: B018
