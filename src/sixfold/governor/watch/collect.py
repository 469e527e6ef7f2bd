"""Builds the signals of a step from what the probes, the weights and the gradients show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sixfold.attention.mixer.spectral import SpectralMixer
from sixfold.contracts import PerHead
from sixfold.governor.watch.layer import Layer
from sixfold.governor.watch.probe import LayerProbe
from sixfold.ops.statistics.sampled import spectra

UNITS = {
    "loss": "the loss's own",
    "max_logit": "nats",
    "entropy": "1 (of log visible keys)",
    "redundancy": "1 (cosine of weights)",
    "sigma_max": "1",
    "condition": "1",
    "gradient_norm": "loss per unit weight",
    "gradient_mean": "loss per unit weight",
    "update_ratio": "1 (of the weight's norm)",
    "rank_distance": "1 (of the input's norm)",
    "weight_norm": "1",
    "weight_growth": "1 (of the sample before)",
    "learning_rate": "1",
    "loss_finite": "1",
    "gradient_share": "1 (of the largest)",
    "gain": "1",
    "frozen": "1 (of the numbers that were to be learned)",
    "stable_rank": "1",
    "filter_response": "1 (by mode of the grid instead of head, slowest first)",
    "times_us": "microseconds",
    "tokens_per_s": "tokens/s",
}
TOKENS = 64
"""Tokens of a layer's input that are looked at."""

Signals = dict[str, list[Tensor | None]]
"""Values by signal, then layer: (h,), or None where a layer has none."""


def to_numbers(values: Signals) -> dict[str, PerHead]:
    """Move every signal of every layer to the host in one transfer."""
    flat = [
        tensor.double() for tensors in values.values() for tensor in tensors if tensor is not None
    ]
    numbers = iter(torch.cat(flat).tolist() if flat else ())
    return {
        name: tuple(
            () if t is None else tuple(next(numbers) for _ in range(len(t))) for t in tensors
        )
        for name, tensors in values.items()
        if any(tensor is not None for tensor in tensors)
    }


def seen(layers: Sequence[Layer], probes: Mapping[int, LayerProbe]) -> Signals:
    """What attention did; None for a layer that did not run."""
    names = ("max_logit", "entropy", "redundancy")
    found = [probes.get(number) for number in range(len(layers))]
    return {name: [getattr(probe, name, None) for probe in found] for name in names}


def per_query_head(values: Tensor, num_heads: int) -> Tensor:
    """Give every query head the figure of the key or value head it shares."""
    return values.repeat_interleave(num_heads // len(values))


@torch.no_grad()
def matrices(layers: Sequence[Layer]) -> Signals:
    """Largest singular values and condition numbers of W_Q, W_K, W_V per head."""
    found: Signals = {f"{n}_{role}": [] for role in "qkv" for n in ("sigma_max", "condition")}
    for layer in layers:
        weights = layer.matrices()
        for role in "qkv":
            pair = spectra(weights[role]) if role in weights else (None, None)
            for name, values in zip(("sigma_max", "condition"), pair, strict=True):
                shared = None if values is None else per_query_head(values, layer.num_heads)
                found[f"{name}_{role}"].append(shared)
    return found


@torch.no_grad()
def responses(layers: Sequence[Layer]) -> Signals:
    """What the filters of a spectral mixer let pass, |g_c(lambda)| in the mean over groups.

    A grid has as many modes as heads; they come in the order of their eigenvalues, those that are
    not kept as 0. None for a layer without such filters.
    """
    found: list[Tensor | None] = []
    for layer in layers:
        mixer = getattr(layer.module, "mixer", None)
        if not isinstance(mixer, SpectralMixer):
            found.append(None)
            continue
        gains = mixer.response(mixer.eigenvalues).abs().mean(0)
        modes = gains.repeat_interleave(torch.tensor(mixer.multiplicities, device=gains.device))
        found.append(torch.nn.functional.pad(modes, (0, layer.num_heads - len(modes))))
    return {"filter_response": found}


@torch.no_grad()
def gradients(layers: Sequence[Layer]) -> Signals:
    """Norm and mean magnitude of the gradients of each head's W_Q, W_K and W_V together."""
    found: Signals = {"gradient_norm": [], "gradient_mean": []}
    for layer in layers:
        roles = layer.gradients()
        norm, mean = None, None
        if roles:
            norm = summed(layer, roles, lambda g: g.float().square().sum((1, 2))).sqrt()
            count = sum(g[0].numel() for g in roles.values())
            mean = summed(layer, roles, lambda g: g.float().abs().sum((1, 2))) / count
        found["gradient_norm"].append(norm)
        found["gradient_mean"].append(mean)
    return found


def summed(layer: Layer, roles: Mapping[str, Tensor], of: object) -> Tensor:
    """A figure of each head's matrices, summed over the roles; (h,)."""
    return torch.stack([per_query_head(of(g), layer.num_heads) for g in roles.values()]).sum(0)


class Whole:
    """All weights of an optimizer just before it moves them.

    Attributes:
        gradient_share: smallest root mean square of a matrix's gradient over the largest.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sizes: list[float] = []
        self.before = [p.detach().clone() for p in self.parameters]
        dense = [p for p in self.parameters if p.grad is not None and not p.grad.is_sparse]
        matrices = [p.grad for p in dense if p.ndim > 1]
        norms = torch.stack(torch._foreach_norm(matrices)).tolist() if matrices else []
        sizes = [norm / g.numel() ** 0.5 for norm, g in zip(norms, matrices, strict=True)]
        reached = [size for size in sizes if size > 0]
        self.gradient_share = min(reached) / max(reached) if reached else None

    @torch.no_grad()
    def moved(self) -> dict[str, float]:
        """||W' - W|| / ||W|| and ||W'|| of all together, and the share of the smallest gradient.

        With them the gain before the step, median ||W||_F / sqrt(outputs) of the matrices: how many
        times larger than its input a random map makes its output. Also kept: `sizes`, the norm of
        each matrix.
        """
        if not self.parameters:
            return {}
        now = [p.detach() for p in self.parameters]
        wide = [p for p in self.before if p.ndim > 1]
        all_norms = torch.stack(torch._foreach_norm([*now, *wide])).tolist()
        norms, early = all_norms[: len(now)], all_norms[len(now) :]
        self.sizes = [n for n, p in zip(norms, now, strict=True) if p.ndim > 1]
        old = float(torch.nn.utils.get_total_norm(self.before))
        torch._foreach_sub_(self.before, now)
        step = float(torch.nn.utils.get_total_norm(self.before))
        found = {"update_ratio": step / max(old, 1e-30), "weight_norm": math.hypot(*norms)}
        if self.gradient_share is not None:
            found["gradient_share"] = self.gradient_share
        gains = [norm / len(p) ** 0.5 for norm, p in zip(early, wide, strict=True) if len(p)]
        return found | ({"gain": statistics.median(gains)} if gains else {})


def growth(old: Sequence[float], new: Sequence[float]) -> dict[str, float]:
    """By what factor matrices have grown since the sample before: three quarters by more.

    Where few of them grow, or those that began at zero, it is not the learning rate.
    """
    ratios = [b / a for a, b in zip(old, new, strict=True) if a > 0] if len(old) == len(new) else []
    if len(ratios) < 2:
        return {}
    return {"weight_growth": statistics.quantiles(ratios, n=4, method="inclusive")[0]}


@torch.no_grad()
def copies(layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
    """The attention weights as they are, to be compared with what a step makes of them."""
    return [{role: w.detach().clone() for role, w in weights(layer).items()} for layer in layers]


def weights(layer: Layer) -> dict[str, Tensor]:
    """A layer's weights by role, or where they are not known all its matrices, as of one head."""
    known = layer.matrices()
    if known:
        return known
    return {name: p[None] for name, p in layer.module.named_parameters() if p.ndim == 2}


@torch.no_grad()
def updates(layers: Sequence[Layer], before: Sequence[Mapping[str, Tensor]]) -> Signals:
    """How far a step moved each head's weights: ||W' - W|| / ||W||, over W_Q, W_K and W_V."""
    ratios: list[Tensor | None] = []
    for layer, old in zip(layers, before, strict=False):
        if not old:
            ratios.append(None)
            continue
        new = weights(layer)
        moved = {role: new[role].float() - w.float() for role, w in old.items()}
        sizes = [
            summed(layer, roles, lambda w: w.float().square().sum((1, 2))).sqrt()
            for roles in (moved, old)
        ]
        ratios.append(sizes[0] / sizes[1].clamp(min=torch.finfo(torch.float32).tiny))
    ratios += [None] * (len(layers) - len(ratios))
    return {"update_ratio": ratios}


@torch.no_grad()
def rank(x: Tensor) -> tuple[Tensor, Tensor]:
    """How far a layer's input is from one token, and its stable rank.

    ||X - 1 mean(X)|| / ||X|| and ||X||^2 / sigma_max(X)^2 in Frobenius norms, of the first sequence
    of x (b, n, c) at up to `TOKENS` evenly spaced tokens.
    Source: Dong et al., Attention is not all you need, arXiv 2103.03404, section 2.
    """
    few = x.reshape(-1, *x.shape[-2:])[0]
    places = torch.linspace(0, len(few) - 1, min(TOKENS, len(few)), device=x.device).round().long()
    few = few[places].float()
    if not few.isfinite().all():
        return few.new_tensor(torch.nan), few.new_tensor(torch.nan)
    whole = few.norm().clamp(min=torch.finfo(torch.float32).tiny)
    greatest = torch.linalg.eigvalsh(few @ few.T)[-1].clamp(min=torch.finfo(torch.float32).tiny)
    return (few - few.mean(0)).norm() / whole, whole.square() / greatest


def times(probes: Mapping[int, LayerProbe]) -> dict[str, float]:
    """Microseconds per stage, summed over the layers that tell it."""
    found: dict[str, float] = {}
    for probe in probes.values():
        for stage, value in probe.times_us.items():
            # a clock that was set back says nothing
            if value >= 0 and stage in ("projection", "attention", "mixing"):
                found[stage] = found.get(stage, 0.0) + value
    return found
