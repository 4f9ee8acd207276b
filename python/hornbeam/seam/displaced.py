"""Functions that are not where their names say, because another one stands there now; so that they can be pickled.

`pickle` writes a function as its module and its qualified name, and refuses one that is not what it finds there. While
a dispatcher stands in the place of a function of Keras', the function's own reference leads here, and the other way
round once the dispatcher was taken away. In another process such a pickle stands for the same of the two there; where
none was displaced, for what is in the place.
"""

from __future__ import annotations

import importlib
from typing import Any

_SEPARATOR, _DOT = "|", "/"  # where there is a dot, `pickle` looks for an attribute of an attribute
#: Reference → the function that it stands for here, and the module and qualified name it has when it is in its place.
_functions: dict[str, tuple[Any, tuple[str, str]]] = {}
_references: dict[int, str] = {}  # by the ids of these functions, which live as long as the process


def displace(function: Any, kind: str) -> None:
    """Gives a function a reference of its own, before another one takes its place.

    Args:
        function: The function; what has no such reference, a `mock` say, stays as it is.
        kind: Tells functions that share a place from each other: `"original"`, say.
    """
    known = _references.get(id(function))
    if known is not None and function.__qualname__ == _functions[known][1][1]:
        function.__qualname__, function.__module__ = known, __name__
        return
    home = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not all(isinstance(part, str) and _SEPARATOR not in part for part in home) or home[0] == __name__:
        return
    reference = _SEPARATOR.join([kind, *map(str, home)]).replace(".", _DOT)
    if reference in _functions and _functions[reference][0] is not function:
        reference = f"{reference}{_SEPARATOR}{id(function)}"
    try:
        function.__qualname__, function.__module__ = reference, __name__
    except (AttributeError, TypeError):  # not in Python
        return
    _functions[reference] = function, (str(home[0]), str(home[1]))
    _references[id(function)] = reference


def put_back(function: Any) -> None:
    """Gives a function that is back in its place its name again."""
    _, home = _functions.get(getattr(function, "__qualname__", ""), (None, None))
    if home is not None:
        function.__module__, function.__qualname__ = home


def __getattr__(reference: str) -> Any:
    """What a reference stands for; where it was not displaced, what is in its place."""
    function, home = _functions.get(reference, (None, None))
    if home is not None and getattr(function, "__qualname__", None) == reference:
        return function
    try:
        _, module, name, *_ = reference.replace(_DOT, ".").split(_SEPARATOR)
    except ValueError:
        raise AttributeError(f"module {__name__!r} has no attribute {reference!r}") from None
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
