"""Decoders of transformers on a GPU: experts, recurrences, and others of each kind.

The models are those of the survey (`decoders.configs`), tiny and with random weights. In float32
the engine returns the tokens of ``generate`` and its logits. In bfloat16 its logits differ from
those of the float32 model by not much more than PyTorch's own bfloat16 differs. Where rounding
chooses other experts, PyTorch's is the largest of several roundings of the embeddings; a sparse
model selects other positions, so it is compared in float32 only.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, capture_decoder, write_engine
from inplace_builder.capture.checkpoint import quiet
from inplace_builder.capture.reference import embeddings_rounded_otherwise
from inplace_builder.served.decoder import decoder_options
from inplace_builder.served.verify import PERTURBATIONS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)

from decoders.configs import FORWARD, make_model  # noqa: E402
from decoders.survey import (  # noqa: E402
    CAPACITY,
    CHUNK,
    PROMPTS,
    ROWS,
    TOKENS,
    Decoded,
    compare,
    decode_forward,
    decode_generate,
    prompt,
)
from support.decoding import decode_together  # noqa: E402
from support.models import open_instance  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

# fmt: off
EXPERTS = [
    "mixtral", "mixtral/window", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe",
    "granitemoeshared", "ernie4_5_moe", "minimax_m2", "hunyuan_v1_moe", "dots1", "afmoe",
    "aria_text", "cohere2_moe", "dbrx", "exaone_moe", "flex_olmo", "glm4_moe", "deepseek_v2",
    "deepseek_v3", "axk1", "glm4_moe_lite", "longcat_flash", "youtu", "gpt_oss", "llama4_text",
]
RECURRENCES = [
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
    "lfm2_moe", "mamba", "mamba2", "olmo_hybrid", "qwen3_5_text", "qwen3_next",
    "recurrent_gemma",
]
OTHERS = [
    "llama", "gemma2", "gpt2", "gpt_neox", "gptj", "bloom", "mpt", "minicpm3", "phi3/longrope",
    "gemma4_text",
]
MASKS = ["big_bird", "megatron-bert", "rembert", "roformer", "llama4_text/chunked"]
SPARSE = [
    "deepseek_v32", "axk2", "glm_moe_dsa", "hy_v4", "minimax_m3_vl_text/sparse", "qwen4_exp_text",
    "doge",
]
# fmt: on
NAMES = [*EXPERTS, *RECURRENCES, *OTHERS, *MASKS]


def decoded(name: str, engine: str, dtype: Dtype, folder: Path) -> list[Decoded]:
    """What the engine generates from the prompts, together."""
    options = BuildOptions(
        device="cuda",
        engine=engine,  # type: ignore[arg-type]
        capacity=CAPACITY,
        slots=ROWS + 1,
        max_rows=ROWS,
        chunk=CHUNK,
        dtype=dtype,
    )
    with quiet():
        model = make_model(name).to(dtype.as_torch)
    capture = capture_decoder(model, decoder_options(options))
    if capture.program.lookahead:  # prompts are fed whole
        options = replace(options, chunk=max(PROMPTS))
        capture = capture_decoder(model, decoder_options(options))
    prompts = [prompt(seed, n, vocabulary(model)) for seed, n in enumerate(PROMPTS)]
    write_engine(capture, folder / "engine", options)
    instance = open_instance(folder / "engine")
    addresses = instance.arena.addresses()
    rows = decode_together(instance, prompts, TOKENS, ("next_token", "logits"))
    assert instance.arena.addresses() == addresses
    return [
        Decoded(
            [int(step["next_token"]) for step in row],
            torch.stack([step["logits"].flatten().float().cpu() for step in row]),
        )
        for row in rows
    ]


def vocabulary(model: PreTrainedModel) -> int:
    """The number of its token ids."""
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size


def reference(name: str, dtype: torch.dtype, perturbation: int | None = None) -> list[Decoded]:
    """What transformers generates on the CPU; with a seed, its embeddings are rounded otherwise."""
    with quiet():
        model = make_model(name).to(dtype)
    decode = decode_forward if name in FORWARD else decode_generate
    prompts = [prompt(seed, n, vocabulary(model)) for seed, n in enumerate(PROMPTS)]
    if perturbation is None:
        return [decode(model, ids) for ids in prompts]
    with embeddings_rounded_otherwise(model, perturbation):
        return [decode(model, ids) for ids in prompts]


def error(expected: list[Decoded], got: list[Decoded]) -> float:
    """The largest relative difference of logits up to the first other token of each prompt."""
    largest = 0.0
    for a, b in zip(expected, got, strict=True):
        same = next(
            (
                at
                for at, pair in enumerate(zip(a.tokens, b.tokens, strict=True))
                if pair[0] != pair[1]
            ),
            TOKENS - 1,
        )
        difference = (a.logits - b.logits)[: same + 1].abs().max() / a.logits.abs().max()
        largest = max(largest, float(difference))
    return largest


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
@pytest.mark.parametrize("name", [*NAMES, *SPARSE])
def test_float32_is_equal_to_generate(name: str, engine: str, tmp_path: Path) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    expected = reference(name, torch.float32)
    verdict, difference = compare(expected, decoded(name, engine, Dtype.FLOAT32, tmp_path))
    assert verdict == "equal", difference


@pytest.mark.parametrize("engine", ["tensorrt", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_close_as_pytorchs(name: str, engine: str, tmp_path: Path) -> None:
    if engine == "tensorrt":
        pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")
    expected = reference(name, torch.float32)
    ours = error(expected, decoded(name, engine, Dtype.BFLOAT16, tmp_path))
    own = error(expected, reference(name, torch.bfloat16))
    if name in EXPERTS:  # where rounding chooses another expert, nothing is close to anything
        for seed in range(PERTURBATIONS):
            if ours <= 2 * own + 1e-3:
                break
            own = max(own, error(expected, reference(name, torch.bfloat16, seed)))
    assert ours <= 2 * own + 1e-3, (ours, own)
