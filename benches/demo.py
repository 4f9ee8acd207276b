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
    pictures = rng.normal(0, 0.2, (count, 28, 28, 1)).astype(np.float32)
    for picture, label in zip(pictures, labels, strict=True):
        top, left = rng.integers(3, 7), rng.integers(5, 12)
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
            layers.BatchNormalization(momentum=0.8),
            layers.Conv2D(64, 3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.2),
            layers.Dense(2048, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(*images(4096, seed=1), batch_size=128, epochs=2, verbose=0)
    return model, model.evaluate(*images(1024, seed=2), verbose=0)[1]


def compare(
    title: str,
    work: dict[str, Callable[[], Any]],
    *,
    before: Callable[[], Any] = gc.collect,
    above_result: bool = False,
) -> list[Any]:
    """Runs Keras' way and ours in turns, once to warm up; best times, and peaks of memory."""
    found: dict[str, list[tuple[float, int]]] = {side: [] for side in work}
    for turn in range(ROUNDS + 1):
        for side in list(work)[:: 1 if turn % 2 else -1]:
            before()
            measure.settle(256 * measure.MIB)
            _, seconds, peak = measure.timed(work[side], above_result=above_result)
            if turn:
                found[side].append((seconds, peak))
    return [title, *([min(run[i] for run in runs) for runs in found.values()] for i in (0, 1))]


def demo(folder: Path) -> tuple[list[list[Any]], list[tuple[str, bool]], str, int]:
    """Rows of times, what was compared, what the model is, and the size of its file."""
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

    kept: list[Any] = []
    rows = [
        compare(
            "save_model",
            {"Keras": lambda: model.save(theirs), "hornbeam": lambda: saving.save_model(model, ours)},
        ),
        compare(
            "load_model",
            {
                "Keras": lambda: kept.append(keras.saving.load_model(theirs)),
                "hornbeam": lambda: kept.append(saving.load_model(ours)),
            },
            before=kept.clear,
            above_result=True,
        ),
    ]
    kept.clear()
    checks = [
        ("Keras reads its own file", same(keras.saving.load_model(theirs))),
        ("hornbeam reads its own file", same(saving.load_model(ours))),
        ("Keras reads hornbeam's file", same(keras.saving.load_model(ours))),
        ("hornbeam reads Keras' file", same(saving.load_model(theirs))),
        ("both files hold the same values", measure.file_digest(theirs) == measure.file_digest(ours)),
    ]
    into = keras.saving.load_model(theirs)
    rows.append(
        compare(
            "load_weights",
            {"Keras": lambda: into.load_weights(theirs), "hornbeam": lambda: saving.load_weights(into, theirs)},
        )
    )
    for variable in measure.variables(into):
        variable.assign(np.zeros(variable.shape, variable.dtype))
    saving.load_weights(into, theirs)
    checks += [("load_weights fills a model", same(into))]
    checks += [("nothing was handed over to Keras", not hornbeam.stats().handovers)]
    return rows, checks, about, ours.stat().st_size


def show(rows: list[list[Any]], checks: list[tuple[str, bool]], about: str, nbytes: int) -> None:
    """As a table; plain text where the output is no terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII2, title=about, title_justify="left")
    table.add_column("")
    for name in ("Keras", "hornbeam", "faster", "file, MB", "memory, MB", "equal"):
        table.add_column(name, justify="center" if name == "equal" else "right")
    right = all(ok for _, ok in checks)
    for title, (stock, ours), peaks in rows:
        table.add_row(
            title,
            f"{stock * 1e3:,.0f} ms",
            f"{ours * 1e3:,.0f} ms",
            f"[bold green]{stock / ours:.1f} x",
            f"{nbytes / 1e6:.1f}",
            " / ".join(f"{peak / 1e6:.0f}" for peak in peaks) if measure.memory("VmHWM") else "n/a",
            "[green]✓" if right else "[red]✗",
        )
    console.print(table)
    for text, ok in checks:
        console.print(f" {'[green]✓[/]' if ok else '[bold red]✗[/]'} {text}")
    console.print(
        "[dim]   Equal: weights, optimizer slots, predictions. Memory: peak above the model. Best of three runs."
    )


def main() -> int:
    """Runs the demo; 1 if anything differs."""
    measure.quiet()
    with tempfile.TemporaryDirectory(prefix="hornbeam-demo-") as name:
        rows, checks, about, nbytes = demo(Path(name))
    show(rows, checks, about, nbytes)
    return 0 if all(ok for _, ok in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
