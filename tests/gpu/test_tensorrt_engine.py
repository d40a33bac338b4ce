"""TensorRT engines on the GPU: built, verified, bound, replayed, and refused where they must be."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inplace.drivers.step_driver import StepDriver
from inplace.engines.arena import Arena
from inplace.errors import LoadError
from inplace.runtime.instance import ModelInstance
from inplace.runtime.loading import load_engine
from inplace.runtime.requests import Request
from inplace.schema.files import EngineFolder
from inplace.schema.served import Manifest
from inplace.schema.specs import Dtype
from inplace_builder.served.build import write_engine
from inplace_builder.served.decoder import build_decoder
from inplace_builder.served.model_config import MODEL_VERSION
from inplace_builder.served.options import BuildOptions
from support.decoding import generate, generate_together, random_prompt
from support.manifests import edit, exchange
from support.models import VOCABULARY, accumulator, greedy, tiny_llama
from support.sinks import SINKS, decoder_with_sinks

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use; there is none here"
)
pytest.importorskip("tensorrt", reason="needs TensorRT; it is not installed")


def options(**changes: Any) -> BuildOptions:
    base = BuildOptions(device="cuda", engine="tensorrt", capacity=64, chunk=8, slots=6, max_rows=4)
    return replace(base, **changes)


def opened(model: Path, slots: int | None = None, *, graphs: bool = True) -> ModelInstance:
    from inplace.engines.tensorrt import TensorRtEngine

    manifest = Manifest.load(model / MODEL_VERSION)
    arena = Arena(manifest.states, slots or manifest.slots, torch.device("cuda"))
    return ModelInstance(
        manifest,
        arena,
        TensorRtEngine(EngineFolder(model / MODEL_VERSION), manifest, arena, graphs=graphs),
        idle_timeout=600.0,
    )


def run(instance: ModelInstance, sequence: int, ids: list[int], *, start: bool = False) -> int:
    active = instance.admit(Request(sequence, start, False, {"input_ids": torch.tensor([ids])}))
    while not active.finished:
        instance.step([active])
    assert active.error is None, active.error
    instance.finish(active)
    return int(active.outputs["next_token"])


@pytest.fixture(scope="module")
def engine(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository") / "llama"
    build_decoder(llama_folder, path, options())
    return path


@pytest.mark.parametrize("alias", ["plugin", "copy"])
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.FLOAT16, Dtype.BFLOAT16])
def test_a_decoder_builds_verifies_and_gives_the_tokens_of_transformers(
    llama_folder: Path, tmp_path: Path, dtype: Dtype, alias: str
) -> None:
    manifest = build_decoder(llama_folder, tmp_path / "out", options(dtype=dtype, alias=alias))
    assert {entry.kind for entry in manifest.program("step").aliases} == {alias}
    assert {record.kind for record in manifest.program("step").lowering} == {alias}
    if dtype is not Dtype.FLOAT32:
        return
    model = tiny_llama(tmp_path / "again")
    instance = opened(tmp_path / "out")
    for sequence, prompt in enumerate(([5, 6, 7], [9], list(range(20, 43))), 1):
        tokens = [run(instance, sequence, prompt, start=True)]
        while len(tokens) < 24:
            tokens.append(run(instance, sequence, tokens[-1:]))
        assert tokens == greedy(model, prompt, 24)


@pytest.mark.parametrize("alias", ["plugin", "copy"])
@pytest.mark.parametrize("name", SINKS)
@pytest.mark.filterwarnings("ignore")
def test_decoders_with_sinks_give_the_tokens_of_transformers(
    tmp_path: Path, name: str, alias: str
) -> None:
    model = decoder_with_sinks(name)
    model.save_pretrained(tmp_path / "model")
    build_decoder(tmp_path / "model", tmp_path / "out", options(alias=alias))
    prompts = [random_prompt(1, 41), random_prompt(2, 3), random_prompt(3, 17)]
    expected = [generate(model, prompt, 20) for prompt in prompts]
    assert generate_together(opened(tmp_path / "out"), prompts, 20) == expected


@pytest.mark.parametrize("kind", ["tensorrt", "torch"])
def test_log_probabilities_of_prompts_are_those_of_transformers(
    llama_folder: Path, tmp_path: Path, kind: Any
) -> None:
    """Ragged rows of several chunks, in one batch with a row that does not ask."""
    build_decoder(llama_folder, tmp_path / "out", options(engine=kind, prompt_logprobs=True))
    model = tiny_llama(tmp_path / "again")
    driver = StepDriver(ModelInstance.open(tmp_path / "out" / MODEL_VERSION))
    prompts = [random_prompt(1, 21), random_prompt(2, 5), random_prompt(3, 8)]
    asked = [{"prompt_logprobs": 3}, {}, {"prompt_logprobs": 0}]
    try:
        answers = driver.run(
            [
                Request(row, True, False, {"input_ids": torch.tensor([ids])}, parameters=parameters)
                for row, (ids, parameters) in enumerate(zip(prompts, asked, strict=True), 1)
            ]
        )
    finally:
        driver.close()
    for ids, parameters, answer in zip(prompts, asked, answers, strict=True):
        assert isinstance(answer, dict), answer
        assert answer["next_token"].tolist() == [greedy(model, ids, 1)]
        assert ("prompt_ranks" in answer) == bool(parameters)
        if not parameters:
            continue
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(ids)[1:, None])
        got = answer["prompt_token_logprobs"][0, 1:, None]
        assert torch.allclose(got, expected, rtol=0, atol=1e-4)
        assert torch.equal(answer["prompt_ranks"][0, 1:], (logprobs > expected).sum(1) + 1)
        if parameters["prompt_logprobs"]:
            assert torch.equal(answer["prompt_top_tokens"][0, 1:], logprobs.topk(3).indices)


def test_states_keep_their_addresses_and_other_slots_their_bytes(engine: Path) -> None:
    instance = opened(engine)
    for tensor in instance.arena.tensors.values():
        tensor.fill_(float("nan"))
    addresses = instance.arena.addresses()
    run(instance, 1, [5, 6, 7], start=True)
    run(instance, 2, [8], start=True)
    used = {instance.table.find(sequence).slot for sequence in (1, 2)}
    foreign = [slot for slot in range(instance.arena.slots) if slot not in used]
    before = {
        name: tensor[foreign].clone().view(torch.uint8)
        for name, tensor in instance.arena.tensors.items()
    }
    for token in range(40):
        admitted = [
            instance.admit(Request(sequence, False, False, {"input_ids": torch.tensor([[token]])}))
            for sequence in (1, 2)
        ]
        instance.step(admitted)
        for active in admitted:
            assert active.error is None
            instance.finish(active)
    assert instance.arena.addresses() == addresses
    for name, tensor in instance.arena.tensors.items():
        assert torch.equal(tensor[foreign].view(torch.uint8), before[name])


def test_steps_give_the_same_tokens_with_and_without_cuda_graphs(engine: Path) -> None:
    runs = []
    for graphs in (True, False):
        instance = opened(engine, graphs=graphs)
        tokens = [run(instance, 1, list(range(30)), start=True)]
        tokens += [run(instance, 1, [token]) for token in range(5)]
        runs.append(tokens)
    assert runs[0] == runs[1]


def test_any_batch_equals_the_solo_runs(engine: Path) -> None:
    solo = opened(engine)
    prompts = [[3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [VOCABULARY - 1, 0], [40] * 8]
    expected = [
        run(solo, sequence, prompt, start=True) for sequence, prompt in enumerate(prompts, 1)
    ]
    together = opened(engine)
    admitted = [
        together.admit(Request(s, True, False, {"input_ids": torch.tensor([p])}))
        for s, p in enumerate(prompts, 1)
    ]
    while pending := [active for active in admitted if not active.finished]:
        together.step(pending)
    assert [int(active.outputs["next_token"]) for active in admitted] == expected


def test_no_graph_is_replayed_after_a_state_moved(engine: Path) -> None:
    instance = opened(engine)
    run(instance, 1, [5], start=True)
    instance.arena.rebind("key_states_0", instance.arena.tensors["key_states_0"].clone())
    active = instance.admit(Request(1, False, False, {"input_ids": torch.tensor([[6]])}))
    instance.step([active])
    assert active.error is not None
    assert "no longer at the addresses" in str(active.error)


@pytest.mark.parametrize("alias", ["plugin", "copy"])
def test_states_other_than_caches(tmp_path: Path, alias: str) -> None:
    write_engine(accumulator(), tmp_path / "accumulator", options(slots=4, capacity=1, alias=alias))
    instance = opened(tmp_path / "accumulator")
    sums = {1: 0.0, 2: 0.0}
    for step, (sequence, value) in enumerate([(1, 1.0), (2, 10.0), (1, 2.0), (1, 3.0), (2, 20.0)]):
        start = sums[sequence] == 0.0
        active = instance.admit(
            Request(sequence, start, False, {"value": torch.full((1, 4), value)})
        )
        instance.step([active])
        instance.finish(active)
        sums[sequence] += value
        assert active.outputs["sum"].tolist() == [[sums[sequence]] * 4], step


def edited(model: Path, tmp_path: Path, **engine: object) -> Path:
    """A copy of a model with other fields in the record of its plan."""
    copy = shutil.copytree(model, tmp_path / "edited")
    edit(
        copy / MODEL_VERSION,
        lambda fields: fields["programs"][0]["engine"]["plan"].update(engine),
    )
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "9.9.9"}, "was built with tensorrt 9.9.9"),
        ({"compute_capability": "8.0"}, r"was built for .*compute capability 8\.0"),
        ({"gpu": "NVIDIA A100"}, "was built for NVIDIA A100"),
    ],
)
def test_a_plan_for_another_machine_is_refused(
    engine: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        opened(edited(engine, tmp_path, **change))


def test_a_truncated_plan_and_changed_weights_are_refused(engine: Path, tmp_path: Path) -> None:
    for name in ("engine.plan", "weights.safetensors"):
        copy = tmp_path / name
        shutil.copytree(engine, copy)
        path = copy / MODEL_VERSION / name
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(LoadError, match="truncated"):
            opened(copy)


def test_a_file_that_is_not_a_plan_is_refused(engine: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(engine, tmp_path / "copy")
    exchange(copy / MODEL_VERSION, "engine.plan", b"not a plan")
    with pytest.raises(LoadError, match="cannot be read by TensorRT"):
        opened(copy)


def test_an_alias_that_the_plan_does_not_have_is_refused(engine: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(engine, tmp_path / "copy")
    edit(
        copy / MODEL_VERSION,
        lambda fields: fields["programs"][0]["aliases"][0].update(output="missing_output"),
    )
    with pytest.raises(LoadError, match="missing_output"):
        opened(copy)


def test_an_arena_larger_than_the_gpu_is_refused(engine: Path) -> None:
    manifest = Manifest.load(engine / MODEL_VERSION)
    with pytest.raises(LoadError, match="fewer slots"):
        Arena(manifest.states, 1 << 34, torch.device("cuda"))


def test_load_engine_takes_a_plan(engine: Path) -> None:
    manifest = Manifest.load(engine / MODEL_VERSION)
    arena = Arena(manifest.states, manifest.slots, torch.device("cuda"))
    load_engine(EngineFolder(engine / MODEL_VERSION), manifest, arena)
