"""The lines that people see while a model is trained."""

import types

import pytest
from transformers import TrainerState

from forgetless.cli import exit_code
from forgetless.files.run_json import EXPLODED
from forgetless.tune import log_lines
from forgetless.tune.log_lines import LogLines, has_exploded


def shown(entries, capsys, **kwargs):
    """What is printed for entries of a log, the state of the trainer, and the model's words."""
    lines = LogLines(shown=True)
    state = TrainerState(max_steps=12000)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=48))
    args = types.SimpleNamespace(learning_rate=1e-3)
    lines.on_train_begin(args, state, None)
    for step, entry in entries:
        state.global_step = step
        state.log_history.append(dict(entry))
        lines.on_log(args, state, None, logs=entry)
    lines.on_train_end(args, state, None, model=model)
    return capsys.readouterr().err.splitlines(), state


STEP = {"loss": 2.5, "learning_rate": 1e-3, "grad_norm": 0.3, "epoch": 0.1, "num_tokens": 9e9}


def test_a_line_for_each_log_step_fits_80_columns(capsys, monkeypatch):
    clock = iter(range(0, 100_000, 4_000))
    monkeypatch.setattr(log_lines.time, "perf_counter", lambda: float(next(clock)))
    held = {"energy": 3.7e-05, "pull_norm": 0.03, "kl": 0.01234, "budget/strength": 123.4}
    entries = [(1200, {**STEP, **held}), (11999, {**STEP, **held, "budget/rise": 0.0012})]
    (heading, *lines), _ = shown(entries, capsys)
    names = ["step", "loss", "rate", "rise", "strength", "tokens/s", "left"]
    assert heading.split() == names
    assert lines[0].split()[:5] == ["1200/12000", "2.5", "1.0e-03", "–", "123"]
    assert lines[1].split()[:5] == ["11999/12000", "2.5", "1.0e-03", "0.0012", "123"]
    assert lines[-1].startswith("tuning: 11,999 steps in")
    assert max(map(len, [heading, *lines])) <= 80 and len(lines) == 3


def test_columns_are_those_that_the_run_logs(capsys):
    (heading, *_), _ = shown([(10, {**STEP, "kl": 0.1, "energy": 1.0})], capsys)
    assert heading.split() == ["step", "loss", "rate", "KL", "tokens/s", "left"]
    (heading, *_), _ = shown([(10, {**STEP, "kl": 0.1, "budget/kl_weight": 2.0})], capsys)
    assert heading.split() == ["step", "loss", "rate", "rise", "weight", "tokens/s", "left"]
    (heading, *_), _ = shown([(10, STEP)], capsys)
    assert "KL" not in heading and "energy" not in heading


def test_held_out_data_says_what_was_learned(capsys):
    entries = [(4, {"eval_loss": 2.0}), (8, {"eval_loss": 1.9})]
    lines, _ = shown(entries, capsys)
    assert lines[:2] == [
        "step 4: held-out loss 2.0000",
        "step 8: held-out loss 1.9000, learned +0.1000 nats since step 4",
    ]


@pytest.mark.parametrize(
    ("losses", "exploded"),
    [
        ([2.5, 2.1], False),
        ([2.5, 2.9], False),
        ([2.5, 7.0], True),
        ([9.0], True),
        ([3.0, float("nan")], True),
        ([], False),
    ],
)
def test_a_loss_that_explodes_is_said(losses, exploded, capsys, caplog):
    assert has_exploded(losses, 48) is exploded
    entries = [(at + 1, {**STEP, "loss": loss}) for at, loss in enumerate(losses)]
    _, state = shown(entries, capsys)
    assert ("the learning rate 0.001 is too high" in caplog.text) is exploded
    assert any(EXPLODED in entry for entry in state.log_history) is exploded
    assert exit_code({"log": state.log_history, "verdict": "met"}) == (1 if exploded else 0)
