"""`python -m hornbeam script.py args…`: runs an unchanged script with every Keras save and load through hornbeam."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

import hornbeam


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script or, with `-m`, a module under `hornbeam.install()`.

    Returns:
        The exit status; a script's own `SystemExit` passes through.
    """
    parser = argparse.ArgumentParser(prog="python -m hornbeam", description=main.__doc__)
    parser.add_argument("--version", action="version", version=f"hornbeam {hornbeam.__version__}")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module instead of a script")
    parser.add_argument("script", nargs="?", help="the script to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if options.module is not None:
        if not options.module:
            parser.error("argument -m: expected a module")
        sys.argv = options.module
        hornbeam.install()
        sys.path[0] = os.getcwd()
        runpy.run_module(options.module[0], run_name="__main__", alter_sys=True)
        return 0
    if options.script is None:
        parser.print_help()
        return 2
    if not os.path.exists(options.script):
        parser.error(f"no such script: '{options.script}'")
    sys.argv = [options.script, *options.args]
    sys.path[0] = os.path.dirname(os.path.abspath(options.script))
    hornbeam.install()
    runpy.run_path(options.script, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
