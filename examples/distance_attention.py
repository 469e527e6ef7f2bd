"""Attention by distance: one language model per distance, its lambdas and what it attends to.

python examples/distance_attention.py [--smoke]
"""

import sys

import torch

from sixfold import DistanceBasedAttention, DistanceType
from sixfold.compat.truthgpt.truthgpt_distance_attention_integration import (
    DistanceAttentionOptimizer,
    TruthGPTAttentionConfig,
    TruthGPTDistanceAttentionModel,
    loss_of,
)
from sixfold.data import shakespeare

SMOKE = "--smoke" in sys.argv
CONTEXT, BATCH, STEPS, SEQUENCES = 32, 16, 3 if SMOKE else 200, 16 if SMOKE else 200

torch.manual_seed(0)
layer = DistanceBasedAttention(hidden_size=64, num_heads=4, distance_type=DistanceType.L1)
x = torch.randn(2, 10, 64)
output, weights = layer(x, output_attentions=True)
print(f"one layer: {tuple(output.shape)}, weights {tuple(weights.shape)}")

data = shakespeare.build(context=CONTEXT)
held_out = [next(data.validation_batches(SEQUENCES)).inputs]


def train(kind):
    """A model of two layers, every lambda learned, after STEPS steps."""
    torch.manual_seed(0)
    config = TruthGPTAttentionConfig(
        hidden_size=64,
        num_heads=4,
        num_layers=2,
        vocab_size=data.vocab_size,
        max_position_embeddings=CONTEXT,
        distance_type=kind.value,
        p_norm=3.0,
    )
    model = TruthGPTDistanceAttentionModel(config)
    model.set_learnable_lambda(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        loss_of(model, data.train_batch(0, step, BATCH).inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


print(f"the same batches, {STEPS} steps of {BATCH} x {CONTEXT} characters, one seed each:")
print("distance      nats/character  ms/layer  lambdas of layer 0        entropy of layer 0")
for kind in DistanceType:
    model = train(kind)
    with torch.no_grad():
        loss = loss_of(model, held_out[0]).item()
    watcher = DistanceAttentionOptimizer(model)
    rates = " ".join(f"{rate:5.2f}" for rate in watcher.lambdas()["layer_0"])
    entropy = watcher.analyze_attention_patterns(held_out, SEQUENCES)[0]["attention_entropy"]
    took = 1000 * model.get_performance_stats()["layer_0"]["avg_forward_time"]
    print(f"{kind.value:12}  {loss:14.3f}  {took:8.2f}  {rates}   {entropy:18.3f}")
print(f"every character alike: {torch.tensor(data.vocab_size).log():.3f} nats/character")
