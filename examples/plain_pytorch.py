"""Record and tune in a plain PyTorch loop, without any trainer.

    python examples/plain_pytorch.py MODEL general.txt domain.txt [--strength 10] [--out adapter]

Each text file holds one document per line. Prints the loss on both texts before and after.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import forgetless


def batches(path, tokenizer, size=4, length=256):
    """Token ids with padding masked in the labels, `size` lines at a time."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    for start in range(0, len(lines), size):
        batch = tokenizer(
            lines[start : start + size],
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=length,
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        yield {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }


def train(model, optimizer, data):
    model.train()
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model, data):
    model.eval()
    return sum(float(model(**batch).loss) for batch in data) / len(data)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "general", "domain"):
        parser.add_argument(name)
    parser.add_argument("--strength", type=float, default=10.0)
    parser.add_argument("--out", default="adapter")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    general, domain = (
        list(batches(given.general, tokenizer)),
        list(batches(given.domain, tokenizer)),
    )

    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    recorder = forgetless.Kronecker(base)
    for batch in general:
        recorder.observe(**batch)
    importance = recorder.finish().to_tier(
        "kronecker:16"
    )  # .save("model.importance.safetensors") keeps it for the next domain

    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    before = loss(model, general), loss(model, domain)
    with forgetless.Penalty(model, importance, strength=given.strength).attach(
        optimizer
    ) as penalty:
        train(model, optimizer, domain)
    after = loss(model, general), loss(model, domain)
    for text, a, b in zip(("general", "domain"), before, after, strict=True):
        print(f"{text}: {a:.3f} -> {b:.3f} nats per token")
    print(f"energy: {penalty.energy():.3g} nats")
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
