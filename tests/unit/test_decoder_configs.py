"""The survey of decoders has every causal language model of this transformers."""

import pytest
from decoders.configs import CONFIGS, WITHOUT_GENERATE, make_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def test_every_model_type_is_surveyed_or_left_out_with_a_reason() -> None:
    surveyed = {name.partition("/")[0] for name in CONFIGS}
    assert surveyed | set(WITHOUT_GENERATE) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not surveyed & set(WITHOUT_GENERATE)


@pytest.mark.parametrize("name", ["llama", "whisper", "gpt_neo", "qwen3_next"])
def test_a_configuration_is_tiny(name: str) -> None:
    config = make_config(name).get_text_config(decoder=True)
    assert config.vocab_size == 300
    assert config.hidden_size == 64
    assert config.num_hidden_layers == 2
