"""One model of the survey: what ``generate`` computes, and what both engines compute.

Three prompts of different lengths are generated from together, so that rows of a step are ragged.
All go past every window. They are fed in chunks, or as one chunk where the model lets tokens that
are fed together see each other (lookahead). An engine is equal if it chooses the same tokens and
its logits are close. For the models of `decoders.configs.FORWARD`, greedy decoding by the full
forward replaces ``generate``.
"""

import re
import sysconfig
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from decoders.configs import FORWARD, Tiny, make_model
from inplace.errors import InplaceError
from inplace.schema.specs import Dtype
from inplace.trt import load_tensorrt
from inplace_builder import BuildOptions, Capture, capture_decoder, write_engine
from inplace_builder.capture.checkpoint import check_checkpoint, quiet
from inplace_builder.fusion.fuse import without_sampling
from inplace_builder.lower import LoweredNetwork, choose_mechanisms, lower, lowerable
from inplace_builder.served.decoder import decoder_options
from support.decoding import decode_together
from support.models import open_instance
from support.network_interpreter import interpret
from torch import Tensor
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[3]
CAPACITY, ROWS, CHUNK, TOKENS = 80, 3, 8, 24
PROMPTS = (41, 23, 9)
"""Tokens of the prompts."""
MIN_DISTINCT = 8
"""Different tokens in all that ``generate`` must return; fewer would prove little."""
TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit of its row."""

OPTIONS = BuildOptions(
    capacity=CAPACITY, slots=ROWS + 1, max_rows=ROWS, chunk=CHUNK, dtype=Dtype.FLOAT32
)
WHOLE_PROMPTS = replace(OPTIONS, chunk=max(PROMPTS))

Report = Callable[[str, object], None]
"""Called with each field of the result as soon as it is known."""


@dataclass(frozen=True)
class Decoded:
    """What was generated from one prompt.

    Attributes:
        tokens: the tokens.
        logits: the scores that each was chosen by, ``[tokens, vocab_size]``.
    """

    tokens: list[int]
    logits: Tensor


def survey(
    name: str,
    folder: Path,
    report: Report,
    *,
    tiny: Tiny | None = None,
    engines: Collection[str] = ("cpu", "tensorrt"),
    by_forward: bool = False,
) -> None:
    """Compare the engines with ``generate`` of one model.

    Args:
        name: of `decoders.configs.CONFIGS`, or of ``tiny``: its model type, and what is behind a
            slash.
        folder: an empty folder to build in.
        report: called with ``generate``, ``cpu`` and ``tensorrt``: "equal", or why not; with the
            largest relative differences of the logits; and with ``reference``, "forward", where
            that is the reference.
        tiny: another configuration.
        engines: the ones to compare.
        by_forward: compare with greedy decoding by the full forward, as for the model types of
            `FORWARD`.
    """
    by_forward = by_forward or name.partition("/")[0] in FORWARD
    decode = decode_forward if by_forward else decode_generate
    if by_forward:
        report("reference", "forward")
    with quiet():
        model = make_model(name, tiny)
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    prompts = [prompt(seed, length, vocabulary) for seed, length in enumerate(PROMPTS)]
    try:
        expected = [decode(model, prompt) for prompt in prompts]
    except Exception as error:
        report("generate", f"fails: {_brief(error, folder, name)}")
        return
    distinct = len({token for each in expected for token in each.tokens})
    report("generate", "ok" if distinct >= MIN_DISTINCT else f"only {distinct} distinct tokens")
    report("parameters", sum(parameter.numel() for parameter in model.parameters()))
    with quiet():
        model.save_pretrained(folder / "model")

    @cache  # both engines share it
    def captured() -> Capture:
        check_checkpoint(folder / "model", CAPACITY)
        capture = capture_decoder(model, decoder_options(OPTIONS))
        if capture.program.lookahead:
            return capture_decoder(model, decoder_options(WHOLE_PROMPTS))
        return capture

    runs: Mapping[str, Callable[[], list[Decoded]]] = {
        "cpu": lambda: _on_cpu(captured(), folder, prompts),
        "tensorrt": lambda: _on_tensorrt(captured(), prompts),
    }
    for engine in engines:
        try:
            verdict, difference = compare(expected, runs[engine]())
            report(f"{engine}_difference", difference)
        except Exception as error:
            verdict = f"refused: {_brief(error, folder, name)}"
        report(engine, verdict)


def compare(expected: list[Decoded], got: list[Decoded]) -> tuple[str, float]:
    """The verdict, and the largest difference of logits relative to the largest logit."""
    differences = [
        float((a.logits - b.logits).abs().max() / a.logits.abs().max())
        for a, b in zip(expected, got, strict=True)
    ]
    difference = max(differences)
    if [each.tokens for each in expected] != [each.tokens for each in got]:
        return "wrong tokens", difference
    close = difference <= TOLERANCE  # False for NaN
    return ("equal" if close else f"logits differ by {difference:.1e}"), difference


def prompt(seed: int, length: int, vocabulary: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, min(vocabulary, 290), (length,), generator=generator).tolist()


def decode_generate(model: PreTrainedModel, prompt: list[int]) -> Decoded:
    """Decode greedily by transformers' ``generate``."""
    with quiet(), torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack([each[0].float() for each in out.logits])
    return Decoded(out.sequences[0, -TOKENS:].tolist(), logits)


def decode_forward(model: PreTrainedModel, prompt: list[int]) -> Decoded:
    """Decode greedily; each token by the forward over all before it, without a cache."""
    tokens, logits = list(prompt), []
    with quiet(), torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.tensor([tokens])
            out = model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
            logits.append(out.logits[0, -1].float())
            tokens.append(int(logits[-1].argmax()))
    return Decoded(tokens[-TOKENS:], torch.stack(logits))


def _on_cpu(capture: Capture, folder: Path, prompts: list[list[int]]) -> list[Decoded]:
    """Build the engine, and decode without a server."""
    options = WHOLE_PROMPTS if capture.program.lookahead else OPTIONS
    write_engine(capture, folder / "engine", options)
    instance = open_instance(folder / "engine")
    rows = decode_together(instance, prompts, TOKENS, ("next_token", "logits"))
    return [
        Decoded(
            [int(step["next_token"]) for step in row],
            torch.stack([step["logits"].flatten() for step in row]),
        )
        for row in rows
    ]


def _on_tensorrt(capture: Capture, prompts: list[list[int]]) -> list[Decoded]:
    """Define the network through TensorRT-RTX's API, and interpret it in PyTorch."""
    return _interpreted(capture, _network(capture), prompts)


def _network(capture: Capture) -> LoweredNetwork:
    tensorrt = load_tensorrt("tensorrt_rtx")
    records = choose_mechanisms(
        capture.exported.graph, capture.states, tensorrt, order=("kv_cache_update", "copy")
    )
    greedy, program = without_sampling(lowerable(capture.exported), capture.program)
    return lower(
        greedy,
        outputs=[spec.name for spec in program.outputs],
        states=capture.states,
        kinds={record.state: record.kind for record in records},
        tensorrt=tensorrt,
    )


def _interpreted(
    capture: Capture, lowered: LoweredNetwork, prompts: list[list[int]]
) -> list[Decoded]:
    """Decode as the runtime does where row r is slot r: a prompt is alone in its steps."""
    memory = {
        state.name: torch.full(
            (len(prompts), *state.shape),
            0.0 if state.reset else float("nan"),
            dtype=state.dtype.as_torch,
        )
        for state in capture.states
    }
    chunk = capture.program.chunk
    chosen: list[list[int]] = []
    logits: list[list[Tensor]] = []

    def step(rows: slice, parts: list[list[int]], done: list[int]) -> dict[str, Tensor]:
        states = {name: tensor[rows] for name, tensor in memory.items()}
        outputs = interpret(lowered, _step_inputs(parts, done) | states)
        for name, output in lowered.state_outputs.items():
            memory[name][rows] = outputs[output]
        return outputs

    for row, prompt in enumerate(prompts):
        for at in range(0, len(prompt), chunk):
            outputs = step(slice(row, row + 1), [prompt[at : at + chunk]], [at])
        chosen.append([int(outputs["next_token"][0])])
        logits.append([outputs["logits"][0]])
    for count in range(1, TOKENS):
        done = [len(prompt) + count - 1 for prompt in prompts]
        outputs = step(slice(None), [each[-1:] for each in chosen], done)
        for row in range(len(prompts)):
            chosen[row].append(int(outputs["next_token"][row]))
            logits[row].append(outputs["logits"][row])
    return [
        Decoded(tokens, torch.stack(scores)) for tokens, scores in zip(chosen, logits, strict=True)
    ]


def _step_inputs(parts: list[list[int]], done: list[int]) -> dict[str, Tensor]:
    """The inputs of a step that appends ``parts`` to rows of ``done`` tokens."""
    offsets = torch.tensor([0, *map(len, parts)]).cumsum(0).int()
    positions = [torch.arange(at, at + len(part)) for part, at in zip(parts, done, strict=True)]
    return {
        "input_ids": torch.tensor([token for part in parts for token in part]),
        "positions": torch.cat(positions).int(),
        "row_offsets": offsets,
        "last_tokens": offsets[1:] - 1,
        "slots": torch.arange(len(parts), dtype=torch.int32),
        "write_indices": torch.tensor(done, dtype=torch.int32),
    }


def without_paths(text: str, folder: Path, name: str) -> str:
    """A text without the folders of this machine.

    Files of packages begin with the package, those of this project with its top folder.

    Args:
        text: for example an error's.
        folder: a temporary one.
        name: takes its place.
    """
    text = text.replace(str(folder), name)
    text = re.sub(r"[^\s\"'`(]*/(?:site|dist)-packages/", "", text)
    for each in (ROOT, Path(sysconfig.get_path("stdlib"))):
        text = text.replace(f"{each}/", "")
    return text


def _brief(error: Exception, folder: Path, name: str) -> str:
    """The first lines of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, InplaceError):
        text = f"{type(error).__name__}: {text}"
    text = without_paths(text, folder, name)
    return text if len(text) <= 400 else f"{text[:399]}…"
