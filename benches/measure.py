"""What every measurement shares: time and peak memory, warm memory, digests of values, ceilings, the machine."""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import io
import mmap
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
KIB, MIB = 1 << 10, 1 << 20


def settle(nbytes: int) -> None:
    """Collects garbage, gives freed memory back, and touches `nbytes` of fresh memory.

    A virtual machine hands free memory to its host after a few idle seconds; its first use then costs ten times a copy.
    """
    gc.collect()
    np.empty(max(nbytes, MIB), np.uint8).fill(1)
    trim()


def trim() -> None:
    """Has the C library return what it holds but does not use."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def memory(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; 0 where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * KIB
    return 0


def timed(work: Callable[[], Any], *, above_result: bool = False) -> tuple[Any, float, int]:
    """Result, seconds, and the peak of memory above what was in use before or, for what makes a model, after."""
    trim()
    before = memory("VmRSS")
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    if above_result:
        gc.collect()
        trim()
        before = memory("VmRSS")
    return result, seconds, max(0, peak - before)


def digest(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Of names, dtypes, shapes and bytes, in this order."""
    out = hashlib.sha256()
    for name, array in arrays:
        out.update(f"{name} {array.dtype} {array.shape} ".encode())
        out.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return out.hexdigest()


def variables(model: Any) -> list[Any]:
    """What files hold of a model: no file format of Keras has seed generators and metrics."""
    optimizer = getattr(model, "optimizer", None)
    return [*model.weights, *(optimizer.variables if optimizer is not None else [])]


def model_digest(model: Any) -> str:
    """Of every weight and optimizer slot, in Keras' order, bit for bit."""
    import keras

    return digest(("", np.asarray(keras.ops.convert_to_numpy(v))) for v in variables(model))


def file_digest(path: Path) -> str:
    """Of every dataset of a `.keras` file by its path, read by zipfile and h5py."""
    import h5py

    found: list[tuple[str, Any]] = []
    with zipfile.ZipFile(path) as archive:
        image = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(image, "r") as file:
        file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
        return digest((name, item[()]) for name, item in sorted(found, key=lambda entry: entry[0]))


def write_blocks(path: Path, arrays: list[np.ndarray], block: int) -> float:
    """Seconds to write `arrays` to a new file with plain system calls: the ceiling of a save."""
    views = [memoryview(a.reshape(-1).view(np.uint8)) for a in arrays]
    start = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with contextlib.suppress(OSError, AttributeError):  # not every system and file system has it
            os.posix_fallocate(fd, 0, sum(len(v) for v in views))
        for view in views:
            at = 0
            while at < len(view):
                at += os.write(fd, view[at : at + block])
    finally:
        os.close(fd)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def read_blocks(path: Path, block: int, *, fresh: bool = False) -> float:
    """Seconds to read a file from the page cache: into one reused buffer or, as a load must, into fresh memory."""
    size, at = path.stat().st_size, 0
    start = time.perf_counter()
    memory = memoryview(_fresh(size) if fresh else bytearray(block))
    with path.open("rb", buffering=0) as file:
        while at < size:
            at += file.readinto(memory[at : at + block] if fresh else memory) or size
    return time.perf_counter() - start


def _fresh(nbytes: int) -> mmap.mmap:
    """Memory that nobody has touched, in huge pages where there are any: the best that a reader can ask for."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def copy_memory(nbytes: int) -> float:
    """Seconds to copy `nbytes` of warm memory to warm memory: best of five."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return min(times)


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of numbers; other values must agree, or all of them are kept."""
    out: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if isinstance(values[0], int | float) and not isinstance(values[0], bool):
            out[key] = median(values)
        else:
            out[key] = values[0] if all(v == values[0] for v in values) else values
    return out


def machine(folder: Path) -> dict[str, Any]:
    """Processor, cores, memory, kernel and the file system that `folder` is on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "ram_gib": round(ram / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(folder),
    }


def _file_system(folder: Path) -> str:
    best = ("", "unknown")
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, kind, *_ = line.split()
            if folder.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
                best = (mount, kind)
    return best[1]


def versions() -> dict[str, str]:
    """Of everything that was measured."""
    import h5py

    found = {"python": platform.python_version(), "hdf5": h5py.version.hdf5_version}
    for name in ("keras", "tensorflow-cpu", "tensorflow", "h5py", "numpy", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.setdefault(name.removesuffix("-cpu"), metadata.version(name))
    changed = _output("git", "status", "--porcelain", "--", "rust", "python", "Cargo.toml")
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    return {
        **found,
        "rustc": _output("rustc", "--version").removeprefix("rustc ").split(" ")[0] or "unknown",
        "hornbeam": commit + (" and changes" if changed else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def compile_package() -> None:
    """Compiles hornbeam's modules, as pip does when it installs them: a first run would include it else."""
    found = importlib.util.find_spec("hornbeam")
    for folder in (found.submodule_search_locations or ()) if found else ():
        compileall.compile_dir(folder, quiet=1)


def quiet() -> None:
    """Keeps TensorFlow's start-up messages out of the output; before it is imported, the same for all sides."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it announces itself at any log level
    sys.setrecursionlimit(20_000)  # stock Keras needs it for a thousand layers
