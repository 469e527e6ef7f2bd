"""The tiled loop with distances and their gradients compiled by Numba, for the CPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sixfold.contracts import Distances, Visibility
from sixfold.ops.distance.tiled import METRICS, Metric, attend_by


@functools.cache
def kernels() -> ModuleType:
    """The compiled kernels; ModuleNotFoundError naming the extra where Numba is missing."""
    try:
        from sixfold.ops.distance import _kernels
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        raise ModuleNotFoundError(
            "impl 'numba' needs Numba: pip install 'sixfold[cpu]'", name=error.name
        ) from error
    return _kernels


@functools.cache
def workers(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a fork has none
    """The threads that run the kernels, which hold no lock."""
    return ThreadPoolExecutor(threads, thread_name_prefix="sixfold-distance")


def spread(piece: Callable[[int, slice], Any], groups: int, n: int) -> None:
    """Call `piece(group, points)` over all groups and points, on PyTorch's number of threads."""
    if groups * n == 0:
        return
    threads = torch.get_num_threads()
    step = -(-n // -(-threads // groups))
    pieces = [(g, slice(i, min(i + step, n))) for g in range(groups) for i in range(0, n, step)]
    if threads == 1 or len(pieces) == 1:
        for each in pieces:
            piece(*each)
    else:
        list(workers(threads, os.getpid()).map(lambda each: piece(*each), pieces))


def plain(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same numbers as a contiguous array."""
    return tensor.detach().contiguous().numpy()


def distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    """||x_i - y_j||_p by differences; (g, n, d) and (g, m, d) to (g, n, m)."""
    kernel = kernels().distance_kernel(kernels().kind_of(p))
    out = x.new_empty(x.shape[0], x.shape[1], y.shape[1])
    points, lanes, tile = plain(x), plain(y.mT), out.numpy()
    power = points.dtype.type(p)
    spread(lambda g, i: kernel(points[g, i], lanes[g], power, tile[g, i]), *x.shape[:2])
    return out


def pull(x: Tensor, y: Tensor, force: Tensor, apart: Tensor, p: float) -> Tensor:
    """Sum over j of force_ij d||x_i - y_j||_p / dx_i, (g, n, d)."""
    kernel = kernels().pull_kernel(kernels().kind_of(p))
    out = torch.empty_like(x.mT, memory_format=torch.contiguous_format)
    lanes, points, total = plain(x.mT), plain(y), out.numpy()
    by_x = force.is_contiguous()
    forces, lengths = (plain(t if by_x else t.mT) for t in (force, apart))
    power = points.dtype.type(p)

    def piece(g: int, i: slice) -> None:
        some = (i, slice(None)) if by_x else (slice(None), i)
        near = [np.ascontiguousarray(a[g][some]) for a in (forces, lengths)]
        found = np.ascontiguousarray(total[g, :, i])
        kernel(np.ascontiguousarray(lanes[g, :, i]), points[g], *near, power, by_x, found)
        total[g, :, i] = found

    spread(piece, *x.shape[:2])
    return out.mT


def attend(rating: Distances, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Same as the reference, in tiles on the CPU, at the speed of its vector units.

    Differentiable once, memory linear in n and m. Raises as ``tiled`` does, ModuleNotFoundError
    naming the extra where Numba is missing, and ValueError for a tensor on another device.
    """
    if rating.query.device.type != "cpu":
        raise ValueError(f"impl 'numba' runs on the CPU, got query on {rating.query.device}")
    return attend_by("numba", rating, value, visibility, dropout)


METRICS["numba"] = Metric(distance, pull)
