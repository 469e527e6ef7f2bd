"""Counting: parameters, and the FLOPs of a forward pass."""

from __future__ import annotations

from torch import nn

from sixfold.attention.mixer._graph import GraphMixer
from sixfold.attention.mixer.hexagonal_logits import LogitMixer
from sixfold.attention.mixer.spectral import SpectralMixer
from sixfold.attention.multihead import MultiHeadAttention
from sixfold.attention.projection.hypernetwork import HypernetworkProjection, Writer
from sixfold.models._block import Block
from sixfold.ops.condense import cells


def parameters(model: nn.Module) -> int:
    """Numbers that can be trained; weights used twice count once.

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, tokens: int) -> int:
    """FLOPs of a forward pass over one sequence, a multiplication and an addition being two.

    Per block 2 n (d_model d (2h + 2h_kv) + mixer + 2 d_model hidden) + 4 n^2 h d, and what the
    model does outside its blocks (`outer_flops`): n tokens, h heads of width d. A graph mixer is
    h d (2d + h), a spectral one h d (d + h), logits of s neighbours 2 n^2 h d s more; a
    hypernetwork adds what it writes for each token.
    Left out: norms, softmax, activations, rotary turns, and weights made once whatever n is (of
    coordinates, of a graph), and condensing. A mask saves nothing: n^2 counts every pair; of a
    hierarchical reach what it sees is counted (`seen`).

    Args:
        model: any model of this package.
        tokens: n; image or field patches are tokens.
    """
    layers = [module for module in model.modules() if isinstance(module, Block)]
    return sum(block_flops(block, tokens) for block in layers) + model.outer_flops(tokens)


def block_flops(block: Block, tokens: int) -> int:
    """FLOPs of one block over one sequence."""
    hidden = sum(part.weight.numel() for part in block.mlp if isinstance(part, nn.Linear))
    return attention_flops(block.attention, tokens) + 2 * tokens * hidden


def attention_flops(layer: MultiHeadAttention, tokens: int) -> int:
    """FLOPs of one attention layer over one sequence."""
    heads = layer.heads
    width = heads.num_heads * heads.head_dim
    projected = width + 2 * heads.num_kv_heads * heads.head_dim
    per_token = heads.d_model * (projected + width)
    if isinstance(layer.projection, HypernetworkProjection):
        per_token += sum(map(written, layer.projection.children()))
    mixer, pairs = layer.mixer, 4 * seen(layer, tokens) * width
    if isinstance(mixer, LogitMixer):
        if heads.num_kv_heads == 1:
            per_token += width * heads.num_heads
        else:
            pairs += 2 * tokens**2 * width * (mixer.slots.shape[1] - 1)
        mixer = mixer.outputs
    if isinstance(mixer, SpectralMixer):
        per_token += width * (heads.head_dim + heads.num_heads)
        mixer = mixer.spatial
    if isinstance(mixer, GraphMixer):
        per_token += width * (2 * heads.head_dim + heads.num_heads)
    return 2 * tokens * per_token + pairs


def seen(layer: MultiHeadAttention, tokens: int) -> int:
    """Pairs of a query and a key, or a meta-token, that a causal layer rates.

    >>> seen(MultiHeadAttention(8, 2), 100)
    10000
    >>> reach = {"name": "hierarchical", "block": 4, "capacity": 2}
    >>> seen(MultiHeadAttention(8, 2, reach=reach), 16)  # 2 * 4 near places, and 0, 0, 1, 2 cells
    152
    """
    if not layer.reach.condenses:
        return tokens**2
    rules = layer.reach.given
    blocks = -(-tokens // rules.block)
    scales = cells.num_scales(blocks, rules.scales)
    far = sum(len(cells.far(number, blocks, scales, is_causal=True)) for number in range(blocks))
    near = blocks * (cells.NEAR + 1) * rules.block
    return rules.block * (near + rules.capacity * far)


def written(writer: Writer) -> int:
    """Multiplications in writing the weights of one token from its view."""
    count = writer.count
    reader = sum(part.weight.numel() for part in writer.reader if isinstance(part, nn.Linear))
    return reader + count**2 * (writer.reader[-1].out_features + writer.head_dim)
