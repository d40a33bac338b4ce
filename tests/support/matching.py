"""Random tokens that a grammar allows."""

import random
from collections.abc import Sequence

import numpy as np
from inplace.grammars import GrammarCompiler, GrammarSource, wait_for_masks
from tokenizers import Tokenizer

from support.vocabulary import tiny_tokenizer

EOS = 2


def follow(
    compiler: GrammarCompiler,
    source: GrammarSource,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    most: int = 400,
    begin: Sequence[int] = (),
) -> str:
    """The text of random tokens that the grammar allows, up to its end.

    Those of ``begin`` come first, and must be allowed.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    generator, tokens = random.Random(seed), list[int]()
    matcher = compiler.compile(source).result(60).matcher({EOS})
    matcher.advance([])
    while len(tokens) < most:
        assert wait_for_masks([matcher], 30) == [matcher]
        following = matcher.receive()
        assert following.error is None, following.error
        if following.mask is None:
            break
        allowed = np.unpackbits(following.mask.view(np.uint8), bitorder="little").nonzero()[0]
        assert (EOS in allowed) == following.may_end
        token = generator.choice(allowed.tolist())
        if len(tokens) < len(begin):
            token = begin[len(tokens)]
            assert token in allowed, (tokenizer.decode(tokens), tokenizer.decode([token]))
        if token == EOS:
            break
        tokens.append(token)
        matcher.advance([token])
    matcher.close()
    return str(tokenizer.decode(tokens, skip_special_tokens=False))
