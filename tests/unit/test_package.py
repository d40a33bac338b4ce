"""The package `inplace`: its public names, and what importing it loads."""

import ast
import subprocess
import sys
from pathlib import Path

import inplace
import pytest

ROOT = Path(__file__).parents[2]


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


def test_one_name_is_one_class() -> None:
    modules: dict[str, list[str]] = {}
    for package in ("backend/inplace", "builder/inplace_builder"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    modules.setdefault(node.name.lower(), []).append(f"{path.name}: {node.name}")
    assert [places for places in modules.values() if len(places) > 1] == []
