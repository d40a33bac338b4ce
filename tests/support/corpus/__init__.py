"""The corpus: small modules with the expected outcome of building each.

Three runners take it: `tests/build/test_recognition.py` compares the captured graph,
`tests/build/test_engines_of_modules.py` the engine on a CPU, and `tests/gpu/test_modules.py` the
TensorRT engine.
"""

from support.corpus.attention import ATTENTIONS, BLOCKS
from support.corpus.case import ModuleCase
from support.corpus.layers import DIVIDED
from support.corpus.objects import OBJECTS
from support.corpus.states import STATES
from support.corpus.writes import APPENDS, EXPLICIT, PLACED

KINDS = {
    "appends": APPENDS,
    "positions": PLACED,
    "explicit": EXPLICIT,
    "attention": ATTENTIONS,
    "states": STATES,
    "objects": OBJECTS,
    "layers": DIVIDED,
}
CORPUS: dict[str, ModuleCase] = {case.name: case for cases in KINDS.values() for case in cases}
assert len(CORPUS) == sum(map(len, KINDS.values())), "names are unique"

BUILT = (
    "IndexCopy float32",
    "two writes of one state",
    "rows at their own positions",
    "number of tokens that varies",
    "start that is a Python number",
    "computed from the state",
    "rows by positions",
    "part of a transposed view",
    "attention assign 3 mask=additive repeat=interleave window=4",
    "attention written out",
    "positions counted",
    "caches that are returned",
    "repeated keys that are returned",
    "weights that are returned",
    "buffers of any rank and type",
    "recurrent",
    "exchange",
    "states in a dataclass",
    "caches in objects",
    "caches in objects that are attributes",
    "StaticCache as an argument",
    "buffer that is assigned",
    "transposed copy, symmetric at first",
    "copy that is broadcast, seen as a row",
    "torch.cond",
    "layers",
    "layers in buffers",
    "views of one buffer",
)
"""Modules that every run builds an engine of; the long tests build one of each."""

RARELY = (
    "Assign bfloat16",
    "Where bfloat16",
    "index_fill_",
    "scatter_add_",
    "scatter_reduce_",
    "put_",
    "part of a permuted view",
    "part of a part of a view",
    *(BLOCKS[number].name for number in (0, 2, 3, 4, 7)),
    "states in a tuple",
    "layers indexed by a number that varies",
    "layers indexed on two axes",
)
"""Modules that are much like others: only the long tests capture them."""
