"""Silero VAD, rebuilt with a convolution's context and an LSTM cell as states, is the package's."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inplace.runtime.instance import ModelInstance
from inplace.runtime.requests import Request
from inplace.trt import load_tensorrt
from inplace_builder.compare import fill_with_sentinel, same_bits
from inplace_builder.errors import BuildError
from inplace_builder.lower import CompileOptions, choose_mechanisms, compile_network
from inplace_builder.served.build import write_engine
from inplace_builder.served.options import BuildOptions
from safetensors.torch import save_file
from silero import CHUNK, SAFETENSORS, TORCHSCRIPT, SileroVad, capture_silero, load_silero, packaged
from support.long import long_except
from support.lowering import lowered
from support.network_interpreter import interpret
from support.speech import chunks, package_says, recordings
from torch import Tensor

pytestmark = pytest.mark.slow

STREAMS, FOREIGN = 64, 2
LIMIT = 1e-4
"""Largest difference of a probability."""


def memory(slots: int) -> dict[str, Tensor]:
    return {
        "context": torch.zeros(slots, 64),
        "hidden": torch.zeros(slots, 128),
        "cell": torch.zeros(slots, 128),
    }


def worst(result: dict[str, list[float]], weights: str) -> float:
    return max(
        float((torch.tensor(generated) - package_says(recording, weights)).abs().max())
        for recording, generated in result.items()
    )


@pytest.mark.parametrize("weights", [TORCHSCRIPT, SAFETENSORS])
def test_the_module_says_what_the_package_says_step_by_step(weights: str) -> None:
    model, audio = (
        load_silero(packaged(weights)),
        [chunks(samples) for samples in recordings().values()],
    )
    states = memory(len(audio))
    result: dict[str, list[float]] = {recording: [] for recording in recordings()}
    silence = np.zeros(CHUNK, dtype=np.float32)
    with torch.inference_mode():
        for index in range(max(map(len, audio))):
            rows = torch.from_numpy(
                np.stack([chunk[index] if index < len(chunk) else silence for chunk in audio])
            )
            slots = torch.tensor(
                [row if index < len(chunk) else -1 for row, chunk in enumerate(audio)],
                dtype=torch.int32,
            )
            generated = model(rows, slots, **states)[:, 0].tolist()
            for row, recording in enumerate(result):
                if slots[row] >= 0:
                    result[recording].append(generated[row])
    assert worst(result, weights) <= LIMIT


def test_the_package_s_two_sets_of_weights_are_two_models() -> None:
    """The safetensors beside the default weights of `load_silero_vad` are other weights."""
    assert (
        worst(
            {
                recording: package_says(recording, SAFETENSORS).tolist()
                for recording in recordings()
            },
            TORCHSCRIPT,
        )
        > 0.1
    )


@pytest.mark.parametrize("weights", long_except([TORCHSCRIPT], [TORCHSCRIPT, SAFETENSORS]))
def test_64_interleaved_streams_on_the_built_engine(weights: str, tmp_path: Path) -> None:
    """Any streams in any step, slots in any order; no other slot is written, nothing moves."""
    folder = tmp_path / "silero-vad"
    write_engine(
        capture_silero(load_silero(packaged(weights))),
        folder,
        BuildOptions(slots=STREAMS, max_rows=STREAMS, capacity=1),
    )
    instance = ModelInstance.open(folder / "1", slots=STREAMS + FOREIGN)
    arena = instance.arena
    assert [alias.kind for alias in instance.program.aliases] == ["operator"] * 3
    for state in arena.tensors.values():
        fill_with_sentinel(state)
    addresses = arena.addresses()
    rng = random.Random(0)
    names = [*recordings(), *rng.choices(list(recordings()), k=STREAMS - len(recordings()))]
    waiting = {stream: chunks(recordings()[name]) for stream, name in enumerate(names, 1)}
    generated: dict[int, list[float]] = {stream: [] for stream in waiting}
    while waiting:
        chosen = rng.sample(sorted(waiting), rng.randint(1, len(waiting)))
        admitted = []
        for stream in chosen:
            start = not generated[stream]
            chunk = waiting[stream].pop(0)
            admitted.append(
                instance.admit(
                    Request(
                        stream, start, not waiting[stream], {"audio": torch.from_numpy(chunk)[None]}
                    )
                )
            )
        owned = {active.sequence.slot for active in admitted}
        others = [slot for slot in range(STREAMS + FOREIGN) if slot not in owned]
        before = {name: state[others].clone() for name, state in arena.tensors.items()}
        instance.step(admitted)
        for name, state in arena.tensors.items():
            assert same_bits(state[others], before[name])
        for stream, active in zip(chosen, admitted, strict=True):
            generated[stream].append(float(active.outputs["probability"]))
            instance.finish(active)
            if not waiting[stream]:
                del waiting[stream]
    assert arena.addresses() == addresses
    for stream, name in enumerate(names, 1):
        assert worst({name: generated[stream]}, weights) <= LIMIT, f"stream {stream}, {name}"
    assert all(
        bool(state[slot].isnan().all())
        for state in arena.tensors.values()
        for slot in range(STREAMS, STREAMS + FOREIGN)
    )


def test_tensorrt_takes_the_whole_network_with_copied_states() -> None:
    """Compiled with TensorRT for RTX, which cannot run here; computed in PyTorch."""
    rtx = load_tensorrt("tensorrt_rtx")
    capture = capture_silero(load_silero(), max_rows=8)
    assert {
        record.kind
        for record in choose_mechanisms(
            capture.exported.graph, capture.states, rtx, order=("copy",)
        )
    } == {"copy"}
    network = lowered(capture, "copy", rtx)
    names = list(recordings())[:3]
    states, generated = memory(3), []
    slots = torch.tensor([0, -1, 2], dtype=torch.int32)  # row r is slot r, or no row at all
    steps = list(zip(*(chunks(recordings()[name])[:12] for name in names), strict=True))
    for step in steps:
        result = interpret(
            network,
            {
                "audio": torch.stack([torch.from_numpy(chunk) for chunk in step]),
                "slots": slots,
                **states,
            },
        )
        states = {name: result[output].clone() for name, output in network.state_outputs.items()}
        generated.append(result["probability"][:, 0])
    for row in (0, 2):
        torch.testing.assert_close(
            torch.stack(generated)[:, row],
            package_says(names[row])[: len(steps)],
            rtol=0,
            atol=LIMIT,
        )
    assert not any(bool(state[1].any()) for state in states.values())
    shapes: dict[str, tuple[int, ...]] = {"audio": (CHUNK,), "slots": ()} | {
        state.name: state.shape for state in capture.states
    }
    profile = {name: ((1, *shape), (4, *shape), (8, *shape)) for name, shape in shapes.items()}
    assert compile_network(network, [profile], CompileOptions(("SM89",))).nbytes > 1000


def test_weights_that_are_not_the_model_s_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError,
        match=(
            r"none\.safetensors does not exist; give silero_vad\.jit or "
            r"silero_vad_16k\.safetensors"
        ),
    ):
        load_silero(tmp_path / "none.safetensors")
    for damaged in (tmp_path / "damaged.safetensors", tmp_path / "damaged.jit"):
        damaged.write_bytes(b"not weights")
        with pytest.raises(BuildError, match=f"the weights in .*{damaged.name} cannot be read"):
            load_silero(damaged)
    weights = SileroVad().state_dict()
    weights["conv2.weight"] = weights["conv2.weight"][:, :, :1].contiguous()
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(
        BuildError,
        match=(
            r"conv2\.weight is \[64, 128, 1\] torch\.float32, expected \[64, 128, 3\] "
            r"torch\.float32 \(1 ten"
        ),
    ):
        load_silero(tmp_path / "other.safetensors")
    del weights["conv2.weight"]
    save_file(weights, tmp_path / "fewer.safetensors")
    with pytest.raises(BuildError, match=r"conv2\.weight is absent"):
        load_silero(tmp_path / "fewer.safetensors")


def test_the_example_prints_segments_and_its_proof() -> None:
    example = Path(__file__).parents[2] / "examples" / "streaming_vad.py"
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("speech from") >= 3
    assert "states stayed where they were" in done.stdout
