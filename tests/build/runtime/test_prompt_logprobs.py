"""Log-probabilities of the tokens that requests feed, beside those of transformers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers.parsing import TokenizerConfig
from inplace.drivers.step_driver import StepDriver
from inplace.drivers.stream_driver import StreamDriver
from inplace.engines.torch_engine import TorchEngine
from inplace.errors import Code, RequestError
from inplace.protocol import PROMPT_OUTPUTS
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.schema.prefixes import PrefixOptions
from support.driving import RecordingEngine
from support.models import VOCABULARY
from support.served import CHUNK, MODEL
from support.streaming import StreamClient
from torch import Tensor
from transformers import LlamaForCausalLM

TOP = 4
ASKED_OUTPUTS = frozenset(PROMPT_OUTPUTS)


@pytest.fixture(scope="module")
def opened(stream_models: Path) -> ModelInstance:
    return ModelInstance.open(stream_models / MODEL / "1")


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(llama_folder).eval()


@pytest.fixture
def instance(opened: ModelInstance) -> ModelInstance:
    """The model with engines that record their steps, its memory poisoned."""
    for tensor in opened.arena.tensors.values():
        tensor.fill_(float("nan"))
    assert opened.prompt_engine is not None
    engines = RecordingEngine(opened.engine), RecordingEngine(opened.prompt_engine)
    return ModelInstance(opened.manifest, opened.arena, engines[0], 600.0, prompt_engine=engines[1])


@pytest.fixture
def driver(instance: ModelInstance) -> Iterator[StepDriver]:
    running = StepDriver(instance)
    yield running
    running.close()


def recorded(instance: ModelInstance) -> tuple[RecordingEngine, RecordingEngine]:
    """What ran the step, and what ran the program with log-probabilities."""
    step, prompt = instance.engine, instance.prompt_engine
    assert isinstance(step, RecordingEngine)
    assert isinstance(prompt, RecordingEngine)
    return step, prompt


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (count,), generator=generator).tolist() for count in lengths]


def request(sequence: int, ids: list[int], *, start: bool = True, **parameters: Any) -> Request:
    inputs = {"input_ids": torch.tensor([ids], dtype=torch.int64)}
    return Request(sequence, start, False, inputs, parameters=parameters)


def run(driver: StepDriver, *requests: Request) -> list[dict[str, Tensor]]:
    answers = driver.run(requests)
    for answer in answers:
        assert not isinstance(answer, RequestError), answer
    return [answer for answer in answers if not isinstance(answer, RequestError)]


def check(
    llama: LlamaForCausalLM, outputs: Any, before: list[int], ids: list[int], known: int
) -> None:
    """Compare the answer to tokens that follow others; all but the first ``known`` have values."""
    with torch.no_grad():
        scores = llama(torch.tensor([before + ids])).logits[0].float()
    logprobs = scores.log_softmax(-1)[len(before) + known - 1 : -1]
    tokens = torch.tensor(ids)[known:, None]
    got = {name: outputs[name][0] for name in ASKED_OUTPUTS}
    assert got["prompt_tokens"].tolist() == ids
    assert got["prompt_token_logprobs"].dtype == got["prompt_top_logprobs"].dtype == torch.float32
    assert got["prompt_token_logprobs"][:known].isnan().all()
    assert got["prompt_ranks"][:known].tolist() == [0] * known
    assert got["prompt_top_tokens"][:known].tolist() == [[-1] * TOP] * known
    expected = logprobs.gather(1, tokens)
    assert torch.allclose(got["prompt_token_logprobs"][known:, None], expected, rtol=0, atol=1e-4)
    assert torch.equal(got["prompt_ranks"][known:], (logprobs > expected).sum(1) + 1)
    top = logprobs.topk(TOP)
    assert torch.equal(got["prompt_top_tokens"][known:], top.indices)
    assert torch.allclose(got["prompt_top_logprobs"][known:], top.values, rtol=0, atol=1e-4)


def test_log_probabilities_are_those_of_transformers(
    driver: StepDriver, llama: LlamaForCausalLM
) -> None:
    """Ragged rows in one batch; some prompts take several chunks, and one has one token."""
    given = prompts(5, 2 * CHUNK + 3, 1, CHUNK, CHUNK + 1)
    requests = [request(1 + row, ids, prompt_logprobs=TOP) for row, ids in enumerate(given)]
    for ids, outputs in zip(given, run(driver, *requests), strict=True):
        check(llama, outputs, [], ids, 1)
        assert outputs["next_token"].tolist() == [[_next_token(llama, ids)]]


def test_rows_that_do_not_ask_are_run_by_the_step(
    driver: StepDriver, llama: LlamaForCausalLM
) -> None:
    step, prompt = recorded(driver.instance)
    asking, silent, long = prompts(2 * CHUNK, 6, CHUNK + 1)
    [alone] = run(driver, request(2, silent))
    assert step.counts == [[6]]
    assert not prompt.counts
    together = run(
        driver,
        request(1, asking, prompt_logprobs=TOP),
        request(2, silent, logits=True),
        request(3, long, prompt_logprobs=TOP),
    )
    assert prompt.counts == [[CHUNK, CHUNK], [CHUNK]]
    assert step.counts == [[6], [6], [1]]  # nothing follows the last token of a prompt
    check(llama, together[0], [], asking, 1)
    check(llama, together[2], [], long, 1)
    assert not ASKED_OUTPUTS & together[1].keys()
    assert torch.equal(together[1]["next_token"], alone["next_token"])
    [following] = run(driver, request(1, [7], start=False, prompt_logprobs=TOP))
    assert prompt.counts == [[CHUNK, CHUNK], [CHUNK]]
    assert following["prompt_ranks"].tolist() == [[0]]


def test_both_programs_share_their_weights(
    opened: ModelInstance, llama: LlamaForCausalLM, stream_models: Path
) -> None:
    """In the file, whose storages are written once, and in memory, packed weights included."""
    step, prompt = opened.manifest.programs
    assert step.engine.file == prompt.engine.file
    size = (stream_models / MODEL / "1" / step.engine.file).stat().st_size
    tensors = []
    for engine in (opened.engine, opened.prompt_engine):
        assert isinstance(engine, TorchEngine)
        module = engine._module
        tensors.append({_address(tensor) for tensor in module.buffers() if tensor.numel() >= 64})
    assert tensors[0] == tensors[1]
    weights = sum(parameter.nbytes for parameter in llama.parameters())
    assert size < 2 * weights


def test_no_alternatives_and_all_options_together(
    driver: StepDriver, llama: LlamaForCausalLM
) -> None:
    [ids] = prompts(9)
    [outputs] = run(driver, request(1, ids, prompt_logprobs=0, logprobs=2))
    assert outputs.keys() & ASKED_OUTPUTS == ASKED_OUTPUTS - {
        "prompt_top_logprobs",
        "prompt_top_tokens",
    }
    assert outputs["top_tokens"].shape == (1, 1, 2)
    assert outputs["prompt_token_logprobs"].shape == (1, 9)


def test_generations_bring_them_with_their_first_token(
    instance: ModelInstance, llama: LlamaForCausalLM
) -> None:
    given, more = prompts(CHUNK + 5, 4)
    driver = StreamDriver(instance, TokenizerConfig(), 64)
    try:
        client = StreamClient(driver)
        plain = client.generate(1, given, 6).wait()
        asked = client.generate(2, given, 6, prompt_logprobs=TOP).wait()
        assert asked.tokens == plain.tokens
        check(llama, asked.responses[0], [], given, 1)
        assert all(not ASKED_OUTPUTS & response.keys() for response in asked.responses[1:])
        # the last generated token is fed before the new ones, so each of those has a value
        again = client.generate(2, more, 2, start=False, prompt_logprobs=TOP).wait()
        check(llama, again.responses[0], given + asked.tokens, more, 0)
        assert again.tokens == client.generate(1, more, 2, start=False).wait().tokens
    finally:
        driver.close()


def test_a_prompt_whose_log_probabilities_are_asked_for_reuses_no_prefix_and_leaves_one(
    instance: ModelInstance, llama: LlamaForCausalLM
) -> None:
    instance.reuse_prefixes(PrefixOptions())
    driver = StepDriver(instance)
    [given] = prompts(CHUNK + 5)
    try:
        for sequence, ids, asked in ((1, given, {}), (2, given, {"prompt_logprobs": TOP})):
            values: dict[str, Any] = {"sequence_key": "mine", **asked}
            [outputs] = run(driver, replace(request(sequence, ids, **values), end=True))
        check(llama, outputs, [], given, 1)
        assert _reused(instance) == 0
        longer = [*given, 3]
        [outputs] = run(driver, request(3, longer, sequence_key="mine"))
        assert outputs["next_token"].tolist() == [[_next_token(llama, longer)]]
        assert _reused(instance) == len(given)
        [outputs] = run(
            driver, request(3, [7, 1], start=False, sequence_key="mine", prompt_logprobs=TOP)
        )
        check(llama, outputs, longer, [7, 1], 1)
    finally:
        driver.close()


def _reused(instance: ModelInstance) -> float:
    return instance.observer.metrics.snapshot()["inplace_prefix_tokens_total", ""]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_one_part_fails_the_step(driver: StepDriver, failing: int) -> None:
    engines = recorded(driver.instance)
    asking, silent = prompts(6, 5)
    run(driver, request(1, asking), request(2, silent))
    engines[failing].fail_at = 1
    answers = driver.run(
        [
            request(1, asking, start=False, prompt_logprobs=1),
            request(2, silent, start=False),
        ]
    )
    for answer in answers:
        assert isinstance(answer, RequestError)
        assert answer.code is Code.ENGINE_FAILED
    lengths = [driver.instance.table.find(sequence).length for sequence in (1, 2)]
    assert lengths == [6, 5]
    run(driver, request(1, asking, start=False, prompt_logprobs=1), request(2, silent, start=False))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(21, "from 0"), (-1, "from 0"), ("x", "whole number"), (True, "whole number")],
)
def test_other_values_are_refused(driver: StepDriver, value: Any, expected: str) -> None:
    [answer] = driver.run([request(1, [1, 2], prompt_logprobs=value)])
    assert isinstance(answer, RequestError)
    assert answer.code is Code.BAD_PARAMETER
    assert expected in str(answer)
    assert len(driver.instance.table) == 0


@pytest.mark.parametrize("number", [None, 0])
def test_outputs_that_it_does_not_ask_for_are_refused(
    driver: StepDriver, number: int | None
) -> None:
    parameters: dict[str, Any] = {} if number is None else {"prompt_logprobs": number}
    asked = request(1, [1, 2], **parameters)
    asked.requested_outputs = frozenset({"next_token", "prompt_ranks", "prompt_top_tokens"})
    [answer] = driver.run([asked])
    assert isinstance(answer, RequestError)
    assert answer.code is Code.BAD_OUTPUT
    missing = ["prompt_ranks", "prompt_top_tokens"] if number is None else ["prompt_top_tokens"]
    assert f"the outputs {missing} need the parameters ['prompt_logprobs']" in str(answer)
    assert len(driver.instance.table) == 0


def test_an_engine_without_the_program_refuses(opened: ModelInstance) -> None:
    plain = ModelInstance(opened.manifest, opened.arena, opened.engine, 600.0)
    driver = StepDriver(plain)
    try:
        [answer] = driver.run([request(1, [1, 2], prompt_logprobs=0)])
    finally:
        driver.close()
    assert isinstance(answer, RequestError)
    assert answer.code is Code.BAD_PARAMETER
    assert "build a language model with --prompt-logprobs" in str(answer)


def _address(tensor: Tensor) -> int:
    """Where a tensor is. Weights that oneDNN has packed have no address: the object itself."""
    return id(tensor) if tensor.is_mkldnn else tensor.data_ptr()


def _next_token(llama: LlamaForCausalLM, ids: list[int]) -> int:
    with torch.no_grad():
        return int(llama(torch.tensor([ids])).logits[0, -1].argmax())
