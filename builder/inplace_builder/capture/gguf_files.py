"""Reading GGUF files through transformers, in less time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside the block each GGUF file is parsed once.

    For one model transformers 5.17 parses its file five times (configuration, tokenizer, weights),
    and makes gguf's table of tensor names once for each module. Both are read only.
    """
    try:
        import gguf
    except ImportError:  # transformers says so where it needs it
        yield
        return
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lru_cache(reader), lru_cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
