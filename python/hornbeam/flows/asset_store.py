"""Assets of layers: vocabularies and other files beside the weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras.src.saving import saving_lib


class AssetStore(saving_lib.DiskIOStore):
    """Keras' asset store, whose temporary directory is made when the first asset asks for it."""

    def __init__(self, mode: str, extract: Callable[[str], None] | None = None) -> None:
        self.mode = mode
        self.archive = None
        self.tmp_dir: str | None = None
        self.root_path = saving_lib._ASSETS_DIRNAME
        self._extract = extract
        self._working_dir: str | None = None
        self.old_path: Callable[[str], str] | None = None

    def get(self, path: str) -> Any:
        """The directory of `path`, or of what an old file calls so, or `None`."""
        return super().get(path) or (self.old_path and super().get(self.old_path(path)))

    @property
    def working_dir(self) -> str:
        """The temporary directory, made when it is first asked for."""
        if self._working_dir is None:
            self.tmp_dir = saving_lib.get_temp_dir()
            self._working_dir = str(Path(self.tmp_dir) / self.root_path)
            Path(self._working_dir).mkdir()
            if self._extract is not None:
                self._extract(self._working_dir)
        return self._working_dir

    def extract(self) -> None:
        """Does now what the first asset would ask for."""
        assert self.working_dir

    def files(self) -> list[tuple[str, str]]:
        """`(member name, path)` of every asset, in the order stock Keras archives them."""
        if self._working_dir is None:
            return []
        root = Path(self._working_dir)
        # Links are followed, as Keras follows them.
        found = sorted(Path(top, name) for top, _, names in os.walk(root, followlinks=True) for name in names)
        return [(f"{self.root_path}/{p.relative_to(root).as_posix()}", str(p)) for p in found]

    def move(self) -> AssetStore:
        """Another store with the same files, which this one no longer removes."""
        moved = AssetStore(self.mode)
        moved.tmp_dir, moved._working_dir = self.tmp_dir, self._working_dir
        self.tmp_dir = self._working_dir = None
        return moved

    def close(self) -> None:
        """Removes the temporary directory."""
        if self.tmp_dir is not None:
            saving_lib.file_utils.rmtree(self.tmp_dir)
            self.tmp_dir = self._working_dir = None
