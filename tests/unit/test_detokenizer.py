"""Incremental detokenization, and stop texts across pieces."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inplace.drivers.detokenizer import (
    Detokenizer,
    StopMatcher,
    TokenizerError,
    decode,
    encode,
    load_tokenizer,
    special_tokens,
)
from inplace.errors import LoadError
from inplace.schema.files import EngineFolder, FileRecord, record_files
from support.models import LOADABLE, VOCABULARY
from support.vocabulary import (
    TOKENIZERS,
    added,
    added_to_any_prompt,
    byte_fallback,
    panicking,
    save_tokenizer,
    tiny_tokenizer,
)
from tokenizers import Tokenizer

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


def detokenizer_of(tokenizer: Tokenizer, prompt: list[int]) -> Detokenizer:
    return Detokenizer(tokenizer, prompt, special_tokens(tokenizer).values())


@given(
    st.lists(st.integers(3, VOCABULARY - 1) | st.sampled_from(WORDS), max_size=120),
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
)
def test_the_pieces_make_the_text_of_all_tokens(tokens: list[int], sizes: list[int]) -> None:
    context = tiny_tokenizer().encode("Licensed").ids
    detokenizer = detokenizer_of(tiny_tokenizer(), context)
    text = "".join(detokenizer.append(part) for part in pieces(tokens, sizes))
    assert text + detokenizer.flush() == added(context, tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    st.text("你好ខ🙂é日abxyz hello don't, . ", max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_so_do_those_of_any_tokenizer_after_any_prompt(
    kind: str, text: str, prompted: float, generated: float, sizes: list[int]
) -> None:
    """The prompt and the generation may both end inside a character."""
    tokenizer = TOKENIZERS[kind]()
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    cut = round(prompted * len(ids))
    prompt, tokens = ids[:cut], ids[cut : cut + round(generated * (len(ids) - cut))]
    detokenizer = detokenizer_of(tokenizer, prompt)
    returned = "".join(detokenizer.append(part) for part in pieces(tokens, sizes))
    if kind == "byte-fallback" and tokenizer.decode(tokens).endswith("\ufffd"):
        return  # the decoder takes complete characters back: the next test
    assert returned + detokenizer.flush() == added_to_any_prompt(tokenizer, prompt, tokens)


def test_characters_before_an_invalid_byte_stay_when_the_decoder_takes_them_back() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer.encode("你好", add_special_tokens=False).ids[1:]  # without the space before it
    assert len(ids) == 6
    detokenizer = detokenizer_of(tokenizer, [])
    assert [detokenizer.append([token]) for token in ids[:4]] == ["", "", "你", ""]
    assert tokenizer.decode(ids[:4]) == "\ufffd" * 4
    [letter] = tokenizer.encode("za", add_special_tokens=False).ids[-1:]
    assert detokenizer.append([letter]) == "\ufffd\ufffd\ufffda"


class Measured:
    """A tokenizer that notes how many tokens it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.id_to_token = tokenizer.id_to_token
        self._tokenizer, self.lengths = tokenizer, list[int]()

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        self.lengths.append(len(tokens))
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text


@pytest.mark.parametrize("kind", ["byte-fallback", "byte-level"])
@pytest.mark.parametrize("size", [1, 7])
def test_a_long_run_of_invalid_bytes_is_not_decoded_again_and_again(kind: str, size: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    name = "<0xFF>" if kind == "byte-fallback" else "ÿ"
    invalid = tokenizer.token_to_id(name)
    assert invalid is not None
    words = tokenizer.encode("hello 你a", add_special_tokens=False).ids
    tokens = words + [invalid] * 1000 + words + [invalid] * 300
    measured = Measured(tokenizer)
    detokenizer = Detokenizer(measured, words, ())  # type: ignore[arg-type]
    returned = "".join(detokenizer.append(part) for part in pieces(tokens, [size]))
    assert returned + detokenizer.flush() == added_to_any_prompt(tokenizer, words, tokens)
    assert max(measured.lengths) < 150


@pytest.mark.parametrize("num_special", [1, 40])
def test_a_space_after_special_tokens_is_kept(num_special: int) -> None:
    """The decoder strips the space that a text begins with, and no window may begin there."""
    tokenizer = byte_fallback()
    [word] = tokenizer.encode("a", add_special_tokens=False).ids  # with the space before it
    end = special_tokens(tokenizer)["</s>"]
    generated = [word] * 33 + [end] * num_special + [word] * 3
    detokenizer = detokenizer_of(tokenizer, [])
    assert "".join(detokenizer.append([token]) for token in generated) == " ".join("a" * 36)
    detokenizer = detokenizer_of(tokenizer, [word] + [end] * num_special)
    assert detokenizer.append([word]) == " a"


def test_one_character_of_three_bytes_over_and_over() -> None:
    """The window is cut between characters, never inside one."""
    tokenizer = byte_fallback()
    ids = tokenizer.encode("ខ" * 40, add_special_tokens=False).ids[1:]
    detokenizer = detokenizer_of(tokenizer, ids[:15])
    assert [detokenizer.append([token]) for token in ids[15:]] == ["", "", "ខ"] * 35


def test_any_tokens_at_all_are_text() -> None:
    """A model may generate bytes that are not characters; nothing raises, no letter is lost."""
    tokenizer = byte_fallback()
    draw = random.Random(0)
    letters = {tokenizer.token_to_id(f"<0x{ord(letter):02X}>") for letter in "xyz"}
    usable = [token for token in range(tokenizer.get_vocab_size()) if token not in letters]
    for _ in range(500):
        ids = [draw.choice(usable) for _ in range(40)]
        cut = draw.randrange(40)
        detokenizer = detokenizer_of(tokenizer, ids[:cut])
        text = "".join(detokenizer.append([token]) for token in ids[cut:]) + detokenizer.flush()
        assert [letter for letter in text if letter in "xyz"] == [
            letter
            for token in ids[cut:]
            for letter in tokenizer.id_to_token(token) or ""
            if letter in "xyz" and not 3 <= token < 259
        ]


def test_a_character_of_several_tokens_is_returned_with_the_last() -> None:
    smile = tiny_tokenizer().encode("🙂", add_special_tokens=False).ids
    assert len(smile) == 4
    detokenizer = detokenizer_of(tiny_tokenizer(), [])
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

    def load(files: tuple[FileRecord, ...]) -> Tokenizer | None:
        return load_tokenizer(EngineFolder(folder), LOADABLE.model_copy(update={"files": files}))

    assert load(()) is None
    save_tokenizer(folder / "tokenizer")
    with pytest.raises(LoadError, match=r"its manifest lists no tokenizer; remove it, or build"):
        load(())
    tokenizer = load(record_files(folder, leave_out=""))
    assert tokenizer is not None
    assert tokenizer.encode("Licensed work").ids == tiny_tokenizer().encode("Licensed work").ids
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(
        LoadError, match=r"tokenizer.json cannot be read as a tokenizer .*; build the model again"
    ):
        load(record_files(folder, leave_out=""))


def test_a_foreign_tokenizer_is_refused_by_its_checksum(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("engine")
    save_tokenizer(folder / "tokenizer")
    manifest = LOADABLE.model_copy(update={"files": record_files(folder, leave_out="")})
    path = folder / "tokenizer" / "tokenizer.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a", b"b", 1))
    with pytest.raises(LoadError) as error:
        load_tokenizer(EngineFolder(folder), manifest)
    assert str(error.value).startswith(f"{path} has the checksum ")
    assert str(error.value).endswith("…: it was changed; build the model again")


def test_errors_of_the_library_are_ours_panics_too() -> None:
    tokenizer = panicking(0)
    assert encode(tokenizer, "x", add_special_tokens=False) == [0]
    with pytest.raises(TokenizerError, match=r"failed on the text: .*UNK"):
        encode(tokenizer, "y", add_special_tokens=False)
    with pytest.raises(TokenizerError, match=r"failed on generated tokens: .*out of bounds"):
        decode(tokenizer, [0])
