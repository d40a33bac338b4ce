"""A small real tokenizer: byte-level BPE, learned from this project's license."""

import shutil
from functools import cache
from pathlib import Path

from inplace.drivers.detokenizer import TOKENIZER_FOLDER
from inplace.schema.files import record_files
from inplace.schema.served import FILE_NAME, Manifest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from support.models import VOCABULARY, tiny_llama
from support.pool import reconfigure

BOS, EOS = 1, 2


@cache
def tiny_tokenizer(size: int = VOCABULARY) -> Tokenizer:
    """Tokens of any text, mostly parts of words and bytes; it puts ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(__file__).parents[2] / "LICENSE"
    tokenizer.train_from_iterator(text.read_text().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    assert tokenizer.get_vocab_size() == size
    return tokenizer


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.role }}: {{ message.content | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it, with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


HERMES_TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}{{ tool.function.name }}, {% endfor %}"
    '{% if tools %}<tool_call>\\n{"name": f, "arguments": {} }\\n</tool_call></s>{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\\n</tool_call>{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Calls as models of the format ``hermes`` write them."""

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}[TOOL_CALLS]"
    "{% if call.id | length != 9 %}{{ raise_exception('an id has 9 characters') }}{% endif %}"
    "[{{ call.function | tojson }}]{% endfor %}</s>{% endfor %}"
)
"""Calls as models of the format ``mistral`` write them, one in a message."""


def tool_tokenizer(template: str, *markers: AddedToken) -> PreTrainedTokenizerFast:
    """A tokenizer of the same size, with tokens for calls of tools, and its chat template."""
    tokenizer = Tokenizer.from_str(tiny_tokenizer(VOCABULARY - len(markers)).to_str())
    tokenizer.add_tokens([*markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def with_tokenizer(built: Path, target: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Copy a built model, and give it another tokenizer of the same size."""
    shutil.copytree(built, target)
    folder = target / "1"
    shutil.rmtree(folder / TOKENIZER_FOLDER)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    files = record_files(folder, FILE_NAME)
    Manifest.load(built / "1").model_copy(update={"files": files}).save(folder)
    reconfigure(target, name=target.name)


def save_tokenizer(folder: Path) -> None:
    """As transformers keeps it beside a model."""
    chat_tokenizer().save_pretrained(folder)


def llama_with_tokenizer(folder: Path, **changes: object) -> LlamaForCausalLM:
    """The model of `tiny_llama`, saved with the tokenizer."""
    model = tiny_llama(folder, **changes)
    save_tokenizer(folder)
    return model


def added(prompt: list[int], tokens: list[int]) -> str:
    """The text that tokens add to a prompt that ends with a whole character."""
    tokenizer = tiny_tokenizer()
    before: str = tokenizer.decode(prompt)
    whole: str = tokenizer.decode(prompt + tokens)
    assert whole.startswith(before)
    return whole[len(before) :]


SAMPLES = ["hello world, don't stop. été naïve 你好 🙂 ខខខ 日本語 abc xyz!"] * 20
"""What the tokenizers of `byte_fallback` and its relatives are trained on or made for."""


@cache
def byte_fallback() -> Tokenizer:
    """As Llama 1 and 2, Mistral 0.x, Phi-3 and Gemma: unknown characters are byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcxyz"]
    pieces += ["▁a", "▁x"]
    merges = [("▁", "a"), ("▁", "x")]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def save_byte_fallback(folder: Path) -> None:
    """That tokenizer as transformers keeps it beside a model."""
    PreTrainedTokenizerFast(
        tokenizer_object=byte_fallback(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@cache
def word_piece() -> Tokenizer:
    """As BERT has it: parts of words, spaces that the decoder puts back."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """As T5 has it: SentencePiece's model, words that begin with a mark."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    return tokenizer


def panicking(bad: int) -> Tokenizer:
    """Its library panics where this token is decoded, which is no `Exception`.

    Only texts that are the name of a token have ids.
    """
    vocabulary = {"x" if token == bad else f"t{token}": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.decoder = decoders.Strip("x", 0, 2)
    return tokenizer


TOKENIZERS = {
    "byte-level": tiny_tokenizer,
    "byte-fallback": byte_fallback,
    "WordPiece": word_piece,
    "Unigram": unigram,
}


def added_to_any_prompt(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """The text that tokens add to a prompt that may end inside a character.

    Computed from whole decodings: what is shared with the text of the prompt is the prompt's, and
    so is the text of its longest part that is whole.
    """
    text: str = tokenizer.decode(prompt + tokens)
    before: str = tokenizer.decode(prompt)
    shared = next(
        (place for place, pair in enumerate(zip(before, text, strict=False)) if len(set(pair)) > 1),
        min(len(before), len(text)),
    )
    whole = len(prompt)
    while whole and tokenizer.decode(prompt[:whole]).endswith("\ufffd"):
        whole -= 1
    return text[max(shared, len(tokenizer.decode(prompt[:whole]))) :]
