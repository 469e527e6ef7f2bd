"""What condensed: groups of tokens, by scale, why each began, and the beliefs that they became.

A divergence is KL(p || q) + KL(q || p) of neighbours in the frame they share, in nats.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sixfold.attention import moments
from sixfold.attention.allowed import check_flags, check_positive, check_whole
from sixfold.attention.beliefs import believe, by_head
from sixfold.attention.masks import visibility_of
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.attention.reach.hierarchical import alive, check_threshold
from sixfold.contracts import Belief, Schema
from sixfold.discover import unknown
from sixfold.geometry.frames import ALGEBRAS
from sixfold.ops.condense import cells, pyramid
from sixfold.ops.condense.groups import Divergence, Tokens, apart
from sixfold.ops.condense.pyramid import Pyramid, Rules


class Group(NamedTuple):
    """Tokens [start, stop) of one head that are one meta-token of a scale.

    apart: the largest divergence between neighbours that it joined, 0 where it joined none.
    began: the divergence from the neighbour before it, which is why it began; inf at the start of a
    cell, where one begins whatever is before, and at a sink and after it.
    row: of the batch.
    place: its number in its cell.
    """

    scale: int
    head: int
    start: int
    stop: int
    apart: float
    began: float
    row: int = 0
    place: int = 0


class MetaTokens(NamedTuple):
    """Beliefs of the groups of one scale in the frame they share; zero where a place is empty.

    mean (b, h, places, d), covariance (b, h, places, d, d), size (b, h, places): their tokens.
    """

    mean: Tensor
    covariance: Tensor
    size: Tensor


class Consensus(NamedTuple):
    """Soft groups: their beliefs, of how many tokens each is, and whose every token is.

    mean (..., capacity, d), covariance (..., capacity, d, d) or None, size (..., capacity),
    assignment (..., n, capacity), whose rows sum to 1.
    """

    mean: Tensor
    covariance: Tensor | None
    size: Tensor
    assignment: Tensor


@torch.no_grad()
def hierarchy(
    layer: MultiHeadAttention,
    x: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Group, ...]:
    """Which tokens of x condense in a layer of reach ``hierarchical``, at which scale, and why.

    Args:
        layer: heads are its key heads.
        x: (b, n, d_model), as the layer takes it.
        key_mask: as in its `forward`.
        is_causal: as in its `forward`.

    Returns:
        Every meta-token of the scales that queries see, finer ones first. Groups are hard, as in
        `eval`.

    Raises:
        ValueError: for a layer of another reach.

    >>> reach = {"name": "hierarchical", "block": 2, "capacity": 1}
    >>> layer = MultiHeadAttention(8, 1, reach=reach)
    >>> found = hierarchy(layer, torch.zeros(1, 10, 8), is_causal=True)
    >>> [(group.scale, group.start, group.stop) for group in found]
    [(0, 0, 2), (0, 2, 4), (0, 4, 6), (0, 6, 8), (0, 8, 10), (1, 0, 4), (1, 4, 8)]
    """
    if not layer.reach.condenses:
        raise ValueError("layer must have reach 'hierarchical': in any other nothing condenses")
    x, source = layer._sources(x, None, None)
    seen = layer._visibility(x, source, 0, None, key_mask, is_causal=is_causal)
    emitted = layer.projection(x, source, seen, None)
    far = layer._far(emitted.key, emitted.value, seen, None)
    tokens, rules = alive(far.tokens, seen.mask), layer.reach.decided
    given = far._replace(tokens=tokens)
    built = layer.reach.pyramid(given, rules, None, is_causal=is_causal)
    return groups(tokens, far.divergence, rules, built)


def groups(
    tokens: Tokens, divergence: Divergence, rules: Rules, built: Pyramid
) -> tuple[Group, ...]:
    """The hard groups of a pyramid that was built of these tokens (b, h, n) by these rules."""
    found: list[Group] = []
    below, width, block = tokens, rules.block, rules.block
    by_scale = zip(built.levels, built.places, pyramid.shares(built), strict=True)
    for scale, (level, where, share) in enumerate(by_scale):
        count, span = level.size.shape[-2], block << scale
        parts, constituents = below.cells(width, count), tokens.cells(span, count)
        distance = apart(parts, divergence)
        joined = where.bool() & (parts.size > 0)[..., None]
        own = share.bool() & (constituents.size > 0)[..., None]
        for row, head, cell, place in level.size.nonzero().tolist():
            began, *inside = distance[row, head, cell][joined[row, head, cell, :, place]].tolist()
            of = own[row, head, cell, :, place].nonzero().flatten() + cell * span
            ends = int(of[0]), int(of[-1]) + 1
            found.append(Group(scale, head, *ends, max(inside, default=0.0), began, row, place))
        below, width = level.joined(), 2 * rules.capacity
    return tuple(found)


def edges(found: tuple[Group, ...]) -> Tensor:
    """Which group is part of which of the next scale: (2, e), rows child and parent.

    >>> halves = [Group(0, 0, 0, 2, 0.0, 9.0), Group(0, 0, 2, 4, 0.0, 9.0)]
    >>> edges((*halves, Group(1, 0, 0, 4, 0.1, 9.0)))
    tensor([[0, 1],
            [2, 2]])
    """
    by_scale: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for number, group in enumerate(found):
        of = by_scale.setdefault((group.row, group.head, group.scale), [])
        of.append((group.start, group.stop, number))
    pairs = []
    for number, group in enumerate(found):
        above = by_scale.get((group.row, group.head, group.scale + 1), [])
        at = bisect_right(above, group.start, key=lambda ends: ends[0]) - 1
        if at >= 0 and group.stop <= above[at][1]:
            pairs.append((number, above[at][2]))
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T


def form(tokens: Tokens, d: int, rules: Rules, *, is_causal: bool) -> Pyramid:
    """Beliefs with these moments at every scale that the sequence fills, seen or not.

    Blocks fill a cell of scale s if there are 2^s; the last block may be short, but not if
    `is_causal`.
    """
    n = tokens.size.shape[-1]
    filled = (-(-n // rules.block)).bit_length()
    most = filled if rules.scales is None else min(filled, rules.scales)
    counts = (cells.num_cells(n, rules.block, s, is_causal=is_causal) for s in range(most))
    scales = sum(count > 0 for count in counts)
    return pyramid.build(tokens, of_beliefs(d), rules, scales, is_causal=is_causal)


def consensus(belief: Belief, threshold: float) -> tuple[Group, ...]:
    """The longest runs of tokens in which neighbours are less than `threshold` apart.

    Raises ValueError for a threshold that is no number of 0 or more.

    >>> mean = torch.tensor([[0.0], [0.1], [3.0], [3.1]])
    >>> found = consensus(believe(mean, torch.ones(4, 1, 1)), threshold=0.5)
    >>> [(group.start, group.stop, round(group.began, 2)) for group in found]
    [(0, 2, inf), (2, 4, 8.41)]
    """
    check_threshold("threshold", threshold)
    tokens, d = tokens_of(moments.moments(belief, "belief")), belief.mean.shape[-1]
    n = belief.mean.shape[-2]
    rules = Rules(n, n, threshold, 1)
    return groups(tokens, of_beliefs(d), rules, form(tokens, d, rules, is_causal=False))


def mixture(belief: Belief) -> MetaTokens:
    """All tokens as one: the moments of their mixture, in the frame they share, one place.

    >>> found = mixture(believe(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1, 1)))
    >>> found.mean.item(), found.covariance.item(), found.size.item()  # 1 + spread 1
    (1.0, 2.0, 2.0)
    """
    tokens, d = tokens_of(moments.moments(belief, "belief")), belief.mean.shape[-1]
    rules = Rules(belief.mean.shape[-2], 1, math.inf, 1)
    return meta_tokens(form(tokens, d, rules, is_causal=False), d, belief.mean.dtype)[0]


def meta_tokens(built: Pyramid, d: int, dtype: torch.dtype) -> tuple[MetaTokens, ...]:
    """The beliefs of a pyramid, finer scales first."""
    found = []
    for level in built.levels:
        flat = level.joined()
        mean, covariance = (part.to(dtype) for part in moments.gaussians(flat.moments, d))
        found.append(MetaTokens(mean, covariance, flat.size))
    return tuple(found)


def tokens_of(given: Tensor, mask: Tensor | None = None) -> Tokens:
    """Tokens with these moments (b, h, n, w), without those that a mask (b, 1, 1, n) hides."""
    return alive(Tokens(given, given[..., :0], torch.ones_like(given[..., 0])), mask)


def of_beliefs(d: int) -> Divergence:
    """The divergence of beliefs of width d, by their moments."""
    return partial(moments.divergence, schema="belief", d=d)


class SoftConsensusDetector(nn.Module):
    """Neighbours in consensus as soft groups, so that gradients decide where one begins.

    Token t begins a group with probability b_t = sigmoid(log(divergence_t / threshold) / tau), is
    at c_t = sum over s <= t of b_s - 1, and of group g by softmax over g of -(c_t - g)^2 / tau. Who
    is of which group depends on nothing that comes later. In training beginnings are drawn.

    Args:
        capacity: groups at most; what begins beyond them joins the last.
        threshold: of consensus, nats, positive.
        temperature: tau, positive.
        learned: learn the threshold, by its logarithm.
        frames: the algebra of phi, ``so`` or ``gl``.
        device: as in PyTorch.
        dtype: as in PyTorch.

    Raises:
        ValueError: for a capacity that is no whole number of 1 or more, a threshold or temperature
            that is not positive, another algebra, and a `learned` that is neither True nor False.

    Source: Jang, Gu, Poole, arXiv 1611.01144; Maddison, Mnih, Teh, arXiv 1611.00712, section 3.3.

    >>> detector = SoftConsensusDetector(capacity=2, threshold=1.0, temperature=0.1).eval()
    >>> found = detector(torch.tensor([[0.0], [0.1], [9.0], [9.1]]))
    >>> found.assignment.argmax(-1).tolist()
    [0, 0, 1, 1]
    >>> [round(mean, 2) for mean in found.mean.flatten().tolist()]
    [0.05, 9.05]
    """

    def __init__(
        self,
        capacity: int,
        threshold: float = 0.01,
        temperature: float = 1.0,
        *,
        learned: bool = True,
        frames: str = "so",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(capacity=capacity)
        check_positive("threshold", threshold)
        check_positive("temperature", temperature)
        check_flags(learned=learned)
        if frames not in ALGEBRAS:
            raise ValueError(unknown("frames", frames, ALGEBRAS))
        self.capacity, self.temperature, self.frames = capacity, temperature, frames
        start = torch.tensor(math.log(threshold), device=device, dtype=dtype)
        self.log_threshold = nn.Parameter(start, requires_grad=learned)

    def forward(
        self,
        mean: Tensor,
        covariance: Tensor | None = None,
        phi: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> Consensus:
        """The groups of points, or of beliefs where there are covariances.

        Args:
            mean: (n, d), (b, n, d) or (b, h, n, d); points are apart by their squared distance.
            covariance: (..., n, d, d).
            phi: coordinates of frames (..., n, g); groups are described in the frame they share.
            factor: lower Cholesky factors instead of `covariance`.
            key_mask: (b, n), True = a real token; others are of no group's size.

        Raises:
            ValueError: naming the argument, for a phi of points, numbers that are not floating and
                as `GaugeAttention.update`.
        """
        if not mean.is_floating_point():
            raise ValueError(f"mean must be floating, got {mean.dtype}")
        if mean.ndim not in (2, 3, 4):
            raise ValueError(
                f"mean must be (n, d), (b, n, d) or (b, h, n, d), got {tuple(mean.shape)}"
            )
        points = covariance is None and factor is None
        if points and phi is not None:
            raise ValueError("phi turns beliefs: give covariance or factor too")
        schema: Schema = "point" if points else "belief"
        belief = (
            by_head(mean, 1)
            if points
            else believe(mean, covariance, phi, factor=factor, algebra=self.frames)
        )
        given, d = moments.moments(belief, schema), mean.shape[-1]
        batch, heads, n = given.shape[:3]
        seen = visibility_of(None, key_mask, (batch, heads, n, n), is_causal=False)
        rules = Rules(
            n,
            self.capacity,
            self.log_threshold.exp(),
            temperature=self.temperature,
            noisy=self.training,
        )
        divergence = partial(moments.divergence, schema=schema, d=d)
        found, where = pyramid.condensed(tokens_of(given, seen.mask), divergence, rules)
        centre, spread = (found.moments, None) if points else moments.gaussians(found.moments, d)
        shape, dtype = mean.shape[:-2], mean.dtype
        return Consensus(
            centre.reshape(*shape, self.capacity, d).to(dtype),
            None if spread is None else spread.reshape(*shape, self.capacity, d, d).to(dtype),
            found.size.reshape(*shape, self.capacity),
            where.reshape(*shape, n, self.capacity).to(dtype),
        )
