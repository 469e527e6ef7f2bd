"""What filtering heads means, written out head by head."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(heads: Tensor, weight: Tensor, operators: Tensor) -> Tensor:
    """Each group of channels of all heads, taken through its own operator over heads.

    M_i[c] = relu(sum over j of operators_c,ij (H_j W)[c]) for the channels c of a group.

    Args:
        heads: head outputs H, (b, n, h, d).
        weight: W, (d, d), applied as H @ W.
        operators: (g, h, h), one per group of d / g channels that stand together.

    Returns:
        (b, n, h, d).
    """
    groups = (heads @ weight).chunk(len(operators), -1)
    filtered = []
    for operator, group in zip(operators, groups, strict=True):
        rows = [
            sum(operator[i, j] * group[:, :, j] for j in range(heads.shape[2]))
            for i in range(heads.shape[2])
        ]
        filtered.append(torch.stack(rows, dim=2))
    return torch.relu(torch.cat(filtered, -1))


def mix(onto: Tensor, heads: Tensor, weight: Tensor, operators: Tensor, gate: Tensor) -> Tensor:
    """Gated sum onto + gate_i * M_i of the heads' mixture and (b, n, h, d); gate (h,)."""
    return onto + gate[:, None] * mixture(heads, weight, operators)
