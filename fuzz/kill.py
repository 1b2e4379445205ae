"""Kill -9 at random moments, go on, and compare with the run that nobody killed, bit for bit.

    # Twelve kills of each scenario; a line for each is appended to fuzz/kills.csv.
    python fuzz/kill.py --seed 0 --kills 12
    python fuzz/kill.py --scenarios tune,compare --kills 3

Every scenario runs a verb on a tiny model, once undisturbed and then as often as it takes: SIGKILL
after a random time within the run's length, or within a few milliseconds of a random one of its
writes (a file opened for writing, a rename, a removal), at most four times in a row, then it may
finish. After every kill, all that stands under a final name must be whole and equal to what the
undisturbed run wrote under it; at the end everything must be equal and no temporary left. Processes
are forked from one that has imported the libraries, so that a kill costs as long as the verb ran.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}

import peft  # noqa: F401  imported before a process is forked, so that a kill costs less
import torch
import trl  # noqa: F401  as above
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

# The verbs too are imported before a process is forked.
import forgetless.budget.shrink
import forgetless.compare.compare
import forgetless.record.record
import forgetless.tune.tune  # noqa: F401
from forgetless.cli import main as forgetless_main
from forgetless.tune import run_folder

WORDS = (
    "the cat sat on mat and dog then too user assistant : . Question Answer ? "
    "yes no one two three a b c d"
).split()
ROW = 4  # kills, at most, before a run may finish
HANGS = 600  # seconds without an end
HERE = Path(__file__).parent
COLUMNS = (
    "date",
    "commit",
    "scenario",
    "seed",
    "run_seconds",
    "writes",
    "runs",
    "kills_at_times",
    "kills_at_writes",
    "findings",
    "seconds",
    "note",
)
# Of a process, not of its result; TRL counts tokens anew when it goes on, and the times in an
# importance file have more or fewer digits.
TIMES = re.compile(
    r"seconds|runtime|per_second|timings|created|environment|versions|peak_memory|resume|wall|flos|"
    r"^num_tokens$|^(file_)?bytes$"
)


@dataclass(frozen=True)
class Scenario:
    """A verb: the words of its command in a world, `--out` the last; what is added to go on."""

    words: Callable[[Path], list[str]]
    out: str  # the name of the file or folder that is written
    more: tuple[str, ...] = ("--resume",)


def _record(*more: str) -> Scenario:
    return Scenario(
        lambda world: [
            "record",
            str(world / "model"),
            "--general",
            str(world / "general.jsonl"),
            "--save-steps",
            "1",
            "--batch-size",
            "4",
            *more,
        ],
        "i.safetensors",
    )


def _tune(*more: str) -> Scenario:
    words = (
        "--max-steps",
        "8",
        "--save-steps",
        "1",
        "--log-steps",
        "1",
        "--batch-size",
        "4",
        "--accumulation",
        "1",
        "--rank",
        "2",
        "--learning-rate",
        "1e-2",
    )
    return Scenario(
        lambda world: [
            "tune",
            str(world / "model"),
            "--data",
            str(world / "domain.jsonl"),
            "--device",
            "cpu",
            *words,
            *(word.replace("WORLD", str(world)) for word in more),
        ],
        "run",
    )


def _compare(name: str, *more: str) -> Scenario:
    return Scenario(lambda world: ["compare", str(world / name), *more], "comparison", ())


SCENARIOS = {
    "record-path": _record(
        "--estimator", "path", "--rank", "2", "--epochs", "2", "--accumulation", "1"
    ),
    "record-kronecker": _record("--estimator", "kronecker", "--groups", "2"),
    "tune": _tune("--importance", "WORLD/importance.safetensors", "--general", "WORLD/other.jsonl"),
    "tune-full": _tune("--full", "--importance", "WORLD/importance.safetensors"),
    "tune-replay": _tune("--method", "kl", "--replay", "self", "--replay-documents", "8"),
    "tune-budget": _tune(
        "--importance",
        "WORLD/importance.safetensors",
        "--budget",
        "20%",
        "--general",
        "WORLD/other.jsonl",
    ),
    "compare": _compare("experiment.yaml"),
    "sequence": _compare("sequence.yaml"),
    "compare-jobs": _compare("experiment.yaml", "--jobs", "2"),
}


def make_world(world: Path) -> Path:
    """A tiny Llama with a word tokenizer, texts, domain data, an importance file and two
    experiments.
    """
    world.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    AutoModelForCausalLM.from_config(config).save_pretrained(world / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    ).save_pretrained(world / "model")
    rng = random.Random(0)
    texts = lambda count: [
        {"text": " ".join(rng.choices(WORDS, k=rng.randint(12, 24)))} for _ in range(count)
    ]
    rows = lambda count, reply: [
        {
            "prompt": f"Question {i} {rng.choice('abcd')} ?",
            "completion": f" {reply} {rng.choice('abcd')}",
        }
        for i in range(count)
    ]
    contents = {
        "general": texts(24),
        "other": texts(60),
        "wide": texts(40),
        "domain": rows(32, "yes no"),
        "held": rows(8, "yes no"),
        "second": rows(40, "dog"),
    }
    for name, some in contents.items():
        (world / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    experiment = {
        "model": str(world / "model"),
        "device": "cpu",
        "general": {
            "wide": str(world / "wide.jsonl"),
            "other": {"text": str(world / "other.jsonl")},
        },
        "domains": {
            "domain": {"data": str(world / "domain.jsonl"), "test": str(world / "held.jsonl")}
        },
        "training": {"max_steps": 3, "batch_size": 4, "accumulation": 1, "rank": 2, "log_steps": 1},
        "importance": {"default": {"batch_size": 8}},
        "methods": {
            "plain": {"learning_rate": 1e-2},
            "hold": {"importance": "default", "learning_rate": 1e-2, "strength": 1},
        },
        "seeds": {"validation": [0], "test": [1]},
        "scales": [0.5],
    }
    (world / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    more = {
        "domains": {**experiment["domains"], "second": str(world / "second.jsonl")},
        "sequences": {
            "way": {"domains": ["domain", "second"], "methods": {"plain": None, "hold": None}}
        },
    }
    (world / "sequence.yaml").write_text(yaml.safe_dump({**experiment, **more}))
    return world


def start(words: list[str], log: Path, *, at_write: int | None = None) -> tuple[int, int]:
    """(pid, pipe) of a forked child that runs `forgetless WORDS`; a pipe tells of its write number
    `at_write` and how many there were.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    status, count, under = 1, 0, str(log.parent)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
        else:
            writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if writes and str(arguments[0]).startswith(under):
            count += 1
            if count == at_write:
                os.write(writer, b"!")

    try:
        os.close(reader)
        torch.set_num_threads(1)
        tqdm.set_lock(
            threading.RLock()
        )  # tqdm's own is shared with the processes that were killed while they held it
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        sys.addaudithook(watch)
        status = forgetless_main(words)
        os.write(writer, f" {count}".encode())
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(pid: int, reader: int) -> tuple[int, int]:
    """(exit status, number of writes) of a child that is left alone; one that hangs is killed."""
    select.select([reader], [], [], HANGS)
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if not select.select([reader], [], [], HANGS)[0]:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    status = ended[1]
    said = os.read(reader, 100).decode().split()
    os.close(reader)
    return os.waitstatus_to_exitcode(status), int(said[-1]) if said and said[-1] != "!" else 0


def kill(pid: int, reader: int, *, after: float | None, delay: float) -> bool:
    """SIGKILL after a time, or `delay` after the byte that tells of a write.

    False where the child was faster and has ended.
    """
    select.select([reader], [], [], after)  # readable: the byte, or the end of the child
    if after is None:
        time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reader)
    return os.WIFSIGNALED(status)


def is_temporary(path: Path) -> bool:
    """What the documentation calls a temporary: hidden, and a lock, or named for the process that
    was writing it.
    """
    return any(re.fullmatch(r"\.forgetless-.*\.tmp|\..*lock", part) for part in path.parts)


def wrong_after_a_kill(place: Path, whole: Path) -> Iterator[str]:
    """What stands under a final name and is broken, or not what the undisturbed run wrote there."""
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place)
        if is_temporary(name) or not path.is_file() or path.suffix == ".txt":
            continue
        try:
            if "checkpoints" in name.parts:
                continue
            if path.suffix == ".safetensors":
                found = load_file(path)
                if (whole / name).exists() and not same(found, load_file(whole / name)):
                    yield f"{name} is not that of the undisturbed run"
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".yaml", ".jsonl"):
                yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else [
                    json.loads(line) for line in path.read_text().splitlines()
                ]
            elif path.suffix == ".state":
                torch.load(path, weights_only=True)
        except Exception as error:
            yield f"{name} is not whole: {type(error).__name__}: {error}"
    for folder in (
        folder
        for folder in place.rglob("*")
        if folder.name in ("final", "unscaled", "adapter", "model") and not is_temporary(folder)
    ):
        names = {path.name for path in folder.iterdir()}
        if (
            not any(name.endswith(".safetensors") for name in names)
            or "tokenizer.json" not in names
            or not names & {"config.json", "adapter_config.json"}
        ):
            yield f"{folder.relative_to(place)} is not whole: {sorted(names)}"
    if (place / "run" / "checkpoints").exists() and (
        last := run_folder.last_checkpoint(place / "run")
    ):
        for path in Path(last).iterdir():
            try:
                torch.load(path, weights_only=False) if path.suffix in (
                    ".pt",
                    ".pth",
                    ".bin",
                ) else load_file(path) if path.suffix == ".safetensors" else None
            except Exception as error:
                yield (
                    f"{path.relative_to(place)} is not whole in a checkpoint that is taken for "
                    f"whole: {error}"
                )


def differences(place: Path, whole: Path) -> Iterator[str]:
    """Where a run that was killed and gone on with ends otherwise than the undisturbed one."""
    files = lambda root: {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    for name in sorted(files(place) ^ files(whole)):
        yield (
            f"{name} is there only {'after kills' if (place / name).exists() else 'without kills'}"
        )
    for name in sorted(files(place) & files(whole)):
        a, b = place / name, whole / name
        if name.suffix == ".safetensors" and not same(load_file(a), load_file(b)):
            yield f"{name} has other numbers"
        elif name.suffix in (".json", ".yaml", ".jsonl") and (
            difference := next(unequal(_read(a, place), _read(b, whole)), None)
        ):
            yield f"{name} differs: {difference}"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    bits = lambda tensor: (
        tensor.contiguous().view(torch.uint8)
        if tensor.ndim
        else tensor.reshape(1).view(torch.uint8)
    )
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])) for name in a
    )


def _read(path: Path, root: Path) -> Any:
    text = path.read_text().replace(str(root), "ROOT")
    return (
        yaml.safe_load(text)
        if path.suffix == ".yaml"
        else [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(text)
    )


def unequal(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Places where two files hold other values, times and the like left out."""
    if where.endswith(
        (".log", ".log_history")
    ):  # its last entry is the trainer's summary of this process
        a, b = ([entry for entry in log if "loss" in entry] for log in (a, b))
    if where.endswith(
        ".target_modules"
    ):  # PEFT writes a set, whose order is another in every spawned process
        a, b = sorted(a), sorted(b)
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if not TIMES.search(str(key)):
                yield from unequal(a.get(key), b.get(key), f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from unequal(x, y, f"{where}[{i}]")
    elif a != b:
        yield f"{where} is {str(a)[:80]} after kills, {str(b)[:80]} without"


def campaign(name: str, world: Path, folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill one scenario `kills` times, in as many runs as that takes; what it found is printed and
    counted.
    """
    scenario, rng, began = SCENARIOS[name], random.Random(f"{seed} {name}"), time.perf_counter()
    words = lambda place, *more: [
        *scenario.words(world),
        "--out",
        str(place / scenario.out),
        "--quiet",
        *more,
    ]
    whole = folder / f"{name}-whole"
    whole.mkdir(parents=True)
    started = time.perf_counter()
    status, writes = finish(*start(words(whole), whole / "log.txt"))
    length = time.perf_counter() - started
    if status not in (0, 3):
        raise SystemExit(
            f"{name}: the undisturbed run ended with {status}:\n{(whole / 'log.txt').read_text()}"
        )
    counts, findings, runs = {"time": 0, "write": 0}, [], 0
    while sum(counts.values()) < kills:
        runs += 1
        place = folder / f"{name}-{runs}"
        place.mkdir()
        found, history, more = [], [], ()
        for _ in range(min(ROW, kills - sum(counts.values()))):
            at = rng.randint(1, writes) if rng.random() < 0.5 else None
            after, delay = None if at else rng.uniform(0, length), rng.uniform(0, 0.004)
            ended = not kill(
                *start(words(place, *more), place / "log.txt", at_write=at),
                after=after,
                delay=delay,
            )
            more = scenario.more
            if ended:  # it was faster; what it wrote is written again by the next
                break
            counts["write" if at else "time"] += 1
            history.append(f"write {at} + {1000 * delay:.1f} ms" if at else f"{after:.2f} s")
            found += [
                f"{problem} (killed at {', '.join(history)})"
                for problem in wrong_after_a_kill(place, whole)
            ]
        again, _ = finish(*start(words(place, *more), place / "log.txt"))
        if again != status:
            found.append(
                f"ends with {again}, not {status}: {(place / 'log.txt').read_text()[-1000:]}"
            )
        found += [
            f"{difference} (killed at {', '.join(history)})"
            for difference in differences(place, whole)
        ]
        print(
            f"{name} run {runs}: killed at {', '.join(history) or 'no time, it was faster'}: "
            f"{'equal' if not found else f'{len(found)} findings: {found[:3]}'}",
            flush=True,
        )
        if not found:
            shutil.rmtree(place)
        findings += found
    return {
        "scenario": name,
        "seed": seed,
        "run_seconds": f"{length:.2f}",
        "writes": writes,
        "runs": runs,
        "kills_at_times": counts["time"],
        "kills_at_writes": counts["write"],
        "findings": len(findings),
        "seconds": f"{time.perf_counter() - began:.0f}",
        "found": findings,
    }


def prepared(world: Path) -> Path:
    """The world with its importance file."""
    make_world(world)
    words = [
        "record",
        str(world / "model"),
        "--general",
        str(world / "general.jsonl"),
        "--out",
        str(world / "importance.safetensors"),
        "--quiet",
    ]
    status, _ = finish(*start(words, world / "log.txt"))
    if status:
        raise SystemExit((world / "log.txt").read_text())
    return world


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(
            "Kill forgetless at random moments and compare what comes out with an undisturbed run."
        )
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=8, help="of each scenario [8]")
    parser.add_argument(
        "--scenarios", default=",".join(SCENARIOS), help="names with commas between [all]"
    )
    parser.add_argument(
        "--folder", help="where to work, and to keep what went wrong [a temporary folder]"
    )
    parser.add_argument(
        "--csv", default=str(HERE / "kills.csv"), help="file to append to, or '' [fuzz/kills.csv]"
    )
    given = parser.parse_args()
    folder = Path(given.folder or tempfile.mkdtemp())
    world = prepared(folder / "world")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    total = 0
    for name in given.scenarios.split(","):
        row = campaign(name, world, folder, kills=given.kills, seed=given.seed)
        total += row["findings"]
        if given.csv:
            new = not Path(given.csv).exists()
            with open(given.csv, "a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow({"date": time.strftime("%Y-%m-%d"), "commit": commit, **row})
    print(f"{total} findings; runs that went wrong are in {folder}" if total else "no findings")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
