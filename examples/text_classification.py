"""A classifier of film reviews: SST-2 where SIXFOLD_DATA has it, else generated phrases.

python examples/text_classification.py [--smoke]
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sixfold import SequenceClassifier, models
from sixfold.data import sst2
from sixfold.train.loop import Training, TrainSettings, fit
from sixfold.train.optimizer import OptimizerSettings, build_optimizer

SMOKE = "--smoke" in sys.argv

if "SIXFOLD_DATA" in os.environ:
    data, steps = sst2.build(length=32), 1500
    print(f"SST-2: {len(data.train.inputs):,} phrases, scored on GLUE's dev sentences")
else:
    data, steps = sst2.miniature(), 100
    print("SIXFOLD_DATA is not set: these are 80 GENERATED phrases ('a dull film'), not SST-2,")
    print("and so easy that the score shows no more than that everything runs")

torch.manual_seed(0)
model = SequenceClassifier(
    vocab_size=data.tokenizer.vocab_size,
    num_classes=data.num_classes,
    context=data.train.inputs.shape[1],
    d_model=56,
    attention={"num_heads": 7, "head_dim": 8, "mixer": "hexagonal"},
    dropout=0.3,
)
print(f"{models.parameters(model):,} parameters, {data.tokenizer.vocab_size:,} words")

steps = 30 if SMOKE else steps
settings = TrainSettings(steps=steps, batch_size=32, validate_every=steps)
rates = OptimizerSettings(learning_rate=1e-3, warmup=20)
with TemporaryDirectory() as folder:
    optimizer = build_optimizer(model, rates)
    result = fit(Training(model, optimizer, data, settings, rates, Path(folder), {})).validation

commonest = data.train.targets.bincount().argmax()
guess = (data.validation.targets == commonest).float().mean().item()
print(f"after {steps} steps, on {len(data.validation.targets):,} phrases it has not seen:")
print(f"  always the commonest class  {guess:6.1%} right")
print(f"  this model                  {result.accuracy:6.1%} right, {result.loss:.3f} nats/example")

phrases = ("a warm film", "a dull plot")
ids = torch.nn.utils.rnn.pad_sequence([data.tokenizer.encode(p) for p in phrases], batch_first=True)
for phrase, p in zip(phrases, model.eval()(ids).softmax(-1)[:, 1].tolist(), strict=True):
    print(f"  {phrase!r}: {p:.0%} positive")
