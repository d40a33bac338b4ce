"""Engines whose weights are 8-bit floats: rounded at the build, or as a checkpoint has them."""

from pathlib import Path

import pytest
import torch
import transformers
from inplace.engines.scales import check_scales
from inplace.errors import LoadError
from inplace.operators.float8 import quantize as quantize_rows
from inplace.schema.artifacts import EngineFile
from inplace.schema.specs import Dtype
from inplace.schema.tensor_file import as_bytes, read_safetensors
from inplace_builder import (
    BuildOptions,
    DecoderOptions,
    RowOptions,
    build_decoder,
    capture_decoder,
    capture_exported_rows,
    write_engine,
)
from inplace_builder.capture.checkpoint import load_model
from inplace_builder.capture.scaled_linear import ScaledLinear, ScaledWeight
from inplace_builder.choices import WeightOptions
from inplace_builder.errors import BuildError
from support.decoding import SHAPE, generate, generate_together, random_prompt
from support.float8_checkpoint import WHOLE, quantize, save_fp8
from support.long import long_except
from support.models import open_instance
from support.plugin_decoders import TwoSequences
from support.plugin_networks import tensorrt_with_plugins
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

OPTIONS = BuildOptions(slots=2, max_rows=2, capacity=48, chunk=8, weights="fp8")
PROMPTS = [random_prompt(1, 11), random_prompt(2, 3)]
BLOCK = (24, 20)
"""Rows and columns with one scale; they divide no weight of the model."""


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def round_weights(model: LlamaForCausalLM) -> None:
    """What rounding at the build stands for: a scale for each output of all but the head."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("_proj.weight"):
                parameter.copy_(quantize(parameter, 1, WHOLE)[2])


@pytest.mark.slow
def test_weights_are_rounded_and_the_head_is_not(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The tokens are those of transformers with the rounded weights."""
    model.save_pretrained(tmp_path / "source")
    before = [generate(model, prompt, 12) for prompt in PROMPTS]
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", OPTIONS)
    assert manifest.built_with["weights"] == (
        "fp8 (e4m3) in 14 linear layers, rounded, with a scale for each output; the head and all "
        "others are float32; activations are float32"
    )
    round_weights(model)
    expected = [generate(model, prompt, 12) for prompt in PROMPTS]
    assert generate_together(open_instance(tmp_path / "model"), PROMPTS, 12) == expected != before
    engine = manifest.programs[0].engine
    assert engine.dtype is Dtype.FLOAT32
    assert len(engine.scales) == 14
    assert not any("lm_head" in name for name in engine.scales)
    content = (tmp_path / "model" / "1" / engine.file).read_bytes()
    storages, _ = read_safetensors(as_bytes(content), "engine")
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    eight = quantize(weight, 1, WHOLE)[0].view(torch.uint8).flatten()
    assert any(torch.equal(storage[: len(eight)], eight) for storage in storages.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    long_except(["blocks"], ["blocks", "rows", "compressed rows", "compressed tensor"]),
)
def test_a_checkpoint_keeps_its_8_bit_weights(
    model: LlamaForCausalLM, tmp_path: Path, name: str
) -> None:
    """Bit for bit, and with the tokens of transformers with what they stand for."""
    stored = save_fp8(model, tmp_path / "source", name, BLOCK)
    loaded, notes = load_model(tmp_path / "source", Dtype.BFLOAT16, weights=WeightOptions("fp8"))
    assert notes == {
        "weights": "fp8 (e4m3) in 14 linear layers, as they are stored; the head and all others "
        "are bfloat16; activations are bfloat16"
    }
    layer = loaded.model.layers[1].mlp.down_proj
    assert isinstance(layer, ScaledLinear)
    kept = stored["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(layer.weight.view(torch.uint8), kept.view(torch.uint8))
    assert layer.group == (20 if name == "blocks" else 0)
    assert loaded.lm_head.weight.dtype is torch.bfloat16
    build_decoder(tmp_path / "source", tmp_path / "model", OPTIONS)
    expected = [generate(model, prompt, 12) for prompt in PROMPTS]
    assert generate_together(open_instance(tmp_path / "model"), PROMPTS, 12) == expected


@pytest.mark.slow
def test_rows_of_long_steps_may_be_rounded_too(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """As engines on GPUs do; the build compares with PyTorch that rounds all of them."""
    model.save_pretrained(tmp_path / "source")
    options = WeightOptions("fp8", activation_rows=6)
    captures = []
    for weights in (WeightOptions("fp8"), options):
        loaded, notes = load_model(tmp_path / "source", Dtype.BFLOAT16, weights=weights)
        captures.append(capture_decoder(loaded, DecoderOptions(48, 2, 8)))
    assert "activations are fp8 too in steps of 6 tokens or more" in notes["weights"]
    bfloat16 = BuildOptions(slots=2, max_rows=2, capacity=48, chunk=8, dtype=Dtype.BFLOAT16)
    errors = [
        float(write_engine(capture, tmp_path / "model", bfloat16).built_with["verified_error"])
        for capture in captures
    ]
    assert errors[0] < 0.02 < errors[1] < 0.3  # random weights are harder to round than trained


@pytest.mark.slow
def test_a_network_merges_8_bit_weights_with_their_scales(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Four plugins a layer, weights bound as they are stored, and the results of the model."""
    save_fp8(model, tmp_path, "blocks", (24, 8))
    loaded, _ = load_model(tmp_path, Dtype.FLOAT32, weights=WeightOptions("fp8"))
    capture = capture_decoder(loaded, DecoderOptions(32, 3, 4))
    sequences = TwoSequences(capture, tensorrt_with_plugins())
    network = sequences.network
    linears = [
        layer.operation
        for layer in network.network.plugins
        if type(layer.operation).__name__ == "LinearOperation"
    ]
    assert [each.scaled for each in linears] == [True] * 8 + [False]
    assert all(each.scale_group == 8 for each in linears[:8])
    assert sum(each.gated for each in linears) == 2
    scales = network.context.scales
    assert len(scales) == 8
    dtypes = {name: weight.dtype for name, weight in network.bound_weights.items()}
    assert all(dtypes[name] is torch.float8_e4m3fn for name in scales)
    assert all(dtypes[name] is torch.float32 for name in scales.values())
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    at = [0, 0]
    for steps in ((4, 1), (3, 4), (1, 1), (1, 3)):
        parts = [ids[row, at[row] : at[row] + steps[row]].tolist() for row in (0, 1)]
        outputs = sequences.step(*parts)
        at = [at[0] + steps[0], at[1] + steps[1]]
        for row in (0, 1):
            torch.testing.assert_close(
                outputs[row]["logits"], expected[row, at[row] - 1], rtol=1e-3, atol=1e-3
            )


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


@pytest.mark.slow
def test_experts_are_rounded_too(tmp_path: Path) -> None:
    """The tokens are those of transformers with the rounded weights; one copy is in the file."""
    mixtral().save_pretrained(tmp_path / "source")
    manifest = build_decoder(tmp_path / "source", tmp_path / "model", OPTIONS)
    assert manifest.built_with["weights"].endswith(
        "; experts of 2 layers are fp8 too, rounded, with a power of two for each output"
    )
    model = mixtral()
    before = [generate(model, prompt, 12) for prompt in PROMPTS]
    round_weights(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                scale = (parameter.abs().amax(-1, keepdim=True) / 448).log2().ceil().exp2()
                rounded = (parameter / scale).to(torch.float8_e4m3fn).float() * scale
                assert ((rounded - parameter).abs() <= parameter.abs() / 16 + scale / 1024).all()
                parameter.copy_(rounded)
    expected = [generate(model, prompt, 12) for prompt in PROMPTS]
    assert generate_together(open_instance(tmp_path / "model"), PROMPTS, 12) == expected != before
    engine = manifest.programs[0].engine
    assert len(engine.scales) == 2 * 4 + 2 * 2
    content = (tmp_path / "model" / "1" / engine.file).read_bytes()
    storages, _ = read_safetensors(as_bytes(content), "engine")
    experts = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    assert sum(len(each) for each in storages.values()) < 4 * (model.num_parameters() - experts)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("kind", ["GptOss", "Mixtral"])
def test_a_network_binds_8_bit_weights_of_experts(tmp_path: Path, kind: str) -> None:
    """Also of transposed ones with biases, as gpt-oss has them."""
    sizes = SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).eval().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, Dtype.FLOAT32, weights=WeightOptions("fp8"))
    capture = capture_decoder(loaded, DecoderOptions(32, 3, 4))
    sequences = TwoSequences(capture, tensorrt_with_plugins())
    network = sequences.network
    grouped = [
        layer.operation
        for layer in network.network.plugins
        if type(layer.operation).__name__ == "GroupedLinearOperation"
    ]
    assert [each.scaled for each in grouped] == [True] * 4
    dtypes = {name: weight.dtype for name, weight in network.bound_weights.items()}
    assert sum(dtype is torch.float8_e4m3fn for dtype in dtypes.values()) >= 4
    scales = network.context.scales
    assert all(dtypes[name] is torch.float8_e4m3fn for name in scales)
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = loaded(ids).logits
    outputs = sequences.step(ids[0].tolist()[:4], ids[1].tolist()[:1])
    for row, place in ((0, 3), (1, 0)):
        torch.testing.assert_close(
            outputs[row]["logits"], expected[row, place], rtol=1e-3, atol=1e-3
        )


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(BuildError, match="GPT2LMHeadModel has no linear layer"):
        load_model(tmp_path, Dtype.FLOAT32, weights=WeightOptions("fp8"))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BuildError, match="weights fp8 needs the plugins of TensorRT"):
        BuildOptions(weights="fp8", engine="tensorrt_rtx", device="cuda")
    with pytest.raises(BuildError, match="weights is 'int4'; choose one of"):
        BuildOptions(weights="int4")  # type: ignore[arg-type]
    cases = [
        (BuildOptions(), WeightOptions()),
        (BuildOptions(weights="fp8"), WeightOptions("fp8")),
        (
            BuildOptions(device="cuda", engine="tensorrt", dtype=Dtype.BFLOAT16),
            WeightOptions(),  # the kernels have not run on a GPU yet
        ),
        (
            BuildOptions(device="cuda", engine="tensorrt", dtype=Dtype.BFLOAT16, weights="fp8"),
            WeightOptions("fp8", 65),
        ),
        (BuildOptions(device="cuda", engine="tensorrt", weights="fp8"), WeightOptions("fp8")),
        (BuildOptions(device="cuda", engine="tensorrt_rtx"), WeightOptions()),
        (
            BuildOptions(device="cuda", engine="tensorrt", weights="dequantized"),
            WeightOptions(),
        ),
    ]
    for options, expected in cases:
        assert options.weight_options == expected


def test_scales_that_a_file_does_not_have_are_refused() -> None:
    engine = EngineFile(
        file="a", kind="torch", device="cpu", dtype=Dtype.FLOAT32, scales={"weight": "scale"}
    )
    good = {"weight": torch.float8_e4m3fn, "scale": torch.float32}
    check_scales("a", engine, good)
    for name, dtype, message in (
        ("weight", torch.float32, r"a has torch\.float32 weight, .* it is torch\.float8_e4m3fn"),
        ("scale", torch.bfloat16, r"a has torch\.bfloat16 scale, .* it is torch\.float32"),
    ):
        with pytest.raises(LoadError, match=message):
            check_scales("a", engine, good | {name: dtype})
    with pytest.raises(LoadError, match="a has no tensor weight"):
        check_scales("a", engine, {})


class Accumulator(torch.nn.Module):
    """A module of one sequence: a running sum of what a linear layer with 8-bit weights gives."""

    total: torch.Tensor

    def __init__(self, group: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = ScaledWeight(*quantize_rows(torch.randn(4, 8), group), group)
        self.layer = ScaledLinear(weight, torch.nn.Parameter(torch.randn(4)))
        self.register_buffer("total", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(self.layer(x))
        return self.total.clone()


def test_rows_of_a_module_share_8_bit_weights(tmp_path: Path) -> None:
    """The build compares the engine with the module, of which each row has a sum of its own."""
    capture = capture_exported_rows(Accumulator(4), RowOptions(3), (torch.randn(1, 8),))
    targets = [str(node.target) for node in capture.exported.graph.nodes]
    assert targets.count("inplace.linear.default") == 1
    options = BuildOptions(slots=3, max_rows=3)
    manifest = write_engine(capture, tmp_path / "model", options)
    assert manifest.verified == "executed"
    assert len(manifest.programs[0].engine.scales) == 1
