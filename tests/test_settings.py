"""What people train with: pull and recorder under checkpointing, torch.compile, fp16 with a scaler,
8-bit optimizers and CPU offload; docs/scaling.md has all.

bf16 factors are in test_penalty, test_path and test_forms, 4- and 8-bit bases in test_quantized,
the recorder's scaler and checkpointing in test_path.
"""

import pytest
import torch

from forgetless import Fisher, PathIntegral, Penalty
from forgetless.model.adapters import add_adapter


@pytest.fixture
def importance(tiny, batch):
    recorder = Fisher(tiny())
    recorder.observe(batch)
    return recorder.finish()


@pytest.fixture
def adapted(tiny):
    def build():
        model = add_adapter(tiny(), names="all-linear", rank=2, alpha=4)
        g = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in trained(model):
                p.add_(torch.randn(p.shape, generator=g) * 0.05)
        return model

    return build


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def factors(model):
    return torch.cat([p.detach().flatten() for p in trained(model)])


def held(model, importance, batch, optimizer, loss=None, step=None):
    """The factors after three steps with the pull."""
    penalty = Penalty(model, importance, strength=5.0)
    with penalty.attach(optimizer):
        for _ in range(3):
            value = loss(model) if loss else model(input_ids=batch, labels=batch).loss
            value.backward()
            (step or optimizer.step)()
            optimizer.zero_grad()
    return factors(model)


def plainly(adapted, importance, batch):
    model = adapted()
    return held(model, importance, batch, torch.optim.SGD(trained(model), lr=0.05))


def test_the_pull_under_gradient_checkpointing(adapted, importance, batch):
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    found = held(model, importance, batch, torch.optim.SGD(trained(model), lr=0.05))
    torch.testing.assert_close(found, plainly(adapted, importance, batch))


def test_the_pull_of_a_compiled_model(adapted, importance, batch):
    model = torch.compile(adapted(), backend="aot_eager")
    found = held(model, importance, batch, torch.optim.SGD(trained(model), lr=0.05))
    torch.testing.assert_close(found, plainly(adapted, importance, batch), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # dynamo says what it recompiles
def test_a_compiled_model_is_recorded_where_the_recorder_comes_first_and_refused_where_not(
    adapted, batch
):
    def recorded(compiled, called):
        torch._dynamo.reset()
        model = adapted()
        run = torch.compile(model, backend="eager") if compiled else model
        if called:
            run(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()
        recorder, optimizer = PathIntegral(run), torch.optim.SGD(trained(model), lr=0.05)
        with recorder.attach(optimizer):
            for _ in range(2):
                run(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return recorder.finish()

    plain, compiled = recorded(False, False), recorded(True, False)
    assert all(
        torch.allclose(plain[name].dense(), compiled[name].dense(), rtol=1e-4) for name in plain
    )
    with pytest.raises(ValueError, match="attach it before the first forward pass"):
        recorded(True, True)


@pytest.mark.parametrize("fused", [False, True])
def test_the_pull_under_fp16_with_a_scaler(adapted, importance, batch, fused):
    """The scale must not multiply or divide the pull, and a step that the scaler skips moves
    nothing.
    """
    model = adapted()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(trained(model), lr=0.05, fused=fused)

    def loss(model):
        with torch.autocast("cpu", dtype=torch.float16):
            return scaler.scale(model(input_ids=batch, labels=batch).loss)

    def step():
        scaler.step(optimizer)
        scaler.update()

    before = factors(model)
    penalty = Penalty(model, importance, strength=5.0)
    with penalty.attach(optimizer):
        (loss(model) * float("inf")).backward()
        step()
        optimizer.zero_grad()
    assert torch.equal(factors(model), before) and scaler.get_scale() == 512.0
    expected = plainly(adapted, importance, batch)
    found = held(model, importance, batch, optimizer, loss, step)
    assert float((found - expected).norm()) < 0.01 * float(
        (expected - before).norm()
    )  # fp16 has 11 bits
    free = adapted()
    without = torch.optim.SGD(trained(free), lr=0.05)
    for _ in range(3):
        free(input_ids=batch, labels=batch).loss.backward()
        without.step()
        without.zero_grad()
    assert float((factors(free) - expected).norm()) > 0.1 * float(
        (expected - before).norm()
    )  # the pull was there


def test_8_bit_optimizers_step_on_the_gradient_with_the_pull(adapted, importance, batch):
    bnb = pytest.importorskip("bitsandbytes")
    model, by_hand = adapted(), adapted()
    make = lambda model: bnb.optim.AdamW8bit(
        trained(model), lr=1e-2, weight_decay=0.0, min_8bit_size=1
    )
    optimizer = make(model)
    found = held(model, importance, batch, optimizer)
    assert next(iter(optimizer.state.values()))["state1"].dtype == torch.uint8
    optimizer, penalty = make(by_hand), Penalty(by_hand, importance, strength=5.0)
    for _ in range(3):
        by_hand(input_ids=batch, labels=batch).loss.backward()
        penalty.pull()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(found, factors(by_hand))


def test_8_bit_optimizers_are_recorded(adapted, batch):
    bnb = pytest.importorskip("bitsandbytes")
    model = adapted()
    recorder, optimizer = (
        PathIntegral(model),
        bnb.optim.AdamW8bit(trained(model), lr=1e-3, min_8bit_size=1),
    )
    with recorder.attach(optimizer):
        before = float(model(input_ids=batch, labels=batch).loss)
        for _ in range(5):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = float(model(input_ids=batch, labels=batch).loss)
    assert recorder.steps == 5 and recorder.decrease == pytest.approx(
        before - after, rel=0.3
    )  # a sum over steps against the loss itself


def test_an_optimizer_on_copies_is_refused_and_held_by_pulling_before_gradients_are_copied(
    adapted, importance, batch
):
    model = adapted()
    copies = [p.detach().clone() for p in trained(model)]
    optimizer, penalty = torch.optim.SGD(copies, lr=0.05), Penalty(model, importance, strength=5.0)
    with pytest.raises(ValueError, match="not among this optimizer's parameters"):
        penalty.attach(optimizer)
    for _ in range(3):
        model(input_ids=batch, labels=batch).loss.backward()
        penalty.pull()
        for copy, p in zip(copies, trained(model), strict=True):
            copy.grad, p.grad = p.grad, None
        optimizer.step()
        with torch.no_grad():
            for copy, p in zip(copies, trained(model), strict=True):
                p.copy_(copy)
    assert torch.equal(factors(model), plainly(adapted, importance, batch))


class CPUOffloadOptimizer:
    """As torchao's: not a torch optimizer; it copies gradients away inside the backward pass."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]

    def step(self):
        pass


def test_optimizers_that_take_gradients_inside_the_backward_pass_are_refused(adapted, importance):
    model = adapted()
    for attach in (Penalty(model, importance, strength=1.0).attach, PathIntegral(model).attach):
        with pytest.raises(
            ValueError, match="expected a torch optimizer, found CPUOffloadOptimizer"
        ):
            attach(CPUOffloadOptimizer(trained(model)))
