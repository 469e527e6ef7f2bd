"""The governor inside Hugging Face's Trainer and Lightning's, as a user attaches it: by one line."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import logging
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from plain import Model, batches, move
from plain import made as plain_made
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs the extra huggingface")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from sixfold import LeadMetaArchitect
from sixfold.contracts import HeadId
from sixfold.governor.architect import ATTACHED
from sixfold.governor.limits import ActionLimits, AlarmLimits, Limits
from sixfold.integrations.huggingface.callback import GovernorCallback
from sixfold.integrations.huggingface.configuration import SixfoldConfig
from sixfold.integrations.huggingface.modeling import SixfoldForCausalLM

V, N = 23, 12


@pytest.fixture(autouse=True)
def let_go():
    yield
    for governor in list(ATTACHED):
        governor.detach()


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def gpt2(**options):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24, "vocab_size": V}
    marks = {"bos_token_id": 0, "eos_token_id": 0}
    options = {"attn_implementation": "sdpa", **options}
    return GPT2LMHeadModel(GPT2Config(**sizes, **marks, **options))


def llama():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, intermediate_size=32, vocab_size=V, attn_implementation="sdpa")
    )


def sixfold():
    return SixfoldForCausalLM(
        SixfoldConfig(vocab_size=V, context=24, d_model=16, num_layers=2, num_heads=4, dropout=0.1)
    )


KINDS = {"gpt2": gpt2, "llama": llama, "sixfold": sixfold}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind="gpt2", **options):
    torch.manual_seed(0)
    return KINDS[kind](**options)


@torch.no_grad()
def sharpen(model, factor):
    """Multiply W_Q and W_K of head 2 in layer 1: its logits grow by the factor's square."""
    d, rows = 4, slice(8, 12)
    if isinstance(model, GPT2LMHeadModel):
        weight = model.transformer.h[1].attn.c_attn.weight
        weight[:, rows] *= factor
        weight[:, 16 + 8 : 16 + 8 + d] *= factor
    elif isinstance(model, LlamaForCausalLM):
        attention = model.model.layers[1].self_attn
        attention.q_proj.weight[rows] *= factor
        attention.k_proj.weight[rows] *= factor
    else:
        fused = model.model.blocks[1].attention.projection.qkv.weight
        fused[rows] *= factor
        fused[16 + 8 : 16 + 8 + d] *= factor


CALM = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""No dropout."""


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": row, "labels": row}
        for row in torch.randint(0, V, (count, N), generator=generator)
    ]


SMALL = {
    "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
    "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "dataloader_pin_memory": False, "optim": "adamw_torch",
}  # fmt: skip


def trainer_of(folder, model, *callbacks, data=None, kind=Trainer, **options):
    from transformers import PrinterCallback

    arguments = TrainingArguments(output_dir=str(folder), **{**SMALL, **options})
    data = rows(64) if data is None else data
    trainer = kind(
        model, arguments, default_data_collator, data, rows(8, 1), callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


LATE = ("rank_distance", "stable_rank")
"""Signals of inputs: those of foreign layers are there from the second sample after attaching."""


def told(folder, leave=()):
    """What the log files of a governor hold but times."""
    found = []
    for name in ("telemetry.jsonl", "journal.jsonl"):
        for line in (Path(folder) / name).read_text().splitlines():
            row = json.loads(line)
            row.pop("times_us", None)
            row.get("scalars", {}).pop("tokens_per_s", None)
            for name in leave:
                row.get("signals", {}).pop(name, None)
            found.append(row)
    return found


# ---------------------------------------------------------------- Hugging Face


@kinds
def test_a_healthy_run_keeps_its_bits(kind, tmp_path):
    bare, watched = made(kind), made(kind)
    trainer_of(tmp_path / "bare", bare).train()
    callback = GovernorCallback(every=2)
    trainer = trainer_of(tmp_path, watched, callback)
    trainer.train()
    assert same(bare, watched)
    assert callback.governor.now == 8
    assert not callback.governor.journal
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == 8
    assert all(row["governor/alarms"] == 0 for row in steps)
    assert all(math.isclose(row["governor/loss"], row["loss"], rel_tol=1e-6) for row in steps)
    assert 0 < steps[-1]["governor/entropy"] <= 1
    assert len((tmp_path / "governor" / "telemetry.jsonl").read_text().splitlines()) == 9
    assert not watched._forward_hooks
    assert not watched._forward_pre_hooks


@kinds
def test_a_sharp_head_is_named_and_clipped(kind, tmp_path, caplog):
    model, callback = made(kind), GovernorCallback(every=2)
    sharpen(model, 100.0)
    trainer = trainer_of(tmp_path, model, callback, max_steps=4, logging_strategy="no")
    trainer.train()
    first = [row for row in callback.governor.journal if row["step"] == 1]
    assert {(row["layer"], row["head"]) for row in first} == {(1, 2)}
    assert [row["kind"] for row in first] == ["alarm", "change"]
    assert first[1]["name"] == "qk_clip"
    assert next(row["held"] for row in callback.governor.journal if row["kind"] == "evidence")
    (row,) = (row for row in trainer.state.log_history if "governor/text" in row)
    assert row["step"] == 1
    assert (row["governor/alarms"], row["governor/changes"]) == (1, 1)
    assert "critical: max_logit of layer 1 head 2" in row["governor/text"]
    assert "made qk_clip at 1.2" in caplog.text
    last = callback.governor.telemetry.history[-1]
    assert last.signal("max_logit", HeadId(1, 2)) < 100


def test_observing_says_what_it_would_do_and_touches_nothing(tmp_path):
    bare, watched = made(), made()
    for model in (bare, watched):
        sharpen(model, 100.0)
    trainer_of(tmp_path / "bare", bare).train()
    trainer = trainer_of(tmp_path, watched, GovernorCallback("observe", every=2))
    trainer.train()
    assert same(bare, watched)
    assert "would make qk_clip at 1.2" in trainer.state.log_history[0]["governor/text"]


def test_a_learning_rate_far_too_high_is_shielded(tmp_path):
    callback = GovernorCallback(every=1)
    options = {"learning_rate": 1.0, "lr_scheduler_type": "constant"}
    trainer = trainer_of(tmp_path, made("llama"), callback, **options)
    trainer.train()
    names = [row["name"] for row in callback.governor.journal if row["kind"] == "change"]
    assert "learning_rate_shield" in names
    assert trainer.state.log_history[-2]["learning_rate"] == 1.0


LOST = Limits(AlarmLimits(rank_distance=2.0), ActionLimits(stop_after=2))
"""Calls every run lost: no tokens lie that far apart."""


class Spoilt(TrainerCallback):
    """Makes the weights' next outputs NaN at one step, as a bad batch would."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, *, model, **rest):
        if state.global_step + 1 in self.steps:
            head = model.get_output_embeddings()
            self.hook = head.register_forward_hook(lambda module, given, out: out * math.nan)

    def on_step_end(self, args, state, control, **rest):
        if state.global_step in self.steps:
            self.hook.remove()


def test_a_nan_is_seen_behind_the_filter_and_its_step_skipped(tmp_path):
    model, callback = made(), GovernorCallback(every=2)
    trainer = trainer_of(tmp_path, model, Spoilt(3), callback, logging_nan_inf_filter=True)
    trainer.train()
    row = trainer.state.log_history[2]
    assert math.isfinite(row["loss"])
    assert math.isnan(row["governor/loss"])
    found = [(row["step"], row.get("signal", row.get("name"))) for row in callback.governor.journal]
    assert {(3, "loss"), (3, "gradient_norm"), (3, "gradient_skip")} <= set(found)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert trainer.state.global_step == callback.governor.now == 8


def test_a_run_that_is_lost_is_stopped_with_the_diagnosis(tmp_path, caplog):
    callback = GovernorCallback(limits=LOST, every=2)
    trainer = trainer_of(tmp_path, made(), callback)
    trainer.train()
    assert trainer.state.global_step == callback.governor.now < 7
    assert "all tokens have become one" in callback.stopped
    text = [row.get("governor/text", "") for row in trainer.state.log_history]
    assert any(callback.stopped in one for one in text)
    assert callback.stopped in caplog.text


def test_accumulation_counts_steps_of_the_optimizer(tmp_path):
    """10 micro-batches by 4: two whole steps and one of two, in each epoch."""
    bare, watched = made(), made()
    options = {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 2}
    trainer_of(tmp_path / "bare", bare, data=rows(40), **options).train()
    callback = GovernorCallback(every=1)
    trainer = trainer_of(tmp_path, watched, callback, data=rows(40), **options)
    trainer.train()
    assert trainer.state.global_step == callback.governor.now == 6
    assert same(bare, watched)
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert all(math.isclose(row["governor/loss"], row["loss"], rel_tol=1e-6) for row in steps)


class Held(TrainerCallback):
    """Has every head's entropy held after the first step, by hand."""

    def __init__(self, callback):
        self.callback = callback

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 1:
            hold(self.callback.governor)


def hold(governor):
    """A term that is far from met, so that its gradient is there."""
    governor.command_adjust_entropy_regularization(5.0)
    governor.terms = {head: (2.0, weight) for head, (_, weight) in governor.terms.items()}
    with governor.resting():
        pass


@pytest.mark.parametrize("counted", [True, False], ids=["tokens", "means"])
def test_the_entropy_term_is_divided_as_the_loss_is(tmp_path, counted):
    """Against a loop of our own: 3 micro-batches by 2, so the second step has one alone."""
    data, rate = rows(12), 0.1
    ours, theirs, free = (made(**CALM) for _ in range(3))
    for model in (ours, theirs, free):
        sharpen(model, 8.0)
    optimizer = torch.optim.SGD(ours.parameters(), lr=rate)
    governor = LeadMetaArchitect(ours, optimizer, every=1)
    order = []

    class Noted(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            order.append((inputs["input_ids"].clone(), num_items_in_batch))
            return super().training_step(model, inputs, num_items_in_batch)

    callback = GovernorCallback(every=1)
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "optim": "sgd"}
    options |= {"learning_rate": rate, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = trainer_of(
        tmp_path, theirs, callback, Held(callback), data=data, kind=Noted, **options
    )
    trainer.model_accepts_loss_kwargs = counted
    trainer.train()
    for step, passes in enumerate((order[:2], order[2:3], order[3:5], order[5:6])):
        losses = []
        for tokens, items in passes:
            divided = {"num_items_in_batch": items} if counted else {}
            loss = ours(input_ids=tokens, labels=tokens, **divided).loss
            loss = loss if counted else loss / len(passes)
            extra = governor.penalty()
            losses.append(loss.detach())
            (loss if extra is None else loss + extra / len(passes)).backward()
        optimizer.step()
        optimizer.zero_grad()
        governor.process_step(torch.stack(losses).sum())
        if step == 0:
            hold(governor)
    trainer_of(tmp_path / "free", free, data=data, **options).train()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter, ours.get_parameter(name), rtol=1e-4, atol=1e-6)
    query = "transformer.h.1.attn.c_attn.weight"
    moved = theirs.get_parameter(query) - free.get_parameter(query)
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "restored"), [("sixfold", False), ("sixfold", True), ("gpt2", 0)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, restored):
    """A clip before the checkpoint, a NaN after it; the logs go on where they were."""
    limits = Limits(AlarmLimits(logit_critical=0.6, finite=True), ActionLimits(clip_to=0.5))
    spoilt = Spoilt(8)
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    options |= {"restore_callback_states_from_checkpoint": bool(restored)}
    whole = made(kind)
    sharpen(whole, 8.0)
    callback = GovernorCallback(limits=limits, every=2)
    trainer = trainer_of(tmp_path, whole, spoilt, callback, **options)
    trainer.train()
    late = LATE if kind == "gpt2" else ()
    known, history = told(tmp_path / "governor", late), trainer.state.log_history
    steps = {row["step"] for row in callback.governor.journal}
    assert min(steps) <= 5 < max(steps)

    again = made(kind)
    sharpen(again, 8.0)
    callback = GovernorCallback(limits=limits, every=2)
    trainer = trainer_of(tmp_path, again, spoilt, callback, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(whole, again)
    assert str(told(tmp_path / "governor", late)) == str(known)
    ours = [row for row in trainer.state.log_history if "loss" in row]
    theirs = [row for row in history if "loss" in row]
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)


def test_a_checkpoint_without_a_governor_is_counted_on_from(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, made(), **options).train()
    callback = GovernorCallback(every=2)
    trainer = trainer_of(tmp_path, made(), callback, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.governor.now == trainer.state.global_step == 8
    assert [snapshot.step for snapshot in callback.governor.telemetry.history] == [5, 7]


class Generates(TrainerCallback):
    def on_evaluate(self, args, state, control, *, model, **rest):
        model.generate(torch.zeros(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("leave", [LATE, ()], ids=["attention", "inputs"])
def test_evaluation_and_generation_are_not_measured(tmp_path, leave):
    found = []
    for strategy in ("no", "steps"):
        callback = GovernorCallback(every=1, folder=tmp_path / strategy)
        model = made(**CALM)  # loaders draw random numbers
        trainer = trainer_of(
            tmp_path, model, callback, Generates(), eval_strategy=strategy, eval_steps=1
        )
        trainer.train()
        found.append(told(tmp_path / strategy, leave))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT uses a name transformers has left
def test_adapters_are_watched(tmp_path):
    peft = pytest.importorskip("peft")
    bare, adapted = (
        peft.get_peft_model(
            made(), peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True)
        )
        for _ in range(2)
    )
    bare.load_state_dict(adapted.state_dict())
    trainer_of(tmp_path / "bare", bare).train()
    callback = GovernorCallback(every=2)
    trainer = trainer_of(tmp_path, adapted, callback)
    trainer.train()
    assert same(bare, adapted)
    assert len(callback.governor.telemetry.history[-1].signals["max_logit"]) == 2
    assert "lora" in callback.governor.layers[0].refusal.lower()


def test_eager_attention_is_told_of_once(tmp_path):
    model = made(attn_implementation="eager")
    with pytest.warns(UserWarning, match=r"set_attn_implementation\('sdpa'\)") as caught:
        trainer = trainer_of(tmp_path, model, GovernorCallback(every=1))
        trainer.train()
    assert len(caught) == 1
    assert "governor/max_logit" not in trainer.state.log_history[0]
    assert math.isfinite(trainer.state.log_history[0]["governor/loss"])


def test_a_loss_that_is_made_elsewhere_is_told_of_once(tmp_path):
    with pytest.warns(UserWarning, match="the model returns no loss") as caught:
        trainer = trainer_of(
            tmp_path, made(), GovernorCallback(every=2), label_smoothing_factor=0.1
        )
        trainer.train()
    assert len(caught) == 1
    assert trainer.state.log_history[0]["governor/max_logit"] > 0
    assert "governor/loss" not in trainer.state.log_history[0]


class Plain(Model):
    """No model of transformers: it returns a tuple with the loss first."""

    def forward(self, input_ids, labels):
        logits = super().forward(input_ids[:, :-1])
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), logits


def test_models_that_return_tuples_get_the_term_too(tmp_path):
    torch.manual_seed(0)
    callback = GovernorCallback(every=1)
    trainer = trainer_of(tmp_path, Plain(V), callback, Held(callback), max_steps=3)
    trainer.train()
    first, second, *_ = trainer.state.log_history
    assert math.isclose(first["governor/loss"], first["loss"], rel_tol=1e-6)
    assert second["loss"] > second["governor/loss"] + 1


def test_a_step_that_the_scaler_skips_is_closed(tmp_path):
    """The scale overflows at first: the optimizer does not move, and its hooks are not called."""
    callback = GovernorCallback(every=2)
    trainer = trainer_of(tmp_path, made(), callback)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert callback.governor.rewind.parts[-1] is scaler
    assert callback.governor.now == trainer.state.global_step == 8
    norms = [
        "gradient_norm" in row["scalars"] for row in told(tmp_path / "governor") if "scalars" in row
    ]
    assert norms == [False] + 7 * [True]


def test_what_it_is_attached_to_is_what_moves(tmp_path):
    callback = GovernorCallback()
    trainer = trainer_of(tmp_path, made(), callback)
    trainer.train()
    governor = callback.governor
    assert governor.model is trainer.model
    assert type(governor.optimizer) is torch.optim.AdamW
    assert governor.rewind.parts == (governor.optimizer, trainer.lr_scheduler)
    assert not governor.limits.rewinding


def test_it_can_train_twice(tmp_path):
    model, callback = made(), GovernorCallback(every=2)
    trainer = trainer_of(tmp_path, model, callback)
    trainer.train()
    first = callback.governor
    with pytest.warns(UserWarning, match="of an earlier run is written anew"):
        trainer.train()
    assert callback.governor is not first
    assert callback.governor.now == 8


def test_a_governor_that_let_go_leaves_training_and_checkpoints_alone(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr("sixfold.governor.architect.step", broken)
    trainer = trainer_of(tmp_path, made(), GovernorCallback(), save_strategy="steps", save_steps=4)
    with pytest.warns(UserWarning, match="training goes on without it"):
        trainer.train()
    assert trainer.state.global_step == 8
    assert (tmp_path / "checkpoint-8" / "trainer_state.json").is_file()


def test_what_cannot_be_watched_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, made(), GovernorCallback())
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="cannot see into DataParallel"):
        GovernorCallback().on_train_begin(
            trainer.args, None, None, model=None, optimizer=None, lr_scheduler=None
        )
    with pytest.raises(ValueError, match="governor.mode"):
        trainer_of(tmp_path, made(), GovernorCallback(mode="watch")).train()


def hugging_face_worker(rank, folder):
    """One of two processes under the Trainer; only the second is given a NaN."""
    join(rank, folder)
    model = made(**CALM)
    sharpen(model, 100.0)
    callback = GovernorCallback(every=2, folder=Path(folder) / "governor")
    spoilt = (Spoilt(3),) if rank == 1 else ()
    trainer = trainer_of(
        folder, model, *spoilt, callback, ddp_backend="gloo", gradient_accumulation_steps=2
    )
    trainer.train()
    leave_word(rank, folder, callback, model)


def join(rank, folder):
    """Be one of two processes."""
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    torch.set_num_threads(1)


def leave_word(rank, folder, callback, model):
    found = {
        "journal": list(callback.governor.journal),
        "weights": [p.detach().double().sum().item() for p in model.parameters()],
        "logs": len(callback.governor.logs),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def lightning_worker(rank, folder):
    """One of two processes under Lightning's; only the second is given a NaN."""
    join(rank, folder)
    import lightning.pytorch as library

    module = module_of(library, spoilt=(2,) if rank == 1 else ())
    module.model.drop.p = 0.0
    with torch.no_grad():
        module.model.attention[1].qkv.weight[8:12] *= 100
        module.model.attention[1].qkv.weight[16 + 8 : 16 + 12] *= 100
    callback = governing(every=2)
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    fit(library, folder, module, callback, **options)
    leave_word(rank, folder, callback, module)


@pytest.mark.slow
@pytest.mark.parametrize("worker", [hugging_face_worker, lightning_worker])
def test_two_processes_decide_alike_and_one_writes(tmp_path, worker):
    import socket

    if worker is lightning_worker:
        pytest.importorskip("lightning")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ours, theirs = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert ours["journal"] == theirs["journal"]
    assert ours["weights"] == theirs["weights"]
    assert {"qk_clip", "gradient_skip"} <= {row.get("name") for row in ours["journal"]}
    assert (ours["logs"], theirs["logs"]) == (2, 0)


@pytest.mark.slow
def test_compiled_models_are_watched(tmp_path):
    callback = GovernorCallback(every=4)
    trainer = trainer_of(
        tmp_path, made("llama"), callback, torch_compile=True, torch_compile_backend="eager"
    )
    trainer.train()
    assert callback.governor.now == 8
    assert len(callback.governor.telemetry.history) == 2
    rows = trainer.state.log_history[:-1]
    assert all(math.isclose(row["governor/loss"], row["loss"], rel_tol=1e-6) for row in rows)


# ---------------------------------------------------------------- Lightning


@pytest.fixture
def library(request):
    name = getattr(request, "param", "lightning.pytorch")
    return pytest.importorskip(name, reason="needs the extra lightning")


both = pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"], indirect=True)


# Lightning warns of loaders with few workers and of loggers it was told not to have
lightning = pytest.mark.filterwarnings("ignore")


def governing(*options, **named):
    from sixfold.integrations.lightning import GovernorCallback

    return GovernorCallback(*options, **named)


def module_of(library, returns="tensor", rate=1e-2, spoilt=()):
    """A LightningModule that calls the model in it, not itself."""

    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = Model()

        def training_step(self, tokens, batch_idx):
            loss = cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss = loss * math.nan if self.global_step in spoilt else loss
            return loss if returns == "tensor" else {"loss": loss, "more": 1}

        def validation_step(self, tokens, batch_idx):
            self.model(tokens)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    return Module()


def fit(library, folder, module, *callbacks, count=8, validation=None, path=None, **options):
    torch.manual_seed(1)
    small = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = library.Trainer(
        default_root_dir=str(folder), callbacks=list(callbacks), **{**small, **options}
    )
    loader = DataLoader(batches(count), batch_size=None)
    held = None if validation is None else DataLoader(batches(2, 1), batch_size=None)
    trainer.fit(module, loader, held, ckpt_path=path)
    return trainer


@both
@lightning
@pytest.mark.parametrize("returns", ["tensor", "mapping"])
def test_a_healthy_lightning_run_keeps_its_bits(library, returns, tmp_path):
    bare, watched = module_of(library, returns), module_of(library, returns)
    fit(library, tmp_path / "bare", bare)
    callback = governing(every=2)
    trainer = fit(library, tmp_path, watched, callback)
    assert same(bare, watched)
    assert callback.governor.now == 8
    assert [layer.name for layer in callback.governor.layers] == [
        "model.attention.0",
        "model.attention.1",
    ]
    assert trainer.logged_metrics["governor/alarms"] == 0
    assert 0 < trainer.logged_metrics["governor/entropy"] <= 1
    assert vars(watched).keys() == vars(bare).keys()
    assert not watched._forward_hooks


@both
@lightning
def test_lightning_is_seen_as_a_plain_loop_is(library, tmp_path):
    """The same batches in a loop of our own: signals, and gradients as the optimizer saw them."""
    module, callback = module_of(library), governing(every=2)
    module.model.drop.p = 0.0
    fit(library, tmp_path, module, callback, gradient_clip_val=0.05)
    ours, optimizer = plain_made(1e-2)
    ours.drop.p = 0.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    governor = LeadMetaArchitect(ours, optimizer, every=2)
    torch.manual_seed(1)
    for tokens in batches(8):
        move(
            ours,
            optimizer,
            tokens,
            governor,
            spoil=lambda model, _: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05),
            scheduler=schedule,
        )
    assert same(module.model, ours)
    for seen, known in zip(
        callback.governor.telemetry.history, governor.telemetry.history, strict=True
    ):
        assert seen.signals == known.signals
        assert seen.scalars["gradient_norm"] == known.scalars["gradient_norm"]
        assert seen.scalars["gradient_norm"] <= 0.0501


@lightning
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_sharp_head_in_lightning_is_named_and_clipped(library, precision, tmp_path, caplog):
    module, callback = module_of(library), governing(every=2)
    with torch.no_grad():
        module.model.attention[1].qkv.weight[8:12] *= 100
        module.model.attention[1].qkv.weight[16 + 8 : 16 + 12] *= 100
    trainer = fit(library, tmp_path, module, callback, precision=precision)
    first = [row for row in callback.governor.journal if row["step"] == 1]
    assert {(row["layer"], row["head"]) for row in first} == {(1, 2)}
    assert [row["kind"] for row in first] == ["alarm", "change"]
    assert trainer.logged_metrics["governor/alarms"] == 1
    assert trainer.logged_metrics["governor/max_logit"] < 100
    assert "critical: max_logit of layer 1 head 2" in caplog.text


@lightning
def test_a_nan_in_lightning_is_skipped(library, tmp_path):
    module, callback = module_of(library, spoilt=(3,)), governing(every=2)
    fit(library, tmp_path, module, callback)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    found = {(row["step"], row.get("signal", row.get("name"))) for row in callback.governor.journal}
    assert {(4, "loss"), (4, "gradient_norm"), (4, "gradient_skip")} <= found


@lightning
def test_a_shield_in_lightning_slows_steps_and_leaves_the_schedule(library, tmp_path):
    """A shield of 2**-40 keeps the weights where they are."""
    module, callback = module_of(library), governing(every=2)

    class Shield(library.Callback):
        def on_train_start(self, trainer, pl_module):
            callback.governor.shields["lr"] = 40

    fit(library, tmp_path, module, callback, Shield())
    before = module_of(library)
    for mine, other in zip(module.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
    rate = callback.governor.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(1e-2 * (1 / 3 + 2 / 3 * 8 / 20))


@lightning
def test_accumulation_in_lightning_counts_steps_of_the_optimizer(library, tmp_path):
    bare, watched, callback = module_of(library), module_of(library), governing(every=1)
    options = {"accumulate_grad_batches": 4, "count": 10, "max_epochs": 2}
    fit(library, tmp_path / "bare", bare, **options)
    trainer = fit(library, tmp_path, watched, callback, **options)
    assert trainer.global_step == callback.governor.now == 6
    assert same(bare, watched)


@lightning
def test_the_entropy_term_in_lightning(library, tmp_path):
    """Against a loop of our own that adds it to each micro-batch."""
    callback = governing(every=1)

    class Hold(library.Callback):
        def on_train_batch_end(self, trainer, pl_module, *batch):
            if trainer.global_step == 1 and not callback.governor.terms:
                hold(callback.governor)

    module = module_of(library)
    module.model.drop.p = 0.0
    fit(library, tmp_path, module, callback, Hold(), accumulate_grad_batches=2, count=6)
    ours, optimizer = plain_made(1e-2)
    ours.drop.p = 0.0
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    governor = LeadMetaArchitect(ours, optimizer, every=1)
    given = batches(6)
    for step in range(3):
        losses = []
        for tokens in given[2 * step : 2 * step + 2]:
            loss = cross_entropy(ours(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            extra = governor.penalty()
            losses.append(loss.detach())
            ((loss if extra is None else loss + extra) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        governor.process_step(torch.stack(losses).mean())
        if step == 0:
            hold(governor)
    assert governor.terms
    for mine, other in zip(module.model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@both
@lightning
def test_a_resumed_lightning_run_is_the_uninterrupted_one(library, tmp_path):
    limits = Limits(AlarmLimits(logit_critical=0.6, finite=True), ActionLimits(clip_to=0.5))
    checkpoint = sys.modules[library.__name__ + ".callbacks"].ModelCheckpoint

    def run(path=None):
        module, callback = module_of(library, spoilt=(8,)), governing(limits=limits, every=2)
        module.model.drop.p = 0.0  # Lightning's checkpoints hold no generator
        saving = checkpoint(tmp_path, "{epoch}", save_top_k=-1)
        options = {"count": 5, "max_epochs": 3, "enable_checkpointing": True, "path": path}
        fit(library, tmp_path, module, saving, callback, **options)
        return module, callback

    whole, callback = run()
    steps = {row["step"] for row in callback.governor.journal}
    assert min(steps) <= 5 < max(steps)
    known = told(tmp_path / "governor", LATE)
    again, _ = run(path=str(tmp_path / "epoch=0.ckpt"))
    assert same(whole, again)
    assert str(told(tmp_path / "governor", LATE)) == str(known)


@lightning
def test_a_lost_lightning_run_is_stopped_and_can_still_be_saved(library, tmp_path):
    callback = governing(limits=LOST, every=2)
    trainer = fit(library, tmp_path, module_of(library), callback)
    assert trainer.global_step == callback.governor.now < 7
    assert "all tokens have become one" in callback.stopped
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert (tmp_path / "after.ckpt").is_file()


@lightning
@pytest.mark.parametrize("leave", [LATE, ()], ids=["attention", "inputs"])
def test_validation_in_lightning_is_not_measured(library, tmp_path, leave):
    found = []
    for name in ("without", "with"):
        callback = governing(every=1, folder=tmp_path / name)
        options = {"validation": True, "val_check_interval": 1} if name == "with" else {}
        module = module_of(library)
        module.model.drop.p = 0.0
        fit(library, tmp_path, module, callback, **options)
        found.append(told(tmp_path / name, leave))
    assert found[0] == found[1]


@lightning
def test_a_step_that_the_scaler_of_lightning_skips_is_closed(library, tmp_path):
    plugins = sys.modules[library.__name__ + ".plugins"]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler)
    callback = governing(every=2)
    trainer = fit(library, tmp_path, module_of(library), callback, plugins=[plugin])
    assert trainer.global_step == callback.governor.now == 8
    rows = [row for row in told(tmp_path / "governor") if "scalars" in row]
    assert ["gradient_norm" in row["scalars"] for row in rows] == [False] + 7 * [True]
    assert all(row["scalars"]["gradient_norm"] < 100 for row in rows[1:])


@lightning
def test_what_lightning_does_by_hand_is_refused(library, tmp_path):
    module = module_of(library)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="optimizes by hand"):
        fit(library, tmp_path, module, governing())


@lightning
def test_an_exception_in_lightning_leaves_the_module_as_it_was(library, tmp_path):
    module, callback = module_of(library), governing()
    module.training_step = broken = lambda tokens, batch_idx: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(library, tmp_path, module, callback)
    assert module.training_step is broken
    assert "forward" not in vars(module)
    assert callback.governor not in ATTACHED
