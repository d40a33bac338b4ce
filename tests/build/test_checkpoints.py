"""A checkpoint that would be served in part, or as another model, is refused; mostly unread."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from inplace.schema.specs import Dtype
from inplace_builder import BuildOptions, build_decoder, load_decoder
from inplace_builder.capture.checkpoint import check_positions, load_tokenizer
from inplace_builder.engine_files import check_target
from inplace_builder.errors import BuildError
from safetensors.torch import load_file, save_file
from support.models import change_config
from support.vocabulary import save_tokenizer

OPTIONS = BuildOptions(slots=2, max_rows=2, capacity=32, chunk=8)
WEIGHTS = "model.safetensors"


@pytest.fixture
def copied(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(llama_folder, tmp_path / "source")


def add_weights(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(folder / WEIGHTS) | tensors, folder / WEIGHTS, metadata={"format": "pt"})


def remove_weights(folder: Path) -> None:
    """What is refused afterwards is refused before anything is loaded."""
    (folder / WEIGHTS).unlink()


def test_weights_that_the_model_does_not_use_are_refused_by_name(copied: Path) -> None:
    bias = "model.layers.1.self_attn.q_proj.bias"  # config.json has no attention_bias
    add_weights(copied, **{bias: torch.ones(64)})
    with pytest.raises(
        BuildError, match=rf"hold \['{bias}'\] \(1 in all\), which LlamaForCausalLM"
    ):
        load_decoder(copied, Dtype.FLOAT32)


def test_tensors_that_models_compute_themselves_are_no_weights(copied: Path) -> None:
    add_weights(copied, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load_decoder(copied, Dtype.FLOAT32)


def test_a_decoder_has_no_lookahead(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="a 'llama' model, which has none"):
        build_decoder(llama_folder, tmp_path / "model", BuildOptions(lookahead=1))


def test_a_capacity_that_the_model_was_not_made_for_is_refused_before_it_is_loaded(
    copied: Path, tmp_path: Path
) -> None:
    remove_weights(copied)
    with pytest.raises(BuildError, match="4097 is more than the 4096 positions this model was"):
        build_decoder(copied, tmp_path / "model", BuildOptions(capacity=4097))


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 100),
        ({"rope_type": "default"}, 100),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 50}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 50}, 100),
        ({"rope_type": "dynamic", "factor": 4.0}, 100),
        ({"rope_type": "longrope", "original_max_position_embeddings": 50}, 50),
        (
            {
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {"rope_type": "linear", "factor": 8.0},
            },
            100,
        ),
    ],
    ids=str,
)
def test_the_largest_capacity_follows_the_scaling_of_the_rotary_embedding(
    rope: dict[str, Any] | None, limit: int
) -> None:
    config: Any = SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)
    check_positions(config, limit)
    with pytest.raises(BuildError, match=rf"a capacity of {limit + 1} .* at most {limit}$"):
        check_positions(config, limit + 1)


def test_positions_without_a_limit_are_not_limited() -> None:
    unlimited: Any = SimpleNamespace(max_position_embeddings=-1)
    check_positions(unlimited, 1 << 20)


def beside_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "model"


@pytest.mark.parametrize(
    "target",
    [
        beside_a_file,
        lambda _: Path("/proc/inplace/model"),
        lambda folder: folder / ("long" * 100),
        lambda _: Path("/"),
        lambda _: Path(".."),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    copied: Path, tmp_path: Path, target: Callable[[Path], Path]
) -> None:
    remove_weights(copied)
    with pytest.raises(BuildError, match=r"cannot be written: .*; choose|has no name of its own"):
        build_decoder(copied, target(tmp_path), OPTIONS)


def test_the_check_of_an_output_leaves_nothing_behind(tmp_path: Path) -> None:
    check_target(tmp_path / "repository" / "model", Path("1/engine.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tokenizer_is_described(llama_folder: Path) -> None:
    tokenizer, description = load_tokenizer(llama_folder)
    assert tokenizer is None
    assert description.startswith("none, clients send token ids, not text (")


def test_a_tokenizer_with_a_fast_version_is_named(copied: Path) -> None:
    save_tokenizer(copied)
    tokenizer, description = load_tokenizer(copied)
    assert tokenizer is not None
    assert description == type(tokenizer).__name__


def test_a_tokenizer_without_a_fast_version_is_described(copied: Path) -> None:
    (copied / "vocab.json").write_text(json.dumps({"<unk>": 0, "a</w>": 1}))
    (copied / "merges.txt").write_text("#version: 0.2\n")
    (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    tokenizer, description = load_tokenizer(copied)
    assert tokenizer is not None
    assert description.startswith(
        "CTRLTokenizer has no fast version (tokenizer.json): clients send"
    )


def test_the_text_part_of_a_larger_model_is_loaded_by_its_class(tmp_path: Path) -> None:
    """transformers' table of causal language models does not have its configuration."""
    config = transformers.Emu3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = transformers.Emu3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    loaded, _ = load_decoder(tmp_path / "source", Dtype.FLOAT32)
    ids = torch.arange(5)[None]
    assert type(loaded) is transformers.Emu3ForCausalLM
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    change_config(tmp_path / "source", architectures=["Emu3VQVAE"])
    with pytest.raises(BuildError, match="'emu3_text_model' model, which is not a decoder"):
        load_decoder(tmp_path / "source", Dtype.FLOAT32)
