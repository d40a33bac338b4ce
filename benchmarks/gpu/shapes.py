"""Models and cases of the GPU benchmarks: published shapes, random weights, targets."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BFLOAT16_BYTES = 2


def _shape(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    theta: float,
    most: int,
    head_size: int = 64,
    *,
    tied: bool = True,
) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=most,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )


SHAPES: dict[str, LlamaConfig] = {
    "135m": _shape(30, 576, 9, 3, 1536, 49152, 1e5, 8192),
    "1b": _shape(16, 2048, 32, 8, 8192, 128256, 5e5, 131072),
    "8b": _shape(32, 4096, 32, 8, 14336, 128256, 5e5, 131072, 128, tied=False),
    "tiny": _shape(2, 128, 2, 1, 256, 512, 1e4, 4096),
}
"""SmolLM2-135M, and Llama-3.2-1B and 3.1-8B without their scaling of the rotary frequencies.

The scaling costs nothing in a step. ``tiny`` is to try a benchmark itself.
"""


@dataclass(frozen=True)
class Case:
    """One decode step of ``rows`` sequences with ``length`` of ``capacity`` positions cached.

    Attributes:
        shape: key of `SHAPES`.
        rows: sequences in the step.
        capacity: positions a sequence may hold.
        length: positions each sequence holds before the step.
        must_us: most microseconds of the step; None where `within` gives the limit.
        aim_us: microseconds hoped for.
        within: the case this one is compared with, and the percent it may be slower.
    """

    shape: str
    rows: int
    capacity: int
    length: int = 600
    must_us: float | None = None
    aim_us: float | None = None
    within: "tuple[Case, float] | None" = None

    @property
    def name(self) -> str:
        """As the tables and plots write it."""
        return f"{self.shape} B{self.rows} c{self.capacity}"


_ONE = Case("1b", 1, 1024, must_us=1200, aim_us=1000)
CASES: tuple[Case, ...] = (
    Case("135m", 1, 1024, must_us=650, aim_us=300),
    Case("135m", 8, 1024, must_us=800, aim_us=400),
    _ONE,
    Case("1b", 8, 4096, must_us=1350, aim_us=1100),
    Case("1b", 64, 1024, must_us=1900, aim_us=1500),
    Case("1b", 1, 32768, within=(_ONE, 5.0)),
)
LENGTHS: tuple[Case, ...] = tuple(Case("1b", 8, 4096, length) for length in (1, 2000, 3900))
"""What the plot of step time against the cached length needs beside `CASES`."""
PREFILL_SHAPE, PREFILL_CAPACITY, PREFILL_TOKENS = "1b", 1024, 512


def weight_bytes(shape: str) -> int:
    """Bytes of the weights in bfloat16 that every step reads: not the embedding, but the head."""
    config = SHAPES[shape]
    hidden, heads, kv_heads = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    attention = 2 * hidden * (heads + kv_heads) * config.head_dim
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return int(
        BFLOAT16_BYTES * (config.vocab_size * hidden + config.num_hidden_layers * layer + hidden)
    )


def cache_bytes(shape: str, positions: int) -> int:
    """Bytes of the keys and values of so many positions, all layers, bfloat16."""
    config = SHAPES[shape]
    return (
        int(
            BFLOAT16_BYTES
            * 2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
        )
        * positions
    )


def floor_us(shape: str, positions: int, bandwidth: float) -> float:
    """Microseconds to read the weights and ``positions`` once; no step can be faster."""
    return (weight_bytes(shape) + cache_bytes(shape, positions)) / bandwidth * 1e6


def random_model(name: str, dtype: torch.dtype, device: str | torch.device) -> LlamaForCausalLM:
    """A model of this shape with the same random weights in every process.

    Weights are normal, of deviation 1/sqrt(inputs); norms are one. They are drawn on a GPU if there
    is one, whatever `device` is, because a CPU takes long over a billion of them.

    Raises:
        KeyError: there is no such shape.
    """
    return random_weights(SHAPES[name], dtype, device)


def random_weights(
    config: LlamaConfig, dtype: torch.dtype, device: str | torch.device
) -> LlamaForCausalLM:
    """`random_model` of any configuration."""
    config = LlamaConfig(**(config.to_dict() | {"dtype": dtype}))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    model.tie_weights()  # to_empty gave the head storage of its own
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(
        device
    )  # its frequencies were lost on the meta device; they stay float32
    source = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(source).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            drawn = torch.empty(parameter.shape, dtype=dtype, device=source)
            parameter.copy_(drawn.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator))
    return model
