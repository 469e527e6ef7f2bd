"""A vision transformer with hexagonal heads: digits, or Fashion-MNIST where SIXFOLD_DATA has it.

python examples/image_classification.py [--smoke]
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sixfold import VisionTransformer, models
from sixfold.data import digits, fashion_mnist
from sixfold.train.loop import Training, TrainSettings, fit
from sixfold.train.optimizer import OptimizerSettings, build_optimizer

SMOKE = "--smoke" in sys.argv

if "SIXFOLD_DATA" in os.environ:
    name, data, patch, steps = "Fashion-MNIST", fashion_mnist.build(), 4, 1500
else:
    name, data, patch, steps = "digits", digits.build(), 2, 600
channels, size = data.train.inputs.shape[1:3]

torch.manual_seed(0)
model = VisionTransformer(
    image_size=size,
    patch_size=patch,
    num_classes=data.num_classes,
    channels=channels,
    d_model=56,
    attention={"num_heads": 7, "mixer": "hexagonal"},
)
tokens = (size // patch) ** 2
print(f"{name}: {len(data.train.inputs):,} images of {size} x {size}, {tokens} patches each")
print(
    f"{models.parameters(model):,} parameters, {models.flops(model, tokens) / 1e6:.1f} MFLOPs/image"
)

steps = 30 if SMOKE else steps
settings = TrainSettings(steps=steps, batch_size=64, validate_every=steps)
rates = OptimizerSettings(learning_rate=2e-3, warmup=20)
with TemporaryDirectory() as folder:
    optimizer = build_optimizer(model, rates)
    result = fit(Training(model, optimizer, data, settings, rates, Path(folder), {})).validation

commonest = data.train.targets.bincount().argmax()
guess = (data.validation.targets == commonest).float().mean().item()
print(f"after {steps} steps, on {len(data.validation.targets):,} images it has not seen:")
print(f"  always the commonest class  {guess:6.1%} right")
print(f"  this model                  {result.accuracy:6.1%} right, {result.loss:.3f} nats/example")
