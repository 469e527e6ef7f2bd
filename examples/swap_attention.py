"""One language model, another attention by one string: every mixer, score and projection.

python examples/swap_attention.py [--smoke]
"""

import sys
import time

import torch
from torch.nn.functional import cross_entropy

from sixfold import LanguageModel, discover, models
from sixfold.data import shakespeare

SMOKE = "--smoke" in sys.argv
CONTEXT, BATCH, STEPS = 32, 16, 3 if SMOKE else 100

data = shakespeare.build(context=CONTEXT)
PLAIN = {"num_heads": 7, "mixer": "none", "score": "dot", "projection": "linear"}


def mean_loss(model, batch):
    return cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())


def train(attention):
    """The model, its validation loss and the milliseconds of a step, after STEPS steps."""
    torch.manual_seed(0)
    model = LanguageModel(data.vocab_size, CONTEXT, 56, 2, {**PLAIN, **attention})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    began = time.perf_counter()
    for step in range(STEPS):
        mean_loss(model, data.train_batch(0, step, BATCH)).backward()
        optimizer.step()
        optimizer.zero_grad()
    took = 1000 * (time.perf_counter() - began) / STEPS
    with torch.no_grad():
        loss = mean_loss(model.eval(), next(data.validation_batches(200)))
    return model, loss.item(), took


swaps = [{}] + [
    {part: name}
    for part in ("mixer", "score", "projection")
    for name in discover.names(f"sixfold.attention.{part}")
    if name != PLAIN[part]
]
train({})  # the first run pays for starting up: it is not timed
print(f"the same batches, {STEPS} steps of {BATCH} x {CONTEXT} characters, one seed each:")
print("attention                   parameters  kFLOPs/token  ms/step  nats/character")
for swap in swaps:
    model, loss, took = train(swap)
    name = "  ".join(f"{part}={name}" for part, name in swap.items()) or "plain"
    work = models.flops(model, CONTEXT) / CONTEXT / 1000
    count = models.parameters(model)
    print(f"{name:26}  {count:10,}  {work:12.0f}  {took:7.1f}  {loss:14.3f}")
print(f"every character alike: {torch.tensor(data.vocab_size).log():.3f} nats/character")
