"""Incremental detokenization, and stop texts across pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inplace.drivers.detokenizer import Detokenizer, StopMatcher, load_tokenizer
from inplace.errors import LoadError
from support.models import VOCABULARY
from support.vocabulary import added, save_tokenizer, tiny_tokenizer

WORDS = (
    tiny_tokenizer()
    .encode("Unless required by applicable law, «naïve» 日本語 🙂🙃 or agreed to")
    .ids
)


def pieces(items: list[int], sizes: list[int]) -> list[list[int]]:
    """The same items in parts of these sizes, over and over."""
    parts: list[list[int]] = []
    while items:
        size = sizes[len(parts) % len(sizes)]
        parts.append(items[:size])
        items = items[size:]
    return parts


@given(
    st.lists(st.integers(3, VOCABULARY - 1) | st.sampled_from(WORDS), max_size=120),
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
)
def test_the_pieces_make_the_text_of_all_tokens(tokens: list[int], sizes: list[int]) -> None:
    context = tiny_tokenizer().encode("Licensed").ids
    detokenizer = Detokenizer(tiny_tokenizer(), context)
    assert "".join(detokenizer.append(part) for part in pieces(tokens, sizes)) == added(
        context, tokens
    )


def test_a_character_of_several_tokens_is_returned_with_the_last() -> None:
    smile = tiny_tokenizer().encode("🙂", add_special_tokens=False).ids
    assert len(smile) == 4
    detokenizer = Detokenizer(tiny_tokenizer(), [])
    assert [detokenizer.append([token]) for token in smile] == ["", "", "", "🙂"]
    assert detokenizer.append([1, 2]) == ""  # special tokens add no text


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_a_text_is_returned_up_to_its_first_stop_text(parts: list[str], texts: list[str]) -> None:
    matcher, returned, whole = StopMatcher(tuple(texts)), "", ""
    for part in parts:
        whole += part
        returned += matcher.append(part)
        assert not any(text in returned for text in texts)
        if matcher.matched:
            assert whole.startswith(returned)
            assert any(whole[len(returned) :].startswith(text) for text in texts)
            return
        assert not any(text in whole for text in texts)
    assert returned + matcher.flush() == whole


def test_a_possible_stop_text_is_held_back_until_it_is_none() -> None:
    matcher = StopMatcher(("</done>",))
    assert [matcher.append(part) for part in ("1 <", "/do", "e", " </don")] == [
        "1 ",
        "",
        "</doe",
        " ",
    ]
    assert matcher.append("e>…") == ""
    assert matcher.matched


def test_a_missing_tokenizer_is_none_and_a_damaged_one_a_load_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("engine")
    assert load_tokenizer(folder) is None
    save_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.encode("Licensed work").ids == tiny_tokenizer().encode("Licensed work").ids
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(
        LoadError, match=r"tokenizer.json cannot be read as a tokenizer .*; build the model again"
    ):
        load_tokenizer(folder)
