"""Capture a model and its draft, as the programs of one engine (speculative decoding)."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from inplace.schema.specs import Update
from torch import nn
from transformers import PreTrainedModel

from inplace_builder.capture.capture import Capture
from inplace_builder.capture.decoder import DecoderOptions
from inplace_builder.capture.drafted import DRAFT, SpeculativeCapture
from inplace_builder.capture.huggingface import capture_decoder
from inplace_builder.capture.union import rename_states, union_of_states
from inplace_builder.errors import BuildError


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of the first layers of another one, with its embedding, norm and head.

    It shares the other one's weights.

    Raises:
        BuildError: it has fewer layers, or they cannot be found.
    """
    config = model.config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    if not 1 <= count < total:
        raise BuildError(
            f"draft_layers is {count}; the model has {total} layers, so a draft has 1 to "
            f"{total - 1}"
        )
    tensors = [*model.parameters(), *model.buffers()]
    shorter = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    lists = [each for each in shorter.modules() if isinstance(each, nn.ModuleList)]
    layers = [each for each in lists if len(each) == total]
    if len(layers) != 1:
        raise BuildError(
            f"{type(model).__name__} has {len(layers)} lists of {total} modules, so its first "
            f"layers cannot be told: leave draft_layers out, or name another model as the draft"
        )
    del layers[0][count:]
    config = shorter.config.get_text_config(decoder=True)
    config.num_hidden_layers = count
    for name, given in list(vars(config).items()):  # such as layer_types: one for each layer
        if isinstance(given, list) and len(given) == total:
            setattr(config, name, given[:count])
    return shorter


def capture_speculative(
    model: PreTrainedModel, draft: PreTrainedModel, options: DecoderOptions, draft_tokens: int
) -> SpeculativeCapture:
    """Export one step of a model and one of its draft.

    Args:
        model: a causal language model of transformers.
        draft: one with the same vocabulary. If it was made by `first_layers`, it uses the model's
            states.
        options: what to build for; its rows are the sequences of a step.
        draft_tokens: how many tokens are drafted in a round.

    Raises:
        BuildError: one of them cannot be captured, or keeps states that cannot be taken back; they
            have different vocabularies.
    """
    sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (model, draft)]
    if sizes[0] != sizes[1]:
        raise BuildError(
            f"the draft has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}: a "
            f"draft must have the model's tokens; choose one of the same family"
        )
    if draft_tokens + 1 > options.chunk:
        raise BuildError(
            f"draft_tokens is {draft_tokens}; the last token and the drafted ones are fed in one "
            f"step, so a chunk must have {draft_tokens + 1} tokens, and it has {options.chunk}"
        )
    captured = capture_decoder(model, _widened(options, draft_tokens, draft_tokens))
    _check_capture("the model", captured)
    is_own = _shares_layers(model, draft)
    try:
        # Its first call in a round is also fed what its states lack.
        limits = _widened(options, draft_tokens, 1 + 2 * draft_tokens)
        if not is_own:
            limits = replace(limits, chunk=min(options.capacity, options.chunk + draft_tokens + 1))
        drafting = capture_decoder(draft, limits)
    except BuildError as error:
        raise BuildError(f"draft: {error}") from error
    _check_capture("the draft", drafting)
    if not is_own:
        taken = {state.name for state in captured.states}
        names = [_free_name(state.name, taken) for state in drafting.states]
        drafting = rename_states(drafting, names)
    program = drafting.program.model_copy(update={"name": DRAFT})
    result = SpeculativeCapture(captured, replace(drafting, program=program), draft_tokens)
    union_of_states(result.captures)
    return result


def _widened(options: DecoderOptions, draft_tokens: int, further: int) -> DecoderOptions:
    """The options with a row for each token that is sampled, and one for padding.

    Args:
        options: its rows are the sequences of a step.
        draft_tokens: how many tokens are drafted in a round.
        further: tokens that a sequence may have in a step beside those of the options.
    """
    rows = options.max_rows * (draft_tokens + 1) + 1
    tokens = options.max_tokens
    if tokens is not None:
        tokens = max(rows, tokens + options.max_rows * further)
    return replace(options, max_rows=rows, max_tokens=tokens)


def _shares_layers(model: PreTrainedModel, draft: PreTrainedModel) -> bool:
    """Whether a draft was made by `first_layers`."""
    weights: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    return all(weights.get(name) is tensor for name, tensor in draft.named_parameters())


def _check_capture(name: str, capture: Capture) -> None:
    """BuildError if several tokens cannot be fed in a step, and those rejected be taken back."""
    if capture.program.lookahead:
        raise BuildError(
            f"tokens cannot be drafted: tokens of {name} that are fed together see each other, so "
            f"what is sampled behind a token would depend on the drafted ones after it"
        )
    other = [state for state in capture.states if state.update is not Update.APPEND]
    if not other and capture.program.chunk == 1:
        raise BuildError(
            f"tokens cannot be drafted: {name} takes one token of a row in a step, so it cannot "
            f"verify several: {capture.notes.get('capture', 'leave the draft out')}"
        )
    if not other:
        return
    reason = (
        f"a ring of {other[0].shape[other[0].axis or 0]} positions, which new tokens overwrite"
        if other[0].update is Update.RING
        else "rewritten by each token"
    )
    raise BuildError(
        f"tokens cannot be drafted: {name} keeps {len(other)} states that are not appended to "
        f"({other[0].name}, …: {reason}), so drafted tokens that are rejected could not be taken "
        f"back; leave the draft out"
    )


def _free_name(name: str, taken: set[str]) -> str:
    """A name for a state of the draft that the model does not have."""
    name = f"{DRAFT}_{name}"
    while name in taken:
        name = f"{DRAFT}_{name}"
    return name
