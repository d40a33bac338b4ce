"""Decoders whose tokens see later ones that are fed with them: a prompt is one chunk.

transformers makes no causal mask for some encoders, also where they are decoders.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from inplace.drivers import StepDriver, StreamDriver, TokenizerConfig
from inplace.errors import Code, RequestError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.programs import Program
from inplace_builder import BuildError, BuildOptions, DecoderOptions, capture_decoder
from inplace_builder.capture.slot_cache import LayerStates
from inplace_builder.served.build import write_engine
from support.decoding import generate, random_prompt
from support.driving import RecordingEngine
from support.models import open_instance
from support.streaming import StreamClient
from transformers import PreTrainedModel

CAPACITY, CHUNK, ROWS = 64, 24, 3
OPTIONS = BuildOptions(slots=4, max_rows=ROWS, capacity=CAPACITY, chunk=CHUNK, step_tokens=CHUNK)
DECODER_OPTIONS = DecoderOptions(CAPACITY, ROWS, CHUNK, CHUNK)


def decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        is_decoder=True,
    )
    model = transformers.MegatronBertForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return decoder()


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built, so verified: requests of several tokens too, fed to the model as they are here."""
    path: Path = tmp_path_factory.mktemp("lookahead") / "model"
    write_engine(capture_decoder(model, DECODER_OPTIONS), path, OPTIONS)
    return path


@pytest.fixture
def client(folder: Path) -> Iterator[StreamClient]:
    plain = open_instance(folder)
    engine = RecordingEngine(plain.engine, overlaps=False)
    instance = ModelInstance(plain.manifest, plain.arena, engine, 600.0)
    driver = StreamDriver(instance, TokenizerConfig(), 64)
    yield StreamClient(driver)
    driver.close()


@pytest.mark.filterwarnings("ignore")
def test_the_operator_is_not_causal_and_the_program_says_so(folder: Path) -> None:
    capture = capture_decoder(decoder(), DECODER_OPTIONS)
    target = torch.ops.inplace.attention.default
    nodes = capture.exported.graph.find_nodes(op="call_function", target=target)
    assert [node.kwargs["causal"] for node in nodes] == [False, False]
    assert f"at most {CHUNK} (chunk)" in open_instance(folder).manifest.built_with["capture"]
    program = open_instance(folder).program
    assert program.lookahead
    assert program.token_budget == ROWS * CHUNK, "room for whole prompts, whatever was asked for"
    fields = program.model_dump() | {"max_tokens": CHUNK}
    with pytest.raises(ValueError, match="room for a whole chunk of each row, 72 tokens"):
        Program.model_validate({name: fields[name] for name in Program.model_fields})


@pytest.mark.filterwarnings("ignore")
def test_prompts_beside_running_generations_are_fed_whole(
    client: StreamClient, model: PreTrainedModel
) -> None:
    lengths = [CHUNK, 7, 20, 1, 13, CHUNK, 2, 9]
    prompts = [random_prompt(seed, length) for seed, length in enumerate(lengths)]
    channels = [
        client.generate(f"s{index}", prompt, 12 + index, end=True)
        for index, prompt in enumerate(prompts)
    ]
    for index, channel in enumerate(channels):
        assert channel.finish_reason == "length"
        assert channel.tokens == generate(model, prompts[index], 12 + index)
    fed = sorted(count for counts in client.engine.counts for count in counts if count > 1)
    assert fed == sorted(length for length in lengths if length > 1)


def test_a_prompt_longer_than_the_chunk_is_refused(client: StreamClient) -> None:
    text = f"{CHUNK + 1} tokens do not fit into one step, which takes {CHUNK} of a sequence"
    long = random_prompt(0, CHUNK + 1)
    client.generate("a", long).assert_refused(Code.CAPACITY, text)
    client.step("b", long, start=True).assert_refused(Code.CAPACITY, text)
    assert client.num_free_slots() == OPTIONS.slots
    # a generation leaves a token that is fed with what follows
    assert client.generate("c", random_prompt(1, 3), 2).finish_reason == "length"
    client.generate("c", random_prompt(2, CHUNK), 2, start=False).assert_refused(
        Code.CAPACITY, text
    )
    more = client.generate("c", random_prompt(2, CHUNK - 1), 2, start=False)
    assert more.finish_reason == "length"


def test_steps_of_a_server_are_fed_whole_or_refused(folder: Path) -> None:
    instance = open_instance(folder)
    driver = StepDriver(instance)
    requests = [
        Request(index + 1, True, False, {"input_ids": torch.tensor([random_prompt(index, length)])})
        for index, length in enumerate((CHUNK, CHUNK, CHUNK, CHUNK + 1))
    ]
    answers = driver.run(requests)
    assert [isinstance(answer, RequestError) for answer in answers] == [False, False, False, True]
    assert [instance.table.find(index).length for index in (1, 2, 3)] == [CHUNK] * 3
    driver.close()


def test_verification_finds_a_causal_mask_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LayerStates.attend

    def attend(self: LayerStates, *args: object, **kwargs: object) -> torch.Tensor:
        masks = {layer: type(mask)() for layer, mask in self.masks.items()}
        object.__setattr__(self, "masks", masks)
        return plain(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerStates, "attend", attend)
    capture = capture_decoder(decoder(), DECODER_OPTIONS)
    with pytest.raises(BuildError, match="differs from the model"):
        write_engine(capture, tmp_path / "model", OPTIONS)
