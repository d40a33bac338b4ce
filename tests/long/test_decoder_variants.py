"""Unusual configurations of decoders: the engines choose the tokens that the model chooses."""

from pathlib import Path

import pytest
from decoders.configs import make_model
from decoders.survey import OPTIONS, survey
from decoders.variants import BY_FORWARD, REFUSED, VARIANTS
from inplace_builder import BuildError, capture_decoder
from inplace_builder.served.decoder import decoder_options

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engines_of_an_unusual_configuration_are_equal_to_generate(
    name: str, tmp_path: Path
) -> None:
    result: dict[str, object] = {}
    survey(name, tmp_path, result.__setitem__, tiny=VARIANTS[name])
    assert result["generate"] == "ok", result
    assert (result["cpu"], result["tensorrt"]) == ("equal", "equal"), result


@pytest.mark.parametrize("name", BY_FORWARD)
def test_the_engine_is_equal_to_the_forward_where_generate_is_not(
    name: str, tmp_path: Path
) -> None:
    """Windows of one position, of which the cache of transformers keeps all positions; and others.

    See `decoders.variants.BY_FORWARD`.
    """
    result: dict[str, object] = {}
    survey(name, tmp_path, result.__setitem__, tiny=BY_FORWARD[name], by_forward=True)
    assert result["generate"] == "ok", result
    assert (result["cpu"], result["tensorrt"]) == ("equal", "equal"), result


@pytest.mark.parametrize("name", REFUSED)
def test_what_sees_later_tokens_is_refused_with_the_reason(name: str) -> None:
    tiny, reason = REFUSED[name]
    with pytest.raises(BuildError, match=reason):
        capture_decoder(make_model(name, tiny), decoder_options(OPTIONS))
