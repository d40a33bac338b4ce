"""A reader of one build walks through few files (`tools/count_files.py`)."""

from tools.count_files import count_build

MAX_FILES = 27
"""Of both packages, for a plain module that writes a cache and attends to it.

More means that a subject was cut in two, or that a module is entered for a function that belongs
elsewhere: merge or move it.
"""


def test_a_build_enters_few_files() -> None:
    files = count_build()["files"]
    assert "inplace_builder/standalone/build.py" in files
    assert len(files) <= MAX_FILES, "\n".join(files)
