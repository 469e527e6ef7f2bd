"""Shows attention that is no function of PyTorch to those who look at the functions of PyTorch."""

from __future__ import annotations

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from sixfold.contracts import Observation


def show(observation: Observation, points: tuple[Tensor, Tensor, Tensor], score: nn.Module) -> None:
    """Compute nothing, in the sight of every active `TorchFunctionMode`.

    Attention inside a model that is not ours calls it once, before it attends: whoever is handed
    this call need not read the functions that follow. Without a mode it costs 0.1 microseconds.

    Args:
        observation: the rating, capped where logits are, without sinks, and who sees whom.
        points: queries (b, h, n, d), keys and values (b, h_kv, m, d) as the model made them.
        score: what rated them.

    >>> import torch
    >>> from torch.overrides import TorchFunctionMode
    >>> from sixfold.contracts import Features, Visibility
    >>> class Looking(TorchFunctionMode):
    ...     def __torch_function__(self, func, types, args=(), kwargs=None):
    ...         print(func is show, args[0].signed)
    >>> points = torch.zeros(1, 2, 3, 4)
    >>> seen = Observation(Features(points, points, 0.5), Visibility(None, is_causal=True))
    >>> with Looking():
    ...     show(seen, (points,) * 3, nn.Identity())
    True True
    """
    if has_torch_function_unary(None):  # of None modes alone are asked, and no kind of tensor
        handle_torch_function(show, (), observation, points, score)
