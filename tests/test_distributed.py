"""Several gloo processes on the CPU give the result of one: recording, holding under DDP and FSDP2, and what is refused. A group of processes runs many cases."""

import contextlib
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIGS
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import holdfast
from holdfast import Fisher, Importance, Kronecker, PathIntegral, Penalty, distributed
from holdfast.importance.activation import Activation
from holdfast.importance.path_factored import PathFactored
from holdfast.importance.tiers import converted
from holdfast.penalty import sharing
from holdfast.texts import batches
from holdfast.weights import add_adapter, fingerprint

TIERS = ("f32", "bf16", "u8", "u4", "factored:2", "kronecker")


# What a process runs: functions of this module, called by every process; what the first returns comes back.


def _main(rank, size, port, function, arguments, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.start("cpu")
    torch.save(globals()[function](*arguments), f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def processes(size, function, *arguments, out):
    """What `function` returned in each of `size` processes. They are forked from a server that has imported everything once."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl", "peft", "transformers", __name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [context.Process(target=_main, args=(rank, size, port, function.__name__, arguments, str(out))) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in started] == [0] * size
    return [torch.load(f"{out}.{rank}", weights_only=False) for rank in range(size)]


def tiny(kind="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind])


def adapted():
    """A tiny model whose adapter has moved away from the base."""
    model = add_adapter(tiny(), names="all-linear", rank=3, alpha=6)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
    return model


def text():
    """Pieces of several lengths; the last batch is smaller, and their number is odd."""
    g = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 48, (int(n),), generator=g).tolist() for n in torch.randint(4, 12, (13,), generator=g)]
    return list(batches([(row, [True] * len(row)) for row in rows], batch_size=3, pad_id=0))


def importance(tier):
    """Importance of every linear weight of the tiny model, with norms, in a tier; kronecker shares input covariances as recorded."""
    model = tiny()
    recorder = Kronecker(model) if tier == "kronecker" else Fisher(model)
    alone = distributed.running
    try:
        distributed.running = lambda: False  # every process records all of it by itself: what is compared is the pull
        for batch in text():
            recorder.observe(**batch)
        found = recorder.finish()
    finally:
        distributed.running = alone
    return found if tier == "kronecker" else Importance(converted(dict(found.entries), tier), {}, {**found.info, "norms": {}})


def observed():
    """The tensors of each observing estimator's importance, and what it counted."""
    found = {}
    recorders = [Fisher(tiny(), labels="sampled"), Kronecker(tiny()), Activation(tiny()), Kronecker(tiny(), rank=2)]
    for i, recorder in enumerate(recorders):
        if i == 3:
            recorder.look(text()[0]["input_ids"])
            recorder.divide(3)
        for group in range(recorder.passes):
            for k, batch in enumerate(text()):
                if k % distributed.size() == distributed.rank():
                    recorder.observe(**batch)
                else:
                    recorder.skip(**batch)
            if group < recorder.passes - 1:
                recorder.end_pass()
        made = recorder.finish()
        found[f"{recorder.estimator}{i}"] = ({name: entry.dense() for name, entry in made.entries.items()}, made.info["settings"])
    return found


def trained(estimator, gradient, full=False):
    """A path recorder's importance after three steps on batches that are shared by row, under DDP where there are several processes.

    In f64: AdamW's division by small gradients and Omega's by small movements enlarge f32's rounding to 2e-4 of the largest element.
    """
    model = (tiny() if full else adapted()).double()
    recorder = {"path": PathIntegral, "path-factored": PathFactored}[estimator](model, gradient=gradient, **({"names": "q_proj,v_proj"} if full else {}))
    wrapped = DistributedDataParallel(model) if distributed.running() else model
    optimizer = torch.optim.AdamW([p for w in recorder.weights for p in w.parameters], lr=1e-2)
    g = torch.Generator().manual_seed(4)
    with recorder.attach(optimizer):
        for _ in range(3):
            ids = torch.randint(3, 48, (4, 8), generator=g)[distributed.rank() :: distributed.size()]
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        recorder.end_epoch()
    made = recorder.finish()
    kept = sum(part.numel() for parts in recorder._credit.values() for part in parts)
    return {name: entry.dense() for name, entry in made.entries.items()}, made.info["settings"], kept


def recorded():
    cases = [("path", "exact"), ("path", "effective"), ("path-factored", "exact"), ("path", "exact", True)]
    return {"observed": observed(), "trained": [trained(*case) for case in cases]}


def held(tier, full, shard):
    """(gradients after a pull, energy, pull norm, ratio, bytes of importance kept)."""
    model = tiny() if full else adapted()
    if full:
        names = "q_proj,v_proj,down_proj"
        penalty = Penalty(model, importance(tier), strength=0.5, names=names, shard=shard, layers=holdfast.layers.ScaleFree())
        with torch.no_grad():
            for weight in penalty.weights:
                weight.W.mul_(1.1)
    else:
        penalty = Penalty(model, importance(tier), strength=0.5, shard=shard, layers=holdfast.layers.ScaleFree())
    parameters = [p for weight in penalty.weights for p in weight.parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    penalty.pull()
    logs = penalty.logs()
    return [p.grad for p in parameters], penalty.energy(), logs["pull_norm"], logs["pull_ratio"], sharing.memory(penalty.importance.entries)


def all_held():
    """Every tier, LoRA and full, with the importance shared out; then only the first process asks for the energy, and all of them again together."""
    found = {(tier, full): held(tier, full, True) for tier in TIERS for full in (False, True)}
    penalty = Penalty(adapted(), importance("u8"), strength=0.5, shard=True)
    penalty.settle()
    if distributed.first():
        with pytest.raises(ValueError, match="together=True"):
            penalty.energy()
    together = penalty.energy(together=True)
    penalty.pull()
    alone = penalty.energy() if distributed.first() else None  # no other process takes part: this must return
    return found, together, alone


def fully_sharded(model):
    """`model` under FSDP2, each decoder layer by itself."""
    from torch.distributed.fsdp import fully_shard

    for layer in next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList)):
        fully_shard(layer)
    return fully_shard(model)


def stepped(tier, full, when=None, optimizer=torch.optim.SGD):
    """Parameters after three steps with the pull, energy, and pull and gradient norms; under FSDP2 with the penalty made before or after sharding."""
    model = tiny() if full else adapted()
    if full:
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_("q_proj" in name or "down_proj" in name)
    found, mark = importance(tier), fingerprint(model)
    found = Importance(found.entries, {}, {**found.info, "model": {"fingerprint": mark}})
    settings = dict(strength=3.0, layers=holdfast.layers.ScaleFree(), shard=when is not None)
    penalty = None if when == "after" else Penalty(model, found, **settings)
    if when is not None:
        fully_sharded(model)
    penalty = penalty or Penalty(model, found, **settings)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(distributed.is_sharded(p) == (when is not None) for p in parameters.values())
    made = optimizer(parameters.values(), lr=0.05)
    g = torch.Generator().manual_seed(4)
    with penalty.attach(made):
        for _ in range(3):
            ids = torch.randint(3, 48, (4, 8), generator=g)[distributed.rank() :: distributed.size()]
            model(input_ids=ids, labels=ids).loss.backward()
            made.step()
            made.zero_grad()
    kept = sharing.memory({weight.name: penalty.importance[weight.name] for weight in penalty.weights if weight.name in penalty.importance})
    return {name: distributed.whole(p).detach() for name, p in parameters.items()}, penalty.energy(together=True), penalty.logs(), kept


def under_fsdp2():
    found = {(tier, full, when): stepped(tier, full, when) for tier, full, when in FSDP2}
    with pytest.raises(ValueError, match="use LoRA, DDP, or element-wise"):
        stepped("kronecker", True, "after")
    model = fully_sharded(adapted())
    recorder = PathIntegral(model)
    with pytest.raises(ValueError, match="record in one process or with DDP"):
        recorder.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="record in one process or with DDP"):
        Fisher(model)
    return found


FSDP2 = [*((tier, False, "after") for tier in TIERS), ("u8", False, "before"), *((tier, True, "after") for tier in TIERS if tier != "kronecker"),
         ("u4", True, "before")]  # fmt: skip


def same(a, b, tolerance=1e-5):
    return all(torch.allclose(a[name], b[name], rtol=tolerance, atol=tolerance * float(a[name].abs().max())) for name in a)


def test_recording_in_2_processes_is_recording_in_one(tmp_path):
    one = recorded()
    for many in processes(2, recorded, out=tmp_path / "out"):
        for name, (entries, settings) in one["observed"].items():
            assert same(entries, many["observed"][name][0]), name
            theirs = many["observed"][name][1]
            assert (theirs["tokens"], theirs["sequences"]) == (settings["tokens"], settings["sequences"]) and theirs["nats"] == pytest.approx(settings["nats"])
        for (entries, settings, kept), (others, theirs, share) in zip(one["trained"], many["trained"], strict=True):
            assert same(entries, others, 1e-10)
            assert theirs["decrease_nats"] == pytest.approx(settings["decrease_nats"], rel=1e-9) and theirs["steps"] == 3
            assert 0.35 * kept < share < 0.65 * kept  # credits are shared out by weight


@pytest.mark.parametrize("size", [2, 4])
def test_pulls_of_shared_importance_are_those_of_one_process(tmp_path, size):
    one = {(tier, full): held(tier, full, False) for tier in TIERS for full in (False, True)}
    energy = Penalty(adapted(), importance("u8"), strength=0.5).energy()
    results = processes(size, all_held, out=tmp_path / "out")
    for case, (gradients, e, norm, ratio, _) in one.items():
        assert results[0][2] == energy
        for found, together, _ in results:
            theirs = found[case]
            assert all(torch.equal(a, b) for a, b in zip(gradients, theirs[0], strict=True)), case
            assert theirs[1:4] == (e, norm, ratio) and together == energy
    for case, (*_, whole) in one.items():
        if case[1]:
            continue  # the file holds more weights than three kinds
        shares = [found[case][4] for found, *_ in results]
        assert sum(shares) == whole and max(shares) < 1.6 * whole / size, case


def test_fsdp2_steps_are_those_of_one_process(tmp_path):
    one = {(tier, full): stepped(tier, full) for tier, full, _ in FSDP2}
    results = processes(2, under_fsdp2, out=tmp_path / "out")
    for tier, full, when in FSDP2:
        parameters, energy, logs, whole = one[tier, full]
        for found in results:
            others, e, theirs, _ = found[tier, full, when]
            assert same(parameters, others), (tier, full, when)
            assert e == pytest.approx(energy, rel=1e-4) and theirs == pytest.approx(logs, rel=1e-4), (tier, full, when)
        shares = [found[tier, full, when][3] for found in results]
        assert max(shares) < 0.7 * whole, (tier, full, when)
