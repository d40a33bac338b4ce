"""The state contract: what engines have in common whose states mean the same."""

import json
from hashlib import sha256

from inplace.schema.served import Manifest
from inplace.schema.specs import INITIAL_FILE, StateSpec, Update

WEIGHTS_NOTE = "weights_sha256"
"""The entry of `Manifest.built_with` with the digest of the weights before they were lowered, so
that an engine that is built again, for another GPU or by another TensorRT, has the same."""

CONTRACT_VERSION = 1
"""Changes with the meaning of states."""

_NAMES = frozenset({INITIAL_FILE, "tokenizer/tokenizer.json"})


def state_contract(manifest: Manifest) -> str:
    """The SHA-256 digest of the weights, the states, their types and scales, and the tokenizer.

    The capacity and the number of slots are left out: a snapshot fits where its positions do.
    """
    fields = {
        "version": CONTRACT_VERSION,
        "weights": _weights(manifest),
        "files": sorted((each.name, each.sha256) for each in manifest.files if each.name in _NAMES),
        "states": [_state(state) for state in manifest.states],
        "programs": [
            (each.name, each.engine.dtype, sorted(each.engine.scales.items()), each.lookahead)
            for each in manifest.programs
        ],
        "schedules": [each.model_dump(mode="json") for each in manifest.schedules],
    }
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _weights(manifest: Manifest) -> object:
    """What identifies the weights: their own digest, or the files that hold them."""
    if (digest := manifest.built_with.get(WEIGHTS_NOTE)) is not None:
        return digest
    names = set()
    for program in manifest.programs:
        plan = program.engine.plan
        names.add(program.engine.file if plan is None or plan.weights is None else plan.weights)
    return sorted((each.name, each.sha256) for each in manifest.files if each.name in names)


def _state(state: StateSpec) -> list[object]:
    extents = [
        None if state.update is Update.APPEND and axis == state.axis else extent
        for axis, extent in enumerate(state.shape)
    ]
    update, dtype = str(state.update), str(state.dtype)
    return [state.name, extents, dtype, update, state.axis, state.fill, state.initial, state.scale]
