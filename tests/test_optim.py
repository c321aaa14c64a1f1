"""The optimizer step on plain tensors: the learning rate, decay, clipping, a skip that leaves no trace, the average."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mdmtrain.config import OptimConfig
from mdmtrain.optim import EMA, build_optimizer, learning_rate, optimizer_step

HEALTHY = torch.tensor(True)


class Small(nn.Module):
    """A matrix, a cube, the gain of a norm, and two matrices in blocks, which Muon takes where it is asked for."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.cube = nn.Parameter(torch.randn(2, 3, 2, generator=generator))
        self.gain = nn.Parameter(torch.ones(5))
        self.layers = nn.ParameterList(torch.randn(size, generator=generator) for size in ((3, 4), (5, 2)))


def start(**options):
    model = Small()
    return model, build_optimizer(model, OptimConfig(lr=0.1, **options))


both = pytest.mark.parametrize("kind", ["adamw", "muon"])


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def total_norm(model):
    return math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))


def state(model, optimizer, *averages):
    """Every bit of training state: name -> bytes."""
    bits = {}
    for name, p in model.named_parameters():
        bits[name] = p.detach()
        bits |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
        bits |= {f"{name}.average": average.tensors[name] for average in averages}
    return {key: value.clone().numpy().tobytes() for key, value in bits.items()}


# ---- learning rate


def test_cosine_at_its_ends_and_in_the_middle():
    config = OptimConfig(lr=2.0, warmup_steps=10, min_lr_ratio=0.1)
    assert learning_rate(config, 0, 110) == pytest.approx(0.2)  # not 0: the first step learns
    assert learning_rate(config, 4, 110) == pytest.approx(1.0)
    assert learning_rate(config, 9, 110) == learning_rate(config, 10, 110) == 2.0  # continuous at the end of warm-up
    assert learning_rate(config, 60, 110) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert learning_rate(config, 109, 110) == pytest.approx(0.2, rel=0.01)
    assert learning_rate(config, 110, 110) == pytest.approx(0.2)


def test_wsd_is_stable_and_then_linear():
    config = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.1)
    values = [learning_rate(config, step, 100) for step in range(101)]
    assert values[9:81] == [2.0] * 72
    assert values[90] == pytest.approx(2.0 * (0.1 + 0.9 / 2)) and values[100] == pytest.approx(0.2)
    falls = [a - b for a, b in pairwise(values[80:])]
    assert falls == pytest.approx([0.09] * 20)


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    steps=st.integers(1, 3000),
    warmup=st.floats(0, 1),
    decay=st.floats(0.01, 1),
    floor=st.floats(0, 1),
)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_learning_rate_is_continuous_and_never_leaves_its_range(schedule, steps, warmup, decay, floor):
    """Up by 1/warm-up a step, down by no more than a step of the decay, from nothing above the peak to the floor."""
    stable = steps if schedule == "cosine" else steps - max(1, round(steps * decay))
    warmup_steps = int(warmup * stable)
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup_steps, decay_fraction=decay, min_lr_ratio=floor)
    values = [learning_rate(config, step, steps) for step in range(steps + 1)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    peak = max(0, warmup_steps - 1)
    assert values[peak] == 1.0 and (warmup_steps == steps or values[-1] == pytest.approx(floor, abs=1e-9))
    assert all(a < b for a, b in pairwise(values[: peak + 1]))
    falling = steps - warmup_steps if schedule == "cosine" else max(1, round(steps * decay))
    steepest = (math.pi / 2 if schedule == "cosine" else 1) / max(1, falling)
    if warmup_steps < steps:
        assert all(-1e-12 <= a - b <= steepest + 1e-9 for a, b in pairwise(values[peak:]))


# ---- decay


@both
def test_weight_decay_acts_on_matrices_only(kind):
    model, optimizer = start(weight_decay=0.5, name=kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer_step(optimizer, HEALTHY, 0.1, 1.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 if name == "gain" else 1 - 0.1 * 0.5))


def test_a_step_is_adamws_with_the_rate_it_is_given():
    model, optimizer = start(weight_decay=0.1, beta1=0.8, beta2=0.9, adam_eps=1e-6)
    twin = Small()
    reference = torch.optim.AdamW(
        [{"params": [twin.matrix, twin.cube, *twin.layers]}, {"params": [twin.gain], "weight_decay": 0.0}],
        betas=(0.8, 0.9),
        eps=1e-6,
        weight_decay=0.1,
        foreach=False,
    )
    for seed, lr in enumerate((0.1, 0.03, 0.5)):
        for each in (model, twin):
            set_gradients(each, seed)
        optimizer_step(optimizer, HEALTHY, lr, None)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert ours.grad is None  # nothing is left for the next step to add to


# ---- clipping


@pytest.mark.parametrize(("clip", "kept"), [(None, 1.0), (1e6, 1.0), (0.5, None)])
@both
def test_gradients_are_scaled_to_the_largest_norm_and_never_up(clip, kept, kind):
    model, optimizer = start(beta1=0.9, name=kind)
    set_gradients(model, 0)
    gradients = {p: p.grad.clone() for p in model.parameters()}
    expected = total_norm(model)
    norm, skipped = optimizer_step(optimizer, HEALTHY, 0.1, clip)
    assert float(norm) == pytest.approx(expected, rel=1e-6) and float(skipped) == 0  # the norm before clipping
    scale = kept if kept is not None else clip / expected
    for p, gradient in gradients.items():
        key, share = ("momentum", 0.05) if "momentum" in optimizer.state[p] else ("exp_avg", 0.1)
        torch.testing.assert_close(optimizer.state[p][key], share * scale * gradient, rtol=1e-4, atol=1e-7)
    if kept is None:  # all parameters by one factor, not each by its own norm
        assert abs(clip / float(gradients[model.gain].norm()) / scale - 1) > 0.1


# ---- a step that is skipped


@both
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("poison", ["nan", "inf", "-inf", "loss", "overflow"])
@pytest.mark.parametrize("where", ["cube", "layers"])
def test_a_step_that_is_not_finite_leaves_no_trace(kind, clip, poison, where):
    (model, optimizer), (control, control_optimizer) = start(name=kind), start(name=kind)
    average, control_average = EMA(model, 0.9), EMA(control, 0.9)

    def good(seed):
        for each, its, its_average in (
            (model, optimizer, average),
            (control, control_optimizer, control_average),
        ):
            set_gradients(each, seed)
            its_average.update(each, optimizer_step(its, HEALTHY, 0.1, clip)[1])

    good(0)
    before = state(model, optimizer, average)
    set_gradients(model, 1)
    poisoned = model.cube if where == "cube" else model.layers[1]
    if poison == "overflow":
        poisoned.grad.fill_(3e38)  # finite, and its norm is not
    elif poison != "loss":
        poisoned.grad[0, 1] = float(poison)
    _, skipped = optimizer_step(optimizer, torch.tensor(poison != "loss"), 0.1, clip)
    average.update(model, skipped)
    assert float(skipped) == 1
    assert state(model, optimizer, average) == before
    assert all(p.grad is None for p in model.parameters())

    good(2)  # and the next step is what it would have been
    after = state(model, optimizer, average)
    assert after != before and after == state(control, control_optimizer, control_average)


@both
def test_multiplying_a_bad_gradient_by_zero_would_be_noticed(kind):
    """nan * 0 is nan; zeroed gradients still decay the weights and count a step."""
    assert torch.isnan(torch.tensor(float("nan")) * 0)
    model, optimizer = start(name=kind)
    before = state(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer_step(optimizer, HEALTHY, 0.1, 1.0)
    assert state(model, optimizer) != before


@both
def test_the_state_is_there_from_the_start(kind):
    model, optimizer = start(name=kind)
    for p in model.parameters():
        entry, by_muon = optimizer.state[p], kind == "muon" and any(p is layer for layer in model.layers)
        assert set(entry) == ({"momentum"} if by_muon else {"step", "exp_avg", "exp_avg_sq"})
        assert all(moment.shape == p.shape for key, moment in entry.items() if key != "step")
        assert not any(tensor.any() for tensor in entry.values())


# ---- the average


def test_the_average_is_exponential():
    model, optimizer = start()
    average = EMA(model, 0.75)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for seed in range(4):
        set_gradients(model, seed)
        _, skipped = optimizer_step(optimizer, HEALTHY, 0.1, 1.0)
        average.update(model, skipped)
        for name, p in model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach().double()
    for name, value in expected.items():
        torch.testing.assert_close(average.tensors[name].double(), value, rtol=1e-5, atol=1e-6)
        assert average.tensors[name].dtype == torch.float32 and not average.tensors[name].requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_bit_for_bit(fails):
    model, optimizer = start()
    average = EMA(model, 0.5)
    set_gradients(model, 0)
    average.update(model, optimizer_step(optimizer, HEALTHY, 0.1, 1.0)[1])
    before = state(model, optimizer, average)
    averaged = {name: value.clone() for name, value in average.tensors.items()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    try:
        with average.swapped_into(model):
            for name, p in model.named_parameters():
                assert torch.equal(p.detach(), averaged[name])
                assert p.detach().numpy().tobytes() != before[name]
            if fails:
                raise RuntimeError("the evaluation broke")
    except RuntimeError:
        assert fails
    assert state(model, optimizer, average) == before
    assert {name: id(p) for name, p in model.named_parameters()} == identities  # the optimizer still holds them


def test_the_average_does_not_follow_the_model_by_reference():
    model, _ = start()
    average = EMA(model, 0.5)
    kept = average.tensors["matrix"].clone()
    with torch.no_grad():
        model.matrix.add_(1)
    assert torch.equal(average.tensors["matrix"], kept)


def test_offloaded_parameters_are_stepped_where_they_are():
    """Parameters on the CPU, the loss on a GPU (of fake tensors: devices are checked, nothing is computed).

    AdamW would copy a flag from the GPU without waiting for it, and read it before it is there.
    """
    with FakeTensorMode():
        model = nn.Linear(4, 4)
        optimizer, average = build_optimizer(model, OptimConfig(lr=0.1)), EMA(model, 0.9)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        norm, skipped = optimizer_step(optimizer, torch.empty((), dtype=torch.bool, device="cuda"), 0.1, 1.0)
        average.update(model, optimizer.found_inf)  # raises where a number is on the other device
        devices = [tensor.device.type for tensor in (optimizer.found_inf, norm, skipped)]
    assert devices == ["cpu", "cuda", "cuda"]
