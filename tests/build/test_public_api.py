"""Public names: they resolve, examples and documentation use nothing else, and they load little."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("inplace", "inplace.client", "inplace.operators", "inplace.plugins", "inplace_builder")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("package", PACKAGES[1:])  # tests/unit/test_package.py has `inplace`
def test_every_public_name_resolves(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_take_paths_as_strings(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        function = getattr(module, name)
        if not inspect.isfunction(function):
            continue
        for parameter in inspect.signature(function).parameters.values():
            if re.match(r"(pathlib\.)?Path\b", str(parameter.annotation)):
                assert "| str" in str(parameter.annotation), f"{package}.{name}({parameter})"


def internal_names(code: str) -> Iterator[str]:
    """What a piece of code takes from this project that is not public."""
    tree, aliases = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in ("inplace", "inplace_builder"):
                    aliases[alias.asname or alias.name] = alias.name
                    if alias.name not in PACKAGES:
                        yield alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in ("inplace", "inplace_builder"):
                public = import_module(module).__all__ if module in PACKAGES else ()
                yield from (
                    f"{module}.{alias.name}" for alias in node.names if alias.name not in public
                )
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            package = aliases.get(node.value.id)
            if package in PACKAGES and node.attr not in import_module(package).__all__:
                yield f"{package}.{node.attr}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_public_names_only(example: Path) -> None:
    assert list(internal_names(example.read_text())) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_in_the_documentation_uses_public_names_only(page: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        assert (
            list(
                internal_names(
                    f"async def snippet():\n    {code.replace(chr(10), chr(10) + '    ')}\n    pass"
                )
            )
            == []
        )


@pytest.mark.parametrize(
    ("code", "internal"),
    [
        ("from inplace.client.errors import ClientError", ["inplace.client.errors.ClientError"]),
        ("import inplace.runtime.slots", ["inplace.runtime.slots"]),
        ("import inplace_builder as ib\nib.served", ["inplace_builder.served"]),
        ("from inplace_builder import build, versions", ["inplace_builder.versions"]),
        ("import inplace\ninplace.load", []),
    ],
)
def test_internal_names_are_recognised(code: str, internal: list[str]) -> None:
    assert list(internal_names(code)) == internal


def loaded_by(code: str) -> set[str]:
    """The top-level packages that are loaded after running code in a process of its own."""
    code = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_builder_loads_nothing() -> None:
    heavy = {"torch", "transformers", "numpy", "pydantic", "tritonclient", "rich", "typer"}
    assert not loaded_by("import inplace_builder") & heavy


def test_importing_build_loads_nothing_that_only_an_export_needs() -> None:
    code = "import sys\nfrom inplace_builder import build\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slow = {"torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "triton"}
    loaded = set(run.stdout.split())
    assert "torch.export" in loaded
    assert not loaded & slow


def test_building_a_plain_module_loads_no_transformers(tmp_path: Path) -> None:
    code = f"""
import inplace_builder as ib
import torch

class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x * self.count

engine = ib.build(Counter(), (torch.ones(1),), path={str(tmp_path / "engine")!r})
assert engine(torch.ones(1)).item() == 1.0
"""
    assert not loaded_by(code) & {"transformers", "accelerate", "tokenizers"}
