"""The library's own source, for notebooks that show an algorithm instead of retyping it."""

import ast
import inspect
from collections.abc import Callable
from textwrap import dedent
from typing import Any


class Source(str):
    """Python code that a notebook displays in colours, and as it is where there are none."""

    __slots__ = ()

    __repr__ = str.__str__

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"


def show_source(function: Callable[..., Any]) -> Source:
    """Source of a function or class without its docstring and decorators; comments stay.

    Parameters
    ----------
    function : callable
        Of this library, for example `medrobust_lib.smoothing.certify.take_votes`.

    Returns
    -------
    Source
        A string; as the last line of a cell it is displayed as code.
    """
    lines = dedent(inspect.getsource(inspect.unwrap(function))).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    hidden = set(range(1, node.lineno))  # decorators stand above
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        hidden |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return Source("\n".join(line for number, line in enumerate(lines, start=1) if number not in hidden))
