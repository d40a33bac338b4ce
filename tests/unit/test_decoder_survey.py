"""What the survey of decoders writes: no folders of this machine, and counts that are true."""

import re
import sysconfig
from pathlib import Path

import pytest
from decoders import page
from decoders.__main__ import complete
from decoders.configs import CONFIGS, FORWARD
from decoders.survey import ROOT, without_paths

FOLDER = Path("/var/tmp/tmpt9gmcuav")
PACKAGES = "/home/me/.venv/lib/python3.11/site-packages"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{FOLDER}/model holds a 'bert' model", "emu3/model holds a 'bert' model"),
        (
            f'at "{PACKAGES}/transformers/models/xmod/modeling_xmod.py", line 435',
            'at "transformers/models/xmod/modeling_xmod.py", line 435',
        ),
        (f"({ROOT}/.venv/lib/python3.11/site-packages/torch/a.py)", "(torch/a.py)"),
        ("/usr/lib/python3/dist-packages/numpy/a.py:3", "numpy/a.py:3"),
        (f"'{ROOT}/builder/inplace_builder/errors.py'", "'builder/inplace_builder/errors.py'"),
        (f"{sysconfig.get_path('stdlib')}/json/decoder.py", "json/decoder.py"),
        ("w/h and a / b", "w/h and a / b"),
    ],
)
def test_a_text_has_no_folder_of_this_machine(text: str, expected: str) -> None:
    assert without_paths(text, FOLDER, "emu3") == expected


def test_a_survey_cut_off_is_not_recorded_as_a_refusal() -> None:
    reason = "not finished in 300 s"
    assert complete({}, reason) == {"generate": reason}
    assert complete({"generate": "ok", "cpu": "equal"}, reason) == {
        "generate": "ok",
        "cpu": "equal",
        "tensorrt": reason,
    }
    whole = {"generate": "ok", "cpu": "equal", "tensorrt": "refused: x"}
    assert complete(whole, reason) == whole


def test_the_page_counts_what_ran_and_marks_another_reference() -> None:
    refused = "refused: no"
    results = {
        "llama": {"generate": "ok", "cpu": "equal", "tensorrt": "equal"},
        "moshi": {"generate": "ok", "cpu": "equal", "tensorrt": refused, "reference": "forward"},
        "mpt": {"generate": "ok", "cpu": refused, "tensorrt": "equal"},
        "opt": {"generate": "ok", "cpu": refused, "tensorrt": "not finished in 300 s"},
        "xglm": {"generate": "only 2 distinct tokens"},
    }
    text = page.page(
        {
            "models": {name: each | {"commit": "abc"} for name, each in results.items()},
            "without_result": ["qwen2", "qwen3"],
            "without_generate": {"xlm": "fails"},
            "forward": FORWARD,
            "versions": {"transformers": "5", "torch": "2"},
            "date": "2026-11-29T00:00:00",
            "command": "make models",
        }
    )
    joined = " ".join(text.split())
    assert "Of 7 configurations 5 ran and 2 have no result yet. 4 of those" in joined
    assert "`make models` at abc (" in joined
    assert "1 are equal on both engines, 1 with the PyTorch engine only, 1 as a" in joined
    assert "1 on neither" in joined
    assert "| `moshi` † | equal | refused: no |" in text
    assert f"`moshi`: {FORWARD['moshi']}." in joined
    assert "zamba2" not in text
    assert "## Left out (2)" in text
    assert "`qwen2`, `qwen3`" in text


def test_models_with_another_reference_are_surveyed() -> None:
    assert FORWARD.keys() <= CONFIGS.keys()


def test_the_recorded_survey_has_no_folder_of_a_machine() -> None:
    for file in (page.RESULTS, page.PAGE):
        assert not re.findall(r"(?<![\w./<])/(?:\w[\w.-]*/)+[^\s\"]*", file.read_text())
