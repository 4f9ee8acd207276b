"""Training data whose position can be saved, so that training goes on at the very next batch."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from hornbeam.errors import CheckpointError, UnsupportedError
from hornbeam.values import on_jax, tf_data


def make(source: Any, *, batch_size: int | None, shuffle: bool, seed: int | None) -> Resumable:
    """`hornbeam.data.resumable`."""
    if hasattr(source, "element_spec"):
        if batch_size is not None or shuffle or seed is not None:
            raise ValueError(f"A tf.data.Dataset batches and shuffles itself. Received: {batch_size=}, {shuffle=}")
        return _Dataset(source)
    if shuffle and seed is None:
        raise ValueError("`shuffle=True` needs a `seed`: the order must be the same after a restart.")
    if isinstance(source, keras.utils.PyDataset):
        if batch_size is not None or source.num_batches is None:
            raise ValueError(f"A PyDataset must be finite, and batches itself. Received: {batch_size=}")
        return _Indexed(source.num_batches, source.__getitem__, shuffle, seed, None)
    arrays = source if isinstance(source, tuple) else (source,)
    leaves = keras.tree.flatten(arrays)
    if not leaves or len(arrays) > 3 or not all(hasattr(a, "shape") and len(a.shape) for a in leaves):
        raise ValueError(f"`source` must be a tf.data.Dataset, a PyDataset or arrays. Received: {type(source)}")
    size, number = batch_size or 32, len(leaves[0])
    if size < 1 or any(len(leaf) != number for leaf in leaves):
        raise ValueError(f"Arrays must be of one length. Received: {[len(leaf) for leaf in leaves]}, {batch_size=}")
    host = keras.tree.map_structure(keras.ops.convert_to_numpy, arrays)
    return _Indexed(math.ceil(number / size), host, shuffle, seed, (number, size))


class Resumable(DataAdapter):
    """Data with a position. `hornbeam.data.resumable` makes it.

    Attributes:
        epoch: The epoch that it is in.
        step: How many batches of it were taken.
    """

    counts = True  # `epoch` and `step` are all there is to the position

    def __init__(self) -> None:
        self.epoch = self.step = 0
        self._began = False

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch, batch by batch."""
        for batch in self._rest():
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def get_state(self) -> dict[str, Any]:
        """Where the next batch comes from."""
        return {"epoch": self.epoch, "step": self.step, "source": self._source_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
            CheckpointError: The state is that of other data.
        """
        self.check_state(state)
        self.epoch, self.step = state["epoch"], state["step"]
        self._set_source_state(state["source"])

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses what `set_state` would refuse, and changes nothing.

        Raises:
            CheckpointError: The state is that of other data.
        """
        if not (isinstance(state, dict) and state.keys() >= {"epoch", "step", "source"}):
            raise CheckpointError(f"The checkpoint is not of data. Expected a position, found {state!r:.200}.")
        self._check_source_state(state["source"])

    def open(self, make: Callable[[], Any], *, goes_on: bool) -> Any:
        """An iterator of the backend's for `fit`, from the position on.

        Args:
            make: Makes one.
            goes_on: The one of the epoch before goes on, if there is one: `steps_per_epoch` does not end at its end.
        """
        return make()

    def _batches(self) -> Iterator[Any]:
        raise NotImplementedError

    def _rest(self) -> Iterator[Any]:
        """What is left of the epoch, in a loop of one's own."""
        return self._batches()

    def _source_state(self) -> Any:
        raise NotImplementedError

    def _check_source_state(self, state: Any) -> None:
        """Raises `CheckpointError` for the state of other data, as far as that can be seen."""

    def _set_source_state(self, state: Any) -> None:
        """Goes there."""

    def on_epoch_begin(self) -> None:
        """Called by `fit`.

        Raises:
            ValueError: `fit` was given something that Keras applies to data of its own only.
        """
        if not self._began:
            _refuse_arguments(self)
        self._began = True

    def on_epoch_end(self) -> None:
        """Called by `fit`, once too often before it begins."""
        if self._began:
            self.epoch, self.step, self._began = self.epoch + 1, 0, False

    def get_numpy_iterator(self) -> Any:
        """As Keras' own."""
        return data_adapter_utils.get_numpy_iterator(self._batches())

    def get_jax_iterator(self, super_batch: int | None = None) -> Any:
        """As Keras' own; from 3.16 on, the batches of several steps come together, where `fit` takes them together."""
        batches = data_adapter_utils.get_jax_iterator(self._batches())
        if not super_batch:
            return batches
        return data_adapter_utils.super_batch_iterator(iter(batches), super_batch, stack_fn=on_jax.stack())

    def get_torch_dataloader(self) -> Any:
        """As Keras' own."""
        return data_adapter_utils.get_torch_dataloader(_Lazy(self._batches))

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch, where that is known."""
        return None

    @property
    def has_partial_batch(self) -> bool | None:
        """Whether the last batch is smaller, where that is known."""
        return None

    @property
    def partial_batch_size(self) -> int | None:
        """Rows of the last batch, where that is known."""
        return None

    def example(self) -> Any:
        """A batch, or what has its structure, shapes and dtypes."""
        raise NotImplementedError


class _Lazy:
    """An iterable that begins at the position of the moment when iteration begins."""

    def __init__(self, begin: Callable[[], Iterator[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[Any]:
        return self._begin()


class _Indexed(Resumable):
    """Batches by their numbers: a position is all there is to save."""

    def __init__(self, length: int, source: Any, shuffle: bool, seed: int | None, rows: tuple[int, int] | None) -> None:
        super().__init__()
        self._length, self._source, self._shuffle, self._seed, self._rows = length, source, shuffle, seed, rows
        self._dataset: Any = None

    @property
    def num_batches(self) -> int:
        """How many batches an epoch has."""
        return self._length

    @property
    def batch_size(self) -> int | None:
        """Rows of a batch."""
        return self._rows[1] if self._rows is not None else None

    def _batches(self) -> Iterator[Any]:
        order = None
        if self._shuffle:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed or 0, self.epoch])))
            order = generator.permutation(self._length if self._rows is None else self._rows[0])
        for i in range(self.step, self._length):
            yield self._batch(i, order)

    def _batch(self, i: int, order: np.ndarray | None) -> Any:
        if self._rows is None:
            batch = self._source(i if order is None else int(order[i]))
            return tuple(batch) if isinstance(batch, list) else batch
        rows: Any = slice(i * self._rows[1], (i + 1) * self._rows[1])
        rows = rows if order is None else order[rows]
        return keras.tree.map_structure(lambda array: array[rows], self._source)

    def get_tf_dataset(self) -> Any:
        """Made from a generator, which begins when an iterator gives its first batch."""
        if self._dataset is None:
            first = self.example()
            others = [self._batch(self._length - 1, None)] if self._length > 1 else []
            signature = data_adapter_utils.get_tensor_spec([first, *others])
            self._dataset = tf_data.from_generator(self._batches, signature)
        return self._dataset

    def example(self) -> Any:
        return self._batch(0, None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the same data at the same position, for an iteration of their own."""
        return vars(self) | {"_dataset": None}

    def _source_state(self) -> dict[str, Any]:
        return {"length": self._length, "shuffle": self._shuffle, "seed": self._seed}

    def _check_source_state(self, state: Any) -> None:
        if state != self._source_state():
            raise CheckpointError(f"The checkpoint is of other data. Expected {self._source_state()}, found {state}.")


class _Dataset(Resumable):
    """A `tf.data.Dataset`: its iterator knows its position, and can be asked for it."""

    counts = False

    def __init__(self, dataset: Any) -> None:
        super().__init__()
        reason = tf_data.unseeded(dataset)
        if reason is not None:
            raise UnsupportedError(f"The position in this tf.data.Dataset cannot be saved: {reason}")
        self._dataset = dataset
        self._live: Any = None  # the iterator that gave the last batch
        self._fresh: bytes | None = None  # its state before it gave any
        self._pending: dict[str, bytes] | None = None  # what the next one begins with
        self._goes_on = False  # whether it outlives the epoch
        self._loaded = False  # whether it is the continuation of another process'

    @property
    def num_batches(self) -> int | None:
        """How many batches an epoch has, where that is known."""
        number = int(self._dataset.cardinality())
        return number if number >= 0 else None

    def get_tf_dataset(self) -> Any:
        """The dataset itself."""
        return self._dataset

    def open(self, make: Callable[[], Any], *, goes_on: bool) -> Any:
        self._goes_on = goes_on
        if self._stays() and keras.backend.backend() == "tensorflow":
            return self._live
        made = make()
        if hasattr(made, "_iterator_resource"):  # elsewhere `_batches` makes it, when its first batch is asked for
            return self._attach(made)
        return made

    def _stays(self) -> bool:
        """Whether the iterator that is there goes on.

        Then no other may be made: it would draw a seed, before or after the one that reads ahead draws its next.
        """
        return self._goes_on and self._live is not None and self._pending is None

    def _attach(self, made: Any) -> Any:
        """The iterator to go on with: `made`, moved to the position.

        Which order an epoch gets is counted in the dataset: each new iterator draws a seed. Only the state of an
        iterator that gave nothing yet sets that count right; a later one's sometimes counts the epoch twice.
        """
        if self._pending is not None:
            self._fresh, live = self._pending["fresh"], self._pending.get("live")
            self._pending, self._loaded = None, True
            if live is not None:
                tf_data.load_iterator(made, live)
                self._live = made
                return made
        if self._loaded and self._fresh is not None:
            tf_data.load_iterator(made, self._fresh)
            made, self._loaded = iter(self._dataset), False
        self._live, self._fresh = made, tf_data.save_iterator(made)
        return made

    def _batches(self) -> Iterator[Any]:
        yield from self._live if self._stays() else self._attach(iter(self._dataset))

    def _rest(self) -> Iterator[Any]:
        left = self.step > 0 and self._live is not None and self._pending is None  # the loop before this was left
        return self._live if left else self._batches()

    def example(self) -> Any:
        return self._dataset.element_spec

    def __reduce__(self) -> Any:
        raise TypeError(
            "Data from a tf.data.Dataset can be neither copied nor pickled: the dataset belongs to this process. Make "
            "them anew with `hornbeam.data.resumable`, and give them the position with `set_state(data.get_state())`."
        )

    def _source_state(self) -> dict[str, bytes] | None:
        if self._live is None or self._fresh is None:
            return self._pending
        done = self.step == 0 and not self._goes_on
        return {"fresh": self._fresh} | ({} if done else {"live": tf_data.save_iterator(self._live)})

    def _set_source_state(self, state: Any) -> None:
        self._pending, self._live = state, None


def frames() -> Iterator[FrameType]:
    """The frames that are running in this thread, the caller's first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _refuse_arguments(data: Resumable) -> None:
    calls = (frame.f_locals for frame in frames() if frame.f_code.co_name == "fit")
    call = next((arguments for arguments in calls if arguments.get("x") is data), {})
    given = [name for name in ("y", "sample_weight", "class_weight") if call.get(name) is not None]
    if given:
        raise ValueError(
            f"`fit` does not apply {', '.join(given)} to data made by `hornbeam.data.resumable`. Make them part of it: "
            "`resumable((x, y, sample_weight), …)`, or a dataset that gives three values."
        )
