"""Paths that outlive a call: what a relative one means is decided once, when it is given."""

from __future__ import annotations

import os
import re


def absolute(path: str | bytes | os.PathLike[str]) -> str:
    """The path from the root, so that a later `chdir` changes nothing; remote ones (`gs://…`) as they are.

    `..` stays where it is: behind a symbolic link it is not the directory that the text says.
    """
    text = os.fsdecode(path)
    if "://" in text:
        return text
    if os.name == "nt" or os.pardir not in re.split(r"[/\\]", text):
        return os.path.abspath(text)
    return os.path.join(os.getcwd(), text)
