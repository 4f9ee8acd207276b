"""What a config names and nobody knows: one error for all of it. Looked for only after Keras has raised."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from keras.src import api_export
from keras.src.backend.common import global_state
from keras.src.saving import object_registration, serialization_lib

from hornbeam.base.reports import shorten

#: Packages whose classes Keras imports by itself; what fails there is no custom object.
_IMPORTED = ("keras", "keras_hub", "keras_cv", "keras_nlp")


@contextlib.contextmanager
def explained(config: Callable[[], Any], custom_objects: dict[str, Any] | None) -> Iterator[None]:
    """Has an error about a custom object name all that are missing, where, and how to supply them.

    Args:
        config: Gives the config of what is built meanwhile; Keras empties the one that it builds from.
        custom_objects: What was passed with it.

    Raises:
        TypeError: Where Keras raises one; or its `ValueError`.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        missing = _missing(config(), custom_objects or {})
        what, cause = _head_and_cause(str(error))
        if not any(name in cause or name.rpartition(">")[2] in cause for _, name in missing):
            raise  # it is about something else
        raise type(error)(f"{what}\n\n{_message(missing)}") from error


def _head_and_cause(message: str) -> tuple[str, str]:
    """How Keras' message begins, and what it gives as the cause, both without the config that it quotes."""
    head = message.partition("\n\nconfig=")[0].partition(" Full object config:")[0]
    tail = message.rpartition("Exception encountered: ")[2].partition(" Full object config:")[0]
    return head, tail


Missing = dict[tuple[str, str], tuple[dict[str, Any], list[str]]]


def _missing(config: Any, custom_objects: dict[str, Any]) -> Missing:
    """`(kind, name)` of every object that cannot be located → its config, and where it is used."""
    scope = global_state.get_global_attribute("custom_objects_scope_dict", {})
    known = {**custom_objects, **scope, **object_registration.GLOBAL_CUSTOM_OBJECTS}
    found: Missing = {}
    pending: list[tuple[Any, str, str]] = [(config, "", "")]
    while pending:
        node, path, owner = pending.pop()
        if isinstance(node, dict):
            name = _name(node)
            if name is not None and not _is_located(node, name, known):
                kind = "function" if node["class_name"] == "function" else "class"
                inner = node["config"].get("name") if isinstance(node["config"], dict) else None
                who = f" '{inner}'" if isinstance(inner, str) else f" of '{owner}'" if owner else ""
                _, places = found.setdefault((kind, name), (node, []))
                places.append(f"{path or 'the object itself'}{f' ({who.strip()})' if who else ''}")
            inner = node.get("config") if "class_name" in node else node
            owner = inner["name"] if isinstance(inner, dict) and isinstance(inner.get("name"), str) else owner
            items = [(value, f"{path}.{key}" if path else str(key), owner) for key, value in node.items()]
            pending += reversed(items)
        elif isinstance(node, list | tuple):
            pending += reversed([(value, f"{path}[{i}]", owner) for i, value in enumerate(node)])
    return found


def _name(node: dict[str, Any]) -> str | None:
    """What an object is looked up by; `None` for what is no object."""
    kind, config = node.get("class_name"), node.get("config")
    if not isinstance(kind, str) or "config" not in node or kind.startswith("__"):
        return None
    if kind == "function":
        return config if isinstance(config, str) else None
    registered = node.get("registered_name") or kind
    return registered if isinstance(registered, str) else None


def _is_located(node: dict[str, Any], name: str, known: dict[str, Any]) -> bool:
    """Whether Keras finds it; nothing is imported for that."""
    if object_registration.get_registered_object(name, custom_objects=known) is not None:
        return True
    module, is_function = node.get("module"), node["class_name"] == "function"
    if not isinstance(module, str) or (module == "builtins" and is_function):
        # Keras looks into its own modules, and for configs of older versions into layers and models.
        modules = (*serialization_lib.BUILTIN_MODULES, "layers", "models")
        plain = name if is_function else node["class_name"]
        builtin = any(api_export.get_symbol_from_name(f"keras.{m}.{plain}") is not None for m in modules)
        return builtin or (is_function and ">" not in name and any(other.endswith(f">{name}") for other in known))
    return module.partition(".")[0] in _IMPORTED


def _message(missing: Missing) -> str:
    lines = [f"{len(missing)} custom {'object' if len(missing) == 1 else 'objects'} could not be located:"]
    for (kind, name), (node, places) in missing.items():
        module = node.get("module")
        origin = f", defined in {module}" if isinstance(module, str) and module != "builtins" else ""
        lines.append(f"  {kind} '{name}'{origin}: used at {shorten(places, 4)}")
    names = [name for _, name in missing]
    given = ", ".join(f"{name!r}: {name.rpartition('>')[2]}" for name in names)
    modules = {node.get("module") for node, _ in missing.values()} - {None, "builtins"}
    imported = f" (import {', '.join(sorted(map(str, modules)))})" if modules else ""
    lines += [
        "Supply them in one of three ways:",
        f"  pass custom_objects={{{given}}}",
        f"  load inside `with keras.saving.custom_object_scope({{{given}}}):`",
        "  decorate each with @keras.saving.register_keras_serializable(package=…, name=…) as when it was saved, and "
        f"import the module that defines it before loading{imported}",
    ]
    return "\n".join(lines)
