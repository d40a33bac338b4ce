"""Unusual configurations of decoders: the CPU engine of each chooses ``generate``'s tokens."""

from pathlib import Path

import pytest
from decoders.survey import survey
from decoders.variants import VARIANTS

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_of_an_unusual_configuration_is_equal_to_generate(
    name: str, tmp_path: Path
) -> None:
    result: dict[str, object] = {}
    survey(name, tmp_path, result.__setitem__, tiny=VARIANTS[name], engines=("cpu",))
    assert result["generate"] == "ok", result
    assert result["cpu"] == "equal", result
