"""The failures: what is done wrong, the healthy twin, which alarms name it, and who is at fault."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sixfold.bench.rescue.task import Arm, Data, Fault, Shape

LARGE = Arm()
"""The reference run: 112 thousand parameters, 300 steps."""
NARROW = Shape(width=32)
SMALL = Arm(NARROW, Data(half=16, alphabet=32))
PICTURES = Arm(NARROW, Data("digits", batch=32), steps=200)
STACK = Arm(Shape(depth=12, heads=0), Data("digits", batch=32), rate=1e-3, steps=200)
DEEP = replace(STACK, shape=Shape(depth=24, heads=0), optimizer="sgd", rate=1e-2, clip=None)
BARE = replace(NARROW, depth=6, mlp=False)

TWINS = {
    "large": LARGE,
    "small": SMALL,
    "small, no clip": replace(SMALL, clip=None),
    "small, long memory": replace(SMALL, betas=(0.9, 0.999)),
    "small, normed queries": replace(SMALL, shape=replace(NARROW, attention="qk_norm")),
    "post-norm": replace(SMALL, shape=replace(NARROW, norm="post", depth=3)),
    "attention alone": replace(SMALL, shape=BARE, steps=200),
    "one layer": replace(SMALL, shape=replace(NARROW, depth=1, heads=2)),
    "pictures": PICTURES,
    "stack": STACK,
    "deep stack": DEEP,
}
"""Healthy runs that failures are compared with."""

RATE = ("weight_growth", "update_ratio")
LOGITS = ("max_logit", "entropy", *RATE)
LOSS = ("loss", "gradient_norm", "weight_norm", *RATE)
BROKEN = ("loss", "gradient_norm")
HEAD = ("max_logit", "entropy", "sigma_max_v")


@dataclass(frozen=True)
class Family:
    """One kind of failure.

    Attributes:
        about: what goes wrong.
        arm: the run that fails.
        twin: the run it is compared with, a key of `TWINS`.
        alarms: signals that name this failure.
        located: whether the faults sit in one head, moved about by the seed.
        silent: whether the loss may hide it; it is to be recalled all the same.
        curable: whether it can be cured from within the run; what is wrong with an architecture, or
            may be meant so, is its owner's to change.
    """

    about: str
    arm: Arm
    twin: str
    alarms: tuple[str, ...]
    located: bool = False
    silent: bool = False
    curable: bool = True

    def run(self, seed: int) -> Arm:
        """The arm of a seed."""
        if not self.located:
            return self.arm
        layer, head = self.culprit(seed)
        faults = tuple(replace(fault, layer=layer, head=head) for fault in self.arm.faults)
        return replace(self.arm, faults=faults)

    def culprit(self, seed: int) -> tuple[int, int]:
        """Layer and head at fault; (-1, -1) where it is the whole model."""
        shape = self.arm.shape
        return (seed % shape.depth, seed // shape.depth % shape.heads) if self.located else (-1, -1)

    @property
    def onset(self) -> int:
        """Iteration before which nothing is wrong yet."""
        return min((fault.first for fault in self.arm.faults), default=0)


def broken(twin: str, fault: Fault, about: str, alarms: tuple[str, ...], **more: bool) -> Family:
    """The twin's own recipe with a fault."""
    return Family(about, replace(TWINS[twin], faults=(fault,)), twin, alarms, **more)


FAMILIES = {
    "soft collapse": Family(
        "learning rate 5e-2", replace(LARGE, rate=5e-2), "large", LOGITS,
    ),
    "hard collapse": Family(
        "learning rate 3e-2, no warm-up, no clip, beta2 0.999",
        replace(LARGE, rate=3e-2, warmup=0, clip=None, betas=(0.9, 0.999)), "large", LOGITS,
    ),
    "fast collapse": Family("learning rate 1e-1", replace(SMALL, rate=1e-1), "small", LOGITS),
    "post-norm collapse": Family(
        "post-norm, learning rate 1e-2, no warm-up",
        replace(TWINS["post-norm"], rate=1e-2, warmup=0), "post-norm", LOGITS + LOSS,
    ),
    "too hot": Family(
        "learning rate 3e-1 with normed queries and keys",
        replace(TWINS["small, normed queries"], rate=3e-1), "small, normed queries", LOSS,
    ),
    "schedule": broken(
        "small", Fault("rate", 100, amount=30.0), "learning rate x30 from step 100 on",
        LOGITS + LOSS,
    ),
    "glitch": broken(
        "small", Fault("glitch", 150, 151, 1e6), "learning rate x1e6 for one step", BROKEN + LOSS,
    ),
    "bad window": broken(
        "small, no clip", Fault("wrong targets", 230, 270, 1.0), "40 batches of wrong targets",
        ("loss", "gradient_norm"),
    ),
    "nan batch": broken(
        "pictures", Fault("nan inputs", 120, 121), "one picture is not a number", BROKEN,
    ),
    "nan gradient": broken(
        "small", Fault("nan gradient", 150, 151), "one number of a head's gradient is not one",
        BROKEN, located=True,
    ),
    "lost moments": broken(
        "small, long memory", Fault("lost moments", 150, 151, 0.0),
        "Adam's second moments set to zero", LOGITS + LOSS,
    ),
    "decay": Family(
        "weight decay 5", replace(SMALL, decay=5.0), "small",
        ("weight_norm", "update_ratio", "loss"),
    ),
    "rank collapse": Family(
        "attention alone, without skips",
        replace(TWINS["attention alone"], shape=replace(BARE, skip=False, norm="none")),
        "attention alone", ("rank_distance",), curable=False,
    ),
    "vanishing": Family(
        "12 sigmoid layers", replace(STACK, shape=Shape(depth=12, heads=0, activation="sigmoid",
        gain=1.0)), "stack", ("gradient_share", "gradient_mean", "gradient_norm"), curable=False,
    ),
    "exploding": Family(
        "24 layers of gain 2.5", replace(DEEP, shape=replace(DEEP.shape, gain=2.5)), "deep stack",
        LOSS,
    ),
    "corrupted head": broken(
        "small", Fault("scale head", 60, 61, 100.0), "W_Q, W_K and W_V of a head x100 at once",
        HEAD, located=True,
    ),
    "runaway head": broken(
        "small", Fault("scale head", 60, 110, 1.1), "W_Q, W_K and W_V of a head x1.1 per step",
        HEAD, located=True,
    ),
    "dead head": broken(
        "small", Fault("kill head", 0, 1), "W_V and W_O of one head are zero",
        ("gradient_norm",), located=True, silent=True,
    ),
    "dead heads": Family(
        "W_V and W_O of both heads of the only layer are zero",
        replace(
            TWINS["one layer"],
            faults=(Fault("kill head", 0, 1), Fault("kill head", 0, 1, head=1)),
        ),
        "one layer", ("gradient_norm",),
    ),
    "frozen layer": broken(
        "small", Fault("freeze", 0, 1), "the first block silently does not learn",
        ("frozen", "update_ratio", "gradient_norm"), curable=False,
    ),
}  # fmt: skip
