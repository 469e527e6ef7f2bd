"""What the heads of a small language model do, before and after training on Shakespeare.

python examples/analyze.py [--smoke] [FOLDER]      (pictures go to FOLDER, or nowhere)
"""

import sys

import torch

import sixfold
from sixfold import LanguageModel
from sixfold.data import shakespeare

SMOKE = "--smoke" in sys.argv
FOLDER = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
CONTEXT, BATCH, STEPS, BATCHES = 64, 16, 5 if SMOKE else 400, 2 if SMOKE else 8

torch.manual_seed(0)
data = shakespeare.build(context=CONTEXT)
model = LanguageModel(data.vocab_size, CONTEXT, d_model=64, num_layers=3)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def seen(pictures=None):
    return sixfold.analyze(
        model, data.validation_batches(BATCH), batches=BATCHES, pictures=pictures
    )


def step(number):
    batch = data.train_batch(0, number, BATCH)
    logits = model(batch.inputs).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


before = seen()
for number in range(STEPS):
    step(number)
after = seen(pictures=FOLDER)

print(after.table())
print(f"\nafter {STEPS} steps, and before:")
for now, then in zip(after.layers, before.layers, strict=True):
    near = min(range(now.num_heads), key=lambda head: now.distance[head].mean)
    print(
        f"{now.name}: head {near} looks nearest, {now.distance[near].mean:.1f} tokens away "
        f"({then.distance[near].mean:.1f}); entropy {now.entropy[near].mean:.2f} "
        f"({then.entropy[near].mean:.2f}); alike {now.alike[near]:.2f} ({then.alike[near]:.2f})"
    )
