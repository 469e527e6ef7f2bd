"""Heads on a hexagonal grid that talk through the spectrum of the grid.

M_i = relu(sum over j of g_c(L)_ij W H_j),  out = H + gate * M

L is the normalised Laplacian of the grid and g_c a learned filter of its eigenvalues, one for each
group c of channels: patterns that vary slowly over the grid pass or not, and fast ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sixfold.attention.allowed import check_whole
from sixfold.attention.mixer._filters import FILTERS, check_order
from sixfold.attention.mixer.hexagonal import build as hexagonal
from sixfold.contracts import Heads, Rating
from sixfold.geometry.graph import undirected
from sixfold.geometry.hexgrid import HexGrid
from sixfold.geometry.spectrum import spectrum
from sixfold.ops.headfilter import fused, reference
from sixfold.ops.headmix import fused as near_fused
from sixfold.ops.headmix import reference as near_reference


class SpectralMixer(nn.Module):
    """H_i + gate_i * relu(sum over j of g_c(L)_ij W H_j), c the group of the channel.

    The relu makes this more than other weights: a linear mix before the output projection only
    re-parameterises it. The gate is 1 in a fresh layer; at 0 the layer computes what it would
    without mixing. What is slow or fast is a matter of the grid alone: filters see eigenvalues and
    whole eigenspaces, no basis of them, and commute with turning the grid.

    Args:
        heads: sizes of the layer; the number of heads must fill a grid.
        filter: what g_c is: ``bands`` (a number each), ``smooth`` (lines between knots),
            ``chebyshev`` (a polynomial) or ``rational`` (a + sum of b_t / (1 + s_t lambda)).
        order: number of bands or of knots, degree, or number of poles; 3, 3, 3 and 2 unless given,
            or less where fewer eigenspaces are kept.
        modes: how many modes pass at least, the slowest first and whole eigenspaces; else all.
        groups: groups of channels with a filter each; gcd(4, head_dim) unless given.
        spatial: add b_i * relu(lambda_i W_self H_i + sum of g_ij W_neighbour H_j) to the mixture,
            as `hexagonal`, under a learned b_i per head.
        tied: share the gate, and all that belongs to a head or an edge, over the orbits of a turn.

    Raises:
        ValueError: for a filter that does not exist, more numbers in it than eigenspaces kept,
            modes outside [1, h], groups that do not divide the width of a head, and for numbers
            that are not whole.

    Source: filters of a graph's spectrum, Defferrard et al., arXiv 1606.09375, section 2.1;
    rational ones, Bianchi et al., arXiv 1901.01343.

    >>> mixer = build(Heads(28, 7, 4, 7), filter="bands")
    >>> mixer.response([0.0, 1.2, 2.0]).shape  # of 4 groups at 3 eigenvalues
    torch.Size([4, 3])
    """

    mixes_logits = False

    def __init__(
        self,
        heads: Heads,
        filter: str,  # noqa: A002 - its name where it is chosen
        order: int | None,
        modes: int | None,
        groups: int | None,
        *,
        spatial: bool,
        tied: bool,
        **factory: object,
    ) -> None:
        super().__init__()
        width = heads.head_dim
        self.grid = HexGrid.of(heads.num_heads)
        self.groups = math.gcd(4, width) if groups is None else groups
        check_whole(groups=self.groups)
        if width % self.groups:
            raise ValueError(f"groups must divide head_dim {width}, got {groups}")
        if modes is not None:
            check_whole(modes=modes)
            if modes > heads.num_heads:
                raise ValueError(f"modes must be at most {heads.num_heads}, the heads, got {modes}")
        self.kind, self.order, self.modes = filter, order, modes
        self._see(self.grid.adjacency(), **factory)
        # weights that are followed, None for the grid's own. They are the bits of float64: numbers
        # would be rounded where the layer is cast, and rounded weights have other eigenspaces
        self.register_buffer("followed", None)
        nodes = self.grid.orbits() if tied else torch.arange(heads.num_heads, device="cpu")
        self.weight = nn.Parameter(torch.empty(width, width, **factory))
        self.gate = nn.Parameter(torch.ones(int(nodes.max()) + 1, **factory))
        self.register_buffer("nodes", nodes.to(self.gate.device))
        self.spatial = hexagonal(heads, tied=tied, **factory) if spatial else None
        nn.init.normal_(self.weight, std=width**-0.5)

    def _see(self, adjacency: Tensor, **factory: object) -> None:
        """Build the filter on the spectrum of a graph."""
        lines = spectrum(adjacency)
        lines = lines if self.modes is None else lines.kept(self.modes)
        order = check_order(self.kind, self.order, len(lines.eigenvalues))
        self.filter = FILTERS[self.kind].build(order, lines, self.groups, **factory)
        self.eigenvalues, self.multiplicities = lines.eigenvalues, lines.multiplicities
        self.order, self.cut = order, lines.cut

    def follow_(self, adjacency: Tensor) -> None:
        """Filter by the spectrum of the grid under other weights of its edges, from now on.

        What has been learned stays. A state tells the graph: who loads it follows that one.

        Raises ValueError for a matrix that is not (h, h), symmetric, finite and without negative
        weights, and where its eigenspaces are too few for the filter; then nothing has changed.
        """
        weights, count = undirected(adjacency, "cpu"), self.grid.num_heads
        if len(weights) != count:
            raise ValueError(f"adjacency must be (h, h) with h {count}, got {tuple(weights.shape)}")
        learned = dict(self.filter.named_parameters())
        like = self.filter.coefficients
        self._see(weights, device=like.device, dtype=like.dtype)
        for name, parameter in learned.items():
            setattr(self.filter, name, parameter)
        own = torch.equal(weights, self.grid.adjacency().double())
        self.followed = None if own else weights.clone().view(torch.int64).to(like.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Follow the graph of a state first: what a filter holds has its size."""
        bits = state_dict.get(f"{prefix}followed")
        if bits is not None:
            self.follow_(bits.view(torch.float64))
        elif self.followed is not None and f"{prefix}gate" in state_dict:
            self.follow_(self.grid.adjacency())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def operators(self) -> Tensor:
        """g_c(L), (g, h, h)."""
        return torch.einsum("gk,kij->gij", self.filter.weights(), self.filter.atoms)

    def response(self, lambdas: Tensor | Sequence[float]) -> Tensor:
        """g_c(lambda), (g, e), at any eigenvalues (e,); 0 above those that are kept."""
        device = self.filter.coefficients.device
        lambdas = torch.as_tensor(lambdas, dtype=torch.float64, device=device)
        return self.filter.response(lambdas) * (lambdas < self.cut)

    def frequency_penalty(self) -> Tensor:
        """How much of what varies fast the filters pass, a scalar to add to a loss.

        The mean over groups of tr(g L g) / h = sum over e of m_e lambda_e g(lambda_e)^2 / h, with
        m_e modes at lambda_e: the roughness, summed over edges, of white noise after the filter.

        >>> mixer = build(Heads(28, 7, 4, 7), order=1)  # one band: g is the same everywhere
        >>> ratio = mixer.frequency_penalty() / mixer.response([0.0])[0, 0] ** 2
        >>> round(ratio.item(), 4)  # tr L / h
        1.0
        """
        gains = self.response(self.eigenvalues)
        power = gains.new_tensor(self.multiplicities) * gains.new_tensor(self.eigenvalues)
        return (gains.square() @ power).mean() / self.grid.num_heads

    def mix_logits(self, rating: Rating) -> Rating:
        """The rating as it is: heads meet after attention."""
        return rating

    def mix_outputs(self, heads: Tensor, impl: str) -> Tensor:
        """Mix head outputs (b, n, h, d).

        With a spatial path only ``reference`` can be differentiated twice.
        """
        slow, onto = impl == "reference", heads
        if self.spatial is not None:
            near, mix = self.spatial, near_reference.mix if slow else near_fused.mix
            gate = (self.gate * near.gate).index_select(0, self.nodes)
            onto = mix(heads, near.weight_self, near.weight_neighbour, near.graph(), gate)
        mix = reference.mix if slow else fused.mix
        gate = self.gate.index_select(0, self.nodes)
        return mix(onto, heads, self.weight, self.operators(), gate)


def build(
    heads: Heads,
    *,
    filter: str = "bands",  # noqa: A002
    order: int | None = None,
    modes: int | None = None,
    groups: int | None = None,
    spatial: bool = False,
    tied: bool = False,
    **factory: object,
) -> SpectralMixer:
    """The mixer of `heads`, whose number must fill a grid."""
    return SpectralMixer(heads, filter, order, modes, groups, spatial=spatial, tied=tied, **factory)
