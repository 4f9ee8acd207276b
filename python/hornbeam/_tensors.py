"""Values ↔ host memory, per backend: what is shared, copied, adopted, held.

A value is *shared* where its memory cannot change while it is held (TensorFlow and JAX tensors on the CPU), *deferred*
where it can or has to be fetched from a device (torch, NumPy, accelerators): then it is copied when its turn comes.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np

from hornbeam._tried import Tried


class Deferred:
    """A value whose host array is made when its turn comes; what it will look like is known now.

    Args:
        array: Makes it.
        dtype: Its dtype.
        shape: Its shape.
        into: Copies the value to memory that is there; without it, `array` makes the whole value first.
    """

    __slots__ = ("array", "dtype", "into", "shape")

    def __init__(
        self,
        array: Callable[[], np.ndarray],
        dtype: str,
        shape: Sequence[int],
        into: Callable[[np.ndarray], Any] | None = None,
    ) -> None:
        self.array = array
        self.dtype = extended_dtype(dtype)
        self.shape = tuple(shape)
        self.into = into

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.dtype.itemsize * math.prod(self.shape)

    def copy_to(self, memory: np.ndarray) -> np.ndarray:
        """The value as an array over `memory`, which has `nbytes` bytes."""
        taken = np.ndarray(self.shape, self.dtype, buffer=memory)
        if self.into is None:
            np.copyto(taken, self.array())
        elif self.nbytes:
            self.into(memory)
        return taken


def extended_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, or the extension's."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))


@functools.cache
def _backend() -> str:
    import keras

    return keras.backend.backend()


def view(value: Any) -> np.ndarray | Deferred:
    """Host memory of a variable, tensor or array.

    Returns:
        An array that nobody else can change (shared, or copied now), or a `Deferred`.
    """
    import keras

    deferrable = isinstance(value, keras.Variable)
    viewer = _VIEWERS.get(_backend())
    found = viewer(value.value if deferrable else value) if viewer is not None else None
    if found is None or (isinstance(found, Deferred) and not deferrable):
        return _copy(value)  # the Keras variable: NumPy cannot convert what is in a distributed scalar one
    return found


def is_addressable(value: Any) -> bool:
    """Whether this process can read all of a value: with several of JAX's, an array may be spread over them."""
    array = value._value if hasattr(value, "_value") else value
    return bool(getattr(array, "is_fully_addressable", True) or getattr(array, "is_fully_replicated", False))


def _copy(value: Any) -> np.ndarray:
    """As stock Keras converts it; the result shares no memory."""
    import keras

    return keras.ops.convert_to_numpy(value)


def _view_tensorflow(value: Any) -> np.ndarray | Deferred | None:
    import tensorflow as tf

    if _is_resource_variable(value.__class__):
        if "CPU" not in (value.device or "CPU"):
            return _fetch_tensorflow(value)
        # A variable that saw sparse updates is copied on every read from then on, unless this is called first; its next
        # sparse update copies it once instead, if the view is still held. Small ones are copied sooner than that.
        if (value.shape.num_elements() or _COPIED) * value.dtype.size > _COPIED:
            tf.raw_ops.DisableCopyOnRead(resource=value.handle)
        return np.asarray(tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype))
    if type(value).__name__ == "EagerTensor" and tf.is_tensor(value) and "CPU" in value.device:
        return np.asarray(value)
    return None


@functools.cache
def _is_resource_variable(cls: type) -> bool:
    """Asked once for a class, since TensorFlow's answer takes longer than reading the variable."""
    from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

    return issubclass(cls, BaseResourceVariable)  # slots made by `fit` are of another class than `tf.Variable(...)`


#: Bytes up to which reading a TensorFlow variable may copy it.
_COPIED = 64 << 10


def _fetch_tensorflow(value: Any) -> Deferred:
    """A variable that is on a device."""
    into = functools.partial(_fetch_rows, lambda rows: value[rows].numpy(), value.dtype.name, value.shape)
    return Deferred(value.numpy, value.dtype.name, value.shape, into)


def _fetch_rows(take: Callable[[Any], Any], dtype: str, shape: Sequence[int], memory: np.ndarray) -> None:
    """Fills memory from a device, some rows at a time: of a large value the host holds little more than `memory`."""
    target = np.ndarray(tuple(shape), extended_dtype(dtype), buffer=memory)
    if target.nbytes <= _FETCHED:
        target[...] = take(...)
        return
    step = max(1, _FETCHED * target.shape[0] // target.nbytes)
    for start in range(0, target.shape[0], step):
        target[start : start + step] = take(slice(start, start + step))


#: Bytes that are fetched from a device at a time.
_FETCHED = 64 << 20


def _view_jax(value: Any) -> np.ndarray | Deferred | None:
    import jax

    if not isinstance(value, jax.Array) or isinstance(value, jax.core.Tracer):
        return None
    if not value.is_fully_addressable:  # every process has a copy of it
        value = value.addressable_data(0)
    if all(device.platform == "cpu" for device in value.devices()):
        return np.asarray(value) if len(value.devices()) == 1 else None
    return _fetch_jax(value)


def _fetch_jax(value: Any) -> Deferred:
    """An array that is on a device."""
    import jax

    cpu = jax.devices("cpu")[0]  # np.asarray would keep the host copy alive with the device array
    into = functools.partial(
        _fetch_rows, lambda rows: np.asarray(jax.device_put(value[rows], cpu)), value.dtype.name, value.shape
    )
    return Deferred(lambda: np.array(jax.device_put(value, cpu)), value.dtype.name, value.shape, into)


def _view_torch(value: Any) -> np.ndarray | Deferred | None:
    import torch

    if not isinstance(value, torch.Tensor):
        return None
    into = functools.partial(_fill_torch, value)  # from a device, too: its driver copies in pieces
    return Deferred(lambda: _copy_torch(value), str(value.dtype).removeprefix("torch."), value.shape, into)


def _fill_torch(value: Any, memory: np.ndarray) -> None:
    import torch

    torch.frombuffer(memory, dtype=value.dtype).view(value.shape).copy_(value.detach())


def _copy_torch(value: Any) -> np.ndarray:
    import torch

    host = value.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return _copy_numpy(host.view(torch.uint16).numpy()).view(extended_dtype("bfloat16"))
    return _copy_numpy(host.numpy())


def _view_numpy(value: Any) -> np.ndarray | Deferred | None:
    if not isinstance(value, np.ndarray):
        return None

    def into(memory: np.ndarray) -> None:
        np.copyto(np.ndarray(value.shape, value.dtype, buffer=memory), value)

    return Deferred(lambda: _copy_numpy(value), value.dtype.name, value.shape, into)


def _copy_numpy(value: np.ndarray) -> np.ndarray:
    # `tobytes` keeps the interpreter, `copy` lets it go: another thread could write half of a tensor meanwhile.
    return np.ndarray(value.shape, value.dtype, buffer=value.tobytes())


_VIEWERS: dict[str, Callable[[Any], np.ndarray | Deferred | None]] = {
    "tensorflow": _view_tensorflow,
    "jax": _view_jax,
    "torch": _view_torch,
    "numpy": _view_numpy,
}


def as_buffer(array: np.ndarray) -> np.ndarray:
    """The array in a form that the buffer protocol can lend: contiguous, of a dtype that it knows."""
    if not array.flags.c_contiguous:
        array = np.ascontiguousarray(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array = array.reshape(-1)  # scalars lend no shape
    return array if dtype_name(array.dtype)[0] != "V" else array.view(np.uint8)


@functools.cache
def dtype_name(dtype: np.dtype) -> str:
    """The name the Rust core knows a dtype by; `V{n}` for what HDF5 has no type for, as h5py stores it."""
    return dtype.name if dtype.name in _NUMBERS else f"V{dtype.itemsize}"


@functools.cache
def keras_dtype(dtype: np.dtype) -> str:
    """Keras' name of a dtype.

    Raises:
        ValueError: For strings and objects, as stock Keras raises it when it stores them.
    """
    import keras

    return keras.backend.standardize_dtype(dtype)


_NUMBERS = frozenset(
    [
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
        "complex128",
    ]
)


def numpy_dtype(name: str, tag: object) -> np.dtype:
    """The NumPy dtype of a dataset: its own, or what Keras marks opaque bytes to be."""
    if tag == "bfloat16" and name == "V2":
        return extended_dtype(tag)
    return np.dtype(f"|{name}" if name.startswith("V") else name)


@functools.cache
def own_dtype(name: str, tag: str | None) -> np.dtype:
    """The NumPy dtype of a tensor in a format that has types for all of them."""
    return np.dtype(name) if tag is None else extended_dtype(tag)


def is_keras_code(frame: FrameType) -> bool:
    """Whether a call comes from Keras itself, which does not change what it stores or assigns afterwards."""
    return frame.f_globals.get("__name__", "").startswith(("keras.src.", "hornbeam."))


_given: dict[int, weakref.ref[np.ndarray]] = {}


def native_shape(shape: tuple[int, ...]) -> Any:
    """The shape as the backend's tensors say it, in errors too."""
    if _backend() == "torch":
        import torch

        return torch.Size(shape)
    return shape


def give_away(array: np.ndarray) -> np.ndarray:
    """Marks an array that nobody but Keras' own code will ever hold, so that its memory may be shared."""
    key = id(array)
    _given[key] = weakref.ref(array, lambda _: _given.pop(key, None))
    return array


@functools.cache
def name_of(dtype: np.dtype) -> str:
    """`dtype.name`, which NumPy works out every time."""
    return dtype.name


def is_given_away(array: np.ndarray) -> bool:
    """Whether `give_away` marked this very array."""
    reference = _given.get(id(array))
    return reference is not None and reference() is array


def share(array: np.ndarray) -> Any | None:
    """A TensorFlow tensor over the array's own memory; `None` where that is not safe.

    TensorFlow copies it before the first update in place, and at once if it is not aligned. The array must not change
    any more. `tf.convert_to_tensor` does the same with a copy of the array.
    """
    if not shares():
        return None
    context, eager_tensor = _eager()
    return eager_tensor(array, context().device_name, None)


@functools.cache
def _eager() -> tuple[Any, Any]:
    from tensorflow.python.eager import context
    from tensorflow.python.framework.ops import EagerTensor

    return context.context, EagerTensor


def adopt(variable: Any, array: np.ndarray) -> bool:
    """Makes the array the memory of a live TensorFlow variable; `False` where it has to be assigned.

    The array has the variable's dtype and shape, and was given away.
    """
    value = variable._value
    tensor = share(array)
    if tensor is None:
        return False
    import tensorflow as tf
    from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

    if not isinstance(value, BaseResourceVariable) or not tf.executing_eagerly():
        return False
    tf.raw_ops.AssignVariableOp(resource=value.handle, value=tensor)
    return True


def hold(variable: Any) -> Callable[[], None]:
    """Keeps the value of a Keras variable; what it returns gives it back, bit for bit.

    Only torch needs a copy: elsewhere an assignment gives the variable other memory.
    """
    value: Any = variable._value
    if _backend() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

        if isinstance(value, BaseResourceVariable):
            tf.raw_ops.DisableCopyOnRead(resource=value.handle)
            held: Any = tf.raw_ops.ReadVariableOp(resource=value.handle, dtype=value.dtype)
            return lambda: tf.raw_ops.AssignVariableOp(resource=value.handle, value=held)
        held = tf.identity(value)  # distributed
        return lambda: variable._direct_assign(held)
    if _backend() == "torch":
        held = value.detach().clone()
        return lambda: variable._direct_assign(held)

    def restore() -> None:
        variable._value = value

    return restore


def hold_raw(value: Any) -> Callable[[], None] | None:
    """As `hold`, for a `tf.Variable` or a torch tensor that no Keras variable is around; `None` for anything else."""
    if _backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(value, tf.Variable):
            held = tf.identity(value)
            return lambda: value.assign(held)
    if _backend() == "torch":
        import torch

        if isinstance(value, torch.Tensor):
            copy = value.detach().clone()

            def restore() -> None:
                with torch.no_grad():
                    value.copy_(copy)

            return restore
    return None


def shares() -> bool:
    """Whether `share` works here."""
    return _backend() == "tensorflow" and _shares()


def _try_share() -> bool:
    """Values arrive, and updates leave the source alone."""
    import tensorflow as tf
    from tensorflow.python.eager import context
    from tensorflow.python.framework.ops import EagerTensor

    context.ensure_initialized()
    block = np.zeros(256, np.uint8)
    start = -block.ctypes.data % 64
    array = block[start : start + 64].view(np.float32)
    array[:] = np.arange(16)
    variable = tf.Variable(EagerTensor(array, context.context().device_name, None))
    variable.assign_add(tf.ones(16))
    right = np.array_equal(variable.numpy(), np.arange(16) + 1)
    return bool(right and np.array_equal(array, np.arange(16)))


_shares = Tried("handing memory over without a copy", _try_share)


class Creation:
    """Where a variable would have been created, so that it can be created there later."""

    __slots__ = ("key", "name_scope", "trainable")

    def __init__(self, name_scope: str | None, key: str | None, trainable: bool) -> None:
        self.name_scope = name_scope
        self.key = key
        self.trainable = trainable  # a layer that is frozen makes its variables before it freezes them


_keys = itertools.count()


def note_creation(variable: Any) -> Creation | None:
    """Notes what TensorFlow takes from the surroundings; `None` where it cannot be restored later."""
    if _backend() != "tensorflow":
        return Creation(None, None, variable.trainable)
    import tensorflow as tf

    graph = tf.compat.v1.get_default_graph()
    if (
        not tf.executing_eagerly()
        or tf.distribute.has_strategy()
        or graph._variable_creator_stack  # private; empty but inside tf.variable_creator_scope
        or _device_scope()
    ):
        return None
    return Creation(tf.get_current_name_scope(), f"{variable._name}_hornbeam_{next(_keys)}", variable.trainable)


def is_eager() -> bool:
    """Whether TensorFlow runs operations at once, as it does outside of functions and graphs."""
    import tensorflow as tf

    return bool(tf.executing_eagerly())


def _device_scope() -> str:
    from tensorflow.python.eager import context

    return context.context().device_name or ""


def create(creation: Creation, variable: Any, make: Callable[[], None]) -> None:
    """Runs `make` as where `creation` was noted; afterwards the variable has the key promised then."""
    now, variable._trainable = variable._trainable, creation.trainable
    try:
        _create(creation, variable, make)
    finally:
        variable._trainable = now


def _create(creation: Creation, variable: Any, make: Callable[[], None]) -> None:
    if _backend() == "jax":
        import jax

        with jax.ensure_compile_time_eval():
            make()
        return
    if creation.name_scope is None:
        make()
        return
    import tensorflow as tf

    if tf.executing_eagerly() and tf.get_current_name_scope() == creation.name_scope:
        make()
    else:
        with tf.init_scope(), tf.name_scope(creation.name_scope + "/" if creation.name_scope else ""):
            make()
    made = variable.__dict__["_value"]
    made._unique_id = made.handle._unique_id = creation.key
