import pytest
import torch
from torch import nn

from sixfold.models._block import Block, blocks, given, per_layer


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block = Block(16, {"num_heads": 2})
    for norm in (block.attention_norm, block.mlp_norm):
        nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 16)
    mask = torch.rand(5, 5) > 0.3

    def norm(x, weight):
        centred = x - x.mean(-1, keepdim=True)
        return weight * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    y = x + block.attention(norm(x, block.attention_norm.weight), attn_mask=mask)
    hidden = nn.functional.gelu(norm(y, block.mlp_norm.weight) @ block.mlp[0].weight.T)
    torch.testing.assert_close(block(x, attn_mask=mask), y + hidden @ block.mlp[2].weight.T)


def test_dropout_falls_on_updates_in_training_only():
    torch.manual_seed(0)
    block, x = Block(8, {"num_heads": 2}, dropout=0.999999), torch.randn(1, 4, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("num_layers", [1, 8])
def test_writers_to_the_residual_stream_start_small(num_layers):
    torch.manual_seed(0)
    stack = blocks(num_layers, 128, {"num_heads": 4}, 4.0, 0.0)
    for block in stack:
        for writer in (block.attention.output, block.mlp[-1]):
            expected = (2 * num_layers * writer.in_features) ** -0.5
            # the deviation of n draws is known to 1 / sqrt(2 n): six of these
            assert abs(writer.weight.std() / expected - 1) < 6 * (2 * writer.weight.numel()) ** -0.5


def test_mlp_ratio_sets_the_hidden_width():
    assert Block(12, {"num_heads": 2}, mlp_ratio=2.5).mlp[0].out_features == 30


def test_a_layer_may_override_a_default():
    own, usual = {"num_heads": 1}, {"num_heads": 4, "head_dim": 2}
    both = {"num_heads": 1, "head_dim": 2}
    assert per_layer([own, {}], 2, **usual) == [both, usual]
    assert per_layer(own, 2, head_dim=2) == [both] * 2


def test_given_arguments_do_not_change_with_their_owner():
    options = {"num_heads": 2}
    kept = given({"self": None, "attention": options})
    options["num_heads"] = 4
    assert kept == {"attention": {"num_heads": 2}}
