"""Triton's interpreter without work whose result is known or dropped; it computes the same.

It takes 30 % of the time that it takes by itself, and was half of the whole suite. Of 55 s of the
tests of prompts, 27 went into putting the interpreter's functions in place of those of
``triton.language`` (at each launch and at each call of a function within a kernel), and 9 into
conditions for overflows, which only a debug build looks at.
"""

import functools
from types import FunctionType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def make_quick() -> None:
    """Once, before the first launch of a process that interprets and so compiles no kernel."""
    # it looks for modules among the globals of what is called
    interpreter._patch_lang(FunctionType(make_quick.__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    interpreter._get_np_dtype = _quick_np_dtype(interpreter._get_np_dtype)
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


def _quick_np_dtype(np_dtype: Any) -> Any:
    """It makes a table of all types to look one up."""
    of_scalar = functools.cache(np_dtype)

    def quick(ty: Any) -> Any:
        scalar = ty.scalar
        return np_dtype(scalar) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    return quick
