"""What cannot be built is refused with what was wrong, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from inplace.schema.specs import Dtype
from inplace_builder.errors import BuildError
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from safetensors.torch import load_file, save_file

OPTIONS = BuildOptions(slots=2, max_rows=2, capacity=32, chunk=8)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WEIGHTS = "model.safetensors"


def t5(folder: Path, _: Path) -> Path:
    transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8).save_pretrained(
        folder
    )
    return folder


def vit(folder: Path, _: Path) -> Path:
    transformers.ViTConfig().save_pretrained(folder)
    return folder


def bert(folder: Path, _: Path) -> Path:
    transformers.BertLMHeadModel(transformers.BertConfig(**SMALL)).save_pretrained(folder)
    return folder


def xlnet(folder: Path, _: Path) -> Path:
    config = transformers.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=64)
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)
    return folder


def empty(folder: Path, _: Path) -> Path:
    folder.mkdir()
    return folder


def nonexistent(folder: Path, _: Path) -> Path:
    return folder / "nowhere"


def garbage(folder: Path, _: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": ')
    return folder


def no_object(folder: Path, _: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("[]")
    return folder


def unknown(folder: Path, _: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "abacus"}')
    return folder


def no_weights(folder: Path, llama_folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(llama_folder / "config.json", folder)
    return folder


def truncated(folder: Path, llama_folder: Path) -> Path:
    shutil.copytree(llama_folder, folder)
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size - 1000)
    return folder


def other_shape(folder: Path, llama_folder: Path) -> Path:
    shutil.copytree(llama_folder, folder)
    weights = load_file(folder / WEIGHTS) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def tensor_left_out(folder: Path, llama_folder: Path) -> Path:
    shutil.copytree(llama_folder, folder)
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def two_gguf_files(folder: Path, _: Path) -> Path:
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return folder


def damaged_gguf(folder: Path, _: Path) -> Path:
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF\0\0garbage")
    return folder / "a.gguf"


def weights_file(_: Path, llama_folder: Path) -> Path:
    return llama_folder / WEIGHTS


Source = Callable[[Path, Path], Path]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (t5, "holds a 't5' model, which is not a decoder"),
        (vit, "holds a 'vit' model, which is not a decoder"),
        (bert, "BertLMHeadModel is an encoder: is_decoder in its configuration is False"),
        (
            xlnet,
            "XLNetLMHeadModel has 2 layers, but 0 of them attend .*; nor can its own code take one "
            "token of each row a step: .* keeps nothing between two tokens",
        ),
        (empty, "is not a model: it holds neither config.json nor a GGUF file"),
        (nonexistent, "nowhere does not exist"),
        (
            garbage,
            "no configuration that transformers can read: .*config.json' is not a valid JSON file",
        ),
        (no_object, "no configuration that transformers can read"),
        (unknown, "model type `abacus`"),
        (no_weights, f"the weights in .* cannot be loaded: .*no file named {WEIGHTS}"),
        (truncated, "the weights in .* cannot be loaded: SafetensorError"),
        (other_shape, "the weights in .* cannot be loaded"),
        (two_gguf_files, "is not a model: it holds 2 GGUF files; name one"),
        (damaged_gguf, r"a\.gguf has no configuration that transformers can read"),
        (weights_file, "is not a model: it holds neither config.json nor a GGUF file"),
        (tensor_left_out, r"lack \['model\.layers\.1\.mlp\.up_proj\.weight'\] \(1 in all\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # transformers' own, when it makes these models
def test_a_model_that_is_no_buildable_decoder_is_refused_and_nothing_is_written(
    tmp_path: Path, llama_folder: Path, source: Source, text: str
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    with pytest.raises(BuildError, match=text):
        build_decoder(source(tmp_path / "source", llama_folder), repository / "model", OPTIONS)
    assert list(repository.iterdir()) == []


def test_a_refused_model_does_not_even_make_the_repository(tmp_path: Path) -> None:
    with pytest.raises(BuildError):
        build_decoder(
            empty(tmp_path / "source", tmp_path), tmp_path / "repository" / "model", OPTIONS
        )
    assert not (tmp_path / "repository").exists()


def test_a_capacity_beyond_the_model_s_positions_is_refused_with_the_largest_possible(
    tmp_path: Path, llama_folder: Path
) -> None:
    with pytest.raises(
        BuildError, match=r"capacity of 4097 is more than the 4096 positions .* choose at most 4096"
    ):
        build_decoder(llama_folder, tmp_path / "model", BuildOptions(capacity=4097))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"capacity": 0}, "capacity is 0"),
        ({"chunk": -1}, "chunk is -1"),
        ({"slots": 2, "max_rows": 3}, "a batch of 3 rows needs as many slots; there are 2"),
        (
            {"dtype": Dtype.FLOAT16},
            "dtype float16 is not supported on device 'cpu'; choose one of .*'float32', 'bfloat16'",
        ),
        ({"dtype": Dtype.INT8}, "dtype int8 is not supported on device 'cpu'"),
        ({"device": "abacus"}, r"device is 'abacus'; choose one of \['cpu', 'cuda'\]"),
        ({"idle_timeout": 0.0}, "idle_timeout is 0.0; it must be a number of seconds above 0"),
        ({"idle_timeout": float("nan")}, "idle_timeout is nan"),
        ({"idle_timeout": float("inf")}, "idle_timeout is inf"),
        ({"queue_delay_microseconds": -1}, "queue_delay_microseconds is -1"),
        ({"instances": 0}, "instances is 0; it must be at least 1"),
        ({"gpus": (0, 1)}, r"gpus is \[0, 1\]; a model on device 'cpu' is served on no GPU"),
        pytest.param({"idle_timeout": 1e300}, "idle_timeout"),
        pytest.param({"queue_delay_microseconds": 1 << 64}, "queue_delay_microseconds"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(options: dict[str, object], text: str) -> None:
    with pytest.raises(BuildError, match=text):
        BuildOptions(**options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_build_for_a_gpu_without_one_is_refused() -> None:
    with pytest.raises(BuildError, match="PyTorch sees none here; choose device cpu"):
        BuildOptions(device="cuda")
