"""The path-integral recorder: against the formulas of the paper, against the measured loss, and in
every awkward situation of real training.
"""

import copy

import pytest
import torch

from forgetless.errors import OptionError
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.penalty.pull import Penalty
from forgetless.record.movement import effective_gradient, low_rank_movement
from forgetless.record.path import PathIntegral, normalise
from forgetless.record.path_factored import PathFactored


@pytest.fixture
def adapted(tiny):
    return add_adapter(tiny(dtype=torch.float64), names="all-linear", rank=3, alpha=6)


def parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def train(model, optimizer, ids, steps=5, accumulation=1):
    for _ in range(steps):
        for part in ids.chunk(accumulation):
            (loss_of(model, part) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("gradient", ["effective", "exact"])
def test_recorder_agrees_with_the_formulas_to_1e_6_in_f64(adapted, batch, gradient):
    """Replays every step by hand: w <- max(0, w - g d), Omega = sum over epochs of w / (U^2 + xi),
    two epochs.
    """
    twin = copy.deepcopy(adapted)
    optimizer = torch.optim.AdamW(parameters(adapted), lr=1e-2)
    recorder = PathIntegral(adapted, gradient=gradient, xi=1e-9)
    mine = torch.optim.AdamW(parameters(twin), lr=1e-2)
    weights = target_weights(twin)
    w = {x.name: torch.zeros(x.shape, dtype=torch.float64) for x in weights}
    omega = {name: torch.zeros_like(value) for name, value in w.items()}
    with recorder.attach(optimizer):
        for _epoch in range(2):
            train(adapted, optimizer, batch, steps=3)
            recorder.end_epoch()
            for _ in range(3):
                deltas = exact_gradients(twin, batch)
                loss_of(twin, batch).backward()
                before = {
                    x.name: (
                        x.A.detach().clone(),
                        x.B.detach().clone(),
                        x.A.grad.clone(),
                        x.B.grad.clone(),
                    )
                    for x in weights
                }
                mine.step()
                mine.zero_grad()
                for x in weights:
                    A, B, gA, gB = before[x.name]
                    s = x.scale
                    g = (
                        s * (B @ gA + gB @ A - 1e-2 * gB @ gA)
                        if gradient == "effective"
                        else deltas[x.name]
                    )
                    d = s * (x.B.detach() @ x.A.detach()) - s * (B @ A)
                    w[x.name] = torch.clamp(w[x.name] - g * d, min=0)
            for x in weights:
                omega[x.name] += w[x.name] / (x.update() ** 2 + 1e-9)
                w[x.name].zero_()
    importance = recorder.finish()
    for name, expected in omega.items():
        torch.testing.assert_close(
            importance[name].values, expected, rtol=1e-6, atol=1e-9 * float(expected.max())
        )


def exact_gradients(model, ids):
    """dL/dU by autograd through the merged weights: brute force."""
    merged = copy.deepcopy(model).merge_and_unload()
    for p in merged.parameters():
        p.requires_grad_(True)
    loss_of(merged, ids).backward()
    return {name: p.grad for name, p in merged.named_parameters()}


def test_pure_functions_match_their_definitions():
    torch.manual_seed(0)
    A, gA, A1 = (torch.randn(2, 5, dtype=torch.float64) for _ in range(3))
    B, gB, B1 = (torch.randn(4, 2, dtype=torch.float64) for _ in range(3))
    eta, s = 0.1, 2.0
    step = s * ((B - eta * gB) @ (A - eta * gA) - B @ A)  # one SGD step of the factors
    left, right = effective_gradient(A, B, gA, gB, s, eta)
    torch.testing.assert_close(left @ right, -step / eta)
    left, right = low_rank_movement(A, B, A1, B1, s)
    torch.testing.assert_close(left @ right, s * (B1 @ A1 - B @ A))
    assert normalise(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 1.0]), 1.0).tolist() == [
        0.0,
        1.0,
    ]


@pytest.mark.parametrize("full", [False, True])
def test_credits_sum_to_the_measured_loss_decrease_within_5_percent(tiny, batch, full):
    model = tiny(dtype=torch.float64)
    model = model if full else add_adapter(model, names="all-linear", rank=3, alpha=6)
    recorder = PathIntegral(model)
    optimizer = torch.optim.SGD([p for w in recorder.weights for p in w.parameters], lr=1e-2)
    before = float(loss_of(model, batch))
    with recorder.attach(optimizer):
        train(model, optimizer, batch, steps=120)
    decrease = before - float(loss_of(model, batch))
    assert decrease > 0.01
    assert recorder.decrease == pytest.approx(decrease, rel=0.05)


def test_accumulation_checkpointing_and_clipping_do_not_change_the_exact_gradient(adapted, batch):
    omegas = []
    for accumulation, checkpointing in ((1, False), (4, False), (2, True)):
        model = copy.deepcopy(adapted)
        if checkpointing:
            model.train()
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        recorder = PathIntegral(model)
        optimizer = torch.optim.SGD(parameters(model), lr=1e-2)
        with recorder.attach(optimizer):
            train(model, optimizer, batch, steps=3, accumulation=accumulation)
        omegas.append(recorder.finish())
    for other in omegas[1:]:
        for name in other:
            torch.testing.assert_close(
                other[name].values, omegas[0][name].values, rtol=1e-6, atol=1e-12
            )


def test_closures_frozen_factors_and_parameters_without_gradient(adapted, batch):
    recorder = PathIntegral(adapted)
    weights = recorder.weights
    weights[0].A.requires_grad_(False)
    optimizer = torch.optim.SGD(parameters(adapted), lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(adapted, batch)
        loss.backward()
        return loss

    with recorder.attach(optimizer):
        optimizer.step(closure)
        optimizer.step(closure=closure)
        assert recorder.steps == 2
        optimizer.zero_grad()
        optimizer.step()  # nothing has a gradient: nothing moves, nothing is recorded
    assert recorder.steps == 2
    lbfgs = torch.optim.LBFGS(parameters(adapted), lr=1e-2, max_iter=4)
    with pytest.raises(ValueError, match="several times per step"), recorder.attach(lbfgs):
        lbfgs.step(closure)


def test_a_step_skipped_by_the_scaler_is_not_recorded_and_scaled_gradients_count_in_nats(
    adapted, batch
):
    plain, scaled = copy.deepcopy(adapted), copy.deepcopy(adapted)
    recorders = []
    for model, factor in ((plain, 1.0), (scaled, 64.0)):
        recorder = PathIntegral(model)
        optimizer = torch.optim.SGD(parameters(model), lr=1e-2)
        scaler = FakeScaler(factor)
        with recorder.attach(optimizer, scaler=scaler):
            (
                loss_of(model, batch) * float("inf")
            ).backward()  # the scaler would skip this step: optimizer.step is never called
            optimizer.zero_grad()
            for _ in range(2):
                (loss_of(model, batch) * factor).backward()
                for p in parameters(model):
                    p.grad /= factor
                optimizer.step()
                optimizer.zero_grad()
        recorders.append(recorder)
    assert recorders[0].decrease == pytest.approx(recorders[1].decrease, rel=1e-9)


class FakeScaler:
    def __init__(self, scale):
        self.scale = scale

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scale


def test_non_finite_gradients_stop_the_recording_with_the_step(adapted, batch):
    recorder = PathIntegral(adapted)
    optimizer = torch.optim.SGD(parameters(adapted), lr=1e-2)
    with recorder.attach(optimizer):
        train(adapted, optimizer, batch, steps=2)
        (loss_of(adapted, batch) * float("nan")).backward()
        with pytest.raises(ValueError, match="step 3"):
            optimizer.step()


def test_bf16_factors_are_credited_in_f32(tiny, batch):
    model = add_adapter(tiny(), names="all-linear", rank=3, alpha=6)
    for p in parameters(model):
        p.data = p.data.to(torch.bfloat16)
    model = model.to(torch.bfloat16)
    recorder = PathIntegral(model)
    optimizer = torch.optim.SGD(parameters(model), lr=0.5)
    with recorder.attach(optimizer):
        train(model, optimizer, batch, steps=3)
    importance = recorder.finish()
    assert all(entry.values.dtype == torch.float32 for entry in importance.entries.values())
    assert recorder.decrease > 0


def test_recorder_sees_the_gradient_before_the_pull(adapted, batch):
    first = PathIntegral(adapted)
    optimizer = torch.optim.SGD(parameters(adapted), lr=1e-3)
    with first.attach(optimizer):
        train(adapted, optimizer, batch, steps=2)
    importance = first.finish()
    recorder = PathIntegral(adapted, gradient="effective")
    penalty = Penalty(adapted, importance, strength=1.0)
    seen = {}
    with penalty.attach(optimizer), recorder.attach(optimizer) as _:
        loss_of(adapted, batch).backward()
        weight = recorder.weights[0]
        left, right = effective_gradient(
            weight.A.detach(),
            weight.B.detach(),
            weight.A.grad.clone(),
            weight.B.grad.clone(),
            weight.scale,
            1e-3,
        )
        original = recorder.record_step
        recorder.record_step = lambda before, gradients: (
            seen.update(gradients),
            original(before, gradients),
        )
        optimizer.step()
    torch.testing.assert_close(seen[weight.name], left @ right)
    assert penalty.pull_norm > 0


def test_what_cannot_be_recorded_is_refused(adapted, batch):
    recorder = PathIntegral(adapted, gradient="effective")
    A = [w.A for w in recorder.weights]
    B = [w.B for w in recorder.weights]
    with pytest.raises(OptionError, match="different learning rates"):
        recorder.attach(torch.optim.SGD([{"params": A, "lr": 1e-3}, {"params": B, "lr": 1e-2}]))
    with pytest.raises(ValueError, match="not among this optimizer"):
        recorder.attach(torch.optim.SGD(A, lr=1e-3))
    with pytest.raises(ValueError, match="no optimizer step was recorded"):
        recorder.finish()
    handle = A[0].register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="inside the backward"):
        recorder.attach(torch.optim.SGD(A + B, lr=1e-3))
    handle.remove()
    for w in recorder.weights:
        w.A.requires_grad_(False), w.B.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        recorder.attach(torch.optim.SGD(A + B, lr=1e-3))


def test_closing_and_exceptions_remove_every_hook(adapted, batch):
    recorder = PathIntegral(adapted)
    optimizer = torch.optim.SGD(parameters(adapted), lr=1e-3)
    with pytest.raises(RuntimeError), recorder.attach(optimizer):
        train(adapted, optimizer, batch, steps=1)
        raise RuntimeError
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(not w.module._forward_hooks for w in recorder.weights)


def test_state_dict_goes_on_exactly(adapted, batch):
    whole, parted = copy.deepcopy(adapted), copy.deepcopy(adapted)
    recorder = PathIntegral(whole)
    optimizer = torch.optim.SGD(parameters(whole), lr=1e-2)
    with recorder.attach(optimizer):
        train(whole, optimizer, batch, steps=4)
    first = PathIntegral(parted)
    optimizer = torch.optim.SGD(parameters(parted), lr=1e-2)
    with first.attach(optimizer):
        train(parted, optimizer, batch, steps=2)
    second = PathIntegral(parted)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with second.attach(optimizer):
        train(parted, optimizer, batch, steps=2)
    a, b = recorder.finish(), second.finish()
    assert all(torch.equal(a[name].values, b[name].values) for name in a)


@pytest.mark.parametrize(
    ("gradient", "full"), [("exact", False), ("effective", False), ("exact", True)]
)
def test_path_factored_keeps_the_sums_of_the_credits(tiny, batch, gradient, full):
    """Against credits formed element by element: sums of rows and columns, clamped as sums, divided
    by sums of U^2, two epochs, accumulated batches.
    """
    model = tiny(dtype=torch.float64)
    model = model if full else add_adapter(model, names="q_proj,up_proj", rank=3, alpha=6)
    twin = copy.deepcopy(model)
    recorder, dense = (
        PathFactored(model, gradient=gradient, xi=1e-6),
        PathIntegral(twin, gradient=gradient, clamp="end"),
    )
    shares = {w.name: [] for w in dense.weights}
    original = dense._earned_by

    def kept(weight, g, before):
        shares[weight.name].append(original(weight, g, before)[0])
        return (shares[weight.name][-1],)

    dense._earned_by = kept
    expected = {w.name: torch.zeros(w.shape, dtype=torch.float64) for w in dense.weights}
    optimizers = [
        torch.optim.AdamW([p for w in r.weights for p in w.parameters], lr=1e-2)
        for r in (recorder, dense)
    ]
    with recorder.attach(optimizers[0]), dense.attach(optimizers[1]):
        for _epoch in range(2):
            train(model, optimizers[0], batch, steps=3, accumulation=2)
            train(twin, optimizers[1], batch, steps=3, accumulation=2)
            recorder.end_epoch()
            for w in dense.weights:
                row, col = (
                    torch.zeros(w.shape[0], dtype=torch.float64),
                    torch.zeros(w.shape[1], dtype=torch.float64),
                )
                for share in shares[w.name]:
                    row, col = (row + share.sum(1)).clamp(min=0), (col + share.sum(0)).clamp(min=0)
                shares[w.name].clear()
                denominator = w.update() ** 2 + 1e-6
                inverse = denominator.sum() / torch.outer(
                    denominator.sum(1), denominator.sum(0)
                )  # 1 over the rank-1 form by sums
                expected[w.name] += torch.outer(row, col) / (row.sum() * col.sum()).sqrt() * inverse
    assert recorder.decrease == pytest.approx(dense.decrease, rel=1e-9)
    importance = recorder.finish()
    assert importance.tier == "factored" and importance.info["estimator"] == "path-factored"
    for name, omega in expected.items():
        rank_one = torch.outer(omega.sum(1), omega.sum(0)) / omega.sum()
        torch.testing.assert_close(
            importance[name].dense(), rank_one, rtol=1e-6, atol=1e-9 * float(rank_one.max())
        )


def test_path_factored_makes_no_tensor_of_the_weights_size(adapted, batch):
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = {w.shape for w in target_weights(adapted)}
    made = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.update(
                tuple(t.shape)
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(t, torch.Tensor)
            )
            return out

    recorder = PathFactored(adapted)
    optimizer = torch.optim.SGD(parameters(adapted), lr=1e-2)
    with recorder.attach(optimizer):
        loss_of(adapted, batch[:, :7]).backward()
        with Watch():
            optimizer.step()
            recorder.end_epoch()
    assert made and not shapes & made


def test_path_factored_goes_on_from_its_state(adapted, batch):
    whole, parted = copy.deepcopy(adapted), copy.deepcopy(adapted)
    recorder = PathFactored(whole)
    optimizer = torch.optim.SGD(parameters(whole), lr=1e-2)
    with recorder.attach(optimizer):
        train(whole, optimizer, batch, steps=4)
    first, second = PathFactored(parted), PathFactored(parted)
    optimizer = torch.optim.SGD(parameters(parted), lr=1e-2)
    with first.attach(optimizer):
        train(parted, optimizer, batch, steps=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with second.attach(optimizer):
        train(parted, optimizer, batch, steps=2)
    a, b = recorder.finish(), second.finish()
    assert all(torch.equal(a[name].dense(), b[name].dense()) for name in a)
    with pytest.raises(ValueError, match="another estimator"):
        PathIntegral(parted).load_state_dict(first.state_dict())


def test_clamping_at_the_end_keeps_what_steps_take_back(adapted, batch):
    """The same run: clamped in every step the credit is the larger, and only the other one sums to
    the loss decrease.
    """
    twin = copy.deepcopy(adapted)
    omegas, recorders = [], []
    for model, clamp in ((adapted, "step"), (twin, "end")):
        recorder = PathIntegral(model, clamp=clamp)
        optimizer = torch.optim.SGD(parameters(model), lr=0.3)
        with recorder.attach(optimizer):
            train(model, optimizer, batch, steps=6)
        recorders.append(recorder)
        omegas.append({name: parts[0].clone() for name, parts in recorder._credits.credit.items()})
    for name in omegas[0]:
        assert (omegas[0][name] >= omegas[1][name] - 1e-15).all()
    assert any((omegas[1][name] < 0).any() for name in omegas[1])
    assert sum(float(w.sum()) for w in omegas[1].values()) == pytest.approx(
        recorders[1].decrease, rel=1e-9
    )
    assert all((entry.values >= 0).all() for entry in recorders[1].finish().entries.values())


def test_different_learning_rates_per_factor_are_recorded_with_the_exact_gradient(tiny, batch):
    """As with LoRA+: the movement is the real one, so the credits still add up to the loss
    decrease.
    """
    model = add_adapter(tiny(dtype=torch.float64), names="all-linear", rank=3, alpha=6)
    recorder = PathIntegral(model)
    groups = [
        {"params": [w.A for w in recorder.weights], "lr": 1e-3},
        {"params": [w.B for w in recorder.weights], "lr": 1.6e-2},
    ]
    optimizer = torch.optim.SGD(groups)
    before = float(loss_of(model, batch))
    with recorder.attach(optimizer):
        train(model, optimizer, batch, steps=60)
    assert recorder.decrease == pytest.approx(before - float(loss_of(model, batch)), rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_a_real_grad_scaler_skips_and_scales(tiny, batch, fused):
    """torch's GradScaler on the CPU: an infinite gradient is skipped, and the others count in nats
    as without a scaler.
    """
    decreases = []
    for enabled in (False, True):
        model = add_adapter(tiny(), names="all-linear", rank=3, alpha=6)
        recorder = PathIntegral(model)
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        with recorder.attach(optimizer, scaler=scaler):
            if enabled:
                scaler.scale(loss_of(model, batch) * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert recorder.steps == 0 and scaler.get_scale() == 128.0
            for _ in range(3):
                scaler.scale(loss_of(model, batch)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert recorder.steps == 3
        decreases.append(recorder.decrease)
    assert decreases[1] == pytest.approx(decreases[0], rel=1e-4)


def test_movements_of_bf16_factors_lose_nothing_to_cancellation():
    """A step of one bf16 unit on large factors: the low-rank form has it to f32 accuracy, the
    difference of two f32 products does not.
    """
    torch.manual_seed(0)
    A, B = torch.randn(64, 64).bfloat16(), (100 * torch.randn(64, 64)).bfloat16()
    after = torch.where(torch.rand(B.shape) < 0.01, B * (1 + 2**-7), B)
    exact = (after.double() - B.double()) @ A.double()
    left, right = low_rank_movement(A.float(), B.float(), A.float(), after.float(), 1.0)
    ours = left @ right
    torch.testing.assert_close(
        ours.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max())
    )
    naive = (after.float() @ A.float() - B.float() @ A.float()).double()
    assert float((naive - exact).abs().max()) > 10 * float((ours - exact).abs().max())
