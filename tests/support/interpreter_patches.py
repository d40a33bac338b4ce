"""A pytest plugin for Triton's interpreter: its language is patched once a launch.

Triton 3.6 looks through all members of `triton.language` whenever a kernel calls a function, to
replace what it has replaced already. That takes 40 % of the time that its kernels are interpreted.
"""

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

_patch: Callable[[Any], Any] = interpreter._patch_lang
_launch: Callable[..., Any] = interpreter.GridExecutor.__call__
_patched: set[int] = set()
"""The modules whose functions this launch has called, by the identity of their names."""


def _patch_once(function: Any) -> Any:
    module = id(function.__globals__)
    if module in _patched:
        return None
    _patched.add(module)
    return _patch(function)


def _launch_anew(*arguments: Any, **options: Any) -> Any:
    _patched.clear()  # the end of a launch restores the language
    return _launch(*arguments, **options)


interpreter._patch_lang = _patch_once
interpreter.GridExecutor.__call__ = _launch_anew
