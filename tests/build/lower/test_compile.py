"""Internal errors of TensorRT are retried at other levels; a network that it refuses is not."""

from dataclasses import replace
from typing import Any

import pytest
from inplace.trt import TensorRT, load_tensorrt
from inplace_builder.errors import BuildError
from inplace_builder.lower import CompileOptions, LoweredNetwork, compile_network, lower
from support.state_cases import STATE_CASES

OPTIONS = CompileOptions(("SM89",), optimization_level=1)


class FailingBuilder:
    """A builder that fails once with each message before it builds, and records each level."""

    def __init__(self, lowered: LoweredNetwork, *messages: str) -> None:
        self._builder, self._log = lowered.builder, lowered.context.log
        self._messages = list(messages)
        self.levels: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._builder, name)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        self.levels.append(config.builder_optimization_level)
        if self._messages:
            self._log.errors.append(self._messages.pop(0))
            return None
        return self._builder.build_serialized_network(network, config)


@pytest.fixture
def lowered() -> LoweredNetwork:
    rtx: TensorRT = load_tensorrt("tensorrt_rtx")
    case = STATE_CASES[0]
    return lower(
        case.exported,
        outputs=["out"],
        states=case.states,
        kinds={state.name: "copy" for state in case.states},
        tensorrt=rtx,
    )


INTERNAL = (
    "[checkSanity.cpp::checkSanity::292] Error Code 2: Internal Error "
    "(Assertion !overlap(t->start) failed. )"
)


@pytest.mark.parametrize(("failures", "levels"), [(0, [1]), (1, [1, 3]), (2, [1, 3, 5])])
def test_an_internal_error_is_retried_at_other_levels(
    lowered: LoweredNetwork, failures: int, levels: list[int]
) -> None:
    builder = FailingBuilder(lowered, *[INTERNAL] * failures)
    assert (
        compile_network(
            replace(lowered, builder=builder), [STATE_CASES[0].profile()], OPTIONS
        ).nbytes
        > 1000
    )
    assert builder.levels == levels


def test_an_internal_error_at_every_level_is_reported(lowered: LoweredNetwork) -> None:
    builder = FailingBuilder(lowered, *[INTERNAL] * 9)
    with pytest.raises(BuildError, match=r"cannot build the network: .*checkSanity"):
        compile_network(replace(lowered, builder=builder), [STATE_CASES[0].profile()], OPTIONS)
    assert builder.levels == [1, 3, 5, 0]


def test_a_refused_network_is_not_retried(lowered: LoweredNetwork) -> None:
    builder = FailingBuilder(
        lowered, "Error Code 10: Internal Error (Could not find any implementation for node a.)"
    )
    with pytest.raises(BuildError, match="has no kernel for the result on this GPU"):
        compile_network(replace(lowered, builder=builder), [STATE_CASES[0].profile()], OPTIONS)
    assert builder.levels == [1]
