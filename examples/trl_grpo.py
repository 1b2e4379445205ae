"""TRL's GRPOTrainer, held by an importance file of `forgetless record`, with a reward that a reader
can replace.

    python examples/trl_grpo.py MODEL prompts.jsonl model.importance.safetensors [--strength 10]
    [--out grpo] [--steps 100] [--completion 64]

`prompts.jsonl` has rows with a prompt. The reward here is the share of different words in an
answer.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import forgetless  # 1


def variety(completions, **_):
    """Different words / words of each completion, plain text or chat."""
    texts = [
        completion if isinstance(completion, str) else completion[-1]["content"]
        for completion in completions
    ]
    return [len(set(text.split())) / max(len(text.split()), 1) for text in texts]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data", "importance"):
        parser.add_argument(name)
    parser.add_argument("--strength", type=float, help="default: what suits the file's estimator")
    parser.add_argument("--out", default="grpo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--completion", type=int, default=64, help="tokens per answer, at most")
    given = parser.parse_args()

    settings = dict(
        max_steps=given.steps,
        learning_rate=1e-4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=4,
    )
    trainer = GRPOTrainer(
        model=given.model,
        reward_funcs=variety,
        args=GRPOConfig(
            output_dir=given.out,
            bf16=torch.cuda.is_available(),
            num_generations=4,
            max_completion_length=given.completion,
            **settings,
        ),
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
