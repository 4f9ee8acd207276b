"""What a running `fit` trains on: Keras keeps its epoch iterator in a local variable, where no callback sees it.

It is found in the frame of `fit`. Only what cannot be resumed exactly otherwise is touched: the epoch iterator of data
made by `hornbeam.data.resumable`, and, with a `seed`, the shuffling of arrays on TensorFlow.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.trainers.epoch_iterator import EpochIterator

from hornbeam.seam import keras_names
from hornbeam.seam.operation import changed, running
from hornbeam.seam.patches import Patch
from hornbeam.training.resumable import Resumable, frames
from hornbeam.values import randomness, tf_data

#: In the state of data: the adapter's count of epochs; beside it, what the data themselves gave.
_EPOCH = "epoch of the adapter"


def callback_list() -> keras.callbacks.CallbackList | None:
    """The list whose `set_model` is calling."""
    for frame in frames():
        if isinstance(found := frame.f_locals.get("self"), keras.callbacks.CallbackList):
            return found
    return None


class Input:
    """The training data of a `fit`, from its `on_train_begin` on.

    Attributes:
        inexact: Why an epoch, repeated after a restart, may see other data; `None` if it sees the same.
        resumable: The data, if a position inside an epoch can be restored.
    """

    def __init__(self, model: Any, seed: int | None) -> None:
        self._epochs = _epoch_iterator(model)
        self._adapter: Any = getattr(self._epochs, "data_adapter", None)
        self._shuffle: Any = None
        self._seeded = seed is not None
        self.resumable = self._adapter if isinstance(self._adapter, Resumable) else None
        self.inexact = self._why_inexact(seed)
        if self._epochs is None:
            return
        if self.resumable is not None:
            epochs, data = self._epochs, self.resumable
            epochs._enumerate_iterator = lambda: _enumerate(epochs, data)
        elif seed is not None and _shuffles_in_tensorflow(self._adapter) and keras_names.is_recognised(self._adapter):
            self._shuffle = _seed_shuffle(self._epochs, self._adapter)

    def _why_inexact(self, seed: int | None) -> str | None:
        epochs, adapter = self._epochs, self._adapter
        if epochs is None:
            return "the data of a `fit` that is not Keras' own are unknown"
        if not keras_names.is_recognised(epochs):
            return f"hornbeam does not know how this Keras' {type(epochs).__name__} goes through the data"
        has_iterators = isinstance(adapter, TFDatasetAdapter) or (isinstance(adapter, Resumable) and not adapter.counts)
        if has_iterators and _is_distributed(epochs):
            return "a distributed tf.data.Dataset does not give away its iterators"
        if isinstance(adapter, Resumable):
            return None
        if isinstance(
            adapter, TFDatasetAdapter | ArrayDataAdapter | PyDatasetAdapter
        ) and not keras_names.is_recognised(adapter):
            return f"hornbeam does not know this Keras' {type(adapter).__name__}"
        if isinstance(adapter, TFDatasetAdapter):
            whole = epochs.steps_per_epoch in (None, adapter.num_batches)
            if not whole and (adapter.num_batches is not None or keras.backend.backend() != "tensorflow"):
                return "with `steps_per_epoch` one pass over the data lasts for several epochs"
            return tf_data.unseeded(adapter._dataset)
        if isinstance(adapter, ArrayDataAdapter | PyDatasetAdapter):
            if epochs.steps_per_epoch and epochs.steps_per_epoch != adapter.num_batches:
                return "with `steps_per_epoch` one pass over the data lasts for several epochs"
            if isinstance(adapter, PyDatasetAdapter):
                return "the PyDataset is infinite" if adapter.num_batches is None else None
            if seed is None and _shuffles_in_tensorflow(adapter) and not _counts_epochs(adapter):
                return "TensorFlow's state of shuffling cannot be saved; pass `seed=`"
            return None
        return f"the position in a {type(adapter).__name__.removesuffix('Adapter')} cannot be saved"

    @property
    def length(self) -> int | None:
        """Batches of an epoch, if they are known."""
        return None if self._epochs is None else self._epochs.steps_per_epoch or self._epochs._num_batches

    @property
    def looks_ahead(self) -> bool:
        """Whether batches begin only when there is one: see `_looks_ahead`."""
        return self.resumable is not None and _looks_ahead(self._epochs, self.resumable)

    def begin(self, epoch: int, seed: int | None) -> None:
        """Called when an epoch begins that is not resumed in its middle."""
        if self.resumable is not None:
            self.resumable.epoch, self.resumable.step = epoch, 0
        if seed is not None:
            if self._shuffle is not None:
                self._shuffle.assign(randomness.derive(seed, epoch))
            elif _counts_epochs(self._adapter) and keras_names.is_recognised(self._adapter):
                self._adapter._epoch = randomness.derive(seed, epoch)
        if self.inexact is None and isinstance(self._adapter, ArrayDataAdapter | PyDatasetAdapter):
            # With `steps_per_epoch` Keras makes an epoch's iterator when the one before ends, which a restart cannot.
            self._epochs._current_iterator = None
            # Workers leave batches of an epoch that was not finished (Keras builds a model from its first) to the next.
            enqueuer = getattr(self._adapter, "enqueuer", None)
            while enqueuer is not None and not enqueuer.is_running() and not enqueuer.ready_queue.empty():
                enqueuer.ready_queue.get()

    def state(self, epoch: int, step: int) -> Any:
        """What is needed to go on at this batch, or, for data that are not resumable, with this epoch."""
        if self.resumable is not None:
            self.resumable.epoch, self.resumable.step = epoch, step
            return self.resumable.get_state()
        if self.inexact is not None:
            return None
        if isinstance(self._adapter, TFDatasetAdapter):
            # A new iterator where there is none: the next epoch's comes after it, here and after a restart.
            live = getattr(self._epochs, "_current_iterator", None)
            live = live if hasattr(live, "_iterator_resource") else iter(self._adapter._dataset)
            return {"iterator": tf_data.save_iterator(live), "seen": self._epochs._steps_seen}
        dataset = getattr(self._adapter, "py_dataset", None)
        state = dataset.get_state() if dataset is not None and hasattr(dataset, "get_state") else None
        return {_EPOCH: int(self._adapter._epoch), "dataset": state} if _counts_epochs(self._adapter) else state

    def restore(self, state: Any) -> None:
        """Goes to where `state` was called."""
        if state is None or self._epochs is None:
            return
        if self.resumable is not None:
            self.resumable.set_state(state)
        elif isinstance(self._adapter, TFDatasetAdapter):
            iterator = iter(self._adapter._dataset)
            tf_data.load_iterator(iterator, state["iterator"])
            if self._epochs.steps_per_epoch:  # it goes on; otherwise the dataset has its count of iterators back
                self._epochs._current_iterator, self._epochs._steps_seen = iterator, state["seen"]
        else:
            if isinstance(state, dict) and _EPOCH in state:
                if _counts_epochs(self._adapter) and not self._seeded:
                    self._adapter._epoch = state[_EPOCH]
                state = state["dataset"]
            if state is not None:
                self._adapter.py_dataset.set_state(state)

    def example(self) -> Any:
        """A batch of resumable data, or what looks like one."""
        return None if self.resumable is None else self.resumable.example()


def _epoch_iterator(model: Any) -> Any:
    for frame in frames():
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            found = frame.f_locals.get("epoch_iterator")
            if isinstance(found, EpochIterator):
                return found
    return None


def _enumerate(epochs: Any, data: Resumable) -> Iterator[tuple[int, int, Any]]:
    """`EpochIterator._enumerate_iterator` from the position of the data on, with one iterator for each epoch."""
    data.on_epoch_begin()
    goes_on = epochs.steps_per_epoch is not None and data.num_batches is None
    # torch draws a number for every iterator: the random state inside of an epoch is that after it was drawn.
    with randomness.kept() if data.step > 0 else contextlib.nullcontext():
        iterator = data.open(lambda: iter(_begin(epochs, data)), goes_on=goes_on)
    length, size = epochs.steps_per_epoch or epochs._num_batches, epochs.steps_per_execution
    step, looks_ahead = data.step, _looks_ahead(epochs, data)
    while length is None or step < length:
        batches = iterator
        if looks_ahead:
            first = list(itertools.islice(iterator, 1))
            if not first:
                break
            batches = itertools.chain(first, iterator)
        epochs._steps_seen = step + size
        yield step, step + size - 1, batches
        step += size
    data.on_epoch_end()


def _looks_ahead(epochs: Any, data: Resumable) -> bool:
    """Whether only the data know which batch is an epoch's last, and `fit` fails where none is left, as on JAX."""
    return keras.backend.backend() == "jax" and data.num_batches is None and not epochs.steps_per_epoch


def _begin(epochs: Any, data: Resumable) -> Any:
    """What `fit` iterates over; where Keras reads ahead of training (JAX), without that, if the position is the data's.

    A distribution has an iterator of its own, which does not read ahead.
    """
    reads_ahead = keras.backend.backend() == "jax" and keras.distribution.distribution() is None
    if not reads_ahead or data.counts:
        return epochs._get_iterator()
    # From Keras 3.16 on, JAX takes the batches of several steps as one.
    together = epochs.steps_per_execution > 1 and hasattr(data_adapter_utils, "super_batch_iterator")
    return data.get_jax_iterator(epochs.steps_per_execution if together else None)


def _is_distributed(epochs: Any) -> bool:
    """Whether TensorFlow distributes the data over replicas."""
    dataset = getattr(epochs, "_distributed_dataset", None)
    return dataset is not None and not hasattr(dataset, "_variant_tensor")


def _shuffles_in_tensorflow(adapter: Any) -> bool:
    return keras.backend.backend() == "tensorflow" and isinstance(adapter, ArrayDataAdapter) and bool(adapter._shuffle)


def _counts_epochs(adapter: Any) -> bool:
    """Whether the order of an epoch is a function of the adapter's own count of epochs, as from Keras 3.16 on."""
    return isinstance(adapter, ArrayDataAdapter | PyDatasetAdapter) and "_epoch" in vars(adapter)


def _shuffle(original: Callable[..., Any]) -> Callable[..., Any]:
    """`tf.random.shuffle`, by a variable seed where an adapter builds its pipeline for us."""

    def shuffle(value: Any, *args: Any, **kwargs: Any) -> Any:
        seed = running().seed
        if seed is None:
            return original(value, *args, **kwargs)
        return tf_data.shuffle(value, seed)  # the first element tells the batches of `shuffle="batch"` apart

    return shuffle


_shuffle_patch = Patch(_shuffle)


def _seed_shuffle(epochs: Any, adapter: Any) -> Any:
    """Builds the pipeline of an adapter of arrays again, with an order that is a function of the returned variable."""
    seed = tf_data.seed_variable()
    if _counts_epochs(adapter):  # what the pipeline takes its order from; stock Keras' has the number of now for ever
        count, adapter._epoch = adapter._epoch, seed
        try:
            dataset = adapter.get_tf_dataset()
        finally:
            adapter._epoch = count
    else:
        with _shuffle_patch(tf_data.random_module(), "shuffle"), changed(seed=seed):
            dataset = adapter.get_tf_dataset()
    strategy = epochs._distribute_strategy
    epochs._distributed_dataset = strategy.experimental_distribute_dataset(dataset)
    return seed
