"""Decoders that compute attention in code of their own, from transformers' cache on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inplace_builder import BuildError, BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture.masks import MaskOptions
from inplace_builder.capture.own_attention import OwnAttention, Scores
from inplace_builder.served.build import write_engine
from support.decoding import SHAPE, generate_together, random_prompt
from support.long import long_except
from support.models import open_instance
from torch import Tensor
from transformers import PreTrainedModel

CAPACITY, CHUNK, WINDOW = 64, 8, 12
OPTIONS = BuildOptions(slots=3, max_rows=3, capacity=CAPACITY, chunk=CHUNK)
DECODER_OPTIONS = DecoderOptions(CAPACITY, 3, CHUNK)
TOKENS = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
FALCON = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("GPTJConfig", GPT),
    "codegen": ("CodeGenConfig", GPT),
    "gpt_neo": (
        "GPTNeoConfig",
        TOKENS
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
    "xglm": (
        "XGLMConfig",
        TOKENS | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    ),
    "falcon": ("FalconConfig", FALCON | {"num_kv_heads": 1}),
    "falcon-grouped": ("FalconConfig", FALCON | {"new_decoder_architecture": True}),
    # it has no cache
    "openai-gpt": ("OpenAIGPTConfig", {name: GPT[name] for name in GPT if name != "rotary_dim"}),
    "falcon-alibi": ("FalconConfig", FALCON | {"alibi": True}),
    "bloom": ("BloomConfig", TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", TOKENS | {"d_model": 32, "n_heads": 4, "n_layers": 2}),
}


def model_of(name: str) -> PreTrainedModel:
    """A random decoder; its greedy tokens vary."""
    config, fields = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**fields)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def stock(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy continuation with its own cache: GPT-Neo is wrong with a static one."""
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    result: list[int] = out[0, len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("name", long_except(["gptj", "bloom"], MODELS))
@pytest.mark.filterwarnings("ignore")
def test_tokens_equal_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
    prompts = [random_prompt(1, 2 * WINDOW + 5), random_prompt(2, 3)]
    expected = [stock(model, prompt, 24) for prompt in prompts]
    assert generate_together(open_instance(tmp_path / "model"), prompts, 24) == expected


@pytest.mark.filterwarnings("ignore")
def test_a_branch_for_one_token_is_left_out(tmp_path: Path) -> None:
    """GIT lets its attention be chosen, but computes it in its own code; its positions depend on
    whether there is one token, and are wrong in transformers' own decode."""
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.GitForCausalLM(
        transformers.GitConfig(
            vision_config={**fields, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            **TOKENS,
            **fields,
            num_attention_heads=4,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    write_engine(capture_decoder(model, DECODER_OPTIONS), tmp_path / "model", OPTIONS)
    prompts = [random_prompt(1, 20), random_prompt(2, 3)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12:
            with torch.no_grad():
                scores = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(scores.argmax()))
        expected.append(tokens[len(prompt) :])
    assert len({token for tokens in expected for token in tokens}) > 3
    assert generate_together(open_instance(tmp_path / "model"), prompts, 12) == expected


@pytest.mark.filterwarnings("ignore")
def test_a_branch_for_one_token_that_differs_is_refused() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    original = model.forward

    def forward(input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        """Scores of several tokens lose their mean, those of one token keep it."""
        kwargs["logits_to_keep"] = 0
        out = original(input_ids=input_ids, position_ids=position_ids, **kwargs)
        if input_ids.shape[1] != 1:
            out.logits = out.logits - out.logits.mean(1, keepdim=True)
        return out

    model.forward = forward
    with pytest.raises(BuildError, match="has other code for one token than for several, and the"):
        capture_decoder(model, DECODER_OPTIONS)


def test_a_window_is_read_off_the_scores() -> None:
    capture = capture_decoder(model_of("gpt_neo"), DECODER_OPTIONS)
    target = torch.ops.inplace.attention.default
    nodes = capture.exported.graph.find_nodes(op="call_function", target=target)
    assert [node.kwargs.get("window", 0) for node in nodes] == [0, WINDOW]
    assert {node.kwargs["scale"] for node in nodes} == {1.0}  # GPT-Neo does not divide scores
    names = {str(node.target) for node in capture.exported.graph.nodes}
    assert not any("softmax" in name for name in names)


def attend(change: Any, mask: bool = True) -> None:
    """Attention over 6 tokens, as a model writes it, with a change of the scores."""
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    own = OwnAttention("Model", key, value, attend=None, proved=lambda *_: None)
    keys, values = own.tracked()
    scores = torch.matmul(query, keys.transpose(-1, -2)) * 0.5
    if mask:
        later = torch.ones(6, 6).triu(1) * torch.finfo(torch.float32).min
        scores = scores + later
    result: Tensor = torch.softmax(change(scores), dim=-1) @ values
    assert isinstance(result, Tensor)


def test_attention_that_is_none_of_ours_is_refused() -> None:
    attend(lambda scores: scores)
    with pytest.raises(BuildError, match="computes tanh of its scores"):
        attend(lambda scores: scores.tanh())
    with pytest.raises(BuildError, match="neither causal nor a sliding window"):
        attend(lambda scores: scores.masked_fill(torch.eye(6) > 0, float("-inf")))
    attend(lambda scores: scores + torch.tensor([0.5, -0.3])[:, None, None] * torch.arange(6))
    with pytest.raises(BuildError, match="not a multiple of the key's position"):
        attend(lambda scores: scores + torch.arange(6) ** 2)
    with pytest.raises(BuildError, match=r"another result than .* the factor 0.5 "):
        attend(lambda scores: scores.clamp(min=-0.01))


def attend_fused(**options: Any) -> list[tuple[Scores, MaskOptions]]:
    """PyTorch's attention over 6 tokens; what it proved."""
    query, key, value = (torch.randn(1, 2, 6, 4) for _ in range(3))
    proved: list[tuple[Scores, MaskOptions]] = []
    own = OwnAttention(
        "Model", key, value, attend=None, proved=lambda *result: proved.append(result)
    )
    function = torch.nn.functional.scaled_dot_product_attention
    result: Tensor = function(query, *own.tracked(), **options)
    expected = function(query, key, value, **options)
    assert torch.equal(result, expected)
    return proved


def test_attention_by_the_function_of_pytorch_is_tracked() -> None:
    causal = MaskOptions()
    assert attend_fused(is_causal=True) == [(Scores(0.5), causal)]
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    assert attend_fused(attn_mask=seen, scale=0.3) == [(Scores(0.3), causal)]
    assert attend_fused(attn_mask=seen & ~seen.tril(-3)) == [(Scores(0.5), MaskOptions(window=3))]
    added = torch.zeros(6, 6).masked_fill(~seen, float("-inf"))
    biased = torch.tensor([0.5, -0.25])[:, None, None] * torch.arange(6) + added
    assert attend_fused(attn_mask=biased) == [(Scores(0.5, (0.5, -0.25)), causal)]
    lookahead = MaskOptions(lookahead=True)
    assert attend_fused() == [(Scores(0.5), lookahead)]
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert attend_fused(attn_mask=everything) == [(Scores(0.5), lookahead)]
    own = OwnAttention("Model", added, added, attend=None, proved=lambda *_: None)
    keys, _ = own.tracked()
    with pytest.raises(BuildError, match="hands its keys to scaled_dot_product_attention"):
        torch.nn.functional.scaled_dot_product_attention(added, keys, added)
