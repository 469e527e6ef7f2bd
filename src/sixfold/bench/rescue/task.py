"""A small training run in plain PyTorch, as its owner would write it: model, data, loop, faults.

Nothing of the model, the optimizer or the loop is Sixfold's own; a governor has to find its way in.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

IGNORED = -100
"""Targets that count in no loss."""
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """A transformer (heads > 0), or a stack of linear layers (heads = 0).

    Attributes:
        width: of the residual stream.
        depth: blocks, or linear layers.
        heads: attention heads per block.
        norm: "pre", "post" or "none".
        skip: whether blocks add to the stream or replace it.
        mlp: whether blocks have one.
        attention: "plain", "qk_norm" or "sigma" (sigma-Reparam of every linear layer of a block).
        activation: of the stack: "relu" or "sigmoid".
        gain: of the stack: standard deviation of its weights times sqrt(width).
    """

    width: int = 64
    depth: int = 2
    heads: int = 4
    norm: str = "pre"
    skip: bool = True
    mlp: bool = True
    attention: str = "plain"
    activation: str = "relu"
    gain: float = math.sqrt(2)


@dataclass(frozen=True)
class Data:
    """What is learned: "copy" (half random tokens, said twice), "shakespeare" or "digits"."""

    name: str = "copy"
    half: int = 32
    alphabet: int = 64
    batch: int = 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong in [first, last): a key of `ON_DATA`, `ON_RUN`, or "rate" in the schedule.

    Data and schedule are at fault by position and would be so again if replayed; what happens to
    the run happens once, at that iteration of the loop.
    """

    kind: str
    first: int = 0
    last: int = 1_000_000
    amount: float = 0.0
    layer: int = 0
    head: int = 0


@dataclass(frozen=True)
class Arm:
    """Everything that decides a run but its seed; `resumed` steps were trained before it began."""

    shape: Shape = field(default_factory=Shape)
    data: Data = field(default_factory=Data)
    optimizer: str = "adamw"
    rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0
    warmup: int = 20
    clip: float | None = 1.0
    steps: int = 300
    faults: tuple[Fault, ...] = ()
    resumed: int = 0


# ---------------------------------------------------------------- model


class SpectralWeight(nn.Module):
    """gamma W / sigma(W): sigma-Reparam, one power step per training pass.

    Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))
        left, _, right = torch.linalg.svd(weight.detach(), full_matrices=False)
        self.register_buffer("left", left[:, 0].clone())
        self.register_buffer("right", right[0].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with spectral norm gamma."""
        if self.training:
            with torch.no_grad():
                self.right = functional.normalize(weight.T @ self.left, dim=0)
                self.left = functional.normalize(weight @ self.right, dim=0)
        return self.gamma * weight / (self.left @ weight @ self.right)


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection, on `scaled_dot_product_attention`."""

    def __init__(self, shape: Shape, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = shape.heads, causal
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        normed = shape.attention == "qk_norm"
        self.norms = nn.ModuleList(
            nn.RMSNorm(shape.width // shape.heads) if normed else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (b, n, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        q, k = self.norms[0](q), self.norms[1](k)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then an MLP if there is one."""

    def __init__(self, shape: Shape, *, causal: bool) -> None:
        super().__init__()
        self.norm, self.skip = shape.norm, shape.skip
        width = shape.width
        parts: list[nn.Module] = [Attention(shape, causal=causal)]
        if shape.mlp:
            parts.append(
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            )
        self.parts = nn.ModuleList(parts)
        self.norms = nn.ModuleList(
            nn.Identity() if self.norm == "none" else nn.LayerNorm(width) for _ in parts
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (b, n, width) to the same shape."""
        for part, norm in zip(self.parts, self.norms, strict=True):
            out = part(norm(x) if self.norm == "pre" else x)
            x = x + out if self.skip else out
            x = norm(x) if self.norm == "post" else x
        return x


class Transformer(nn.Module):
    """Tokens (b, n) or patches (b, n, p) to logits: per token, or of the whole."""

    def __init__(self, shape: Shape, data: Data) -> None:
        super().__init__()
        tokens, length, classes = SIZES[data.name](data)
        self.whole = data.name == "digits"
        self.embed = (
            nn.Linear(tokens, shape.width) if self.whole else nn.Embedding(tokens, shape.width)
        )
        self.position = nn.Embedding(length, shape.width)
        self.blocks = nn.ModuleList(Block(shape, causal=not self.whole) for _ in range(shape.depth))
        self.norm = nn.Identity() if shape.norm == "post" else nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, n, classes), or (b, classes) of a picture."""
        x = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.whole else x)


def stack(shape: Shape, data: Data) -> nn.Sequential:
    """Linear layers on pictures, weights N(0, gain^2 / fan_in)."""
    pixels, length, classes = SIZES[data.name](data)
    kind = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[shape.activation]
    widths = [pixels * length, *[shape.width] * (shape.depth - 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in widths:
        layers += [nn.Linear(fan_in, shape.width), kind()]
    return nn.Sequential(*layers, nn.Linear(shape.width, classes))


def build_model(shape: Shape, data: Data) -> nn.Module:
    """The model with weights N(0, gain^2 / fan_in), gain 1 in a transformer, and no bias."""
    model = Transformer(shape, data) if shape.heads else stack(shape, data)
    gain = 1.0 if shape.heads else shape.gain
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            fan_in = module.weight.shape[1]
            nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if shape.attention == "sigma":
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]
        for module in linear:
            parametrize.register_parametrization(module, "weight", SpectralWeight(module.weight))
    return model


# ---------------------------------------------------------------- data


def draw(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on these integers alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def copy_batch(data: Data, seed: int, index: int) -> Batch:
    """Random halves said twice, (b, 2 half) each; only the second half is a target."""
    half = draw(seed, index).integers(0, data.alphabet, (data.batch, data.half))
    tokens = torch.from_numpy(np.concatenate([half, half, half[:, :1]], axis=1))
    targets = tokens[:, 1:].clone()
    targets[:, : data.half - 1] = IGNORED
    return tokens[:, :-1], targets


@cache
def loaded(name: str, context: int) -> Any:
    """A data set of the package, read once per process."""
    from sixfold.data import digits, shakespeare

    return shakespeare.build(context=context) if name == "shakespeare" else digits.build()


def patches(pictures: Tensor) -> Tensor:
    """Pictures (b, 1, 8, 8) as 16 patches of 4 pixels, (b, 16, 4), about standardised."""
    cut = pictures.unfold(2, 2, 2).unfold(3, 2, 2)
    return (cut.reshape(len(pictures), 16, 4) - 0.3) / 0.4


def text_batch(data: Data, seed: int, index: int) -> Batch:
    """Windows of text and the characters that follow, (b, 2 half) each."""
    return tuple(loaded("shakespeare", 2 * data.half).train_batch(seed, index, data.batch))


def digit_batch(data: Data, seed: int, index: int) -> Batch:
    """Digits as patches (b, 16, 4) with labels (b,)."""
    found = loaded("digits", 0).train_batch(seed, index, data.batch)
    return patches(found.inputs), found.targets


BATCH = {"copy": copy_batch, "shakespeare": text_batch, "digits": digit_batch}
SIZES: dict[str, Callable[[Data], tuple[int, int, int]]] = {
    "copy": lambda data: (data.alphabet, 2 * data.half, data.alphabet),
    "shakespeare": lambda data: (65, 2 * data.half, 65),
    "digits": lambda data: (4, 16, 10),  # noqa: ARG005
}
"""Of each task: tokens or numbers per patch, positions, classes."""


def wrong_targets(fault: Fault, batch: Batch, seed: int, index: int) -> Batch:
    """A share `amount` of the targets drawn at random from those there are."""
    inputs, targets = batch
    random = draw(seed, index, 1)
    drawn = torch.from_numpy(random.integers(0, int(targets.max()) + 1, targets.shape))
    chosen = torch.from_numpy(random.random(targets.shape)) < fault.amount
    return inputs, torch.where(chosen & (targets != IGNORED), drawn, targets)


def nan_inputs(fault: Fault, batch: Batch, seed: int, index: int) -> Batch:  # noqa: ARG001
    """One picture of the batch is not a number."""
    inputs, targets = batch
    broken = inputs.clone()
    broken[0] = torch.nan
    return broken, targets


def few_letters(fault: Fault, batch: Batch, seed: int, index: int) -> Batch:  # noqa: ARG001
    """A curriculum's easy part: letters up to `amount` only."""
    inputs, targets = batch
    letters = int(fault.amount)
    return inputs % letters, torch.where(targets == IGNORED, targets, targets % letters)


ON_DATA = {"wrong targets": wrong_targets, "nan inputs": nan_inputs, "few letters": few_letters}


class Batches:
    """The training batches of an arm, in order; iterating again begins again."""

    def __init__(self, arm: Arm, seed: int, first: int = 0) -> None:
        self.arm, self.seed, self.first = arm, seed, first

    def __len__(self) -> int:
        return self.arm.steps - self.first

    def __iter__(self) -> Iterator[Batch]:
        data = self.arm.data
        for index in range(self.first, self.arm.steps):
            batch = BATCH[data.name](data, self.seed, index)
            for fault in self.arm.faults:
                if fault.kind in ON_DATA and fault.first <= index < fault.last:
                    batch = ON_DATA[fault.kind](fault, batch, self.seed, index)
            yield batch


# ---------------------------------------------------------------- the run and its faults


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of the targets that count, nats."""
    logits = model(batch[0])
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def stored(linear: nn.Linear) -> nn.Parameter:
    """The parameter behind a weight, which is not the weight where that is reparametrised."""
    if parametrize.is_parametrized(linear):
        return linear.parametrizations.weight.original
    return linear.weight


def of_head(run: Run, fault: Fault) -> tuple[nn.Parameter, nn.Parameter, slice]:
    """The fused projection and the output weight a fault is about, and the channels of its head."""
    attention = run.model.blocks[fault.layer].parts[0]
    fused, out = stored(attention.qkv), stored(attention.out)
    width = out.shape[1] // attention.heads
    return fused, out, slice(fault.head * width, (fault.head + 1) * width)


def scale_head(run: Run, fault: Fault) -> None:
    """W_Q, W_K and W_V of one head times `amount`: its logits grow by amount^2."""
    fused, _, rows = of_head(run, fault)
    for weight in fused.chunk(3):
        weight[rows] *= fault.amount


def kill_head(run: Run, fault: Fault) -> None:
    """W_V and W_O of one head are zero: their gradients are exactly zero too."""
    fused, out, rows = of_head(run, fault)
    fused.chunk(3)[2][rows] = 0
    out[:, rows] = 0


def freeze(run: Run, fault: Fault) -> None:
    """One block silently stops learning."""
    run.model.blocks[fault.layer].requires_grad_(False)  # noqa: FBT003


def nan_gradient(run: Run, fault: Fault) -> None:
    """One number of one block's gradient is not a number."""
    fused, _, rows = of_head(run, fault)
    fused.grad[rows.start, 0] = torch.nan


def gradient_noise(run: Run, fault: Fault) -> None:
    """Gaussian noise of `amount` times the gradient's own size, tensor by tensor."""
    random = torch.Generator().manual_seed(run.seed + run.iteration)
    for p in run.parameters():
        size = fault.amount * p.grad.square().mean().sqrt()
        p.grad += size * torch.randn(p.shape, generator=random)


def lost_moments(run: Run, fault: Fault) -> None:
    """Adam's second moments are multiplied by `amount`."""
    for state in run.optimizer.state.values():
        state["exp_avg_sq"] *= fault.amount


def glitch(run: Run, fault: Fault) -> None:
    """The learning rate of one step is `amount` times what it should be."""
    for group in run.optimizer.param_groups:
        group["lr"] *= fault.amount


BEFORE_FORWARD = {"scale head": scale_head, "kill head": kill_head, "freeze": freeze}
AFTER_BACKWARD = {
    "nan gradient": nan_gradient, "gradient noise": gradient_noise,
    "lost moments": lost_moments, "glitch": glitch,
}  # fmt: skip
ON_RUN = BEFORE_FORWARD | AFTER_BACKWARD


def factor(arm: Arm, step: int) -> float:
    """The learning rate of a step over the arm's: warm-up, then 1, and what the faults make of it.

    >>> factor(Arm(warmup=10), 4), factor(Arm(faults=(Fault("rate", 100, amount=30.0),)), 100)
    (0.5, 30.0)
    """
    value = min(1.0, (step + 1) / arm.warmup) if arm.warmup else 1.0
    for fault in arm.faults:
        if fault.kind == "rate" and fault.first <= step < fault.last:
            value *= fault.amount
    return value


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p, arm: torch.optim.AdamW(p, arm.rate, betas=arm.betas, weight_decay=arm.decay),
    "adam": lambda p, arm: torch.optim.Adam(p, arm.rate, betas=arm.betas, weight_decay=arm.decay),
    "sgd": lambda p, arm: torch.optim.SGD(
        p, arm.rate, momentum=arm.betas[0], weight_decay=arm.decay
    ),
}


class Run:
    """A model, its optimizer, schedule and batches, and where the loop stands."""

    def __init__(self, arm: Arm, seed: int) -> None:
        self.arm, self.seed, self.iteration = arm, seed, 0
        torch.manual_seed(seed)
        self.model = build_model(arm.shape, arm.data)
        self.optimizer = OPTIMIZERS[arm.optimizer](self.model.parameters(), arm)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(factor, arm))
        self.batches = Batches(arm, seed, arm.resumed)

    def parameters(self) -> list[nn.Parameter]:
        """Those that have a gradient."""
        return [p for p in self.model.parameters() if p.grad is not None]

    def disturb(self, faults: dict[str, Callable[[Run, Fault], None]]) -> None:
        """Whatever of these faults is due at this iteration happens."""
        for fault in self.arm.faults:
            if fault.kind in faults and fault.first <= self.iteration < fault.last:
                with torch.no_grad():
                    faults[fault.kind](self, fault)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, after what happens to the weights before it."""
        self.disturb(BEFORE_FORWARD)
        return cross_entropy(self.model, batch)

    def move(
        self, loss: Tensor, tame: Callable[[list[nn.Parameter]], object] | None = None
    ) -> None:
        """One step of the optimizer; `tame` may change the gradients after the clip, in place."""
        self.optimizer.zero_grad()
        loss.backward()
        self.disturb(AFTER_BACKWARD)
        if self.arm.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.arm.clip)
        if tame is not None:
            tame(self.parameters())
        self.optimizer.step()
        self.scheduler.step()
        self.iteration += 1


def resumed(arm: Arm, seed: int) -> Run:
    """The run of an arm, at its beginning or continued from what its first steps had saved."""
    if not arm.resumed:
        return Run(arm, seed)
    early = Run(arm, seed)
    for _, batch in zip(range(arm.resumed), Batches(arm, seed), strict=False):
        early.move(early.loss(batch))
    saved = io.BytesIO()
    parts = ("model", "optimizer", "scheduler")
    torch.save({part: vars(early)[part].state_dict() for part in parts}, saved)
    saved.seek(0)
    state, run = torch.load(saved), Run(arm, seed + 1)
    for part in parts:
        vars(run)[part].load_state_dict(state[part])
    run.seed, run.iteration, run.batches = seed, early.iteration, Batches(arm, seed, arm.resumed)
    return run


@torch.no_grad()
def held_out(run: Run) -> float:
    """Mean loss on four clean batches that training never sees."""
    run.model.eval()
    batches = (BATCH[run.arm.data.name](run.arm.data, run.seed + 10_000, i) for i in range(4))
    losses = [cross_entropy(run.model, batch).item() for batch in batches]
    run.model.train()
    return sum(losses) / len(losses)
