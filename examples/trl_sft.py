"""TRL's SFTTrainer, held by an importance file of `forgetless record`.

    python examples/trl_sft.py MODEL domain.jsonl model.importance.safetensors [--strength 10]
    [--out sft] [--steps 100]

`domain.jsonl` has rows that TRL knows: text, prompt and completion, or messages. The two lines that
hold the model are marked.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import forgetless  # 1


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data", "importance"):
        parser.add_argument(name)
    parser.add_argument("--strength", type=float, help="default: what suits the file's estimator")
    parser.add_argument("--out", default="sft")
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()

    settings = dict(
        max_steps=given.steps,
        learning_rate=1e-3,
        max_length=512,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=given.model,
        args=SFTConfig(
            output_dir=given.out, bf16=torch.cuda.is_available(), **settings
        ),  # SFTConfig would turn bf16 on, also without a GPU
        train_dataset=load_dataset("json", data_files=given.data, split="train"),
        peft_config=LoraConfig(
            r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    forgetless.hold(trainer, given.importance, strength=given.strength)  # 2
    trainer.train()
    trainer.save_model(given.out)


if __name__ == "__main__":
    main()
