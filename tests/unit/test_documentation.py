"""What the documentation names exists: modules, files, results and tests."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/results/README.md",
    ROOT / "model_repository/README.md",
]
CODE = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"(inplace|inplace_builder)(\.\w+)+")
FILE = re.compile(r"[\w./-]+\.(?:py|md|json|txt|png|sh|ya?ml|toml|lock)")
RESULTS = "benchmarks/results"
TEST_FILES = {
    "L": "test_lifetimes",
    "F": "test_faults",
    "S": "test_stream_lifetimes",
    "P": "test_step_protocol",
    "I": "test_triton_idle",
}
"""Letters of docs/failures.md."""


@cache
def code_of(page: Path) -> list[str]:
    """What stands in backticks, outside of code blocks."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return CODE.findall(text)


@cache
def names_in(file: Path) -> set[str]:
    """The names that a module defines or imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name for alias in node.names}
            case ast.Assign():
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module defines."""
    first, *rest = name.split(".")
    folder = (
        ROOT / {"inplace": "backend/inplace", "inplace_builder": "builder/inplace_builder"}[first]
    )
    for place, part in enumerate(rest):
        if (folder / part).is_dir():
            folder /= part
            continue
        file = folder / f"{part}.py"
        rest = rest[place:] if not file.is_file() else rest[place + 1 :]
        file = file if file.is_file() else folder / "__init__.py"
        return not rest or rest[0] in names_in(file)
    return (folder / "__init__.py").is_file()


def files_of(page: Path) -> Iterator[str]:
    """The files of this project that a page names."""
    for code in code_of(page):
        if FILE.fullmatch(code) and "/" in code and not code.startswith(("/", "1/", "<")):
            yield code


def places_of(page: Path) -> list[Path]:
    """Where the paths of a page may begin."""
    parts = ("", "tests", RESULTS, "builder/inplace_builder", "backend/inplace")
    return [page.parent, *(ROOT / part for part in parts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    if page.name != "CHANGELOG.md":  # it names what is gone, too
        names = [code for code in code_of(page) if NAME.fullmatch(code)]
        assert [name for name in names if not exists(name)] == []
        files = [
            file
            for file in files_of(page)
            if not any((place / file).exists() for place in places_of(page))
        ]
        assert files == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_lines_of_100_characters(page: Path) -> None:
    lines = page.read_text().splitlines()
    # A row of a table that is made from docstrings cannot be broken.
    assert [line for line in lines if len(line) > 100 and not line.startswith("| `")] == []


def test_results_that_are_cited_are_there() -> None:
    there = {file.name for file in (ROOT / RESULTS).rglob("*")}
    cited = {
        Path(code).name
        for page in PAGES
        for code in code_of(page)
        if re.fullmatch(r"[\w./-]*(cpu|gpu|perf|soak|fuzz)\w*\.(json|md|txt|png)", code)
    }
    assert len(cited) > 20
    assert cited - there == set()


def test_every_failure_names_tests_that_exist() -> None:
    text = " ".join((ROOT / "docs/failures.md").read_text().split())
    cited = 0
    for group in re.findall(r"\(([^()]*`[^()]*)\)", text):
        letter = ""
        for code, other in re.findall(r"\b([A-Z])\b|`([\w…]+)`", group):
            letter = code or letter
            if not other or letter not in TEST_FILES:
                continue
            source = (ROOT / "tests/server" / f"{TEST_FILES[letter]}.py").read_text()
            pattern = r"def test_\w*" + other.strip("…").replace("…", r"\w*")
            assert re.search(pattern, source), f"{letter} {other}"
            cited += 1
    assert cited > 30


def test_the_reference_has_every_public_operator() -> None:
    source = (ROOT / "backend/inplace/operators/__init__.py").read_text()
    public = ast.literal_eval(source.partition("__all__ = ")[2])
    page = (ROOT / "docs/reference/operators.md").read_text()
    entries = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert [entry for entry in entries if not exists(entry)] == []
    assert {entry.rpartition(".")[2] for entry in entries} == set(public)
