"""What a save or load is asked for: made by whoever is called, handed down as an argument, never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hornbeam.base import writer
from hornbeam.errors import UnsupportedError

NameMap = Mapping[str, str | None] | Callable[[str], str | None]
#: What weights can be cast to.
DTYPES = ("float16", "bfloat16")
_SAFETENSORS = (".safetensors", ".safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class SaveRequest:
    """One save.

    Attributes:
        model: The model, or whatever else Keras saves.
        target: A path, a `Stream` or a file object.
        weights_format: As Keras' argument.
        include_optimizer: Save the optimizer's state.
        dtype: What weights in wider floating-point types are cast to.
        allow_overflow: Let values that the type cannot hold become infinite.
        max_shard_size: Size of a shard in GB (1024³ bytes).
        objects_to_skip: Layers that are left out.
        only: Patterns of what is saved; `None` for everything.
        skip: Patterns of what is not.
        replace_complete: A part of the model may take the place of complete weights.
        writer: Who writes it, where it is asynchronous.

    Raises:
        ValueError: For an unknown dtype, and what does nothing.
    """

    model: Any
    target: Any
    weights_format: str = "h5"
    include_optimizer: bool = True
    dtype: str | None = None
    allow_overflow: bool = False
    max_shard_size: float | None = None
    objects_to_skip: Sequence[Any] | None = None
    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    replace_complete: bool = False
    writer: writer.Reservation | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be 'float16' or 'bfloat16'. Received: dtype={self.dtype!r}")
        if self.allow_overflow and self.dtype is None:
            raise ValueError("`allow_overflow` is for weights that are cast, by `dtype`.")
        if self.replace_complete and not self.partial:
            raise ValueError("`replace_complete` is for saves of a part: pass `only` or `skip` as well.")

    @property
    def path(self) -> str | None:
        """The target as reports call it: `None` for a file object."""
        return self.target if isinstance(self.target, str) else None

    @property
    def partial(self) -> bool:
        """Whether only a part of the model is saved."""
        return self.only is not None or bool(self.skip)

    @property
    def safetensors(self) -> bool:
        """Whether it is saved as that."""
        return str(self.target).endswith(_SAFETENSORS)

    @property
    def smaller(self) -> bool:
        """Whether the file holds less than Keras' would."""
        return not self.include_optimizer or self.dtype is not None or self.allow_overflow

    def refuse_writer(self, what: str) -> None:
        """Raises if the save is asynchronous, where it cannot be.

        Raises:
            UnsupportedError: Then.
        """
        if self.writer is not None:
            raise UnsupportedError(f"Only `.keras` and `.weights.h5` files are saved asynchronously, not {what}.")

    def beyond(self) -> list[str]:
        """What of it stock Keras does not do."""
        found = []
        if self.writer is not None:
            found.append("does not save asynchronously")
        if self.partial:
            found.append("does not save in part")
        if self.safetensors:
            found.append("knows no safetensors")
        if self.smaller:
            found.append("neither casts weights nor leaves the optimizer's state out")
        return found


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """One load.

    Attributes:
        source: A path, a `Stream` or a file object.
        model: What takes the weights; `None` where the file says what the model is.
        strict: Raise unless the load is complete.
        only: Patterns of what is loaded; `None` for everything.
        skip: Patterns of what is not.
        name_map: Name in the file → name in the model.
        by_name: Match layers by their names instead of their places.
        skip_mismatch: Warn of what does not fit.
        objects_to_skip: Layers that are left alone.
        custom_objects: As Keras' argument, like the next two.
        compile: See Keras.
        safe_mode: See Keras.
    """

    source: Any
    model: Any = None
    strict: bool = False
    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    name_map: NameMap | None = None
    by_name: bool = False
    skip_mismatch: bool = False
    objects_to_skip: Sequence[Any] | None = None
    custom_objects: Any = None
    compile: bool = True
    safe_mode: bool = True

    @property
    def partial(self) -> bool:
        """Whether not simply everything goes where Keras would put it."""
        return self.only is not None or bool(self.skip) or self.name_map is not None or self.by_name

    @property
    def path(self) -> str | None:
        """The source as reports call it: `None` for a file object."""
        return self.source if isinstance(self.source, str) else None

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """What a mapping has names for, though the file, which has these, does not."""
        return sorted(set(self.name_map).difference(names)) if isinstance(self.name_map, Mapping) else []

    def beyond(self) -> list[str]:
        """What of it stock Keras does not do."""
        found = ["does not load strictly or in part"] if self.strict or self.partial else []
        return [*found, "knows no safetensors"] if str(self.source).endswith(_SAFETENSORS) else found
