"""A small real tokenizer: byte-level BPE, as many tokens as the tiny models know, learned from this project's license."""

from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.models import VOCABULARY

BOS, EOS = 1, 2


@cache
def tiny_tokenizer() -> Tokenizer:
    """Every text is tokens of it, and most of its tokens are parts of words or single bytes; it puts ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(__file__).parents[2] / "LICENSE"
    tokenizer.train_from_iterator(text.read_text().splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """As transformers keeps it beside a model."""
    PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def added(prompt: list[int], tokens: list[int]) -> str:
    """The text that tokens add to a prompt that ends with a whole character, up to the last whole character."""
    tokenizer = tiny_tokenizer()
    before: str = tokenizer.decode(prompt)
    whole: str = tokenizer.decode(prompt + tokens)
    assert whole.startswith(before)
    return whole[len(before) :].rstrip("\ufffd")
