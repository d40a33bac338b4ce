"""Positions are those that transformers' ``generate`` has, however a decoder gets them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace_builder import BuildError, BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.served.build import write_engine
from support.decoding import generate_together, random_prompt
from support.long import long_except
from support.models import open_instance
from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=48, chunk=8)
DECODER_OPTIONS = DecoderOptions(48, 3, 8)
PADDING = 1
ENCODER = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": PADDING,
    "is_decoder": True,
}
DECODER = {
    "vocab_size": 128,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # without positions they count from the index of the padding on, and not over padding
    "roberta": ("RobertaConfig", "RobertaForCausalLM", ENCODER),
    "camembert": ("CamembertConfig", "CamembertForCausalLM", ENCODER),
    "data2vec-text": ("Data2VecTextConfig", "Data2VecTextForCausalLM", ENCODER),
    "xlm-roberta-xl": ("XLMRobertaXLConfig", "XLMRobertaXLForCausalLM", ENCODER),
    # they take no positions, and count from the length of the cache; TrOCR keeps all logits
    "mvp": ("MvpConfig", "MvpForCausalLM", DECODER),
    "trocr": ("TrOCRConfig", "TrOCRForCausalLM", DECODER),
    # it takes positions among other arguments, copies views, and keeps all logits
    "whisper": (
        "WhisperConfig",
        "WhisperForCausalLM",
        DECODER | {"max_target_positions": 64, "pad_token_id": 0},
    ),
}


def model_of(name: str, **fields: Any) -> PreTrainedModel:
    config, kind, common = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, kind)(
        getattr(transformers, config)(**common, **fields)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts() -> list[list[int]]:
    """Two of different lengths; one holds the token that pads elsewhere."""
    padded = random_prompt(1, 19)
    padded[4] = PADDING
    return [padded, random_prompt(2, 3)]


def stock(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy continuation; no token of the prompt is padding."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )
    result: list[int] = out[0, len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("name", long_except(["roberta", "mvp", "trocr", "whisper"], MODELS))
def test_tokens_equal_those_of_generate(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
    expected = [stock(model, prompt, 16) for prompt in prompts()]
    assert generate_together(open_instance(tmp_path / "model"), prompts(), 16) == expected


def test_positions_of_a_table_of_sines_that_skip_padding_are_refused_with_the_line() -> None:
    with pytest.raises(BuildError, match=r"number of cached tokens at .*modeling_trocr.py.*mask"):
        capture_decoder(model_of("trocr", use_learned_position_embeddings=False), DECODER_OPTIONS)
