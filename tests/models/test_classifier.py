import pytest
import torch

from sixfold import SequenceClassifier

PARTS = {
    "linear": {"num_heads": 4},
    "hexagonal": {"num_heads": 7, "head_dim": 4, "projection": "coordinate", "mixer": "hexagonal"},
    "hypernetwork": {"num_heads": 7, "head_dim": 4, "projection": "hypernetwork"},
    "cosine": {"num_heads": 4, "score": "cosine", "num_kv_heads": 2},
}
# rotary angles are float32 in any precision: an error of 2**-24 times a position below 16
RELATIVE = 16 * 2**-20


def model_of(attention="linear", **options):
    torch.manual_seed(0)
    model = SequenceClassifier(30, 3, 16, 16, 2, PARTS[attention], **options).double().eval()
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.head.bias)
    return model


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("attention", PARTS)
def test_padding_never_changes_the_logits(attention, side):
    model, tokens = model_of(attention), torch.randint(1, 30, (4, 7))
    bare = model(tokens)
    left = {"right": 0, "left": 9, "both": 4}[side]
    padded = torch.nn.functional.pad(tokens, (left, 9 - left))
    tolerance = 1e-12 if side == "right" else RELATIVE
    torch.testing.assert_close(model(padded), bare, rtol=0, atol=tolerance)


def test_rows_of_different_lengths_share_a_batch():
    model = model_of()
    rows = [torch.randint(1, 30, (length,)) for length in (1, 5, 16)]
    together = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    apart = torch.cat([model(row[None]) for row in rows])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)


def test_what_the_padding_embeds_is_never_seen():
    model, tokens = model_of(), torch.tensor([[3, 4, 0, 0]])
    before = model(tokens)
    with torch.no_grad():
        model.embedding.weight[0] = 1e3
    assert torch.equal(model(tokens), before)


def test_any_token_may_be_the_padding():
    model, tokens = model_of(pad=29), torch.randint(0, 29, (2, 6))
    padded = torch.nn.functional.pad(tokens, (0, 3), value=29)
    torch.testing.assert_close(model(padded), model(tokens), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"pad must be in \[0, 30\), got 30"):
        model_of(pad=30)


def test_a_row_of_padding_gives_the_bias():
    model = model_of()
    assert torch.equal(model(torch.zeros(1, 5, dtype=torch.long))[0], model.head.bias)


def test_attention_is_bidirectional():
    model, tokens = model_of(), torch.randint(1, 30, (1, 6))
    # without positions and blocks a mean would not notice the order; with rotary it does
    assert (model(tokens) - model(tokens.flip(1))).abs().max() > 1e-6
    seen = model.embedding(tokens).detach().requires_grad_()
    block = model.blocks[0](seen)
    block[0, 0].sum().backward()
    assert (seen.grad[0, -1] != 0).any()


def test_a_longer_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence of 17 tokens is longer than the context of 16"):
        model_of()(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize("name", ["vocab_size", "num_classes", "context", "d_model"])
def test_what_cannot_be_meant_is_named(name):
    sizes = {"vocab_size": 30, "num_classes": 3, "context": 16}
    with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got 0"):
        SequenceClassifier(**{**sizes, name: 0})
    with pytest.raises(ValueError, match="tokens must be int64 or int32, got torch.float32"):
        SequenceClassifier(**sizes)(torch.ones(1, 4))
