"""The corpus built: each engine does what its module does, in the memory of its states."""

from pathlib import Path

import pytest
from inplace_builder.errors import BuildError
from inplace_builder.standalone.build import build
from support.corpus import BUILT, CORPUS
from support.corpus.check import check_engine
from support.long import long_except

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", long_except(BUILT, CORPUS))
def test_an_engine_does_what_its_module_does(name: str, tmp_path: Path) -> None:
    check_engine(CORPUS[name], tmp_path)


def test_a_state_that_would_be_written_back_whole_is_refused_with_its_line(tmp_path: Path) -> None:
    case = CORPUS["index_add_"]
    reason = r"state cache is read, computed and written back whole: .*index_add writes a part"
    with pytest.raises(BuildError, match=rf"{reason}.*corpus/writes\.py"):
        build(case.module(), case.example(), path=tmp_path / "engine", strict=True)
    assert list(tmp_path.iterdir()) == []
