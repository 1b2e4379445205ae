"""The transformers Trainer, held by an importance file of `forgetless record`.

    python examples/transformers_trainer.py MODEL domain.jsonl model.importance.safetensors
    [--strength 10] [--out trained] [--steps 100] [--report-to none]

`domain.jsonl` has rows with a `text`. The two lines that hold the model are marked.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import forgetless  # 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data", "importance"):
        parser.add_argument(name)
    parser.add_argument("--strength", type=float, help="default: what suits the file's estimator")
    parser.add_argument("--out", default="trained")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, trackio, ...")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = load_dataset("json", data_files=given.data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=512),
        remove_columns=rows.column_names,
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(given.model),
        LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            given.out,
            max_steps=given.steps,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=given.report_to,
            save_strategy="no",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    forgetless.hold(trainer, given.importance, strength=given.strength)  # 2
    trainer.train()
    model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
