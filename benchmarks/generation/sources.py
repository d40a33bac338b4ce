"""Hugging Face folders of the shapes of `benchmarks.gpu.shapes`, for servers of any kind.

``python -m benchmarks.generation.sources --shapes 135m,1b,8b --dir build/compare/models`` writes
a folder for each shape that is not there yet, with random weights in bfloat16 and a tokenizer.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.shapes import SHAPES, random_weights

DONE = "done"
"""The file that is written last."""


def write_source(shape: str, folder: Path) -> None:
    """Write the folder, unless it is there.

    Raises:
        KeyError: there is no such shape.
    """
    if (folder / DONE).exists():
        return
    config = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    random_weights(config, torch.bfloat16, device).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=spaced_tokenizer(config.vocab_size)).save_pretrained(
        folder
    )
    (folder / DONE).write_text("")


def spaced_tokenizer(size: int) -> Tokenizer:
    """A byte-level tokenizer whose tokens are `` t17`` but for the bytes, which come last.

    So the spaces of a text count its tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġt{number}" for number in range(size - len(alphabet))]
    vocabulary = {token: number for number, token in enumerate(words + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def vocabulary_of(folder: Path) -> int:
    """Of a Hugging Face folder."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="135m,1b,8b", help="separated by commas")
    parser.add_argument("--dir", type=Path, default=Path("build/compare/models"))
    given = parser.parse_args()
    for shape in given.shapes.split(","):
        write_source(shape, given.dir / shape)
        print(given.dir / shape, flush=True)


if __name__ == "__main__":
    main()
