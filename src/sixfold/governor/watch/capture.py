"""Sees every call of attention in a forward pass, whoever makes it, and reads it.

A torch-function mode is handed each function of PyTorch that Python calls. It calls the function as
it is and then looks, so that a watched pass computes what an unwatched one does.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sixfold.contracts import Features, Observation, Visibility
from sixfold.governor.watch.layout import LATEST, Layout, Product, Share, product
from sixfold.ops.attend.reference import restrict, visible
from sixfold.ops.attend.show import show

SEEN = "F.scaled_dot_product_attention, F.multi_head_attention_forward and flex_attention"
LARGEST_MASK = 2**26
"""Entries of a mask that is written out only to be looked at."""


class Unreadable(ValueError):
    """A call of attention that cannot be told in queries, keys and a mask; says why."""


Points = tuple[Tensor, Tensor, Tensor]
"""Queries (b, h, n, d), keys and values (b, h_kv, m, d)."""


class Sight(NamedTuple):
    """A call of attention: what a probe observes, and what tells whose weights made it.

    points: what is rated, to be traced to weights; None where nothing is to be traced. layout: the
    rows, where they are plain. score: what rated them; None for a scaled dot product of PyTorch's.
    """

    observation: Observation
    points: Points | None = None
    layout: Layout | None = None
    score: nn.Module | None = None


def of_show(observation: Observation, points: Points, score: nn.Module) -> Sight:
    """Take what our attention shows inside a model of Hugging Face."""
    return Sight(observation, points, None, score)


def of_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - the signature of PyTorch
    is_causal: bool = False,  # noqa: FBT001, FBT002
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001, FBT001, FBT002 - shapes say it
) -> Sight:
    """Read `F.scaled_dot_product_attention`; its causality is upper-left aligned, ours is not."""
    check_axes(query, key)
    n, m = query.shape[-2], key.shape[-2]
    if is_causal and n != m:
        attn_mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril()
        is_causal = False
    rating = Features(query, key, query.shape[-1] ** -0.5 if scale is None else scale)
    visibility = Visibility(hiding(attn_mask), is_causal)
    return Sight(Observation(rating, visibility), (query, key, value))


def check_axes(query: Tensor, key: Tensor) -> None:
    """Raise Unreadable for anything but heads of sequences of a batch."""
    if query.is_nested or key.is_nested:
        raise Unreadable("its sequences are a nested tensor")
    if query.ndim != 4 or key.ndim != 4:
        raise Unreadable(f"queries must be (b, h, n, d), got {tuple(query.shape)}")


def hiding(mask: Tensor | None) -> Tensor | None:
    """The mask with -inf where a float one has the least finite number, which is meant to hide."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))


def of_flex(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Sight:
    """Read FlexAttention: scores as they are, and a block mask."""
    flex = sys.modules["torch.nn.attention.flex_attention"]
    score_mod, block_mask, scale = rest[:3]
    mask_mod, mask = block_mask[-1], None
    check_axes(query, key)
    if score_mod is not flex._identity:
        raise Unreadable("flex_attention is given a score_mod, an arbitrary function of a logit")
    if mask_mod is not flex.noop_mask:
        _, h, n, _ = query.shape
        m = key.shape[-2]
        if h * n * m > LARGEST_MASK:
            raise Unreadable(f"the block mask of flex_attention has {h} x {n} x {m} entries")
        mask = flex.create_mask(mask_mod, 1, h, n, m, query.device)
    rating, visibility = Features(query, key, scale), Visibility(mask, is_causal=False)
    return Sight(Observation(rating, visibility), (query, key, value))


MHA = inspect.signature(F.multi_head_attention_forward)


def of_mha(*args: Any, **kwargs: Any) -> Sight:
    """Read `F.multi_head_attention_forward`, whose queries and keys only its weights tell.

    They are made again for the first sequence, which stands for all: probes look at no other.
    """
    bound = MHA.bind(*args, **kwargs)
    bound.apply_defaults()
    asked = bound.arguments
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if asked[name] is not None:
            raise Unreadable(f"multi_head_attention_forward is given {name}")
    if asked["add_zero_attn"]:
        raise Unreadable("multi_head_attention_forward is given add_zero_attn")
    source = [asked[name] for name in ("query", "key")]
    batch = 1 if source[0].ndim == 2 else source[0].shape[1]
    layout, points = mha_layout(asked), []
    for role, tokens in zip("qk", source, strict=True):
        first = tokens if tokens.ndim == 2 else tokens[:, 0]
        heads = F.linear(first, *mha_weight(asked, role)).unflatten(-1, (asked["num_heads"], -1))
        points.append(heads.transpose(0, 1).expand(batch, -1, -1, -1))
    rating = Features(*points, points[0].shape[-1] ** -0.5)
    return Sight(Observation(rating, mha_visibility(asked, rating)), None, layout)


def mha_weight(asked: dict[str, Any], role: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one role."""
    number, bias = "qkv".index(role), asked["in_proj_bias"]
    if asked["use_separate_proj_weight"]:
        weight = asked[f"{role}_proj_weight"]
    else:
        weight = asked["in_proj_weight"].chunk(3)[number]
    return weight, None if bias is None else bias.chunk(3)[number]


def mha_layout(asked: dict[str, Any]) -> Layout | None:
    """Rows of the heads, as the arguments say; None where a weight is no parameter."""
    heads, width, bias = asked["num_heads"], asked["embed_dim_to_check"], asked["in_proj_bias"]
    separate, d, layout = asked["use_separate_proj_weight"], width // asked["num_heads"], {}
    for number, role in enumerate("qkv"):
        weight = asked[f"{role}_proj_weight" if separate else "in_proj_weight"]
        if not all(isinstance(part, nn.Parameter) for part in (weight, bias) if part is not None):
            return None
        above = number * width
        layout[role] = [
            Share(weight, 0, bias, h * d + (0 if separate else above), d, h * d + above)
            for h in range(heads)
        ]
    return layout


def mha_visibility(asked: dict[str, Any], rating: Features) -> Visibility:
    """Masks of the first sequence: there True hides, here True shows."""
    masks = []
    if (mask := asked["attn_mask"]) is not None:
        mask = mask[None] if mask.ndim == 2 else mask[: asked["num_heads"]]
        masks.append(mask[None])
    if (mask := asked["key_padding_mask"]) is not None:
        masks.append(mask[None, None, None] if mask.ndim == 1 else mask[:1, None, None])
    hidden = [~mask for mask in masks if mask.dtype == torch.bool]
    added = [mask for mask in masks if mask.dtype != torch.bool]
    whole = hiding(sum(added[1:], added[0])) if added else None
    for shown in hidden:
        whole = restrict(whole, shown)
    if whole is not None:
        n, m = rating.query.shape[-2], rating.key.shape[-2]
        whole = visible(Visibility(whole, is_causal=False), n, m, whole.device)
    return Visibility(whole, is_causal=False)


READ: dict[Any, Callable[..., Sight]] = {
    F.scaled_dot_product_attention: of_sdpa,
    F.multi_head_attention_forward: of_mha,
    show: of_show,
}
PRODUCTS: dict[Any, int] = {torch.addmm: 3} | dict.fromkeys(
    (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), 2
)
"""Products whose last argument may be a weight, and how many arguments they have."""


def reader(function: Any) -> Callable[..., Sight] | None:
    """How a call of this function is read; None where it is no attention."""
    if isinstance(function, torch._ops.HigherOrderOperator):
        return of_flex if function.name() == "flex_attention" else None
    return READ.get(function)


def parameter_of(weight: Any) -> tuple[nn.Parameter, bool] | None:
    """The matrix that is a weight, and whether it is transposed; None where it is no parameter."""
    base, transposed = weight, False
    if isinstance(weight, Tensor) and isinstance(weight._base, nn.Parameter):
        base, transposed = weight._base, True
    if not isinstance(base, nn.Parameter) or base.ndim != 2:
        return None
    whole = base.T if transposed else base
    same = (weight.shape, weight.stride()) == (whole.shape, whole.stride())
    return (base, transposed) if same else None


def linear_map(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Parameter, int, Tensor | None] | None:
    """Weight, axis of outputs and bias of a linear map by a parameter; None for anything else."""
    if function is F.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        weight, axis, bias = given["weight"], 0, given.get("bias")
    elif len(args) == PRODUCTS.get(function) and not kwargs:
        weight, axis = args[-1], 1
        bias = args[0] if function is torch.addmm else None
    else:
        return None
    found = parameter_of(weight)
    return None if found is None else (found[0], 1 - axis if found[1] else axis, bias)


Show = Callable[[Sequence[nn.Module], Callable[[], Sight], Sequence[Product] | None], None]
"""Is given the running modules, how to read the call, and the traced linear maps before it."""


class Capture(TorchFunctionMode):
    """The mode of one pass, and the modules that are running in it.

    Args:
        show: called after each call of attention.
        tracing: whether linear maps are remembered.
    """

    def __init__(self, show: Show, *, tracing: bool) -> None:
        super().__init__()
        self.show, self.tracing = show, tracing
        self.running: list[nn.Module] = []
        self.products: deque[Product] = deque(maxlen=LATEST)

    def enter(self, module: nn.Module, _: Any) -> None:
        """A module begins."""
        self.running.append(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A module has ended, or has raised."""
        if module in self.running:
            while self.running.pop() is not module:
                pass

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, and look."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = reader(func)
        if read is not None:
            traced = list(self.products) if self.tracing else None
            self.show(self.running, lambda: read(*args, **kwargs), traced)
        elif self.tracing and (made := linear_map(func, args, kwargs)) is not None:
            self.products.append(product(out, *made))
        return out
