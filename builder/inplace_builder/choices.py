"""What a build can choose between.

The command line lists these without loading PyTorch, so this module imports nothing else.
"""

from dataclasses import dataclass
from typing import Literal

Device = Literal["cpu", "cuda"]
"""Where an engine runs."""

EngineKind = Literal["torch", "tensorrt", "tensorrt_rtx"]
"""What runs an engine: PyTorch, TensorRT, or TensorRT for RTX."""

EngineChoice = Literal["auto", EngineKind]
"""An engine, or ``auto``: TensorRT on a GPU where it can run the model, else PyTorch."""

Precision = Literal["float32", "bfloat16", "float16"]
"""Element types of a served model's weights and states; float16 on a GPU only."""

Protocol = Literal["step", "stream"]
"""How a model is served: unary requests of one step, or gRPC streams with whole generations."""

Mechanism = Literal["plugin", "kv_cache_update", "copy"]
"""How TensorRT updates a state; see `inplace.schema.specs.AliasKind`."""

Weights = Literal["auto", "fp8", "dequantized"]
"""Whether weights of linear layers are 8-bit floats; auto: as dequantized."""

Cache = Literal["auto", "fp8"]
"""Element type of cached keys and values; auto: that of the weights and other states."""


@dataclass(frozen=True)
class WeightOptions:
    """What becomes of the weights of linear layers.

    Attributes:
        kind: ``fp8``: 8-bit floats, those of the checkpoint if it has such, else rounded here;
            ``dequantized``: none.
        activation_rows: tokens of a step from which on these are 8-bit floats too; 0 for never.
    """

    kind: Literal["fp8", "dequantized"] = "dequantized"
    activation_rows: int = 0
