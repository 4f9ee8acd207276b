"""Which private names of Keras' each module of hornbeam uses, from its syntax tree.

`make names` writes that into the table of `keras_names`, and says what is to be added to it by hand.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from pathlib import Path

import hornbeam

_ROOT = Path(hornbeam.__file__).parent
#: Module, as `flows.saves`, → its syntax tree.
SOURCES = {
    ".".join(path.relative_to(_ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in _ROOT.rglob("*.py")
}
#: Underscored attributes of other libraries' objects, and of Python's own.
FOREIGN = {
    "_getframe",  # sys
    "_initializing",  # importlib
    "_replace",  # named tuples
    "_Value",  # hornbeam._core, for type checkers
    "_plain_class",  # set by hornbeam
    # TensorFlow: variables, handles, iterators, datasets, graphs; each is tried, or its absence handled
    *("_deterministic", "_graph_key", "_handle_data", "_handle_name", "_in_graph_mode", "_inputs"),
    *("_iterator_resource", "_parent_trackable", "_rng", "_seed", "_seed2", "_self_setattr_tracking", "_setattr_hook"),
    *("_tracked", "_unique_id", "_variable_creator_stack", "_variant_tensor"),
}

#: Of adapters and epoch iterators: `keras_names` recognises their whole code and all their attributes.
RECOGNISED = {
    *("_current_iterator", "_distribute_strategy", "_distributed_dataset", "_enumerate_iterator", "_epoch"),
    *("_get_iterator", "_num_batches", "_steps_seen"),
}


def used(module: str) -> set[str]:
    """Names that are imported from `keras.src`, or reached through what is: `saving.saving_lib._save_state`."""
    tree, known = SOURCES[module], {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src"):
            for name in node.names:
                full = f"{node.module}.{name.name}".removeprefix("keras.src.")
                known[name.asname or name.name] = full
                found.add(full)
        elif isinstance(node, ast.Import):
            assert not [n.name for n in node.names if n.name.startswith("keras.src")], module

    def full(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute) and not (node.attr.startswith("__") and node.attr.endswith("__")):
            owner = full(node.value)
            return owner and f"{owner}.{node.attr}"
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = full(node)
        elif _is_by_name(node) and isinstance(node.args[1].value, str):  # type: ignore[attr-defined]
            owner = full(node.args[0])  # type: ignore[attr-defined]
            name = owner and f"{owner}.{node.args[1].value}"  # type: ignore[attr-defined]
        else:
            continue
        # What a lazily imported library has is no affair of Keras'.
        if name is not None and not name.startswith("utils.module_utils.tensorflow."):
            found.add(name)
    return found


def _is_by_name(node: ast.AST) -> bool:
    """Whether it is `getattr(a, "b")`, `hasattr(a, "b")` or a patch of `a.b`."""
    if not isinstance(node, ast.Call) or len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
        return False
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    return name in ("getattr", "hasattr", "setattr") or name.endswith("_patch")


def attributes(module: str) -> set[str]:
    """Underscored attributes of anything that is no module of Keras', and that hornbeam did not name itself."""
    found: set[str] = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif _is_by_name(node):
            name = node.args[1].value  # type: ignore[attr-defined]
        else:
            continue
        if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
            found.add(name)
    return found - own() - FOREIGN - RECOGNISED - {name.rpartition(".")[2] for name in used(module)}


def own() -> set[str]:
    """What hornbeam's classes and modules define."""
    found: set[str] = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                found.update(name.asname or name.name for name in node.names)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in (part for t in targets if t is not None for part in ast.walk(t)):
                if isinstance(target, ast.Name):
                    found.add(target.id)
                elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    found.add(target.attr)
    return found


def imports(module: str) -> set[str]:
    """Modules of hornbeam that a module imports when it is imported, and those that they do."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found or name not in SOURCES:
            continue
        found.add(name)
        for node in SOURCES[name].body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hornbeam":
                inside = f"{node.module}.".removeprefix("hornbeam.")
                todo += [inside.removesuffix("."), *(f"{inside}{n.name}" for n in node.names)]
    return found


def all_used() -> dict[str, set[str]]:
    """Module of hornbeam → names."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in SOURCES:
        if used(module):
            found[module] = used(module)
    return found


#: Operation → where it begins.
ENTRIES = {
    "save": ["formats.save_adapters", "formats.shards"],
    "load": ["formats.load_adapters", "formats.shards"],
    "legacy save": ["formats.legacy_save"],
    "legacy load": ["formats.legacy_load"],
    "json": ["formats.to_json"],
    "export": ["formats.exports"],
    "safetensors": ["formats.safetensors"],
    "savedmodel": ["formats.savedmodel"],
    "training": ["training.backup", "training.model_checkpoint"],
    "partial save": ["flows.parts"],
}


def update(path: Path) -> None:
    """Writes what the modules use, and what each operation imports."""
    table = json.loads(path.read_text())
    owners: dict[str, set[str]] = defaultdict(set)  # attribute → whose, as `keras.Layer:_name`
    for name in table["known"]:
        owners[name.partition(":")[2]].add(name)
    table["uses"], shared = {}, owners.keys() & own()
    for module in sorted(SOURCES):
        found = set(used(module))
        for attribute in attributes(module):
            if attribute not in owners:
                print(f"{module} uses '{attribute}': add it to `known`, as 'keras.Layer:{attribute}', say")
            found |= owners[attribute]
        for node in ast.walk(SOURCES[module]):  # what hornbeam's own classes have, too
            if isinstance(node, ast.Attribute) and node.attr in shared:
                found |= owners[node.attr]
        if found:
            table["uses"][module] = sorted(found)
    for operation, entries in ENTRIES.items():
        modules = set().union(*(imports(entry) for entry in entries))
        table["operations"][operation]["modules"] = sorted(modules & table["uses"].keys())
    needed = {name for names in table["uses"].values() for name in names}
    needed |= {name for operation in table["operations"].values() for name in operation["replaces"]}
    for name in sorted(needed - table["known"].keys()):
        print(f"add '{name}' to `known`, with its parameters")
    table["known"] = {name: known for name, known in table["known"].items() if name in needed}
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    update(_ROOT / "seam" / "keras_names.json")
