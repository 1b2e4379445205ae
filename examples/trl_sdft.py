"""TRL's SDFTTrainer (self-distillation, arXiv 2601.19897), plainly or held by an importance file of
`forgetless record`.

    python examples/trl_sdft.py MODEL domain.jsonl [--importance model.importance.safetensors]
    [--strength 10] [--out sdft] [--steps 100] [--completion 64]

`domain.jsonl` has rows with `prompt` and `completion`. The model answers each prompt by itself, and
learns towards its own predictions with the row's completion shown to it. `distill` is the same for
other programs: it takes and returns a trainer.
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

import forgetless  # 1


def demonstrated(row):
    """A row as the trainer takes it: the completion is what only the teacher sees."""
    return {
        "prompt": row["prompt"],
        "privileged_context": f"An example of an answer: {row['completion']}",
    }


def distill(model, data, *, importance=None, strength=None, out="sdft", steps=100, completion=64):
    """A trainer that has distilled the rows of the file `data` into `model`, a name or a folder."""
    rows = load_dataset("json", data_files=data, split="train")
    trainer = SDFTTrainer(
        model=model,
        args=SDFTConfig(
            output_dir=out,
            bf16=torch.cuda.is_available(),
            num_generations=1,
            max_completion_length=completion,
            distillation_topk=20,
            max_steps=steps,
            learning_rate=1e-4,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=4,
        ),
        train_dataset=rows.map(demonstrated, remove_columns=rows.column_names),
        peft_config=LoraConfig(
            r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    if importance is not None:
        forgetless.hold(trainer, importance, strength=strength)  # 2
    trainer.train()
    return trainer


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "data"):
        parser.add_argument(name)
    parser.add_argument("--importance", help="an importance file; default: none, plain SDFT")
    parser.add_argument("--strength", type=float, help="default: what suits the file's estimator")
    parser.add_argument("--out", default="sdft")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--completion", type=int, default=64, help="tokens per answer, at most")
    given = parser.parse_args()
    trainer = distill(
        given.model,
        given.data,
        importance=given.importance,
        strength=given.strength,
        out=given.out,
        steps=given.steps,
        completion=given.completion,
    )
    trainer.save_model(given.out)


if __name__ == "__main__":
    main()
