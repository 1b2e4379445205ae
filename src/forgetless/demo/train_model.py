"""The script that made `demo/model/`: python -m forgetless.demo.train_model [--out DIR]

It trains a byte-level BPE tokenizer and a Llama of about one million parameters from scratch on the
world's text, with AdamW and a cosine schedule, for `--steps` steps. That takes minutes on two
cores. The settings and what was reached are written beside the weights in training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.data.documents import Document
from forgetless.data.encoding import batches, encode_documents
from forgetless.data.tasks import TASKS
from forgetless.demo.world import MODEL_FOLDER, SEED, build, documents, multiple_choice
from forgetless.evaluate.accuracy import answers
from forgetless.files.provenance import environment

# Tokens of the tokenizer: the 256 bytes, three special ones, and what occurs most often.
VOCABULARY = 1024
# Tokens that the model can read at a time.
CONTEXT = 256


def make_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE with <s>, </s> and <pad>; every document starts with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=alphabet,
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONTEXT,
    )


def make_model(vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def train_on_world(
    model: nn.Module,
    tokenizer: Any,
    steps: int,
    seed: int,
    batch_size: int = 48,
    rate: float = 3e-3,
) -> float:
    """Train on fresh paragraphs in every step; the mean loss of the last fifty steps, in nats per
    token.
    """
    facts = build().general
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
        ),
    )
    losses, started = [], time.perf_counter()
    for step in range(steps):
        texts = documents(facts, seed * 1_000_003 + step, batch_size)
        batch = next(
            batches(
                encode_documents(
                    [Document(text, None, "world") for text in texts], tokenizer, length=CONTEXT
                ),
                batch_size=batch_size,
                pad_id=0,
            )
        )
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            print(
                f"step {step + 1:5d}  loss {sum(losses[-100:]) / 100:.3f}  "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return sum(losses[-50:]) / 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    random.seed(given.seed)
    world = build()
    tokenizer = make_tokenizer(documents(world.general + world.domain, SEED, 3000))
    model: Any = make_model(len(tokenizer))
    started = time.perf_counter()
    loss = train_on_world(model, tokenizer, given.steps, given.seed)
    model = model.to(torch.bfloat16)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    questions = multiple_choice(build().general)
    known = answers(model.float(), tokenizer, TASKS["choices"], questions)
    reached = {
        "seed": given.seed,
        "steps": given.steps,
        "loss_nats": loss,
        "seconds": time.perf_counter() - started,
        "parameters": sum(p.numel() for p in model.parameters()),
        "general_accuracy": known.numbers["acc_norm"],
        "versions": environment("cpu").versions,
    }
    (given.out / "training.json").write_text(json.dumps(reached, indent=1) + "\n")
    print(json.dumps(reached, indent=1))


if __name__ == "__main__":
    main()
