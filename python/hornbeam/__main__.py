"""`python -m hornbeam script.py args…`: runs an unchanged script with every Keras save and load through hornbeam."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

import hornbeam


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script or, with `-m`, a module under `hornbeam.install()`.

    Returns:
        The exit status; a script's own `SystemExit` passes through.
    """
    parser = argparse.ArgumentParser(prog="python -m hornbeam", description=main.__doc__)
    parser.add_argument("--version", action="version", version=f"hornbeam {hornbeam.__version__}")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module instead of a script")
    parser.add_argument("script", nargs="?", help="the script to run: a file, or a directory or zip with `__main__.py`")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if options.module is not None:
        if not options.module:
            parser.error("argument -m: expected a module")
        _put_first(os.getcwd())
        try:
            spec, code = _module(options.module[0])
        except ImportError as error:
            parser.error(str(error))
        sys.argv = [spec.origin or options.module[0], *options.module[1:]]
        _run(code, spec.origin, spec)
        return 0
    if options.script is None:
        parser.print_help()
        return 2
    if not os.path.exists(options.script):
        parser.error(f"no such script: '{options.script}'")
    sys.argv = [options.script, *options.args]
    place = os.path.join(os.getcwd(), options.script)
    importer: Any = pkgutil.get_importer(place)
    if importer is None:
        _put_first(os.path.dirname(os.path.realpath(place)))
        _run(_file(place), place, None)
        return 0
    found = importer.find_spec("__main__")
    if found is None:
        parser.error(f"no `__main__.py` in '{options.script}'")
    if sys.flags.safe_path:  # as Python: there is nothing to replace
        sys.path.insert(0, place)
    else:
        _put_first(place)
    _run(found.loader.get_code("__main__"), found.origin, found)
    return 0


def _put_first(directory: str) -> None:
    """In the place of the working directory, which `python -m` puts first; under `-P` it does not."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _module(name: str) -> tuple[ModuleSpec, CodeType]:
    """What `python -m name` runs."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
        if spec is None:
            raise ImportError(f"'{name}' is a package without `__main__.py`, which cannot be run")
    loader: Any = None if spec is None else spec.loader
    code = loader.get_code(spec.name) if spec is not None and hasattr(loader, "get_code") else None
    if spec is None or code is None:
        raise ImportError(f"no module to run is named '{name}'")
    return spec, code


def _file(path: str) -> CodeType:
    """The code of a script, compiled or not."""
    with io.open_code(path) as file:
        code = pkgutil.read_code(file)
    if code is None:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec")
    return code


def _run(code: CodeType, file: str | None, spec: ModuleSpec | None) -> None:
    """Runs it as `__main__`, which it stays: threads and `atexit` need it when it has come to its end."""
    module = ModuleType("__main__")
    module.__file__ = file
    module.__spec__ = spec
    module.__package__ = None if spec is None else spec.parent
    module.__loader__ = None if spec is None else spec.loader
    vars(module)["__cached__"] = None if spec is None else spec.cached
    vars(module)["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    hornbeam.install()
    exec(code, vars(module))


if __name__ == "__main__":
    sys.exit(main())
