"""A hexagonal language model on tiny Shakespeare, in a loop of your own, governed.

python examples/language_modelling.py [--smoke]
"""

import sys

import torch
from torch.nn.functional import cross_entropy

from sixfold import LanguageModel, LeadMetaArchitect, models
from sixfold.data import shakespeare

SMOKE = "--smoke" in sys.argv
STEPS, CONTEXT, BATCH = 20 if SMOKE else 600, 64, 16

data = shakespeare.build(context=CONTEXT)
torch.manual_seed(0)
model = LanguageModel(
    vocab_size=data.vocab_size,
    context=CONTEXT,
    d_model=112,
    num_layers=4,
    attention={"num_heads": 7, "projection": "coordinate", "mixer": "hexagonal"},
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.1)
governor = LeadMetaArchitect(model, optimizer=optimizer)
print(f"{models.parameters(model):,} parameters; {STEPS} steps of {BATCH} x {CONTEXT} characters")


def mean_loss(batch):
    return cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())


for step in range(STEPS):
    loss = mean_loss(data.train_batch(0, step, BATCH))
    penalty = governor.penalty()
    (loss if penalty is None else loss + penalty).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    seen = governor.process_step(loss)
    for line in seen.text:
        print(f"  step {seen.step}: {line}")
    if seen.step % (STEPS // 5) == 0:
        print(f"  step {seen.step}: training loss {loss.item():.3f} nats/character")

print(governor.generate_report())

# what counting pairs of characters in the training text achieves
pairs = torch.ones(data.vocab_size, data.vocab_size)
pairs.index_put_((data.train[:-1], data.train[1:]), torch.tensor(1.0), accumulate=True)
bigram = (pairs / pairs.sum(1, keepdim=True)).log()
batch = next(data.validation_batches(500))
with torch.no_grad():
    ours = mean_loss(batch).item()
counted = -bigram[batch.inputs, batch.targets].mean().item()
print(f"on {batch.targets.numel():,} characters it has not seen, in nats/character:")
print(f"  every character alike  {torch.tensor(data.vocab_size).log():.3f}")
print(f"  pairs counted          {counted:.3f}")
print(f"  this model             {ours:.3f}")

prompt = data.tokenizer.encode("ROMEO:\n")[None]
drawn = torch.stack([*model.generate(prompt, 40 if SMOKE else 300, temperature=0.8)], dim=1)
print(f"\nROMEO:\n{data.tokenizer.decode(drawn[0])}")
