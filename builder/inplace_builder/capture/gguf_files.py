"""Reading GGUF files through transformers, in less time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside the block each GGUF file is parsed once.

    For one model transformers 5.17 parses its file five times (configuration, tokenizer, weights),
    and makes gguf's table of tensor names once for each module. Both are read only. Each
    time it decodes the metadata byte by byte, from slices of a NumPy memmap. Plain arrays over the
    same memory take less than half of the time.
    """
    try:
        import gguf
    except ImportError:  # transformers says so where it needs it
        yield
        return
    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map

    @lru_cache
    def parsed(path: Any) -> Any:
        result = reader(path)
        for field in result.fields.values():
            field.parts[:] = [part.view(np.ndarray) for part in field.parts]
        return result

    gguf.GGUFReader, gguf.get_tensor_name_map = parsed, lru_cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
