"""Full fine-tuning reads the base from the checkpoint's files: the same numbers as from a copy,
without the copy.
"""

import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import CONFIGS
from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import DenseEntry, FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.model import weights as weights_module
from forgetless.model.checkpoint import KeptWeight, StoredWeight
from forgetless.model.linear import base_shapes
from forgetless.model.targets import target_weights
from forgetless.penalty.pull import Penalty

ENTRIES = {
    "f32": lambda out, into: DenseEntry(torch.rand(out, into)),
    "factored": lambda out, into: FactoredEntry(torch.rand(out, 1), torch.rand(into, 1)),
    "kronecker": lambda out, into: KroneckerEntry(
        Covariance(torch.eye(out) + 0.5), Covariance(torch.eye(into) + 0.5)
    ),
}


@pytest.fixture
def saved(tiny, tmp_path):
    """A function: kind -> the folder of a tiny model, in one file or in shards."""

    def save(kind, *, shards=False, dtype=torch.float32):
        folder = tmp_path / f"{kind}-{shards}"
        tiny(kind, dtype).save_pretrained(folder, **({"max_shard_size": "8KB"} if shards else {}))
        assert (folder / "model.safetensors.index.json").exists() == shards
        return folder

    return save


def load(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def importance_of(model, form):
    torch.manual_seed(1)
    return Importance({name: ENTRIES[form](*shape) for name, shape in base_shapes(model).items()})


def kept(penalty):
    """The twin: the same penalty with copies."""
    penalty.weights = [
        dataclasses.replace(w, base=KeptWeight(w.W.detach().clone())) for w in penalty.weights
    ]
    return penalty


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("shards", [False, True])
def test_every_weight_is_found_and_stays_the_base_while_the_optimizer_moves(saved, kind, shards):
    model = load(saved(kind, shards=shards))
    weights = target_weights(model, names="all-linear")
    assert weights and all(isinstance(w.base, StoredWeight) for w in weights)
    before = {w.name: w.W.detach().clone() for w in weights}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(input_ids=torch.arange(3, 9)[None], labels=torch.arange(3, 9)[None]).loss.backward()
    optimizer.step()
    for w in weights:
        assert torch.equal(w.base_rows(slice(None)), w.oriented(before[w.name])) and bool(
            w.update().any()
        )
        assert torch.equal(w.moved(slice(2, 5)), w.update()[2:5])


@pytest.mark.parametrize("form", sorted(ENTRIES))
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pulls_and_energies_are_those_of_copies(saved, kind, form, monkeypatch):
    monkeypatch.setattr(weights_module, "BASE_ROWS", 50)  # several reads per weight
    model = load(saved(kind))
    importance = importance_of(model, form)
    streamed, copied = (
        Penalty(model, importance, strength=0.5, names="all-linear"),
        kept(Penalty(model, importance, strength=0.5, names="all-linear")),
    )
    assert all(isinstance(w.base, StoredWeight) for w in streamed.weights)
    pulls = []
    for penalty in (streamed, copied):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD([w.W for w in penalty.weights], lr=0.01)
        with torch.no_grad():
            for w in penalty.weights:
                w.W.copy_(
                    copied.weights[[c.name for c in copied.weights].index(w.name)].base.tensor
                    + 0.1 * torch.randn_like(w.W)
                )
        for _ in range(3):
            optimizer.zero_grad()
            penalty.pull()
            optimizer.step()
        pulls.append(([w.W.grad.clone() for w in penalty.weights], penalty.energy()))
    assert pulls[0][1] == pulls[1][1] > 0
    assert all(torch.equal(a, b) for a, b in zip(pulls[0][0], pulls[1][0], strict=True))


def test_a_checkpoint_in_another_dtype_is_rounded_as_loading_did(saved):
    model = load(saved("llama"), torch.bfloat16)
    weights = target_weights(model, names="all-linear")
    assert all(isinstance(w.base, StoredWeight) and not w.update().any() for w in weights)


def test_weights_that_moved_since_loading_are_copied_and_said(saved, caplog):
    model = load(saved("llama"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    with caplog.at_level(logging.INFO, "forgetless"):
        weights = target_weights(model, names="q_proj")
    assert [type(w.base) for w in weights] == [KeptWeight, StoredWeight] and not weights[
        0
    ].update().any()
    assert (
        "base of 1 of 2 weights is kept as a copy" in caplog.text
        and "layers.0.self_attn.q_proj" in caplog.text
    )


def test_models_without_a_checkpoint_are_copied(tiny, saved, tmp_path):
    assert all(isinstance(w.base, KeptWeight) for w in target_weights(tiny(), names="q_proj"))
    folder = saved("llama")
    model = load(folder)
    shutil.rmtree(folder)
    assert all(isinstance(w.base, KeptWeight) for w in target_weights(model, names="q_proj"))


def test_a_cached_hub_model_is_found_among_its_snapshots(saved, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    snapshots = cache / "models--someone--tiny" / "snapshots"
    shutil.copytree(saved("llama"), snapshots / ("a" * 40))
    shutil.copytree(saved("qwen"), snapshots / ("b" * 40))  # another revision
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("a" * 40)
    model = AutoModelForCausalLM.from_pretrained(
        "someone/tiny", cache_dir=cache, local_files_only=True
    )
    weights = target_weights(model, names="all-linear")
    assert {w.base.path.parent.name for w in weights} == {"a" * 40}


def test_writing_over_the_file_is_an_error_and_replacing_it_is_not(saved):
    folder = saved("llama")
    weights = target_weights(load(folder), names="q_proj")
    file = folder / "model.safetensors"
    (folder / "new").write_bytes(b"\0" * file.stat().st_size)
    os.replace(folder / "new", file)  # another inode: the old one stays mapped
    assert not weights[0].update().any()
    weights = target_weights(load(saved("qwen")), names="q_proj")
    other = weights[0].base.path
    other.write_bytes(other.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="was written over"):
        weights[0].update()


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"),
    reason="needs Linux's count of memory that is not backed by a file",
)
def test_no_second_model_in_memory(tmp_path):
    """A model of 109 MiB: pulling from the file takes a fraction of what the copies take."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    # The file comes first: what the copies leave behind in the heap would be used again.
    script = textwrap.dedent("""
        import sys, torch
        from transformers import AutoModelForCausalLM
        from forgetless.importance.controls import uniform
        from forgetless.penalty.pull import Penalty
        torch.set_num_threads(1)
        def anonymous():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
        def growth(name):
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
            importance = uniform(model)
            # Imports and buffers are not what is measured.
            Penalty(model, importance, strength=1.0, names=r".*layers[.]0.*q_proj").energy()
            if name is not None:
                model.config._name_or_path = name
            start = anonymous()
            penalty = Penalty(model, importance, strength=1.0, names="all-linear")
            penalty.energy()
            return anonymous() - start
        print(growth(None), growth(""))
    """)
    # Freed memory must go back at once to be counted: a padded heap (the Makefile's
    # MALLOC_TOP_PAD_) would keep it, as much as happens to be fragmented.
    environment = {
        **os.environ,
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    file, copy = map(float, done.stdout.split())
    assert copy > 90
    assert file < 20
