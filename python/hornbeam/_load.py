"""The load flow: open, decode the config, build the model while the core reads, hand the tensors over, check the CRC.

Each public function stands in for the function of `saving_lib` of the same name; the first argument is the stock one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from keras.src.saving import saving_lib

from hornbeam import _build, _core, _keras, _state, _tensors
from hornbeam._store import AssetStore, Image, LoadStore

Stock = Callable[..., Any]
#: Bytes the reader may be ahead of a model whose variables have memory of their own already.
_READ_AHEAD = 32 << 20
_ALL = 1 << 62


def _read_ahead() -> int:
    """Without a limit where what is read becomes the variables' memory."""
    return _ALL if _tensors.shares() else _READ_AHEAD


def load_model_from_fileobj(stock: Stock, fileobj: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._load_model_from_fileobj`."""
    reason = _keras.unsupported()
    if reason is not None:
        return _state.hand_over(reason, stock, fileobj, custom_objects, compile, safe_mode)
    file = _core.open(_source(fileobj), archive=True)
    sizes = {name: size for name, size, _ in file.members()}
    if saving_lib._CONFIG_FILENAME not in sizes:
        raise KeyError(f"There is no item named '{saving_lib._CONFIG_FILENAME}' in the archive")
    config = _read_member(file, saving_lib._CONFIG_FILENAME)
    weights_name = saving_lib._VARS_FNAME_H5
    if weights_name not in sizes:
        if saving_lib._VARS_FNAME_NPZ in sizes:
            return _state.hand_over("npz weights", stock, fileobj, custom_objects, compile, safe_mode)
        raise ValueError(f"Expected a {weights_name} or {saving_lib._VARS_FNAME_NPZ} file.")
    _check_expansion(file, weights_name)
    has_assets = any(name.startswith(f"{saving_lib._ASSETS_DIRNAME}/") for name in sizes)
    with ExitStack() as stack:
        stack.enter_context(_build.scope())
        weights = file.weights(engine=_state.current().engine)
        store = LoadStore([Image(weights, weights_name, verify=True, read_ahead=_read_ahead())])
        stack.callback(store.close)
        model = _from_config(config, custom_objects, compile, safe_mode)
        assets = None
        if has_assets:
            _check_extraction(file)
            assets = AssetStore("r", lambda root: _extract(file, root))
            stack.callback(assets.close)
            assets.extract()  # before Keras' loop over layers could swallow an error
        _load_state(model, store, assets)
    _count_load(store)
    return model


def load_model_from_dir(stock: Stock, dirpath: Any, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._load_model_from_dir`."""
    root = Path(os.fspath(dirpath))
    weights_path = root / saving_lib._VARS_FNAME_H5
    reason = _keras.unsupported(path=dirpath)
    if reason is None and (root / saving_lib._VARS_FNAME_NPZ).exists() and not weights_path.exists():
        reason = "npz weights"
    if reason is not None:
        return _state.hand_over(reason, stock, dirpath, custom_objects, compile, safe_mode)
    if not root.is_dir() or not weights_path.exists():
        return stock(dirpath, custom_objects, compile, safe_mode)  # raises
    config = (root / saving_lib._CONFIG_FILENAME).read_bytes()
    with ExitStack() as stack:
        stack.enter_context(_build.scope())
        weights = _core.open(str(weights_path), archive=False).weights(engine=_state.current().engine)
        store = LoadStore([Image(weights, str(weights_path), verify=True, read_ahead=_read_ahead())])
        stack.callback(store.close)
        model = _from_config(config, custom_objects, compile, safe_mode)
        assets = None
        if (root / saving_lib._ASSETS_DIRNAME).is_dir():
            assets = saving_lib.DiskIOStore(str(root / saving_lib._ASSETS_DIRNAME), mode="r")
            stack.callback(assets.close)
        _load_state(model, store, assets)
    _count_load(store)
    return model


def load_weights_only(
    stock: Stock, model: Any, filepath: Any, skip_mismatch: bool = False, objects_to_skip: Any = None
) -> Any:
    """`saving_lib.load_weights_only`: everything is read and checked before the model is touched."""
    text = str(filepath)
    if not model.built or not text.endswith(("weights.h5", "weights.json", ".keras")):
        return stock(model, filepath, skip_mismatch, objects_to_skip)  # raises
    reason = _keras.unsupported(path=text)
    if reason is not None:
        return _state.hand_over(reason, stock, model, filepath, skip_mismatch, objects_to_skip)
    engine = _state.current().engine
    if text.endswith("weights.json"):
        from hornbeam._shards import open_shards

        opened = [(name, file.weights(engine=engine)) for name, file in open_shards(text)]
    else:
        file = _core.open(text, archive=text.endswith(".keras"))
        if text.endswith(".keras"):
            name = saving_lib._VARS_FNAME_H5
            if all(name != member for member, *_ in file.members()):
                raise KeyError(f"There is no item named '{name}' in the archive")
            _check_expansion(file, name)
        opened = [(text, file.weights(engine=engine))]
    with ExitStack() as stack:
        store = LoadStore(Image(w, name, verify=True, read_ahead=_ALL) for name, w in opened)
        stack.callback(store.close)
        store.complete(drop_rest=False)
        visited = {id(o) for o in objects_to_skip or ()}
        _load_state(model, store, None, skip_mismatch=skip_mismatch, visited=visited)
    _count_load(store)
    return None


def _source(fileobj: Any) -> Any:
    """What the core reads from: a path where the file object stands for one, memory, or the object itself."""
    if type(fileobj) is io.BufferedReader and isinstance(fileobj.name, str | bytes):
        try:
            if os.path.samestat(os.fstat(fileobj.fileno()), os.stat(fileobj.name)):
                return os.fsdecode(fileobj.name)
        except OSError:
            pass
    if type(fileobj) is io.BytesIO:
        return fileobj.getvalue()  # no copy, and the object stays free to be written to
    if not fileobj.seekable():
        return fileobj.read()
    return fileobj


def _from_config(config: bytes, custom_objects: Any, compile: bool, safe_mode: bool) -> Any:
    """`saving_lib._model_from_config` through the Rust codec."""
    decoded = _core.decode_json(config, trusted=False)
    if not compile:
        decoded["compile_config"] = None
    with saving_lib.ObjectSharingScope():
        return saving_lib.deserialize_keras_object(decoded, custom_objects, safe_mode=safe_mode)


def _load_state(
    model: Any,
    store: LoadStore,
    assets: Any,
    *,
    skip_mismatch: bool = False,
    visited: set[int] | None = None,
) -> None:
    failed: set[int] = set()
    errors: dict[int, Any] = {}
    with _keras.fast_walk():
        saving_lib._load_state(
            model,
            weights_store=store,
            assets_store=assets,
            inner_path="",
            skip_mismatch=skip_mismatch,
            visited_saveables=visited if visited is not None else set(),
            failed_saveables=failed,
            error_msgs=errors,
        )
    store.complete(drop_rest=True)
    if failed:
        if skip_mismatch:
            saving_lib._raise_loading_failure(errors, warn_only=True)
        else:
            saving_lib._raise_loading_failure(errors)


def _read_member(file: _core.File, name: str) -> bytes:
    _check_expansion(file, name)
    return file.read(name)


def _check_expansion(file: _core.File, name: str) -> None:
    floor, factor = saving_lib._ZIP_MEMBER_BOMB_FLOOR_BYTES, saving_lib._ZIP_MEMBER_MAX_EXPANSION
    file.check_expansion(name, floor, factor)


def _check_extraction(file: _core.File) -> None:
    floor = getattr(saving_lib, "_ZIP_EXTRACT_BOMB_FLOOR_BYTES", saving_lib._ZIP_MEMBER_BOMB_FLOOR_BYTES)
    for name, *_ in file.members():
        file.check_expansion(name, floor, saving_lib._ZIP_MEMBER_MAX_EXPANSION)


def _extract(file: _core.File, root: str) -> None:
    """Writes the asset members below `root`; a name that would leave it is skipped with a warning, as in Keras."""
    start = f"{saving_lib._ASSETS_DIRNAME}/"
    base = Path(root).resolve()
    for name, *_ in file.members():
        if not name.startswith(start) or name.endswith("/"):
            continue
        path = (base / name[len(start) :]).resolve()
        if "\\" in name or not path.is_relative_to(base):
            _state.logger.warning("skipped an asset that points outside the archive: %r", name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_read_member(file, name))


def _count_load(store: LoadStore) -> None:
    for image in store.images:
        _state.count(engine=image.weights.engine)
    _state.count(
        loads=1,
        bytes_read=sum(image.bytes for image in store.images),
        tensors_read=sum(image.tensors for image in store.images),
    )
