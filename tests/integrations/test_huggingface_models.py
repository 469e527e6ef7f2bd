"""Sixfold models under Hugging Face's tools, used as a user would use them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers", reason="needs the extra huggingface")

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
    set_seed,
)

from sixfold import LanguageModel, LeadMetaArchitect, SequenceClassifier, discover
from sixfold.data import shakespeare
from sixfold.data.tokenizer import bpe, characters, words
from sixfold.errors import DataError
from sixfold.integrations.huggingface.configuration import SixfoldConfig
from sixfold.integrations.huggingface.modeling import (
    SixfoldForCausalLM,
    SixfoldForSequenceClassification,
    register_models,
)
from sixfold.integrations.huggingface.tokenization import fast_tokenizer

V, CONTEXT = 23, 24
HEX = {"num_heads": 7, "head_dim": 4, "projection": "coordinate", "mixer": "hexagonal"}
ATTENTIONS = {
    "linear": {"num_heads": 4},
    "cosine": {"num_heads": 4, "score": "cosine", "num_kv_heads": 2},
    "hexagonal": HEX,
    "hypernetwork": {"num_heads": 7, "head_dim": 4, "projection": "hypernetwork"},
    "window": {"num_heads": 4, "reach": {"name": "window", "width": 4}},
}
attentions = pytest.mark.parametrize("attention", ATTENTIONS)
placed = pytest.mark.parametrize("positions", ["rotary", "learned"])


@pytest.fixture(autouse=True)
def registered():
    register_models()


def config_of(kind="linear", /, **words):
    sizes = {"vocab_size": V, "context": CONTEXT, "d_model": 16, "num_layers": 2}
    return SixfoldConfig(**{**sizes, **ATTENTIONS[kind], **words})


def lm_of(kind="linear", /, **words):
    """A model in double precision whose predictions are sharp and hang on all that was read."""
    torch.manual_seed(0)
    model = SixfoldForCausalLM(config_of(kind, **words)).double().eval()
    for table in (model.model.embedding, model.model.position):
        if table is not None:
            torch.nn.init.normal_(table.weight)
    for block in model.model.blocks:
        for writer in (block.attention.output, block.mlp[-1]):
            torch.nn.init.normal_(writer.weight)
    return model


def tokens_of(batch, length, seed=0):
    return torch.randint(1, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows, side):
    """Rows of tokens as one batch, and its mask; what fills it is a token like any other."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 5), torch.zeros(len(rows), longest).long()
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


ROWS = [tokens_of(1, 9, seed=1)[0], tokens_of(1, 4, seed=2)[0], tokens_of(1, 6, seed=3)[0]]


# ---------------------------------------------------------------- configuration


def test_a_configuration_speaks_both_languages_and_survives_json(tmp_path):
    config = config_of("window", rope_theta=500.0, attention=[{"score": "cosine"}, {}])
    same = SixfoldConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=2)
    assert (same.d_model, same.num_heads, same.num_layers) == (16, 4, 2)
    assert (config.hidden_size, config.max_position_embeddings) == (16, CONTEXT)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "sixfold"
    assert written["reach"] == {"name": "window", "width": 4}
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SixfoldConfig
    assert loaded.to_json_string() == config.to_json_string()
    assert [layer["score"] for layer in loaded.layers()] == ["cosine", "dot"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"score": "cosin"}, "unknown score 'cosin'; .*Did you mean 'cosine'"),
        ({"mixer": {"name": "hexagon"}}, "unknown mixer 'hexagon'; .*Did you mean 'hexagonal'"),
        ({"projection": None}, "unknown projection None"),
        ({"num_head": 7}, "unknown option 'num_head'; .*Did you mean 'num_heads'"),
        ({"attention": [{"scores": "dot"}]}, "attention 'scores'; .*Did you mean 'score'"),
        ({"attention": {"num_heads": 3}}, "attention must list options for each layer"),
        ({"attention": ["dot"]}, r"or be None, got \['dot'\]"),
        ({"d_model": 16, "hidden_size": 32}, "hidden_size is d_model: give one of them"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        SixfoldConfig(**words)


def test_sizes_are_refused_by_the_model_itself():
    with pytest.raises(ValueError, match="d_model 16 is not a multiple of num_heads 3"):
        SixfoldForCausalLM(config_of(num_heads=3))
    with pytest.raises(ValueError, match="attention lists 1 layers, num_layers is 2"):
        SixfoldForCausalLM(config_of(attention=[{}]))
    with pytest.raises(ValueError, match="a classifier's positions must be rotary, got 'learned'"):
        SixfoldForSequenceClassification(config_of(positions="learned"))


# ---------------------------------------------------------------- the same model


@placed
@attentions
def test_logits_are_those_of_our_own_model_from_the_same_seed(attention, positions):
    options = ATTENTIONS[attention]
    torch.manual_seed(7)
    ours = LanguageModel(V, CONTEXT, 16, 2, options, positions).eval()
    torch.manual_seed(7)
    model = SixfoldForCausalLM(config_of(attention, positions=positions)).eval()
    assert ours.state_dict().keys() == model.model.state_dict().keys()
    tokens = tokens_of(3, 10)
    assert torch.equal(model(tokens).logits, ours(tokens))
    assert torch.equal(model.model(tokens), ours(tokens))
    kept = model(tokens, logits_to_keep=2).logits
    torch.testing.assert_close(kept, ours(tokens)[:, -2:], rtol=0, atol=1e-6)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, ours(tokens))
    assert torch.equal(model(tokens, return_dict=False)[0], ours(tokens))


@pytest.mark.parametrize("side", ["left", "right"])
@placed
@attentions
def test_padding_on_either_side_moves_no_logit(attention, positions, side):
    model = lm_of(attention, positions=positions)
    ids, mask = padded(ROWS, side)
    together = model(ids, attention_mask=mask).logits
    for i, row in enumerate(ROWS):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(together[i, mask[i] == 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@attentions
def test_padding_moves_no_class(attention, side):
    torch.manual_seed(0)
    model = SixfoldForSequenceClassification(config_of(attention, num_labels=3)).double().eval()
    ids, mask = padded(ROWS, side)
    together = model(ids, attention_mask=mask).logits
    alone = torch.cat([model(row[None]).logits for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_a_classifier_is_ours_and_finds_padding_by_its_token():
    torch.manual_seed(7)
    ours = SequenceClassifier(V, 2, CONTEXT, 16, 2, HEX).eval()
    torch.manual_seed(7)
    model = SixfoldForSequenceClassification(config_of("hexagonal", pad_token_id=0)).eval()
    ids, mask = padded(ROWS, "right")
    ids = ids * mask
    assert torch.equal(model(ids).logits, ours(ids))
    assert torch.equal(model(ids, attention_mask=mask).logits, ours(ids))


def test_loss_is_the_mean_over_the_tokens_that_count():
    model, tokens = lm_of(), tokens_of(2, 8)
    labels = tokens.clone()
    labels[0, :5] = -100
    logits = model(tokens).logits[:, :-1].flatten(0, 1).float()
    expected = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    count = int((labels[:, 1:] != -100).sum())
    assert count == 3 + 7
    torch.testing.assert_close(model(tokens, labels=labels).loss, expected / count)
    share = model(tokens, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(share, expected / 40)


def test_a_classifier_learns_one_class_several_or_a_number():
    ids = tokens_of(4, 6)
    for kind, labels, size in (
        ("single_label_classification", torch.tensor([0, 2, 1, 2]), 3),
        ("multi_label_classification", torch.rand(4, 3), 3),
        ("regression", torch.rand(4), 1),
    ):
        model = SixfoldForSequenceClassification(config_of(num_labels=size))
        model(ids, labels=labels).loss.backward()
        assert model.config.problem_type == kind
        assert model.model.head.weight.grad.abs().sum() > 0


@attentions
def test_states_and_weights_on_request(attention):
    model, tokens = lm_of(attention), tokens_of(2, 8)
    plain = model(tokens)
    assert plain.hidden_states is None
    assert plain.attentions is None
    full = model(tokens, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(full.logits, plain.logits, rtol=0, atol=1e-12)
    assert len(full.hidden_states) == 3
    assert torch.equal(full.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(model.lm_head(full.hidden_states[-1]), full.logits)
    for block, x, weights in zip(
        model.model.blocks, full.hidden_states, full.attentions, strict=False
    ):
        seen = block.attention(block.attention_norm(x), is_causal=True, need_weights=True)[1]
        assert torch.equal(weights, seen)
        assert weights.shape == (2, model.config.num_heads, 8, 8)
    assert model(tokens).attentions is None


def test_what_would_be_ignored_is_refused_by_name():
    model, tokens = lm_of(), tokens_of(2, 6)
    with pytest.raises(TypeError, match="position_ids is not taken: .*packed"):
        model(tokens, position_ids=torch.arange(6)[None])
    with pytest.raises(TypeError, match="token_type_ids is not taken: .*model_input_names"):
        model(tokens, token_type_ids=torch.zeros_like(tokens))
    with pytest.raises(TypeError, match="unknown argument 'num_items'; .*num_items_in_batch"):
        model(tokens, num_items=3)
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model()
    for mask in (torch.ones(2, 5), torch.ones(2, 6), torch.ones(2, 1, 6, 6, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"attention_mask must be \(b, m\) = \(2, 6\)"):
            model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="7 tokens is longer than the context of 6"):
        lm_of(positions="learned", context=6)(tokens_of(1, 7))
    with pytest.raises(ValueError, match=r"key_mask must be \(b, m\) with m = 6, got \(2, 5\)"):
        lm_of(positions="learned").model(tokens, key_mask=torch.ones(2, 5, dtype=torch.bool))


# ---------------------------------------------------------------- weights


KINDS = ("projection", "score", "mixer")
PARTS = [(kind, name) for kind in KINDS for name in discover.names(f"sixfold.attention.{kind}")]
PARTNER = {"projection": "score", "score": "projection", "mixer": "score"}


def model_with(kind, name):
    """A model with this part, and the first partner that works with it."""
    # learned positions, because some scores bear no rotation
    sizes = {"num_heads": 7, "head_dim": 4, "positions": "learned"}
    for other in discover.names(f"sixfold.attention.{PARTNER[kind]}"):
        try:
            return SixfoldForCausalLM(config_of(**sizes, **{kind: name, PARTNER[kind]: other}))
        except ValueError as error:
            refusal = error
    raise refusal


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_comes_back_from_a_folder_to_the_bit(kind, name, tmp_path):
    model = model_with(kind, name).eval()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not loaded.training
    assert type(loaded) is SixfoldForCausalLM
    assert torch.equal(loaded(tokens_of(2, 8)).logits, model(tokens_of(2, 8)).logits)
    own, read = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert all(torch.equal(own[name], read[name]) for name in own)


@pytest.mark.parametrize("score", ["dot", "l2_squared", "l1"])
def test_a_clip_comes_back_from_a_folder_to_the_bit(score, tmp_path):
    model, tokens = lm_of(score=score, positions="learned"), tokens_of(2, 8)
    before = model(tokens).logits.detach()
    for block in model.model.blocks:
        block.attention.scale_head_(0, -3)
    clipped = model(tokens).logits
    assert (clipped - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = SixfoldForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert [b.attention.score.power.tolist() for b in loaded.model.blocks] == [[-3, 0, 0, 0]] * 2
    assert torch.equal(loaded(tokens).logits, clipped)


def test_a_folder_holds_safetensors_with_each_weight_once(tmp_path):
    from safetensors.torch import load_file

    model = SixfoldForCausalLM(config_of("hexagonal"))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert load_file(tmp_path / "model.safetensors").keys() == {
        f"model.{name}" for name in model.model.state_dict()
    }


def test_a_classifier_takes_a_language_model_and_draws_its_head_as_ours(tmp_path):
    config = config_of(d_model=64, num_labels=100)
    model = SixfoldForCausalLM(config)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=100, output_loading_info=True
    )
    assert report["missing_keys"] == {"model.head.weight", "model.head.bias"}
    for name, weight in loaded.model.blocks.state_dict().items():
        assert torch.equal(weight, model.model.blocks.state_dict()[name])
    # 6400 draws of deviation 1/8: their root mean square is within 1 % of it, nearly always 3 %
    assert loaded.model.head.weight.pow(2).mean().sqrt().item() == pytest.approx(1 / 8, rel=0.04)
    assert not loaded.model.head.bias.any()


def test_weights_that_a_folder_lacks_are_drawn_as_ours(tmp_path):
    from safetensors.torch import load_file, save_file

    model = SixfoldForCausalLM(config_of(d_model=64))
    model.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.blocks.0.attention.projection.qkv.weight"
    kept = {key: tensor for key, tensor in load_file(file).items() if key != name}
    save_file(kept, file, metadata={"format": "pt"})
    drawn = AutoModelForCausalLM.from_pretrained(tmp_path).get_parameter(name)
    assert drawn.pow(2).mean().sqrt().item() == pytest.approx(1 / 8, rel=0.03)
    assert not torch.equal(drawn, model.get_parameter(name))


def test_the_vocabulary_grows_and_the_head_stays_tied():
    model, tokens = lm_of(), tokens_of(2, 6)
    before = model(tokens).logits
    model.resize_token_embeddings(V + 4)
    after = model(tokens).logits
    assert after.shape[-1] == model.config.vocab_size == V + 4
    torch.testing.assert_close(after[..., :V], before, rtol=0, atol=1e-12)
    assert model.lm_head.weight is model.model.embedding.weight
    assert model.model.arguments["vocab_size"] == V + 4
    assert torch.equal(model.model(tokens), after)
    assert model(torch.full((1, 2), V + 3), labels=torch.full((1, 2), V + 3)).loss.isfinite()


def test_half_precision_stays_near():
    model, tokens = lm_of("hexagonal"), tokens_of(2, 8)
    exact = model(tokens).logits
    low = model.to(torch.bfloat16)(tokens).logits
    assert low.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.1 * exact.abs().max()
    found = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert found.shape == (2, 11)


# ---------------------------------------------------------------- generation


def drawn(model, ids, count=12, **options):
    return model.generate(ids, max_new_tokens=count, pad_token_id=0, **options)


@placed
@attentions
def test_greedy_generation_is_our_own_with_and_without_a_cache(attention, positions):
    model, prompt = lm_of(attention, positions=positions), tokens_of(3, 4)
    ours = torch.stack([*model.model.generate(prompt, 12, temperature=0.0)], dim=1)
    for use_cache in (True, False):
        found = drawn(model, prompt, do_sample=False, use_cache=use_cache)
        assert torch.equal(found[:, 4:], ours)


@placed
@attentions
def test_a_left_padded_prompt_goes_on_as_it_would_alone(attention, positions):
    model = lm_of(attention, positions=positions)
    ids, mask = padded(ROWS, "left")
    together = drawn(model, ids, attention_mask=mask, do_sample=False)[:, ids.shape[1] :]
    for row, found in zip(ROWS, together, strict=True):
        assert torch.equal(found, drawn(model, row[None], do_sample=False)[0, len(row) :])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "do_sample": False, "eos_token_id": 0},
    ],
)
@pytest.mark.parametrize("attention", ["linear", "hypernetwork"])
def test_a_cache_never_changes_what_is_drawn(attention, options):
    model = lm_of(attention)
    rows = 1 if "prompt_lookup_num_tokens" in options else 3
    ids, mask = padded(ROWS[:rows], "left")
    if rows == 1:
        # a prompt that repeats itself, so that there is something to look up, and to take back
        ids = ROWS[1].repeat(3)[None]
        mask = torch.ones_like(ids)
    plain = {name: value for name, value in options.items() if not name.startswith("prompt")}
    found = []
    for given in ({**options, "use_cache": True}, {**plain, "use_cache": False}):
        set_seed(3)
        found.append(drawn(model, ids, attention_mask=mask, count=10, **given))
    # looking up may go one token too far (transformers 5.12)
    assert torch.equal(found[0][:, : found[1].shape[1]], found[1])


@placed
def test_a_segment_after_a_cache_equals_the_whole(positions):
    model = lm_of("hypernetwork", positions=positions)
    ids, mask = padded(ROWS, "left")
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=DynamicCache())
    assert first.past_key_values.get_seq_length() == 5
    rest = model(ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
    real = mask[:, 5:] == 1
    torch.testing.assert_close(rest.logits[real], whole[:, 5:][real], rtol=0, atol=1e-12)
    first.past_key_values.crop(-3)
    again = model(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    real = mask[:, 6:] == 1
    torch.testing.assert_close(again.logits[real], whole[:, 6:][real], rtol=0, atol=1e-12)
    first.past_key_values.reset()
    assert first.past_key_values.get_seq_length() == 0


def test_generation_goes_on_from_a_cache_and_from_embeddings():
    model, prompt = lm_of("hexagonal"), tokens_of(2, 5)
    expected = drawn(model, prompt, do_sample=False)
    cache = model(prompt[:, :3], use_cache=True).past_key_values
    assert torch.equal(drawn(model, prompt, do_sample=False, past_key_values=cache), expected)
    embedded = model.get_input_embeddings()(prompt)
    found = model.generate(
        inputs_embeds=embedded, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert torch.equal(found, expected[:, 5:])


def test_other_caches_are_refused_by_name():
    model, prompt = lm_of(), tokens_of(1, 4)
    with pytest.raises(ValueError, match="must be a DynamicCache .* not StaticCache"):
        drawn(model, prompt, cache_implementation="static")
    with pytest.raises(ValueError, match="must be a DynamicCache .* not StaticCache"):
        model(prompt, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    other = DynamicCache()
    other.update(torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 4), 0)
    with pytest.raises(ValueError, match="holds 2 tokens of another model"):
        model(prompt, past_key_values=other)
    ours = model(prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 4 tokens of another model"):
        lm_of(num_layers=3)(prompt, past_key_values=ours)
    with pytest.raises(NotImplementedError, match="cannot serve another model"):
        ours.update(torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 4), 0)


# ---------------------------------------------------------------- training


@attentions
def test_checkpointing_changes_no_gradient(attention):
    torch.manual_seed(0)
    model, tokens = SixfoldForCausalLM(config_of(attention, dropout=0.1)).train(), tokens_of(2, 8)

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    runs = []
    for block in model.model.blocks:
        block.mlp.register_forward_hook(lambda *seen: runs.append(1))
    expected = gradients()
    assert len(runs) == 2
    activation_checkpointing(model)
    found = gradients()
    assert len(runs) == 2 + 4, "blocks did not run again"
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="cannot be had with checkpointing"):
        model(tokens, use_cache=True)
    with pytest.raises(ValueError, match="output_attentions cannot be had"):
        model(tokens, output_attentions=True)
    assert model.eval()(tokens, use_cache=True).past_key_values is not None


def activation_checkpointing(model):
    """The name changed in 5.x; the old one warns that it will go."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def arguments_of(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        **options,
    )


@pytest.fixture(scope="module")
def text():
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    data = shakespeare.build(context=CONTEXT)
    return data, [{"input_ids": row, "labels": row} for row in data.train_batch(0, 0, 64).inputs]


def test_trainer_learns_saves_and_goes_on(tmp_path, text):
    data, rows = text

    def trainer(folder, steps, **options):
        torch.manual_seed(0)
        model = SixfoldForCausalLM(config_of("hexagonal", vocab_size=data.vocab_size, dropout=0.1))
        arguments = arguments_of(folder, max_steps=steps, lr_scheduler_type="constant", **options)
        return Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)

    whole = trainer(tmp_path / "whole", 6, save_strategy="no")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(torch.tensor(data.vocab_size).log().item(), abs=0.3)
    assert losses[-1] < losses[0] - 0.2
    trainer(tmp_path / "parts", 3, save_steps=3).train()
    second = trainer(tmp_path / "parts", 6, save_strategy="no")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


def test_accumulated_batches_weigh_every_token_alike(tmp_path, text):
    # rows of unequal length: only `num_items_in_batch` makes two half batches equal a whole one
    _, rows = text
    lengths = [4, 20, 7, 24, 3, 24, 12, 9]
    short = [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"].masked_fill(torch.arange(CONTEXT) >= n, -100),
        }
        for row, n in zip(rows, lengths, strict=False)
    ]

    def trained(folder, **options):
        torch.manual_seed(0)
        model = SixfoldForCausalLM(config_of(vocab_size=65))
        arguments = arguments_of(folder, max_steps=1, save_strategy="no", optim="sgd")
        for name, value in options.items():
            setattr(arguments, name, value)
        Trainer(model, arguments, train_dataset=short, data_collator=default_data_collator).train()
        return model.state_dict()

    whole = trained(tmp_path)
    halves = trained(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for name, weight in whole.items():
        torch.testing.assert_close(halves[name], weight, rtol=0, atol=2e-6)


def test_the_governor_watches_the_layers_of_a_hugging_face_model():
    torch.manual_seed(0)
    model, tokens = SixfoldForCausalLM(config_of("hexagonal")).train(), tokens_of(4, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    governor = LeadMetaArchitect(model, optimizer, every=1)
    watched = [layer.module for layer in governor.layers]
    assert watched == [block.attention for block in model.model.blocks]
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = governor.process_step(loss)
    assert seen.snapshot.loss == loss.item()
    assert len(seen.snapshot.signals["entropy"]) == 2
    assert len(seen.snapshot.signals["entropy"][0]) == 7
    governor.detach()


# ---------------------------------------------------------------- tools


def test_a_character_model_writes_in_a_text_pipeline(tmp_path, text):
    data, _ = text
    tokenizer = fast_tokenizer(data.tokenizer)
    torch.manual_seed(0)
    model = SixfoldForCausalLM(
        config_of("hexagonal", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    writer = pipeline("text-generation", model=str(tmp_path), device="cpu")
    prompts = ["ROMEO:", "O"]
    written = writer(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, found in zip(prompts, written, strict=True):
        ids = data.tokenizer.encode(prompt)[None]
        ours = torch.stack([*model.model.generate(ids, 5, temperature=0.0)], 1)[0]
        expected = prompt + AutoTokenizer.from_pretrained(tmp_path).decode(ours)
        assert found[0]["generated_text"] == expected


def test_a_classifier_judges_in_a_text_pipeline(tmp_path):
    tokenizer = fast_tokenizer(bpe.build("a warm film. a dull plot. " * 9, vocab_size=280))
    names = {0: "negative", 1: "positive"}
    config = config_of("hexagonal", vocab_size=len(tokenizer), id2label=names, context=64)
    config.label2id = {name: i for i, name in names.items()}
    model = SixfoldForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = pipeline("text-classification", model=str(tmp_path), device="cpu")
    phrases = ["a warm film", "a dull plot, and long"]
    for phrase, found in zip(phrases, judge(phrases, batch_size=2), strict=True):
        ids = torch.tensor(tokenizer(phrase)["input_ids"])[None]
        odds = model(ids).logits.softmax(-1)[0]
        assert found["label"] == names[int(odds.argmax())]
        assert found["score"] == pytest.approx(odds.max().item(), abs=1e-6)


@pytest.mark.parametrize("line", ["two\nlines, and  spaces ", "héllo 🙂", ""])
@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_fast_tokenizers_give_our_ids_and_the_text_back(kind, line, tmp_path):
    alphabet = "two\nlines, and  spaces héllo 🙂" * 3
    ours = bpe.build(alphabet, vocab_size=270) if kind == "bpe" else characters.build(alphabet)
    fast_tokenizer(ours).save_pretrained(tmp_path)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    ids = fast(line)["input_ids"]
    assert ids == ours.encode(line).tolist()
    assert fast.decode(ids) == line
    assert fast.pad_token_id == ours.vocab_size == len(fast) - 1


def test_fast_tokenizers_refuse_what_they_cannot_say():
    with pytest.raises(Exception, match="Missing"):
        fast_tokenizer(characters.build("abc"))("abd")
    with pytest.raises(DataError, match="Words is neither characters nor byte pairs"):
        fast_tokenizer(words.build("a b"))


# PEFT asks for a name that transformers has renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("attention", "targets"),
    [
        ("hexagonal", ["output", "mlp.0", "mlp.2"]),
        ("hypernetwork", ["bank"]),
        ("linear", ["qkv"]),
        ("hexagonal", ["base"]),
        ("hexagonal", ["base", "network.0", "network.2"]),
    ],
)
def test_lora_adapts_saves_and_merges(attention, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    base, tokens = lm_of(attention).float(), tokens_of(2, 8)
    before = base(tokens).logits.detach()
    settings = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets)
    model = peft.get_peft_model(base, settings)
    torch.testing.assert_close(model(tokens).logits, before)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=1.0)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        assert all(p.grad is not None for p in learned)
        optimizer.step()
        optimizer.zero_grad()
    adapted = model.eval()(tokens).logits.detach()
    assert (adapted - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(lm_of(attention).float(), tmp_path).eval()
    torch.testing.assert_close(again(tokens).logits, adapted)
    merged = model.merge_and_unload()
    assert type(merged) is SixfoldForCausalLM
    torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert drawn(merged, tokens, count=2, do_sample=False).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_a_classifier_with_its_head():
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = peft.LoraConfig(
        r=2, task_type="SEQ_CLS", target_modules=["output"], modules_to_save=["head"]
    )
    model = peft.get_peft_model(SixfoldForSequenceClassification(config_of()), settings)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.partition("model.model.model.")[2] for name in learned} == {
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
        *(
            f"blocks.{i}.attention.output.lora_{side}.default.weight"
            for i in range(2)
            for side in "AB"
        ),
    }
    model(input_ids=tokens_of(3, 6), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits():
    model = lm_of("hexagonal").float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, mask = padded(ROWS, "left")
    found = compiled(ids, attention_mask=mask, use_cache=False).logits
    real = mask == 1
    expected = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_registering_twice_is_registering_once():
    register_models()
    register_models()
    assert type(AutoModelForCausalLM.from_config(config_of())) is SixfoldForCausalLM


@pytest.mark.slow
def test_the_example_learns_and_writes(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "huggingface.py"
    found = subprocess.run(
        [sys.executable, "-W", "error", str(example), "--smoke"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.returncode == 0, found.stderr
    assert not [*tmp_path.iterdir()], "an example leaves files behind"
    alike, ours = (
        float(re.search(rf"{start} +(\d\.\d+)", found.stdout)[1])
        for start in ("every character alike", "this model")
    )
    assert ours < alike - 0.5
    assert "config.json, generation_config.json, model.safetensors" in found.stdout
    assert "ROMEO:\n" in found.stdout
