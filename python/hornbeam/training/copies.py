"""Copies of what has locks, threads or files: they have the same arguments, and begin anew."""

from __future__ import annotations

from typing import Any


class BeginsAnew:
    """An object whose copies and pickles are without what `_forget` sets: that belongs to this one's work."""

    def _forget(self) -> None:
        """Sets what a new object has before any work; `__init__` calls it, too."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        blank = object.__new__(type(self))
        blank._forget()
        return {name: value for name, value in vars(self).items() if name not in vars(blank)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(state)
