"""Which of a model's variables a stored value is for: by name, by place only where names allow no other answer.

Two lists are compared as a whole. Names that Keras made (`dense_1`) count on in a process, so the same model built a
second time has others: they are the same if they differ in nothing but their counters, and these are in one order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
from keras.src.utils.naming import to_snake_case


def match(ours: Sequence[str], theirs: Sequence[str], automatic: Iterable[str] = ()) -> list[int] | None:
    """Where each of our names is among theirs.

    Args:
        ours: Names of the model's variables.
        theirs: Names in the file.
        automatic: What Keras' own names begin with: `dense` of `dense_1`.

    Returns:
        Their indices; `None` where the names do not say which is which.
    """
    if len(ours) != len(theirs):
        return None
    places = list(range(len(ours)))
    if len(ours) == 1 or list(ours) == list(theirs):
        return places
    where = {name: i for i, name in enumerate(theirs)}
    if len(where) == len(theirs) and where.keys() == set(ours):
        return [where[name] for name in ours]
    pattern = re.compile(
        "|".join(rf"{re.escape(a)}(?:_(\d+))?(?=_|$)" for a in sorted(automatic, key=len)[::-1]) or "$^"
    )
    split = [[_split(name, pattern) for name in names] for names in (ours, theirs)]
    kinds = [[kind for kind, _ in names] for names in split]
    if kinds[0] != kinds[1]:
        return None
    for kind in set(kinds[0]):
        counters = [[count for k, count in names if k == kind] for names in split]
        if _ranks(counters[0]) != _ranks(counters[1]):
            return None
    return places


def _split(name: str, automatic: re.Pattern[str]) -> tuple[str, tuple[int, ...]]:
    """A name without the counters that Keras gave it, and these. Slots of optimizers join several names with `_`."""
    kinds, counters = [], []
    for part in name.split("/"):
        at, kind = 0, ""
        while found := automatic.match(part, at):
            number = next((g for g in found.groups() if g is not None), None)
            counters.append(-1 if number is None else int(number))
            kind += part[at : found.end()].removesuffix("" if number is None else f"_{number}") + "*_"
            at = found.end() + 1
        kinds.append(kind + part[at:])
    return "/".join(kinds), tuple(counters)


def _ranks(counters: Sequence[tuple[int, ...]]) -> list[int]:
    order = sorted(set(counters))
    return [order.index(count) for count in counters]


def automatic_names(*roots: Any) -> set[str]:
    """What the automatic names of models, layers, metrics, optimizers and what is in them begin with."""
    found = {to_snake_case(cls) for cls in ("SeedGenerator", "Sequential", "Functional", "Model")}
    for root in roots:
        inside = root._flatten_layers() if hasattr(root, "_flatten_layers") else [root]
        optimizers = [o for o in [getattr(root, "optimizer", None)] if o is not None]
        for item in [root, *inside, *optimizers, *getattr(root, "metrics", ())]:
            found.add(to_snake_case(type(item).__name__))
    return found


def names_of(root: Any, variables: Iterable[Any]) -> list[str]:
    """Names of variables by the layers that they belong to, from the model down (`encoder/dropout/seed_generator/0`).

    Paths of Keras' depend on where a layer was built: a model that was loaded has others. What no layer has keeps its.
    """
    known: dict[int, str] = {}
    seen: set[int] = set()

    def visit(layer: Any, start: str) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        own = [*getattr(layer, "_trainable_variables", ()), *getattr(layer, "_non_trainable_variables", ())]
        named = [(v, v.name) for v in own]
        named += [(s.state, f"seed_generator/{i}") for i, s in enumerate(getattr(layer, "_seed_generators", ()))]
        named += [(v, f"{m.name}/{v.name}") for m in getattr(layer, "_metrics", ()) for v in m.variables]
        for variable, name in named:
            known.setdefault(id(variable), start + name)
        for inner in getattr(layer, "_layers", ()):
            if isinstance(inner, keras.layers.Layer):
                visit(inner, f"{start}{inner.name}/")

    if isinstance(root, keras.layers.Layer):
        visit(root, "")
    refers = {v.path.replace("/", "_"): v.path for v in getattr(root, "_trainable_variables", ())}
    own = f"{getattr(root, 'name', '')}/"  # of an optimizer, or a metric: it may be called anything
    return [known.get(id(v)) or _slot_name(v.path, refers).removeprefix(own) for v in variables]


def _slot_name(path: str, refers: Mapping[str, str]) -> str:
    """The path of an optimizer's slot (`adam/model_dense_kernel_momentum`) by the variable's layer alone."""
    start, _, rest = path.partition("/")
    words = rest.split("_")
    for n in range(len(words) - 1, 0, -1):
        variable = refers.get("_".join(words[:n]))
        if variable is not None:
            return "/".join([start, *variable.split("/")[-2:], "_".join(words[n:])])
    return path


def differences(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """How two lists of names differ, in words."""
    said = [
        f"only in the {where}: {sorted(set(a) - set(b))}"
        for where, a, b in (("checkpoint", theirs, ours), ("model", ours, theirs))
        if set(a) - set(b)
    ]
    if not said:
        said = [f"in another order, or twice. Expected {list(ours)}, found {list(theirs)}"]
    return "; ".join(said)
