"""The governor in Hugging Face's Trainer: a head collapses, is named, and is put right.

python examples/govern_huggingface.py [--smoke]      (Trainer needs accelerate as well)
"""

import sys
from tempfile import TemporaryDirectory

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from sixfold.data import shakespeare
from sixfold.integrations.huggingface.callback import GovernorCallback

SMOKE = "--smoke" in sys.argv
STEPS, CONTEXT, BATCH = (12, 32, 8) if SMOKE else (300, 64, 16)

data = shakespeare.build(context=CONTEXT)
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=data.tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        attn_implementation="sdpa",
    )
)
with torch.no_grad():  # what an unlucky run does to itself: head 5 of layer 1 sees one token only
    attention = model.model.layers[1].self_attn
    for weight in (attention.q_proj.weight, attention.k_proj.weight):
        weight[5 * 8 : 6 * 8] *= 60

governor = GovernorCallback(every=5)
with TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        save_strategy="no",
        logging_steps=STEPS // 3,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    rows = [{"input_ids": row, "labels": row} for row in data.train_batch(0, 0, STEPS * BATCH)[0]]
    trainer = Trainer(model, arguments, default_data_collator, rows, callbacks=[governor])
    trainer.remove_callback(PrinterCallback)
    trainer.train()

for row in trainer.state.log_history:
    if "governor/text" in row:
        print(f"step {row['step']:>3}  {row['governor/text']}")
    elif "loss" in row:
        print(
            f"step {row['step']:>3}  loss {row['loss']:.3f}, largest logit "
            f"{row['governor/max_logit']:.1f}, least entropy {row['governor/entropy']:.2f}"
        )
print(governor.governor.generate_report())
