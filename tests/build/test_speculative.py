"""Speculative decoding: drafted tokens change how fast tokens come, and never which ones."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers import StreamDriver, TokenizerConfig, engine_thread
from inplace.engines import Finish
from inplace.engines.arena import Arena
from inplace.engines.tensorrt.steps import (
    InputBuffers,
    StepSize,
    decode_sizes,
    mixed_sizes,
    smallest_fit,
    step_size,
)
from inplace.errors import Code, LoadError
from inplace.operators import sample
from inplace.runtime import speculative
from inplace.runtime.batcher import Sample, add_samples
from inplace.runtime.schedules import open_model
from inplace.runtime.speculative import SpeculativeInstance
from inplace.schema.prefixes import PrefixOptions
from inplace.schema.served import Manifest
from inplace.trt import TensorRT
from inplace_builder import BuildError, BuildOptions, Capture, DecoderOptions, write_engine
from inplace_builder.capture.drafted import SpeculativeCapture
from inplace_builder.capture.speculative import capture_speculative, first_layers
from inplace_builder.served.verify_speculative import verify_speculative
from pydantic import ValidationError
from support.driving import RecordingEngine
from support.models import greedy, late_token, tiny_llama
from support.network_interpreter import interpret
from support.plugin_decoders import plugin_network
from support.plugin_networks import tensorrt_with_plugins
from support.storing import left_in, memory_bucket, store_in
from support.streaming import StreamClient, slow_steps, wait_until
from support.vocabulary import added, tiny_tokenizer
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

DRAFTED, TOKENS, POSITIONS, ROWS = 3, 24, 48, 4
"""Tokens of a draft, tokens of the vocabulary, positions of a sequence, and rows of a step."""
LIMITS = DecoderOptions(capacity=POSITIONS, max_rows=ROWS, chunk=8, max_tokens=32)
OPTIONS = BuildOptions(
    slots=ROWS,
    max_rows=ROWS,
    capacity=POSITIONS,
    chunk=8,
    serve="stream",
    draft_layers=1,
    draft_tokens=DRAFTED,
)
PROMPTS = {"a": [5], "b": [7, 3, 11, 2, 9, 4, 1, 8, 6, 3, 12], "c": [1, 2]}


def model_of(folder: Path, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A model whose first layer often, but not always, chooses the tokens of all its layers."""
    model = tiny_llama(folder, **{"vocab_size": TOKENS, **changes})
    torch.manual_seed(seed)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            if seed:
                for parameter in layer.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
            if index:
                layer.self_attn.o_proj.weight.mul_(0.4)
                layer.mlp.down_proj.weight.mul_(0.4)
    return model


@dataclass(frozen=True)
class Built:
    """An engine, and what it was made of."""

    folder: Path
    capture: SpeculativeCapture
    model: LlamaForCausalLM
    draft: PreTrainedModel


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An engine whose draft is the model's first layer."""
    root = tmp_path_factory.mktemp("own")
    model = model_of(root / "model")
    draft = first_layers(model, 1)
    capture = capture_speculative(model, draft, LIMITS, DRAFTED)
    write_engine(capture, root / "engine", OPTIONS)
    return Built(root / "engine" / "1", capture, model, draft)


@pytest.fixture(scope="module")
def other(own: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An engine whose draft is a model of its own, which keeps states of its own."""
    root = tmp_path_factory.mktemp("other")
    draft = model_of(root / "draft", seed=3, num_hidden_layers=1, num_key_value_heads=4)
    capture = capture_speculative(own.model, draft, LIMITS, DRAFTED)
    write_engine(capture, root / "engine", OPTIONS)
    return Built(root / "engine" / "1", capture, own.model, draft)


def instance_of(built: Built) -> SpeculativeInstance:
    instance = open_model(
        built.folder,
        Manifest.load(built.folder),
        idle_timeout=600.0,
        trust=None,
        call_rows={},
        loop_calls=None,
    )
    assert isinstance(instance, SpeculativeInstance)
    instance.engine = RecordingEngine(instance.engine)
    instance._draft_engine = RecordingEngine(instance._draft_engine)
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan"))
    return instance


@pytest.fixture(params=["own", "other"])
def built(request: pytest.FixtureRequest) -> Built:
    result: Built = request.getfixturevalue(request.param)
    return result


@pytest.fixture
def client(built: Built) -> Iterator[StreamClient]:
    yield from clients(built)


def clients(built: Built, config: TokenizerConfig | None = None) -> Iterator[StreamClient]:
    instance = instance_of(built)
    driver = StreamDriver(instance, config or TokenizerConfig(), 8, engine_thread())
    yield StreamClient(driver)
    driver.close()


def drafted(client: StreamClient) -> tuple[float, float]:
    """How many tokens were accepted and rejected."""
    metrics = client.metrics()
    name = "inplace_draft_tokens_total"
    return metrics[name, "accepted"], metrics[name, "rejected"]


def test_three_interleaved_generations_have_the_models_own_greedy_tokens(
    client: StreamClient, built: Built
) -> None:
    channels = {name: client.generate(name, ids, 30) for name, ids in PROMPTS.items()}
    for name, ids in PROMPTS.items():
        assert channels[name].wait().tokens == greedy(built.model, ids, 30)
        assert channels[name].finish_reason == "length"
    accepted, rejected = drafted(client)
    assert accepted > 0
    assert rejected > 0
    assert len(client.engine.counts) < sum(30 for _ in PROMPTS)
    rounds = [counts for counts in client.engine.counts if counts[:3] == [DRAFTED + 1] * 3]
    assert rounds, "three generations verify their tokens in one step"


def test_a_step_for_each_token_is_saved_where_drafted_tokens_are_accepted(own: Built) -> None:
    for client in clients(own):
        tokens = client.generate("a", PROMPTS["a"], 30).wait().tokens
        accepted, _ = drafted(client)
        assert tokens == greedy(own.model, PROMPTS["a"], 30)
        assert len(client.engine.counts) == 30 - accepted < 24


def test_a_sequence_continues_after_its_generation_with_tokens_and_another_generation(
    client: StreamClient, built: Built
) -> None:
    ids = PROMPTS["b"]
    first = client.generate("b", ids, 7).wait().tokens
    history = [*ids, *first, 4, 4]
    step = client.step("b", [4, 4], position=len(ids) + 7).next_token
    assert step == greedy(built.model, history, 1)[0]
    second = client.generate("b", [step], 12, start=False).wait().tokens
    assert second == greedy(built.model, [*history, step], 12)


def test_a_copy_has_the_tokens_of_its_sequence_and_the_states_of_both_programs(
    client: StreamClient, built: Built
) -> None:
    key: dict[str, Any] = {"sequence_key": "mine"}
    ids = PROMPTS["c"]
    history = [*ids, *client.generate("a", ids, 7, **key).wait().tokens]
    counts, before = list[tuple[float, float]](), drafted(client)
    for name, tokens in (("other", [4, 9]), ("copy", []), ("a", [])):
        start: dict[str, Any] = {"start": False} if name == "a" else {"from": "a"}
        answer = client.generate(name, tokens, 25, **key, **start).wait()
        assert answer.tokens == greedy(built.model, [*history, *tokens], 25)
        after = drafted(client)
        counts.append((after[0] - before[0], after[1] - before[1]))
        before = after
    assert counts[1] == counts[2]
    assert counts[2][0] > 0, counts


def test_a_generation_goes_on_in_another_server_with_the_states_of_both_programs(
    built: Built,
) -> None:
    key: dict[str, Any] = {"sequence_key": "mine"}
    bucket, servers = memory_bucket(), list[StreamClient]()
    for _ in range(2):
        instance = instance_of(built)
        store_in(instance, bucket)
        servers.append(StreamClient(StreamDriver(instance, TokenizerConfig(), 8, engine_thread())))
    first, second = servers
    try:
        for name, ids in PROMPTS.items():
            with slow_steps(first, 0.005):
                running = first.generate(name, ids, 30, **key).wait_for_tokens(4)
                first.driver.hand_over()
                running.assert_refused(Code.SHUTDOWN, "the sequence was stored", retryable=True)
            got = running.tokens
            restored: dict[str, Any] = {"restore": True, "position": len(ids) + len(got), **key}
            rest = second.generate(name, [], 30 - len(got), end=True, **restored).wait()
            assert got + rest.tokens == greedy(built.model, ids, 30)
        assert drafted(second)[0] > 0
    finally:
        for server in servers:
            server.driver.close()
            assert server.driver.instance.snapshots is not None
            server.driver.instance.snapshots.close()
    assert left_in(bucket) == []


def test_an_engine_with_a_draft_refuses_to_reuse_prefixes(own: Built) -> None:
    with pytest.raises(LoadError, match="without a draft"):
        instance_of(own).reuse_prefixes(PrefixOptions())


def test_an_end_token_among_accepted_ones_ends_the_generation_there(own: Built) -> None:
    expected = greedy(own.model, PROMPTS["c"], 40)
    for end in {late_token(expected), expected[5]}:
        length = expected.index(end) + 1
        for client in clients(own, TokenizerConfig(eos_token_ids=frozenset({end}))):
            channel = client.generate("c", PROMPTS["c"], 40)
            assert (channel.finish_reason, channel.tokens) == ("eos", expected[:length])
            history = [*PROMPTS["c"], *expected[:length], 3]
            step = client.step("c", [3], position=len(history) - 1)
            assert step.next_token == greedy(own.model, history, 1)[0]


def test_text_is_streamed_and_a_stop_text_ends_it(own: Built) -> None:
    expected = greedy(own.model, PROMPTS["a"], 30)
    for client in clients(own, TokenizerConfig(tiny_tokenizer())):
        whole = client.generate("a", PROMPTS["a"], 30, ignore_eos=True).wait()
        assert (whole.tokens, whole.text) == (expected, added(PROMPTS["a"], expected))
        stop = whole.text[9:11]
        stopped = client.generate("b", PROMPTS["a"], 30, ignore_eos=True, stop=(stop,))
        assert stopped.finish_reason == "stop"
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert stopped.tokens == expected[: len(stopped.tokens)]


def test_a_generation_fills_the_capacity_and_no_more(client: StreamClient, built: Built) -> None:
    ids = PROMPTS["b"]
    channel = client.generate("b", ids, 100)
    assert channel.finish_reason == "capacity"
    assert channel.tokens == greedy(built.model, ids, POSITIONS - len(ids))
    client.step("b", [1]).assert_refused(Code.CAPACITY)


def test_a_generation_with_a_grammar_is_not_drafted_and_disturbs_no_drafted_one(
    tmp_path: Path,
) -> None:
    """Nor the generation that goes on behind it: the draft's states catch up with its tokens."""
    tokenizer = tiny_tokenizer()
    sizes: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size()}
    model = model_of(tmp_path / "model", **sizes)
    draft = model_of(tmp_path / "draft", seed=3, num_hidden_layers=1, **sizes)
    capture = capture_speculative(model, draft, LIMITS, DRAFTED)
    write_engine(capture, tmp_path / "engine", OPTIONS)
    built = Built(tmp_path / "engine" / "1", capture, model, draft)
    regex = "([0-9][a-z]){6}"
    for client in clients(built, TokenizerConfig(tokenizer)):
        beside = client.generate("a", PROMPTS["a"], 30)
        follower = client.generate("b", PROMPTS["b"], 12, regex=regex).wait()
        assert beside.wait().tokens == greedy(model, PROMPTS["a"], 30)
        assert re.fullmatch(regex, follower.text), follower.error
        before = drafted(client)
        again = client.generate("c", PROMPTS["b"], 12, regex=regex).wait()
        assert again.tokens == follower.tokens
        assert drafted(client) == before
        free = client.generate("b", [4, 9], 20, start=False).wait()
        assert free.tokens == greedy(model, [*PROMPTS["b"], *follower.tokens, 4, 9], 20)
        assert sum(drafted(client)) > sum(before)


def test_a_client_that_leaves_in_the_middle_frees_its_slot_and_disturbs_nobody(
    client: StreamClient, built: Built
) -> None:
    with slow_steps(client, 0.02):
        leaving = client.generate("c", PROMPTS["c"], 40)
        staying = client.generate("a", PROMPTS["a"], 40)
        leaving.wait_for_tokens(2)
        leaving.client_cancelled = True
        assert leaving.finish_reason == "cancelled"
    assert staying.wait().tokens == greedy(built.model, PROMPTS["a"], 40)
    wait_until(lambda: client.num_free_slots() == ROWS - 1)
    assert client.generate("c", PROMPTS["b"], 9).wait().tokens == greedy(
        built.model, PROMPTS["b"], 9
    )


def test_a_failed_call_of_the_draft_ends_its_generations_and_no_later_one(
    client: StreamClient, built: Built
) -> None:
    instance = client.driver.instance
    assert isinstance(instance, SpeculativeInstance)
    draft = instance._draft_engine
    assert isinstance(draft, RecordingEngine)
    draft.fail_at = 5
    client.generate("a", PROMPTS["a"], 30).assert_refused(
        Code.ENGINE_FAILED, "out of luck", retryable=True
    )
    assert client.num_free_slots() == ROWS
    tokens = client.generate("a", PROMPTS["a"], 30).wait().tokens
    assert tokens == greedy(built.model, PROMPTS["a"], 30)


SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.1, "seed": 7},
    "top": {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "seed": -2},
    "penalty": {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.6},
    "greedy penalty": {"repetition_penalty": 1.6, "logprobs": 2},
    "bias": {"temperature": 1.0, "seed": 1, "logit_bias": "3:2,4:-9", "logprobs": 2},
}


def reference_tokens(
    model: LlamaForCausalLM, ids: list[int], count: int, **parameters: Any
) -> tuple[list[int], list[float]]:
    """What the model samples one by one with these parameters, and log-probabilities."""
    ids, logprobs = list(ids), list[float]()
    for _ in range(count):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[:, -1].float()
        raw = scores.log_softmax(-1)
        for entry in filter(None, parameters.get("logit_bias", "").split(",")):
            token, bias = entry.split(":")
            scores[0, int(token)] += float(bias)
        seen = torch.tensor(sorted(set(ids)))
        penalty = parameters.get("repetition_penalty", 1.0)
        values = scores[0, seen]
        scores[0, seen] = torch.where(values > 0, values / penalty, values * penalty)
        chosen = sample(
            scores,
            torch.tensor([parameters.get("temperature", 0.0)]),
            torch.tensor([parameters.get("top_k", 0)], dtype=torch.int32),
            torch.tensor([parameters.get("top_p", 1.0)]),
            torch.tensor([parameters.get("seed", 0)]),
            torch.tensor([len(ids)], dtype=torch.int32),
        )
        ids.append(int(chosen))
        logprobs.append(float(raw[0, ids[-1]]))
    return ids[-count:], logprobs


def test_sampled_tokens_are_those_that_the_model_samples_one_by_one(
    client: StreamClient, built: Built
) -> None:
    channels = {
        name: client.generate(name, PROMPTS["c"], 25, end=True, **parameters)
        for name, parameters in SAMPLINGS.items()
    }
    for name, channel in channels.items():
        tokens, logprobs = reference_tokens(built.model, PROMPTS["c"], 25, **SAMPLINGS[name])
        assert channel.wait().tokens == tokens, name
        if "logprobs" in SAMPLINGS[name]:
            given = [
                value
                for response in channel.responses
                for value in torch.as_tensor(response["token_logprobs"]).flatten().tolist()
            ]
            assert len(given) == 25
            assert all(isclose(a, b, abs_tol=1e-4) for a, b in zip(given, logprobs, strict=True))


DRAWS = 2000


@pytest.mark.long
def test_the_distribution_of_sampled_tokens_is_the_models(other: Built) -> None:
    """The joint effect of drafts, acceptance and corrections, by a chi-square test.

    The exact probabilities of the second and third token are sums over all tokens before them.
    """
    prompt, temperature = PROMPTS["c"], 0.9
    instance = instance_of(other)
    counts = torch.zeros(2, TOKENS)
    driver = StreamDriver(instance, TokenizerConfig(), DRAWS, engine_thread())
    client = StreamClient(driver)
    channels = [
        client.generate(seed + 1, prompt, 3, end=True, temperature=temperature, seed=seed)
        for seed in range(DRAWS)
    ]
    for channel in channels:
        _, second, third = channel.wait().tokens
        counts[0, second] += 1
        counts[1, third] += 1
    accepted, rejected = drafted(client)
    driver.close()
    assert min(accepted, rejected) > DRAWS / 50, "both happen"
    expected, drafts = (
        marginals(model, prompt, temperature) for model in (other.model, other.draft)
    )
    for observed, probabilities, wrong in zip(counts, expected, drafts, strict=True):
        assert p_value(observed, probabilities) > 0.01
        assert p_value(observed, wrong) < 1e-9, "the test tells the draft's distribution apart"


def marginals(model: LlamaForCausalLM, prompt: list[int], temperature: float) -> Tensor:
    """The probabilities of the second and of the third token, ``[2, TOKENS]``."""
    every = torch.arange(TOKENS)
    prefixes, weights, rows = torch.tensor([prompt]), torch.ones(1), []
    for _ in range(3):
        with torch.no_grad():
            scores = model(prefixes).logits[:, -1].double() / temperature
        joint = weights[:, None] * scores.softmax(-1)
        rows.append(joint.sum(0))
        weights = joint.flatten()
        prefixes = torch.cat(
            [prefixes.repeat_interleave(TOKENS, 0), every.repeat(len(prefixes))[:, None]], 1
        )
    return torch.stack(rows[1:])


def p_value(observed: Tensor, probabilities: Tensor) -> float:
    """Of a chi-square test; tokens that are expected less than five times are one class."""
    expected = probabilities * observed.sum()
    rare = expected < 5
    counts, means = (
        torch.cat([each[~rare], each[rare].sum()[None]]).double() for each in (observed, expected)
    )
    statistic = ((counts - means) ** 2 / means.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor(len(means) - 1).double() / 2, statistic / 2))


def test_verification_fails_if_tokens_are_sampled_behind_the_wrong_ones(
    own: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(own.folder)
    notes = verify_speculative(own.folder, manifest, own.capture)
    assert set(notes) == {"verified_error", "draft_accepted"}

    def shifted(program: Any, batch: Any, samples: list[Sample]) -> Any:
        return add_samples(
            program, batch, [replace(each, token=each.token + 1) for each in samples]
        )

    monkeypatch.setattr(speculative, "add_samples", shifted)
    with pytest.raises(BuildError, match="differs from the model"):
        verify_speculative(own.folder, manifest, own.capture)


class NetworkEngine:
    """A program's TensorRT network, interpreted over an arena in steps of the captured sizes."""

    overlaps = False

    def __init__(self, capture: Capture, arena: Arena, tensorrt: TensorRT) -> None:
        self._network, self._program = plugin_network(capture, tensorrt), capture.program
        self._states = {state.name: arena.tensors[state.name] for state in capture.states}
        self.sizes: list[StepSize] = []

    def on_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def launch(self, inputs: Mapping[str, Tensor], requested: Collection[str]) -> Finish:
        step = step_size(self._program, inputs)
        sizes = [*decode_sizes(self._program), *mixed_sizes(self._program)]
        size = smallest_fit(sizes, step)
        assert size is not None
        self.sizes.append(step)
        buffers = InputBuffers(self._program, size, torch.device("cpu"))
        buffers.fill({name: inputs[name].contiguous() for name in inputs})
        buffers.upload()
        given = {**buffers.tensors, **self._states, **self._network.bound_weights}
        for spec in self._program.inputs:
            if spec.name not in given:
                given[spec.name] = torch.zeros((size.rows, *spec.shape), dtype=spec.dtype.as_torch)
                given[spec.name][: step.rows] = inputs[spec.name]
        outputs = interpret(self._network, {name: given[name] for name in self._network.inputs})
        return lambda _: {name: outputs[name][: step.rows] for name in requested}


def test_rounds_of_tensorrt_networks_in_captured_sizes_give_the_models_tokens(own: Built) -> None:
    """Both programs, with the padding of captured steps; plans are run in tests/gpu."""
    tensorrt = tensorrt_with_plugins()
    instance = instance_of(own)
    step = NetworkEngine(own.capture.model, instance.arena, tensorrt)
    instance.engine = step
    instance._draft_engine = NetworkEngine(own.capture.draft, instance.arena, tensorrt)
    driver = StreamDriver(instance, TokenizerConfig(), 8, engine_thread())
    client = StreamClient(driver)
    channels = {name: client.generate(name, ids, 12) for name, ids in PROMPTS.items()}
    for name, ids in PROMPTS.items():
        assert channels[name].wait().tokens == greedy(own.model, ids, 12)
    accepted, rejected = drafted(client)
    driver.close()
    assert min(accepted, rejected) > 0
    rounds = [size for size in step.sizes if size.rows > size.tokens]
    assert any(size.tokens == 3 * (DRAFTED + 1) for size in rounds), "they are mixed steps"


def test_the_draft_of_own_layers_keeps_nothing_of_its_own(own: Built, other: Built) -> None:
    model, draft = Manifest.load(own.folder).programs
    assert set(draft.states) < set(model.states)
    model, draft = Manifest.load(other.folder).programs
    assert not set(draft.states) & set(model.states)
    assert own.capture.draft.reference is not own.capture.model.reference
    weights = dict(first_layers(own.model, 1).named_parameters())
    assert all(weights[name] is dict(own.model.named_parameters())[name] for name in weights)


def test_a_manifest_whose_decoding_is_not_possible_is_refused(own: Built) -> None:
    manifest = Manifest.load(own.folder).model_dump(mode="json", by_alias=True)
    schedules = manifest["schedules"]
    calls = schedules[1]["calls"]
    for changes, message in (
        ({"schedules": [schedules[0], schedules[1] | {"calls": calls[::-1]}]}, "one call of a pro"),
        ({"schedules": [schedules[0], schedules[1] | {"requests": ["start", "decode"]}]}, "for no"),
        ({"states": [{**state, "update": "ring"} for state in manifest["states"]]}, "not appended"),
        ({"programs": [{**each, "max_rows": 4} for each in manifest["programs"]]}, "need 5 rows"),
    ):
        with pytest.raises(ValidationError, match=message):
            Manifest.model_validate_json(json.dumps(manifest | changes))


def test_models_whose_tokens_cannot_be_taken_back_are_refused(tmp_path: Path, own: Built) -> None:
    config = MistralConfig(**(own.model.config.to_dict() | {"sliding_window": 6}))
    ring = MistralForCausalLM(config).eval()
    with pytest.raises(BuildError, match=r"the model keeps 4 states .* a ring of 13 positions"):
        capture_speculative(ring, first_layers(ring, 1), LIMITS, DRAFTED)
    vocabulary = tiny_llama(tmp_path / "other", vocab_size=TOKENS + 1, num_hidden_layers=1)
    with pytest.raises(BuildError, match="a vocabulary of 25 tokens, the model one of 24"):
        capture_speculative(own.model, vocabulary, LIMITS, DRAFTED)
    with pytest.raises(BuildError, match="the model has 2 layers, so a draft has 1 to 1"):
        first_layers(own.model, 2)
    with pytest.raises(BuildError, match="a chunk must have 9 tokens"):
        capture_speculative(own.model, own.model, LIMITS, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": "x"}, "leave one out"),
        ({"draft_layers": None}, "there is no draft"),
        ({"draft_tokens": 0}, "at least 1"),
        ({"draft_layers": 0}, "at least 1"),
        ({"serve": "step"}, "choose serve stream"),
        ({"prompt_logprobs": True}, "leave one out"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BuildError, match=message):
        replace(OPTIONS, **changes)
