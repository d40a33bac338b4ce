"""`pip install .[client]` in an environment of its own: what works, and what names its extra."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment with nothing but a client."""
    folder = tmp_path_factory.mktemp("client")
    source = folder / "source"
    for name in ("backend", "builder"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    commands = folder / "venv" / "bin"
    pip = (str(commands / "pip"), "install", "-q", "--disable-pip-version-check")
    subprocess.run([*pip, f"{source}[client]"], check=True)
    return commands


def test_the_client_is_installed_without_pytorch(client_environment: Path) -> None:
    code = (
        "from importlib.util import find_spec; from inplace.client import Client, Sequence; "
        "print([name for name in ('torch', 'transformers', 'starlette') if find_spec(name)])"
    )
    command = [str(client_environment / "python"), "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("build", ".", "--output", "m"), "builder"),
        (("serve", "--model-repository", "m"), "server"),
        (("openai", "--model-repository", "m"), "openai"),
        (("inspect", "m"), "runtime"),
    ],
)
def test_a_command_of_another_role_names_its_extra(
    client_environment: Path, arguments: tuple[str, ...], extra: str
) -> None:
    command = [str(client_environment / "inplace"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: `inplace {arguments[0]}` needs the package ")
    assert run.stderr.endswith(f"install inplace-triton[{extra}]\n")
