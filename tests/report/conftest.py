"""Made-up runs with the shape of real ones, written as files; no model is trained."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

SIGNALS = ("sigma_max_q", "sigma_max_k", "sigma_max_v", "condition_q", "condition_k", "condition_v")
TROUBLED = (2, 3)


def dump(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def loss_at(step: int, steps: int, chance: random.Random) -> float:
    return 1.45 + 2.7 * math.exp(-7 * step / steps) + chance.gauss(0, 0.03)


def metrics_rows(name: str, steps: int, every: int, nan_from: int | None) -> list[dict]:
    chance = random.Random(1)
    units = {"loss": "nats/token", "learning_rate": "1", "gradient_norm": "1",
             "tokens_per_s": "tokens/s"}  # fmt: skip
    header = {"run": name, "seed": 0, "device": "cpu: made up, 8 threads", "commit": "0a1b2c3",
              "config_hash": "9f8e7d", "units": units}  # fmt: skip
    rows: list[dict] = [{"header": header}]
    for step in range(every, steps + 1, every):
        broken = nan_from is not None and step >= nan_from
        rate = 1e-3 * min(1.0, step / (0.05 * steps)) * (0.55 + 0.45 * math.cos(3 * step / steps))
        climb = 0.0
        if nan_from is not None and 0.8 * nan_from < step < nan_from:
            climb = 5.0 * ((step - 0.8 * nan_from) / (0.2 * nan_from)) ** 2
        rows.append({
            "step": step, "split": "train",
            "loss": math.nan if broken else loss_at(step, steps, chance) + climb,
            "learning_rate": rate, "gradient_norm": 0.4 + 2 * math.exp(-step / steps * 6) + climb,
            "tokens_per_s": 21_000 + chance.gauss(0, 400),
        })  # fmt: skip
        if step % max(every, steps // 12 // every * every) == 0:
            loss = math.nan if broken else loss_at(step, steps, chance) + 0.05
            rows.append({"step": step, "split": "validation", "loss": loss})
    return rows


def logit_at(head: tuple[int, int], share: float, governed: bool) -> float:
    base = 8 + 6 * share + 1.3 * head[0] + 0.9 * ((head[1] * 5) % 7)
    if head != TROUBLED:
        return base
    peak = math.exp(5.2 * share) if share < 0.55 or not governed else 0.0
    return base + 7 * peak - 7 if peak else base + 12


def telemetry_rows(
    steps: int, every: int, layers: int, heads: int, radius: int | None, governed: bool
) -> list[dict]:
    chance = random.Random(2)
    rows: list[dict] = [{"header": {
        "layers": layers, "num_heads": heads, "grid_radius": radius,
        "units": {"max_logit": "nats", "entropy": "1 (of log n)", "gradient_norm": "1",
                  "sigma_max": "1 (of nothing)"},
    }}]  # fmt: skip
    for row, step in enumerate(range(every, steps + 1, every)):
        share = step / steps

        def grid(value: Callable[[int, int], float]) -> list[list[float]]:
            return [[round(value(layer, head), 4) for head in range(heads)]
                    for layer in range(layers)]  # fmt: skip

        logit = grid(lambda a, b: logit_at((a, b), share, governed) + chance.gauss(0, 0.4))  # noqa: B023
        signals = {"max_logit": logit, "entropy": [
            [round(max(0.02, min(0.99, 1.05 - 0.016 * v - 0.04 * a)), 4) for v in heads_]
            for a, heads_ in enumerate(logit)]}  # fmt: skip
        if row % 4 == 0:
            for k, name in enumerate(SIGNALS):
                size = 1 + 2.5 * (name.startswith("condition")) * (1 + 3 * share)
                signals[name] = grid(lambda a, b: size * (1 + 0.2 * a + 0.05 * b + 0.1 * k))  # noqa: B023
        signals["gradient_norm"] = grid(lambda a, b: 0.1 + 0.3 * math.exp(-4 * share) * (1 + a))  # noqa: B023
        parts = {"projection": 900.0, "attention": 1500.0, "mixing": 300.0, "gradient": 4200.0}
        times = {name: value * chance.uniform(0.95, 1.1) for name, value in parts.items()}
        rows.append({
            "step": step, "loss": loss_at(step, steps, chance), "signals": signals,
            "scalars": {"learning_rate": 1e-3, "gradient_norm": 0.9, "tokens_per_s": 21_000.0},
            "times_us": {"step": sum(times.values()) + 700.0, **times},
        })  # fmt: skip
    return rows


def journal_rows(steps: int) -> list[dict]:
    layer, head = TROUBLED
    at = [int(steps * share) for share in (0.2, 0.4, 0.5, 0.55, 0.57, 0.7, 0.75, 0.78)]
    place = {"layer": layer, "head": head}
    alarm = {"kind": "alarm", "signal": "max_logit", **place, "limit": 100.0}
    expects = {"signal": "max_logit", "direction": "fall", "bound": 60.0, "within": 30}
    return [
        {"step": at[0], **alarm, "level": "notice", "value": 31.0,
         "text": "max_logit of layer 2 head 3 is rising: 31 nats, limit 100 nats"},
        {"step": at[1], **alarm, "level": "warning", "value": 73.0,
         "text": "max_logit of layer 2 head 3 is 73 nats; at this rate it passes 100 in 80 steps"},
        {"step": at[2], **alarm, "level": "critical", "value": 131.0,
         "text": "max_logit of layer 2 head 3 is 131 nats, limit 100 nats"},
        {"step": at[3], "kind": "change", "id": 1, "name": "qk_clip", **place,
         "arguments": {"limit": 60.0}, "expects": expects, "cost": "one matrix scaled",
         "text": "scale the queries and keys of layer 2 head 3 so that no logit passes 60"},
        {"step": at[4], "kind": "evidence", "id": 1, "held": True, "value": 41.0,
         "text": "max_logit fell to 41 nats"},
        {"step": at[5], "kind": "change", "id": 2, "name": "temperature", "layer": 0, "head": 1,
         "arguments": {"factor": 1.5}, "expects": {"signal": "entropy", "direction": "rise",
         "bound": 0.8, "within": 40}, "cost": "none", "text": "soften layer 0 head 1"},
        {"step": at[6], "kind": "evidence", "id": 2, "held": False, "value": 0.71,
         "text": "entropy stayed at 0.71"},
        {"step": at[7], "kind": "undo", "id": 2, "text": "took the softening back"},
    ]  # fmt: skip


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return lambda name="hex-7", **options: write_run(tmp_path / name, **options)


def write_run(
    folder: Path,
    *,
    steps: int = 5000,
    every: int = 20,
    radius: int | None = 1,
    heads: int = 7,
    layers: int = 4,
    governed: bool = True,
    nan_from: int | None = None,
    sample: str
    | None = "ROMEO:\nSpeak again, bright angel; for thou art\nAs glorious to this night.",
) -> Path:
    folder.mkdir(parents=True)
    config = {"seed": 0, "model": {"d_model": 128, "num_heads": heads, "layers": layers},
              "train": {"steps": steps, "batch": 16, "learning_rate": 1e-3}}  # fmt: skip
    environment = {"python": "3.11.9", "torch": "2.13.0", "device": "cpu", "commit": "0a1b2c3",
                   "parameters": 1_234_567, "wall_s": 754.2}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    dump(folder / "metrics.jsonl", metrics_rows(folder.name, steps, every, nan_from))
    if governed:
        rows = telemetry_rows(steps, every, layers, heads, radius, governed)
        dump(folder / "telemetry.jsonl", rows)
        dump(folder / "journal.jsonl", journal_rows(steps))
    if sample is not None:
        (folder / "sample.txt").write_text(sample)
    return folder
