"""500 random schemas with an untrained model: every text ends and is valid."""

import json
import random
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.options import BuildOptions
from support.schemas import random_schema
from support.streaming import RecordingChannel
from support.vocabulary import llama_with_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.long

SCHEMAS, CAPACITY, EOS = 500, 2048, 2
OUTPUTS = frozenset({"tokens", "text_output", "finish_reason"})


def test_random_schemas_end_and_are_valid(tmp_path: Path) -> None:
    llama_with_tokenizer(tmp_path / "source", num_hidden_layers=1)
    options = BuildOptions(slots=8, max_rows=8, capacity=CAPACITY, chunk=16, serve="stream")
    build_decoder(tmp_path / "source", tmp_path / "built", options)
    instance = ModelInstance.open(tmp_path / "built" / "1")
    config = TokenizerConfig(tiny_tokenizer(), frozenset({EOS}))
    driver = StreamDriver(instance, config, SCHEMAS)
    generator, answers = random.Random(0), []
    for index in range(SCHEMAS):
        schema = random_schema(generator, depth=generator.randint(0, 2))
        parameters: dict[str, bool | int | float | str] = {
            "max_tokens": CAPACITY - 8,
            "temperature": generator.choice([0.0, 1.0, 3.0]),
            "seed": index,
            "json": json.dumps(schema),
        }
        ids = {"input_ids": torch.tensor([[5, 6]])}
        channel = RecordingChannel(OUTPUTS)
        driver.submit([(Request(index + 1, True, True, ids, "r", parameters), {}, channel)])
        answers.append((schema, channel))
        if index % 16 == 15:  # fewer than may wait to be compiled
            for _, each in answers:
                each.wait()
    for schema, channel in answers:
        assert channel.finish_reason in ("stop", "eos"), schema
        jsonschema.validate(json.loads(channel.text), schema)
    driver.close()
