"""Several gloo processes on the CPU give the result of one: recording, holding under DDP and FSDP2;
and what is refused. A group of them runs many cases.
"""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import forgetless
from conftest import CONFIGS, forking
from forgetless import Fisher, Importance, Kronecker, PathIntegral, Penalty
from forgetless.data.encoding import batches
from forgetless.errors import OptionError
from forgetless.importance.tiers import converted
from forgetless.model import distributed, shards
from forgetless.model.adapters import add_adapter
from forgetless.model.fingerprint import fingerprint
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.penalty import sharing
from forgetless.penalty.callback import PenaltyCallback
from forgetless.record import record as recording
from forgetless.record import state as recording_state
from forgetless.record import sums
from forgetless.record.activation import Activation
from forgetless.record.callback import RecorderCallback
from forgetless.record.path_factored import PathFactored
from forgetless.tune.tune import tune

EXAMPLES = Path(__file__).parents[1] / "examples" / "accelerate"
TIERS = ("f32", "bf16", "u8", "u4", "factored:2", "kronecker")


# What a process runs: functions of this module, called by every process; what the first returns
# comes back.


def _main(rank, size, port, function, arguments, out):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
    )
    torch.set_num_threads(1)
    distributed.start("cpu")
    torch.save(globals()[function](*arguments), f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def processes(size, function, *arguments, out):
    """What `function` returned in each of `size` processes.

    They are forked from a server that has imported everything once.
    """
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(
            target=_main, args=(rank, size, port, function.__name__, arguments, str(out))
        )
        for rank in range(size)
    ]
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
    rows = [
        torch.randint(3, 48, (int(n),), generator=g).tolist()
        for n in torch.randint(4, 12, (13,), generator=g)
    ]
    return list(batches([(row, [True] * len(row)) for row in rows], batch_size=3, pad_id=0))


def importance(tier):
    """Importance of every linear weight of the tiny model, with norms, in a tier; kronecker shares
    input covariances as recorded.
    """
    model = tiny()
    recorder = Kronecker(model) if tier == "kronecker" else Fisher(model)
    alone = distributed.running
    try:
        distributed.running = lambda: (
            False
        )  # every process records all of it by itself: what is compared is the pull
        for batch in text():
            recorder.observe(**batch)
        found = recorder.finish()
    finally:
        distributed.running = alone
    return (
        found
        if tier == "kronecker"
        else Importance(converted(dict(found.entries), tier), {}, {**found.info, "norms": {}})
    )


def observed():
    """The tensors of each observing estimator's importance, and what it counted."""
    found = {}
    recorders = [
        Fisher(tiny(), labels="sampled"),
        Kronecker(tiny()),
        Activation(tiny()),
        Kronecker(tiny(), rank=2),
    ]
    for i, recorder in enumerate(recorders):
        if i == 3:
            recorder.look(text()[0]["input_ids"])
            recorder.divide(3)
        for group in range(recorder.passes):
            for k, batch in enumerate(text()):
                if k % distributed.world_size() == distributed.rank():
                    recorder.observe(**batch)
                else:
                    recorder.skip(**batch)
            if group < recorder.passes - 1:
                recorder.end_pass()
        made = recorder.finish()
        found[f"{recorder.estimator}{i}"] = (
            {name: entry.dense() for name, entry in made.entries.items()},
            made.info["settings"],
        )
    return found


def tracked():
    """What a recording has whose covariances are tracked, each process its part of the text: the
    energy of an update of each weight, and the traces.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "TRACKED_FROM", 16)
        recorder = Kronecker(tiny(), rank=2)
        for k, batch in enumerate(text()):
            if k % distributed.world_size() == distributed.rank():
                recorder.observe(**batch)
            else:
                recorder.skip(**batch)
        made = recorder.finish()
    found = {}
    for name, entry in made.entries.items():
        U = torch.randn(entry.shape, generator=torch.Generator().manual_seed(0))
        traces = entry.in_cov.trace(), entry.out_cov.trace()
        found[name] = float(entry.energy(U)), *traces
    return found


def trained(estimator, gradient, full=False):
    """A path recorder's importance after three steps on batches that are shared by row, under DDP
    where there are several processes.

    In f64: AdamW's division by small gradients and Omega's by small movements enlarge f32's
    rounding to 2e-4 of the largest element.
    """
    model = (tiny() if full else adapted()).double()
    recorder = {"path": PathIntegral, "path-factored": PathFactored}[estimator](
        model, gradient=gradient, **({"names": "q_proj,v_proj"} if full else {})
    )
    wrapped = DistributedDataParallel(model) if distributed.running() else model
    optimizer = torch.optim.AdamW([p for w in recorder.weights for p in w.parameters], lr=1e-2)
    g = torch.Generator().manual_seed(4)
    with recorder.attach(optimizer):
        for _ in range(3):
            ids = torch.randint(3, 48, (4, 8), generator=g)[
                distributed.rank() :: distributed.world_size()
            ]
            wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.zero_grad()
        recorder.end_epoch()
    made = recorder.finish()
    kept = sum(part.numel() for parts in recorder._credits.credit.values() for part in parts)
    return (
        {name: entry.dense() for name, entry in made.entries.items()},
        made.info["settings"],
        kept,
    )


def recorded():
    cases = [
        ("path", "exact"),
        ("path", "effective"),
        ("path-factored", "exact"),
        ("path", "exact", True),
    ]
    return {
        "observed": observed(),
        "trained": [trained(*case) for case in cases],
        "tracked": tracked(),
    }


def held(tier, full, shard):
    """(gradients after a pull, energy, pull norm, ratio, bytes of importance kept)."""
    model = tiny() if full else adapted()
    if full:
        names = "q_proj,v_proj,down_proj"
        penalty = Penalty(
            model,
            importance(tier),
            strength=0.5,
            names=names,
            shard=shard,
            layers=forgetless.layers.ScaleFree(),
        )
        with torch.no_grad():
            for weight in penalty.weights:
                weight.W.mul_(1.1)
    else:
        penalty = Penalty(
            model, importance(tier), strength=0.5, shard=shard, layers=forgetless.layers.ScaleFree()
        )
    parameters = [p for weight in penalty.weights for p in weight.parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    penalty.pull()
    logs = penalty.logs()
    return (
        [p.grad for p in parameters],
        penalty.energy(),
        logs["pull_norm"],
        logs["pull_ratio"],
        sharing.memory(penalty.importance.entries),
    )


def all_held():
    """Every tier, LoRA and full, with the importance shared out; then only the first process asks
    for the energy, and all of them again together.
    """
    found = {(tier, full): held(tier, full, True) for tier in TIERS for full in (False, True)}
    penalty = Penalty(adapted(), importance("u8"), strength=0.5, shard=True)
    penalty.settle()
    if distributed.first():
        with pytest.raises(ValueError, match="together=True"):
            penalty.energy()
    together = penalty.energy(together=True)
    penalty.pull()
    alone = (
        penalty.energy() if distributed.first() else None
    )  # no other process takes part: this must return
    return found, together, alone


def fully_sharded(model, offload=False):
    """`model` under FSDP2, each decoder layer by itself; with parameters, gradients and optimizer
    state in CPU memory between uses, as FSDP2 offloads them.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    for layer in next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList)
    ):
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


def sharded_by_accelerate(model):
    """`model` as accelerate's own FSDP2 prepares it, which a trainer on a CPU would not be given:
    accelerate takes DDP there.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=distributed.first(),
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def stepped(tier, full, when=None, optimizer=torch.optim.SGD):
    """Parameters after three steps with the pull, energy, and pull and gradient norms; under FSDP2
    made before or after sharding, or offloaded.
    """
    model = tiny() if full else adapted()
    if full:
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            p.requires_grad_("q_proj" in name or "down_proj" in name)
    found, mark = importance(tier), fingerprint(model)
    found = Importance(found.entries, {}, {**found.info, "model": {"fingerprint": mark}})
    settings = dict(strength=3.0, layers=forgetless.layers.ScaleFree(), shard=when is not None)
    penalty = Penalty(model, found, **settings) if when in (None, "before", "accelerate") else None
    if when == "accelerate":
        sharded_by_accelerate(model)
    elif when is not None:
        fully_sharded(model, offload=when == "offloaded")
    penalty = penalty or Penalty(model, found, **settings)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(shards.is_sharded(p) == (when is not None) for p in parameters.values())
    made = optimizer(parameters.values(), lr=0.05)
    g = torch.Generator().manual_seed(4)
    with penalty.attach(made):
        for _ in range(3):
            ids = torch.randint(3, 48, (4, 8), generator=g)[
                distributed.rank() :: distributed.world_size()
            ]
            model(input_ids=ids, labels=ids).loss.backward()
            made.step()
            made.zero_grad()
    kept = sharing.memory(
        {
            weight.name: penalty.importance[weight.name]
            for weight in penalty.weights
            if weight.name in penalty.importance
        }
    )
    return (
        {name: shards.gathered(p).detach() for name, p in parameters.items()},
        penalty.energy(together=True),
        penalty.logs(),
        kept,
    )


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


def names(out):
    """What a run left; the first process may still hold the lock while another looks."""
    return sorted(path.name for path in out.iterdir() if path.name != ".lock")


def tuned(folder, data, cases, name):
    """The final weights, run.json's energy and what lies in the folder after `tune`, by case."""
    found = []
    for i, (tier, full) in enumerate(cases):
        out = folder.parent / f"{name}{i}"
        given = {
            "model": str(folder),
            "data": str(data),
            "out": str(out),
            "importance": str(folder.parent / f"{tier}.safetensors"),
            "strength": 0.1,
            "targets": "q_proj,down_proj",
            "full": full,
            "rank": 2,
            "batch_size": 4,
            "accumulation": 1,
            "epochs": 1,
            "learning_rate": 1e-2,
            "log_steps": 1,
            "device": "cpu",
        }
        run = tune(resolve(TuneOptions, given))
        weights = load_file(
            out / "final" / ("model.safetensors" if full else "adapter_model.safetensors")
        )
        found.append(
            (
                weights,
                run["energy"],
                [entry["loss"] for entry in run["log"] if "loss" in entry],
                names(out),
            )
        )
    return found


FSDP2 = [
    *((tier, False, "after") for tier in TIERS),
    ("u8", False, "before"),
    *((tier, True, "after") for tier in TIERS if tier != "kronecker"),
    ("u4", True, "before"),
    ("u8", False, "offloaded"),
    ("f32", True, "offloaded"),
    ("u8", False, "accelerate"),
    ("kronecker", False, "accelerate"),
]


def same(a, b, tolerance=1e-5):
    return all(
        torch.allclose(
            a[name], b[name], rtol=tolerance, atol=tolerance * float(a[name].abs().max())
        )
        for name in a
    )


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_recording_in_many_processes_is_recording_in_one(tmp_path, size):
    one = recorded()
    for many in processes(size, recorded, out=tmp_path / "out"):
        for name, (entries, settings) in one["observed"].items():
            assert same(entries, many["observed"][name][0]), name
            theirs = many["observed"][name][1]
            assert (theirs["tokens"], theirs["sequences"]) == (
                settings["tokens"],
                settings["sequences"],
            ) and theirs["nats"] == pytest.approx(settings["nats"])
        for (entries, settings, kept), (others, theirs, share) in zip(
            one["trained"], many["trained"], strict=True
        ):
            assert same(entries, others, 1e-10)
            assert (
                theirs["decrease_nats"] == pytest.approx(settings["decrease_nats"], rel=1e-9)
                and theirs["steps"] == 3
            )
            assert (
                size > 2 or 0.35 * kept < share < 0.65 * kept
            )  # credits are shared out by weight, of which there are few
        for name, (energy, *traces) in one["tracked"].items():
            theirs, *others = many["tracked"][name]
            # Directions that two have tracked apart are not quite those that one has tracked.
            assert theirs == pytest.approx(energy, rel=0.15), name
            assert others == pytest.approx(traces, rel=1e-4), name


@pytest.mark.parametrize("size", [2, 4])
def test_pulls_of_shared_importance_are_those_of_one_process(tmp_path, size):
    one = {(tier, full): held(tier, full, False) for tier in TIERS for full in (False, True)}
    energy = Penalty(adapted(), importance("u8"), strength=0.5).energy()
    results = processes(size, all_held, out=tmp_path / "out")
    for case, (gradients, e, norm, ratio, _) in one.items():
        assert results[0][2] == pytest.approx(energy, rel=1e-6)
        for found, together, _ in results:
            theirs = found[case]
            assert all(torch.equal(a, b) for a, b in zip(gradients, theirs[0], strict=True)), case
            assert theirs[1:4] == pytest.approx(
                (e, norm, ratio), rel=1e-6
            ) and together == pytest.approx(energy, rel=1e-6)
    for case, (*_, whole) in one.items():
        if case[1]:
            continue  # the file holds more weights than three kinds
        shares = [found[case][4] for found, *_ in results]
        assert sum(shares) == whole and max(shares) < 1.6 * whole / size, case


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fsdp2_steps_are_those_of_one_process(tmp_path, size):
    one = {(tier, full): stepped(tier, full) for tier, full, _ in FSDP2}
    results = processes(size, under_fsdp2, out=tmp_path / "out")
    for tier, full, when in FSDP2:
        parameters, energy, logs, whole = one[tier, full]
        for found in results:
            others, e, theirs, _ = found[tier, full, when]
            assert same(parameters, others), (tier, full, when)
            assert e == pytest.approx(energy, rel=1e-4) and theirs == pytest.approx(
                logs, rel=1e-4
            ), (tier, full, when)
        shares = [found[tier, full, when][3] for found in results]
        assert max(shares) < (0.7 if tier != "factored:2" or not full else 0.8) * whole, (
            tier,
            full,
            when,
        )  # factored: rows are cut, columns are not


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_tune_in_many_processes_is_tune_in_one(tmp_path, model_folder, size):
    """15 rows, a batch of 4: the last step of the epoch is not full, and no row may count twice.

    One process writes.
    """
    data = tmp_path / "domain.jsonl"
    data.write_text(
        "\n".join(
            json.dumps(
                {"prompt": f"Question {'abcd'[i % 4]} ?", "completion": " yes no" * (1 + i % 3)}
            )
            for i in range(15)
        )
    )
    cases = [("u8", False), ("f32", True)]
    for tier, _ in cases:
        importance(tier).save(tmp_path / f"{tier}.safetensors")
    one = tuned(model_folder, data, cases, "one")
    results = processes(size, tuned, model_folder, data, cases, "two", out=tmp_path / "out")
    for found in results:
        for (weights, energy, losses, files), (others, e, theirs, written) in zip(
            one, found, strict=True
        ):
            assert (
                same(weights, others, 1e-4)
                and e == pytest.approx(energy, rel=1e-4)
                and theirs == pytest.approx(losses, rel=1e-4)
            )
            assert written == files


@pytest.mark.parametrize(
    "kind, fsdp2, named",
    [
        ("DEEPSPEED", False, "DDP or FSDP2"),
        ("FSDP", False, "fsdp_version: 2"),
        ("MEGATRON_LM", False, "DDP or FSDP2"),
    ],
)
def test_engines_that_keep_their_own_gradients_are_refused_before_training(kind, fsdp2, named):
    model, found = adapted(), importance("f32")
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(deepspeed=None),
        accelerator=SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=fsdp2),
    )
    with pytest.raises(ValueError, match=named):
        forgetless.hold(trainer, found, strength=1.0)
    recorder = RecorderCallback(PathIntegral(model), trainer=trainer)
    with pytest.raises(ValueError, match=named):
        recorder.on_train_begin(trainer.args, None, None)
    if kind == "DEEPSPEED":
        callback = PenaltyCallback(Penalty(model, found, strength=1.0))
        with pytest.raises(ValueError, match=named):
            callback.on_train_begin(SimpleNamespace(deepspeed="zero.json"), None, None)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_the_verbs_refuse_engines_that_spread_the_model(monkeypatch, tmp_path, variable):
    monkeypatch.setenv(variable, "true")
    options = resolve(
        TuneOptions, {"model": "m", "data": "d", "out": str(tmp_path / "run"), "method": "plain"}
    )
    with pytest.raises(OptionError, match=r"ddp\.yaml"):
        tune(options)
    assert not (tmp_path / "run").exists()


def test_steps_are_shared_out_evenly_or_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert (
        distributed.split_batch(3, 8) == (3, 2)
        and distributed.split_batch(4, 6) == (2, 3)
        and distributed.split_batch(8, 1) == (2, 1)
    )
    with pytest.raises(OptionError, match="multiple of the number of processes"):
        distributed.split_batch(3, 2)


def test_memory_is_shared_out_evenly_and_what_is_shared_stays_together(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    sizes = {
        "q": ("x", 5),
        "k": ("x", 5),
        "v": ("x", 5),
        "o": ("o", 6),
        "up": ("up", 9),
        "down": ("down", 12),
    }
    owner = distributed.owners(sizes)
    assert owner["q"] == owner["k"] == owner["v"]
    load = [
        sum(size for name, (_, size) in sizes.items() if owner[name] == rank) for rank in range(3)
    ]
    assert sum(load) == 42 and max(load) == 15


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_configurations_parse(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and set(yaml.safe_load(path.read_text())) <= set(
        config.to_dict()
    ) | {"fsdp_config"}
    if path.name == "fsdp2.yaml":
        assert (
            config.distributed_type == DistributedType.FSDP
            and config.fsdp_config["fsdp_version"] == 2
        )


def resumed(folder, text_file, estimator):
    """A recording that stopped after its third step, or batch, and goes on."""
    given = {
        "model": str(folder),
        "general": str(text_file),
        "out": str(folder.parent / f"{estimator}.safetensors"),
        "estimator": estimator,
        "rank": 2,
        "epochs": 2,
        "batch_size": 3,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "device": "cpu",
    }
    given = (
        given
        if estimator == "path"
        else {
            k: v
            for k, v in given.items()
            if k not in ("rank", "epochs", "accumulation", "learning_rate")
        }
    )
    whole = recording.record(resolve(RecordOptions, given))
    write, calls = recording_state.write, []

    def stop(*arguments):
        write(*arguments)
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt

    recording_state.write = stop
    with pytest.raises(KeyboardInterrupt):
        recording.record(resolve(RecordOptions, {**given, "overwrite": True}))
    recording_state.write = write
    # a launch ends with all of its processes: none is still writing when the next one clears up
    distributed.barrier()
    again = recording.record(resolve(RecordOptions, {**given, "resume": True}))
    return all(torch.equal(whole[name].dense(), again[name].dense()) for name in whole), sorted(
        path.name for path in folder.parent.glob("*.state*")
    )


@pytest.mark.parametrize("estimator", ["path", "fisher"])
def test_recording_in_2_processes_resumes_to_the_same_bits(
    tmp_path, model_folder, text_file, estimator
):
    assert (
        processes(2, resumed, model_folder, text_file, estimator, out=tmp_path / "out")
        == [(True, [])] * 2
    )
