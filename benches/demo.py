"""A small real model, trained, saved and loaded by stock Keras and by hornbeam: each reads the other's file.

Exit status 1 if any value differs.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import measure

ROUNDS = 3
#: Seven segments of each digit: top, upper left, upper right, middle, lower left, lower right, bottom.
DIGITS = ["1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011"]
BARS = [(0, 0, 3, 12), (0, 0, 11, 3), (0, 9, 11, 12), (8, 0, 11, 12), (8, 0, 19, 3), (8, 9, 19, 12), (16, 0, 19, 12)]


def images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy digits of 28 x 28 pixels, at random places and of random brightness; and which they are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    pictures = rng.normal(0, 0.3, (count, 28, 28, 1)).astype(np.float32)
    for picture, label in zip(pictures, labels, strict=True):
        top, left = rng.integers(0, 9), rng.integers(0, 16)
        glyph = np.zeros((19, 12, 1), np.float32)
        for lit, (y0, x0, y1, x1) in zip(DIGITS[label], BARS, strict=True):
            if lit == "1":
                glyph[y0:y1, x0:x1] = rng.uniform(0.6, 1)
        picture[top : top + 19, left : left + 12] += glyph
    return pictures, labels


def trained() -> tuple[Any, float]:
    """A convolutional network after a short training with Adam, and its accuracy on new pictures."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, strides=2, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(2048, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(*images(4096, seed=1), batch_size=128, epochs=3, verbose=0)
    return model, model.evaluate(*images(1024, seed=2), verbose=0)[1]


def compare(title: str, stock: Callable[[], Any], ours: Callable[[], Any], *, above_result: bool = False) -> list[Any]:
    """Runs both in turns, once to warm up; best times, and peak memory."""
    found: dict[str, list[tuple[float, int]]] = {"stock": [], "ours": []}
    for turn in range(ROUNDS + 1):
        sides = [("stock", stock), ("ours", ours)]
        for name, work in sides if turn % 2 else sides[::-1]:
            measure.settle(256 * measure.MIB)
            _, seconds, peak = measure.timed(work, above_result=above_result)
            if turn:
                found[name].append((seconds, peak))
    best = {name: min(seconds for seconds, _ in runs) for name, runs in found.items()}
    peak = {name: min(peak for _, peak in runs) for name, runs in found.items()}
    return [title, best["stock"], best["ours"], peak["stock"], peak["ours"]]


def demo(folder: Path) -> tuple[list[list[Any]], list[tuple[str, bool]], str]:
    """Rows of times, what was compared, and what the model is."""
    import keras

    import hornbeam
    from hornbeam import saving

    start = time.perf_counter()
    model, accuracy = trained()
    about = f"{model.count_params():,} parameters, trained in {time.perf_counter() - start:.0f} s, {accuracy:.0%} right"
    theirs, ours = folder / "keras.keras", folder / "hornbeam.keras"
    pictures, _ = images(256, seed=3)
    want = measure.model_digest(model)
    answers = model.predict(pictures, verbose=0)

    def same(loaded: Any) -> bool:
        equal = measure.model_digest(loaded) == want
        return equal and bool(np.array_equal(loaded.predict(pictures, verbose=0), answers))

    kept: dict[str, Any] = {}

    def keep(side: str, load: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            kept[side] = None
            kept[side] = load()

        return work

    rows = [compare("save_model", lambda: model.save(theirs), lambda: saving.save_model(model, ours))]
    rows += [
        compare(
            "load_model",
            keep("stock", lambda: keras.saving.load_model(theirs)),
            keep("hornbeam", lambda: saving.load_model(ours)),
            above_result=True,
        )
    ]
    checks = [
        ("Keras reads its own file", same(kept["stock"])),
        ("hornbeam reads its own file", same(kept["hornbeam"])),
        ("Keras reads hornbeam's file", same(keras.saving.load_model(ours))),
        ("hornbeam reads Keras' file", same(saving.load_model(theirs))),
        ("both files hold the same values", measure.file_digest(theirs) == measure.file_digest(ours)),
    ]
    into = kept.pop("stock")
    kept.clear()
    gc.collect()
    rows += [compare("load_weights", lambda: into.load_weights(theirs), lambda: saving.load_weights(into, theirs))]
    for variable in measure.variables(into):
        variable.assign(np.zeros(variable.shape, variable.dtype))
    saving.load_weights(into, theirs)
    checks += [("load_weights fills a model", same(into))]
    checks += [("nothing was handed over to Keras", not hornbeam.stats().handovers)]
    for row, size in zip(rows, [(theirs, ours), (theirs, ours), (theirs, theirs)], strict=True):
        row += [path.stat().st_size for path in size]
    return rows, checks, about


def show(rows: list[list[Any]], checks: list[tuple[str, bool]], about: str) -> None:
    """As a table; plain text where the output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII2, title=f"A small network: {about}")
    table.add_column("")
    for name in ("Keras", "hornbeam", "times as fast", "file, MB", "extra memory, MB", "equal"):
        table.add_column(name, justify="center" if name == "equal" else "right")
    right = all(ok for _, ok in checks)
    for title, stock, ours, peak, our_peak, size, our_size in rows:
        table.add_row(
            title,
            f"{stock * 1e3:,.0f} ms",
            f"{ours * 1e3:,.0f} ms",
            f"[bold green]{stock / ours:.1f}",
            f"{size / 1e6:.1f}" if size == our_size else f"{size / 1e6:.1f} / {our_size / 1e6:.1f}",
            f"{peak / 1e6:.0f} / {our_peak / 1e6:.0f}" if measure.memory("VmHWM") else "n/a",
            "[green]✓" if right else "[red]✗",
        )
    console.print(table)
    for text, ok in checks:
        console.print(f" {'[green]✓[/]' if ok else '[bold red]✗[/]'} {text}")
    console.print(
        "[dim] Weights, optimizer slots and predictions, bit for bit. Best of three runs, after one more."
    )


def main() -> int:
    """Runs the demo; 1 if anything differs."""
    measure.quiet()
    with tempfile.TemporaryDirectory(prefix="hornbeam-demo-") as name:
        rows, checks, about = demo(Path(name))
    show(rows, checks, about)
    return 0 if all(ok for _, ok in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
