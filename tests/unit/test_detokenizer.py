"""Tokens into text as they come, and stop texts across pieces."""

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
    found: list[list[int]] = []
    while items:
        size = sizes[len(found) % len(sizes)]
        found.append(items[:size])
        items = items[size:]
    return found


@given(
    st.lists(st.integers(3, VOCABULARY - 1) | st.sampled_from(WORDS), max_size=120),
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
)
def test_pieces_of_tokens_are_the_text_of_all_of_them(tokens: list[int], sizes: list[int]) -> None:
    context = tiny_tokenizer().encode("Licensed").ids
    detokenizer = Detokenizer(tiny_tokenizer(), context)
    assert "".join(detokenizer.append(part) for part in pieces(tokens, sizes)) == added(
        context, tokens
    )


def test_a_character_of_several_tokens_comes_with_the_last_of_them() -> None:
    smile = tiny_tokenizer().encode("🙂", add_special_tokens=False).ids
    assert len(smile) == 4
    detokenizer = Detokenizer(tiny_tokenizer(), [])
    assert [detokenizer.append([token]) for token in smile] == ["", "", "", "🙂"]
    assert detokenizer.append([1, 2]) == ""  # special tokens say nothing


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_a_text_is_said_up_to_its_first_stop_text_and_wholly_without_one(
    parts: list[str], texts: list[str]
) -> None:
    stops, said, whole = StopMatcher(tuple(texts)), "", ""
    for part in parts:
        whole += part
        said += stops.append(part)
        assert not any(text in said for text in texts)
        if stops.matched:
            assert whole.startswith(said)
            assert any(whole[len(said) :].startswith(text) for text in texts)
            return
        assert not any(text in whole for text in texts)
    assert said + stops.flush() == whole


def test_what_may_become_a_stop_text_is_held_back_and_said_when_it_does_not() -> None:
    stops = StopMatcher(("</done>",))
    assert [stops.append(part) for part in ("1 <", "/do", "e", " </don")] == [
        "1 ",
        "",
        "</doe",
        " ",
    ]
    assert stops.append("e>…") == ""
    assert stops.matched


def test_a_folder_may_have_no_tokenizer_but_none_that_is_damaged(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("engine")
    assert load_tokenizer(folder) is None
    save_tokenizer(folder / "tokenizer")
    found = load_tokenizer(folder)
    assert found is not None
    assert found.encode("Licensed work").ids == tiny_tokenizer().encode("Licensed work").ids
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(
        LoadError, match=r"tokenizer.json cannot be read as a tokenizer .*; build the model again"
    ):
        load_tokenizer(folder)
