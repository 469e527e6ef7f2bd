"""Runs in which nothing is wrong: plain ones, and ones that look suspicious.

On none of them may a governor raise an alarm above notice or act.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sixfold.bench.rescue.task import Arm, Data, Fault, Shape, draw

Draw = np.random.Generator


def log_uniform(random: Draw, low: float, high: float) -> float:
    """A number between low and high, uniform in its logarithm, to two digits."""
    return float(f"{np.exp(random.uniform(np.log(low), np.log(high))):.2g}")


def shape(random: Draw) -> Shape:
    """A small transformer."""
    return Shape(
        width=int(random.choice([16, 32, 48, 64])),
        depth=int(random.integers(1, 4)),
        heads=int(random.choice([1, 2, 4, 8])),
        norm=str(random.choice(["pre", "pre", "pre", "post"])),
    )


def plain(random: Draw, data: Data, steps: int) -> Arm:
    """Width, depth, heads, norm, batch and optimizer drawn; learning rates that are known to do."""
    optimizer = str(random.choice(["adamw", "adamw", "adam", "sgd"]))
    rate = (
        log_uniform(random, 1e-2, 1e-1) if optimizer == "sgd" else log_uniform(random, 3e-4, 3e-3)
    )
    return Arm(
        shape(random), replace(data, batch=int(random.choice([8, 16, 32]))), optimizer, rate,
        betas=(0.9, float(random.choice([0.95, 0.99, 0.999]))),
        decay=0.1 if optimizer == "adamw" else 0.0, steps=steps,
    )  # fmt: skip


COPY, TEXT, DIGITS = Data(half=8, alphabet=16), Data("shakespeare", half=16), Data("digits")


def solved(random: Draw, steps: int = 200) -> Arm:
    """A copy task that is learned within the run: a plateau, then the induction phase change."""
    width = int(random.choice([32, 48]))
    return Arm(
        Shape(width, heads=int(random.choice([2, 4]))), COPY, rate=log_uniform(random, 2e-3, 5e-3),
        steps=steps,
    )  # fmt: skip


def faulty(arm: Arm, *faults: Fault) -> Arm:
    """The arm with something that is no failure."""
    return replace(arm, faults=faults)


def restart(random: Draw) -> Arm:
    """The learning rate falls to a tenth, and is then set back."""
    first, second = sorted(int(n) for n in random.integers(60, 160, 2))
    return faulty(solved(random), Fault("rate", first, second, 0.1))


def bad_batches(random: Draw) -> Arm:
    """Up to five batches of wrong targets under clipping: the run recovers by itself."""
    first = int(random.integers(100, 150))
    return faulty(
        solved(random), Fault("wrong targets", first, first + int(random.integers(1, 6)), 1.0)
    )


def noise(random: Draw) -> Arm:
    """Gradients of single steps drown in noise of up to three times their size."""
    faults = [
        Fault("gradient noise", int(n), int(n) + 1, float(random.uniform(0.5, 3)))
        for n in random.integers(20, 150, 5)
    ]
    return faulty(solved(random, 150), *faults)


def sharp(random: Draw) -> Arm:
    """Trained on after it is solved, at a high rate: induction heads are sharp and stay so."""
    return replace(solved(random, 300), rate=log_uniform(random, 5e-3, 1e-2))


KINDS: dict[str, tuple[int, Callable[[Draw], Arm]]] = {
    "copy": (80, lambda random: plain(random, COPY, 100)),
    "text": (50, lambda random: plain(random, TEXT, 60)),
    "digits": (40, lambda random: plain(random, DIGITS, 80)),
    "phase change": (20, solved),
    "plateau": (15, lambda random: replace(solved(random), rate=log_uniform(random, 3e-4, 8e-4))),
    "restart": (15, restart),
    "resume": (
        15, lambda random: replace(solved(random), resumed=int(random.integers(50, 120)), warmup=0)
    ),
    "curriculum": (
        15, lambda random: faulty(solved(random), Fault("few letters", 0, 100, 4.0))
    ),
    "bad batches": (15, bad_batches),
    "noisy labels": (
        15, lambda random: faulty(
            solved(random, 150), Fault("wrong targets", 0, 150, float(random.uniform(0.05, 0.3)))
        ),
    ),
    "gradient noise": (15, noise),
    "sharp heads": (15, sharp),
}  # fmt: skip
"""How many of each kind, and how one is drawn."""


def healthy(seed: int) -> dict[str, Arm]:
    """Every healthy run by name, other ones for another seed, the same in every process.

    >>> len(healthy(0))
    310
    """
    return {
        f"{kind} {number}": make(draw(seed, place, number))
        for place, (kind, (count, make)) in enumerate(KINDS.items())
        for number in range(count)
    }
