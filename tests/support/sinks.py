"""Random decoders whose heads have attention sinks."""

import torch
from decoders.configs import make_model
from transformers import PreTrainedModel

SINKS = {"gpt_oss": 2, "granite_swa": 2, "granitemoe_swa": 2, "mimo_v2_flash": 1}
"""Names of decoders of two layers, and how many of the layers have sinks."""


def decoder_with_sinks(name: str) -> PreTrainedModel:
    """A random decoder whose sinks take different parts of the softmax."""
    model = make_model(name)
    for parameter in sinks_of(model):
        torch.nn.init.normal_(parameter, std=2.0)
    return model


def sinks_of(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("sinks")]
