"""What was learned and what was lost: loss on general text in nats per token, loss on the answers, task accuracies through lm-eval.

"Before" is always the bare base model. Perplexity is exp(nats). Standard errors are over documents (or questions), as ratio estimates, since documents
differ in length; a change is paired by document, which takes most of the noise out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from holdfast.adapter_files import checked, with_adapter
from holdfast.config import EvalOptions
from holdfast.models import context_length, load_model, load_tokenizer
from holdfast.options import OptionError, as_dict, nearest
from holdfast.runs import check_output_folder, environment, write_json
from holdfast.tasks import TASKS, Row, Task, encode_rows, find_task, load_task, load_training_data
from holdfast.texts import Document, Encoded, collate, encode, encode_prompted, load_documents

BATCH_TOKENS, BATCH_TOKENS_CPU = 4096, 1024  # of a forward pass. On a CPU more leave its caches: 4,096 took 1.17x of the time of 1,024 on the lab model


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of some documents: sums of nats and counts of scored tokens, both (documents,)."""

    nats_by_document: np.ndarray
    tokens_by_document: np.ndarray
    utf8_bytes: int | None = None

    @property
    def tokens(self) -> int:
        return int(self.tokens_by_document.sum())

    @property
    def nats(self) -> float:
        """Nats per token over all documents."""
        return float(self.nats_by_document.sum() / self.tokens)

    @property
    def standard_error(self) -> float | None:
        """Of `nats`, over documents; None for a single document."""
        return ratio_error(self.nats_by_document, self.tokens_by_document)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def bits_per_byte(self) -> float | None:
        return None if not self.utf8_bytes else float(self.nats_by_document.sum() / math.log(2) / self.utf8_bytes)

    def numbers(self) -> dict[str, Any]:
        """For run.json."""
        return {"nats": self.nats, "standard_error": self.standard_error, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte,
                "tokens": self.tokens, "documents": len(self.tokens_by_document),
                "nats_by_document": self.nats_by_document.tolist(), "tokens_by_document": self.tokens_by_document.tolist()}  # fmt: skip


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sum(sums) / sum(counts) over independent documents (linearised ratio); None below two documents."""
    n = len(sums)
    if n < 2:
        return None
    residual = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(n / (n - 1) * float((residual**2).sum())) / counts.sum())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _windows(encoded: Sequence[Encoded], window: int, stride: int) -> list[tuple[int, Encoded]]:
    """(document, window) pairs in which every token but a document's first is scored exactly once, with at least window - stride tokens before it."""
    cut = []
    for index, (ids, scored) in enumerate(encoded):
        end = 1  # targets before `end` have been scored
        while end < len(ids):
            stop = min(len(ids), end + (window - 1 if end == 1 else stride))
            start = max(0, stop - window)
            cut.append((index, (ids[start:stop], [s and start + i >= end for i, s in enumerate(scored[start:stop])])))
            end = stop
    return cut


def text_loss(model: nn.Module, encoded: Sequence[Encoded], *, window: int, stride: int | None = None, batch_tokens: int | None = None,
              utf8_bytes: int | None = None, label: str = "evaluating") -> TextLoss:  # fmt: skip
    """Loss on encoded documents by windows of `window` tokens moving by `stride` (default half), in f32. Costs one forward pass over the windows."""
    from tqdm import tqdm

    stride = stride or max(1, window // 2)
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (BATCH_TOKENS_CPU if device.type == "cpu" else BATCH_TOKENS)
    if not window >= 2 or not 1 <= stride < window:
        raise OptionError(f"expected 1 <= stride < window and window >= 2, found window {window} and stride {stride}")
    cut = sorted(_windows(encoded, window, stride), key=lambda item: -len(item[1][0]))
    nats, tokens = np.zeros(len(encoded)), np.zeros(len(encoded))
    with _evaluating(model), tqdm(total=len(cut), desc=label, unit="window", disable=not sys.stderr.isatty(), leave=False) as bar:
        start = 0
        while start < len(cut):
            group = cut[start : start + max(1, batch_tokens // len(cut[start][1][0]))]
            batch = {key: value.to(device) for key, value in collate([piece for _, piece in group], 0).items()}
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # moved instead of the logits, which a slice or transpose would copy
            each = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none").view_as(targets)
            for (index, _), total, count in zip(group, each.double().sum(1).tolist(), (targets != -100).sum(1).tolist(), strict=True):
                nats[index] += total
                tokens[index] += count
            start += len(group)
            bar.update(len(group))
    kept = tokens > 0
    if not kept.any():
        raise ValueError("no token of the text is scored; expected text of at least two tokens, or chats with assistant turns")
    return TextLoss(nats[kept], tokens[kept], utf8_bytes)


def rise(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float | None]:
    """Change in nats per token with its standard error, paired by document, from two `TextLoss.numbers()` of the same documents."""
    old, new = np.array(before["nats_by_document"]), np.array(after["nats_by_document"])
    counts = np.array(before["tokens_by_document"])
    return {"nats": float((new - old).sum() / counts.sum()), "standard_error": ratio_error(new - old, counts)}


def general_loss(model: nn.Module, tokenizer: Any, documents: Sequence[Document], *, length: int | None = None, stride: int | None = None,
                 batch_tokens: int | None = None) -> TextLoss:  # fmt: skip
    """Loss on general text. Bits per byte only where every document is plain text."""
    window = min(length or 2048, context_length(model))
    plain = all(document.text is not None for document in documents)
    size = sum(len((document.text or "").encode()) for document in documents) if plain else None
    return text_loss(model, encode(documents, tokenizer), window=window, stride=stride, batch_tokens=batch_tokens, utf8_bytes=size, label="general text")


def completion_loss(model: nn.Module, tokenizer: Any, data: Any, *, length: int | None = None, batch_tokens: int | None = None) -> TextLoss:
    """Loss on held-out domain data: on completions, assistant turns, or all of the text. A prompt too long for the window loses its beginning."""
    window = min(length or 2048, context_length(model))
    encoded = encode_rows(data, tokenizer)
    if "prompt" in data.column_names:
        encoded = [_last(pair, window) for pair in encoded]
    return text_loss(model, encoded, window=window, batch_tokens=batch_tokens, label="domain data")


def _last(encoded: Encoded, window: int) -> Encoded:
    ids, scored = encoded
    return ids[-window:], scored[-window:]


def answers(model: nn.Module, tokenizer: Any, task: Task, rows: Sequence[Row], *, batch_tokens: int | None = None) -> dict[str, Any]:
    """Loss on the right answers, and accuracy by ranking the choices by likelihood (acc) and by likelihood per byte (acc_norm), with standard errors."""
    window = context_length(model)
    pieces, sizes = [], []
    for row in rows:
        for choice in task.choices(row):
            pieces.append(_last(encode_prompted(task.prompt(row), " " + choice, tokenizer), window))
            sizes.append(len(choice.encode()))
    loss = text_loss(model, pieces, window=window, batch_tokens=batch_tokens, label=task.name)
    if len(loss.nats_by_document) != len(pieces):
        raise ValueError(f"task {task.name}: {len(pieces) - len(loss.nats_by_document)} choices have no token to score; remove these rows")
    right, right_norm, gold_nats, gold_tokens, place = [], [], [], [], 0
    for row in rows:
        count, gold = len(task.choices(row)), task.gold(row)
        nats = loss.nats_by_document[place : place + count]
        right.append(float(nats.argmin() == gold))
        right_norm.append(float((nats / np.array(sizes[place : place + count])).argmin() == gold))
        gold_nats.append(nats[gold])
        gold_tokens.append(loss.tokens_by_document[place + gold])
        place += count
    answer = TextLoss(np.array(gold_nats), np.array(gold_tokens))
    error = lambda values: float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"acc": float(np.mean(right)), "acc_stderr": error(right), "acc_norm": float(np.mean(right_norm)), "acc_norm_stderr": error(right_norm),
            "questions": len(rows), "answer_loss": answer.numbers()}  # fmt: skip


def lm_eval_accuracy(model: nn.Module, tokenizer: Any, name: str, *, file: str | None = None, shots: int = 0, limit: int | None = None) -> dict[str, Any]:
    """One lm-eval task on the live model through `HFLM`, from the Hub or with its data replaced by a local JSONL file."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    check_tasks(name)
    manager = _task_manager()
    task: Any = name
    if file:
        splits = {split: str(Path(file).resolve()) for split in ("train", "validation", "test")}
        task = {**manager.task_index[name].cfg, "task": f"{name}-local", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
    with _evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        result = lm_eval.simple_evaluate(model=wrapped, tasks=[task], num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0)
    numbers = next(iter(result["results"].values()))
    return {key.replace(",none", ""): value for key, value in numbers.items() if isinstance(value, (int, float))}


def check_tasks(specs: str | None) -> None:
    """Raise OptionError or ValueError for unknown tasks and unreadable task files, before any model is loaded."""
    for spec in _task_specs(specs):
        name, _, file = spec.partition("=")
        if find_task(spec) is not None:
            if file:
                load_task(spec)
        elif name not in (known := _task_manager().all_tasks):
            raise OptionError(f"unknown task '{name}'; {nearest(name, [*TASKS, *known])}")


def _task_specs(specs: str | None) -> list[str]:
    return [part.strip() for part in (specs or "").split(",") if part.strip()]


@functools.cache
def _task_manager() -> Any:
    """lm-eval's index of tasks: takes seconds to make, hence once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def measure(model: nn.Module, tokenizer: Any, *, general: str | None = None, data: str | None = None, tasks: str | None = None,
            text_column: str | None = None, general_split: str = "train", data_split: str | None = None, limit: int | None = None, shots: int = 0,
            length: int | None = None, stride: int | None = None, batch_tokens: int | None = None) -> dict[str, Any]:  # fmt: skip
    """The numbers of one state of a model: {"general": ..., "domain": ..., "tasks": {...}}; what was not asked for is None."""
    documents = load_documents(general, column=text_column, split=general_split, limit=limit) if general else None
    held = load_training_data(data, split=data_split, limit=limit) if data else None
    found: dict[str, Any] = {
        "general": general_loss(model, tokenizer, documents, length=length, stride=stride, batch_tokens=batch_tokens).numbers() if documents else None,
        "domain": completion_loss(model, tokenizer, held, length=length, batch_tokens=batch_tokens).numbers() if held is not None else None,
        "tasks": {},
    }
    for spec in _task_specs(tasks):
        ours = find_task(spec)
        if ours is not None and shots == 0:
            task, rows = load_task(spec, split=None)
            found["tasks"][task.name] = answers(model, tokenizer, task, rows[:limit], batch_tokens=batch_tokens)
        else:
            name, _, file = spec.partition("=")
            found["tasks"][name] = lm_eval_accuracy(model, tokenizer, name, file=file or None, shots=shots, limit=limit)
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Forgetting (rise of the general loss) and learning (fall of the domain loss), in nats per token, paired by document; None where not measured."""
    lost = rise(before["general"], after["general"]) if before["general"] and after["general"] else None
    gained = rise(before["domain"], after["domain"]) if before["domain"] and after["domain"] else None
    learned = None if gained is None else {"nats": -float(gained["nats"] or 0.0), "standard_error": gained["standard_error"]}
    return {"forgetting": lost, "learning": learned}


def table(before: dict[str, Any], after: dict[str, Any] | None, *, authors_perplexity: bool = False) -> str:
    """Aligned text: what, before, after, change, standard error."""
    rows: list[tuple[str, float | None, float | None, float | None]] = []
    later = after or {"general": None, "domain": None, "tasks": {}}
    for key, label in (("general", "general loss (nats/token)"), ("domain", "domain loss (nats/token)")):
        if before[key]:
            a, b = before[key], later[key]
            rows.append((label, a["nats"], b and b["nats"], rise(a, b)["standard_error"] if b else a["standard_error"]))
            if key == "general":
                rows.append(("general perplexity", a["perplexity"], b and b["perplexity"], None))
                if a["bits_per_byte"] is not None:
                    rows.append(("general bits per byte", a["bits_per_byte"], b and b["bits_per_byte"], None))
                if authors_perplexity:
                    rows.append(("2^nats (as the paper's code)", 2 ** a["nats"], 2 ** b["nats"] if b else None, None))
    for name, a in before["tasks"].items():
        b = later["tasks"].get(name)
        if "answer_loss" in a:
            x, y = a["answer_loss"], b and b["answer_loss"]
            rows.append((f"{name} answer loss (nats/token)", x["nats"], y and y["nats"], rise(x, y)["standard_error"] if y else x["standard_error"]))
        for metric in ("acc", "acc_norm"):
            if metric in a:
                rows.append((f"{name} {metric}", a[metric], b and b[metric], (b or a).get(f"{metric}_stderr")))
    show = lambda value: "-" if value is None else f"{value:.4f}"
    lines = [f"{'':<34}{'before':>10}{'after':>10}{'change':>10}{'std.err.':>10}"]
    for label, x, y, error in rows:
        change = None if x is None or y is None else y - x
        lines.append(f"{label:<34}{show(x):>10}{show(y):>10}{('-' if change is None else f'{change:+.4f}'):>10}{show(error):>10}")
    return "\n".join(lines)


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """`holdfast eval`: the bare base model, then with the adapter (its update times `scale`) or the tuned model. Prints the table, returns the run."""
    if options.adapter and options.tuned:
        raise OptionError("give --adapter or --tuned, not both")
    if options.scale != 1.0 and not options.adapter:
        raise OptionError("--scale scales an adapter's update; give --adapter")
    if options.adapter:
        checked(options.adapter)
    if options.tuned and not Path(options.tuned).is_dir():
        raise ValueError(f"'{options.tuned}' is not a folder; give --tuned the final/ folder of a run with --full")
    check_tasks(options.tasks)
    if options.out:
        check_output_folder(options.out)
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    wanted = {key: getattr(options, key) for key in ("general", "data", "tasks", "text_column", "general_split", "data_split", "limit", "shots",
                                                     "length", "stride", "batch_tokens")}  # fmt: skip
    tokenizer, model = load_tokenizer(options), load_model(options)
    before = measure(model, tokenizer, **wanted)
    after = None
    if options.adapter:
        from holdfast.weights import scale_update

        model = with_adapter(model, options.adapter)
        scale_update(model, options.scale)
        after = measure(model, tokenizer, **wanted)
    elif options.tuned:
        after = measure(load_model(options, options.tuned), tokenizer, **wanted)
    run = {"configuration": as_dict(options), "environment": environment(str(next(model.parameters()).device)), "before": before, "after": after,
           **(changes(before, after) if after else {"forgetting": None, "learning": None})}  # fmt: skip
    print(table(before, after, authors_perplexity=options.authors_perplexity))
    if options.out:
        write_json(Path(options.out) / "run.json", run)
    return run
