"""A hexagonal language model in Hugging Face's own tools: Trainer, AutoModel, pipeline.

python examples/huggingface.py [--smoke]      (Trainer needs accelerate as well)
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from sixfold import models
from sixfold.data import shakespeare
from sixfold.integrations.huggingface.configuration import SixfoldConfig
from sixfold.integrations.huggingface.modeling import SixfoldForCausalLM, register_models
from sixfold.integrations.huggingface.tokenization import fast_tokenizer

SMOKE = "--smoke" in sys.argv
STEPS, CONTEXT, BATCH, SCORED = (20, 32, 16, 40) if SMOKE else (600, 64, 16, 500)

data = shakespeare.build(context=CONTEXT)
tokenizer = fast_tokenizer(data.tokenizer)
config = SixfoldConfig(
    vocab_size=len(tokenizer),
    context=CONTEXT,
    d_model=56,
    num_layers=2,
    num_heads=7,
    projection="coordinate",
    mixer="hexagonal",
    pad_token_id=tokenizer.pad_token_id,
)
torch.manual_seed(0)
model = SixfoldForCausalLM(config)
print(f"{models.parameters(model):,} parameters; {STEPS} steps of {BATCH} x {CONTEXT} characters")


def rows(batch):
    return [{"input_ids": row, "labels": row} for row in batch.inputs]


with TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    train = rows(data.train_batch(0, 0, STEPS * BATCH))
    trainer = Trainer(model, arguments, default_data_collator, train)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    held_out = trainer.evaluate(rows(next(data.validation_batches(SCORED))))["eval_loss"]
    print(f"every character alike  {torch.tensor(len(tokenizer)).log():.3f} nats/character")
    print(f"this model             {held_out:.3f} on text it has not seen")

    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)
    print(f"its folder: {', '.join(sorted(path.name for path in Path(folder).iterdir()))}")
    register_models()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    writer = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    drawn = writer("ROMEO:\n", max_new_tokens=40 if SMOKE else 300, do_sample=True)
    print(drawn[0]["generated_text"])
