"""Lightning, held by an importance file of `forgetless record`.

    python examples/lightning_fit.py MODEL domain.txt model.importance.safetensors [--strength 10]
    [--out lightning] [--steps 100]

`domain.txt` holds one document per line. Needs `pip install lightning`.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless
from forgetless.integrations.lightning import LightningCallback


class Tuned(L.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data", "importance"):
        parser.add_argument(name)
    parser.add_argument("--strength", type=float, default=10.0)
    parser.add_argument("--out", default="lightning")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(lines):
        batch = tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=256)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }

    lines = [
        line for line in Path(given.data).read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    data = torch.utils.data.DataLoader(lines, batch_size=4, shuffle=True, collate_fn=collate)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    penalty = forgetless.Penalty(
        model, forgetless.Importance.from_pretrained(given.importance), strength=given.strength
    )
    trainer = L.Trainer(
        max_steps=given.steps,
        callbacks=[LightningCallback(penalty)],
        logger=CSVLogger(given.out),
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
    )
    trainer.fit(Tuned(model), data)
    print(f"energy: {penalty.energy():.3g} nats")
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
