"""What attention by distance means: softmax of -rate ||q - k||_p, pair by pair, materialised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import TransformType, retrieve_all_functorch_interpreters
from torch.autograd.forward_ad import unpack_dual

from sixfold.contracts import Distances, Visibility
from sixfold.ops.attend import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(rating: Distances, value: Tensor) -> None:
    """Raise for a p, a dtype or a number of heads that no implementation serves.

    Raises:
        ValueError: p below 1 or not a number, or query heads that key heads do not divide.
        TypeError: a dtype that is not floating, or queries, keys and values of different dtypes.
    """
    query, key, _, p = rating
    if not p >= 1:
        raise ValueError(f"p must be in [1, inf], got {p}")
    if query.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"query must be one of {names}, got {query.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, "
            f"{value.dtype}"
        )
    if query.shape[1] % key.shape[1] or query.shape[1] % value.shape[1]:
        raise ValueError(
            f"key heads {key.shape[1]} and value heads {value.shape[1]} must divide the "
            f"{query.shape[1]} query heads"
        )


def once(impl: str) -> RuntimeError:
    """What an implementation with one backward pass says to every other derivative."""
    return RuntimeError(
        f"impl {impl!r} can be differentiated once, backward: impl='reference' serves second and "
        "forward derivatives and torch.func"
    )


def check_transforms(impl: str, rating: Distances, value: Tensor, *, vmap: bool) -> None:
    """Raise RuntimeError under transforms that `impl` does not serve; `vmap` is one it may serve.

    An operator that has only a backward pass gives forward derivatives of zero, silently.
    """
    for tensor in (rating.query, rating.key, rating.rate, value):
        if unpack_dual(tensor).tangent is not None:
            raise once(impl)
    if torch.compiler.is_compiling():
        return
    levels = {level.key() for level in retrieve_all_functorch_interpreters()}
    refused = {TransformType.Grad, TransformType.Jvp, *(() if vmap else (TransformType.Vmap,))}
    if levels & refused:
        raise once(impl)


def attend(rating: Distances, value: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """Attention by distance: O_i = sum over j of softmax_j(-rate_h ||q_i - k_j||_p) v_j.

    Args:
        rating: query (b, h, n, d), key (b, h_kv, m, d), rate (h,) and p in [1, inf].
        value: (b, h_kv, m, d_v).
        visibility: which keys each query sees.
        dropout: share of weights dropped.

    Returns:
        (b, h, n, d_v); rows that see no key are exactly zero.

    Raises:
        ValueError: for p < 1 and heads that do not divide.
        TypeError: for a dtype that is not floating.

    Differentiable any number of times; holds b h n m d numbers.

    >>> x = torch.tensor([[[[0.0], [1.0]]]])
    >>> rating = Distances(x, x, rate=torch.tensor([3.0]).log(), p=1.0)
    >>> attend(rating, x, Visibility(None, is_causal=False), 0.0).flatten()
    tensor([0.2500, 0.7500])
    """
    check(rating, value)
    return reference.attend(rating, value, visibility, dropout)
