"""A simulator of heat in a moving fluid, held to the exact solution of the equation.

python examples/physics.py [--smoke]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sixfold import PhysicsSimulator, models
from sixfold.data import heat
from sixfold.train.loop import Training, TrainSettings, fit
from sixfold.train.optimizer import OptimizerSettings, build_optimizer

SMOKE = "--smoke" in sys.argv
SIZE, FRAMES, DT, KAPPA, VELOCITY = 16, 10, 0.05, 0.005, (1.0, 0.5)

data = heat.build(size=SIZE, frames=FRAMES, dt=DT, kappa=KAPPA, velocity=VELOCITY)
torch.manual_seed(0)
model = PhysicsSimulator(
    channels=1,
    grid_size=SIZE,
    d_model=56,
    attention={"num_heads": 7, "mixer": "hexagonal"},
)
print(f"du/dt = {KAPPA} laplace(u) - {VELOCITY} . grad(u) on a {SIZE} x {SIZE} torus")
print(f"{len(data.train.inputs):,} pairs of fields {DT} apart")
print(f"{models.parameters(model):,} parameters")

steps = 40 if SMOKE else 600
settings = TrainSettings(steps=steps, batch_size=32, validate_every=steps)
rates = OptimizerSettings(learning_rate=3e-3, final_learning_rate=1e-4, warmup=20, weight_decay=0.0)
with TemporaryDirectory() as folder:
    optimizer = build_optimizer(model, rates)
    fit(Training(model, optimizer, data, settings, rates, Path(folder), {}))

# fields that belong to no trajectory of the data, followed step by step on the model's own output
frames = 5 if SMOKE else 2 * FRAMES
u0 = heat.initial_fields(64, SIZE, seed=1000)
with torch.no_grad():
    film = model.eval().rollout(u0.float()[:, None], frames)[:, :, 0].double()

print(f"after {steps} steps of training, error against the exact solution (rms, field: rms):")
print("   time   model  no change   field")
for frame in sorted({1, 2, 5, frames // 2, frames}):
    exact = heat.exact(u0, frame * DT, kappa=KAPPA, velocity=VELOCITY)
    errors = (film[:, frame - 1] - exact, u0 - exact, exact)
    model_error, no_change, field = (e.square().mean().sqrt().item() for e in errors)
    print(f"  {frame * DT:5.2f}  {model_error:6.4f}     {no_change:6.4f}  {field:6.4f}")
print(f"trajectories of the data end at {FRAMES * DT}: what lies beyond was never trained on")
