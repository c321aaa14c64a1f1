"""The estimators against exact answers: a model small enough to enumerate, and the closed forms of mathematics.md.

The table model's cross-entropy is an arbitrary function of the position, its token and everything visible.
"""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.noise import Stream
from mdmtrain.diffusion.objective import MaskingRates, corrupt_counted, plain_process, row_losses

V, L, MASK = 3, 4, 3
EPS = 0.05
TABLE = torch.from_numpy(np.random.default_rng(0).gamma(1.0, 1.5, size=((V + 1) ** L, L, V)).astype(np.float32))
for _code, _noisy in enumerate(product(range(V + 1), repeat=L)):
    TABLE[_code] *= _noisy.count(MASK) ** 1.5  # harder the less is visible, so that wrong counts show
ROWS = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0], [1, 0, 0, 2]])
ELIGIBLE = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()  # the last row is padded
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def table_ce(masked_batch):
    """The table model's cross-entropies, [K]."""
    code = (masked_batch.noisy * (V + 1) ** torch.arange(L)).sum(dim=1)
    return TABLE[code[masked_batch.positions // L], masked_batch.positions % L, masked_batch.targets]


def enumerate_masks(row, length):
    """(number masked, sum of CE over the masked) for every non-empty masked set of a row."""
    for chosen in product([False, True], repeat=length):
        if any(chosen):
            masked = torch.tensor(list(chosen) + [False] * (L - length))
            noisy = row.masked_fill(masked, MASK)
            code = int((noisy * (V + 1) ** torch.arange(L)).sum())
            yield sum(chosen), sum(float(TABLE[code, i, row[i]]) for i in range(L) if masked[i])


def exact_cut(row, length, eps=EPS):
    """E over t ~ U[eps, 1] and M of (1/t) sum_i M_i CE_i: polynomials in t, so the quadrature is exact."""
    t, dt = eps + (1 - eps) * (NODES + 1) / 2, WEIGHTS / 2
    return sum(float((t ** (k - 1) * (1 - t) ** (length - k)) @ dt) * s for k, s in enumerate_masks(row, length))


def exact_any_order(row, length):
    """(1/P) sum_k c_k, c_k the mean over all masked sets of size k of the mean CE: the uncut NELBO per token."""
    sizes = {}
    for k, s in enumerate_masks(row, length):
        sizes.setdefault(k, []).append(s / k)
    return sum(np.mean(c) for c in sizes.values()) / length


def step_rates(config, seed, step, slots):
    return plain_process(config).draw(seed, step, slots)


def corrupt(ids, eligible, uniforms, drawn, mask_id):
    return plain_process(DiffusionConfig()).corrupt(ids, eligible, uniforms, drawn, mask_id)


def everywhere(ids):
    """Every position is eligible, as in a full row of plain text."""
    return torch.ones_like(ids, dtype=torch.bool)


def weighed(rates, importance):
    """Rates with given importance weights."""
    return MaskingRates(rates, 1 / importance)


def z_score(values, expected):
    """Standard errors between the mean of independent values and its expectation."""
    return (np.mean(values) - expected) / (np.std(values) / np.sqrt(len(values)))


# ---- unbiased, exactly as named


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("kind", ["global", "none"])
def test_training_estimator_has_its_exact_expectation(schedule, kind):
    config = DiffusionConfig(eps=EPS, schedule=schedule, strata=kind)
    slots, steps = 48, 400
    ids, eligible = ROWS.repeat(slots // 3, 1), ELIGIBLE.repeat(slots // 3, 1)
    right, wrong = [], {name: [] for name in WRONG_NORMALISATIONS}
    for step in range(steps):
        drawn = step_rates(config, 3, step, slots)
        uniforms = torch.from_numpy(noise.position_uniforms(3, step, np.arange(slots), L))
        masked_batch = corrupt(ids, eligible, uniforms, drawn, MASK)
        losses = row_losses(table_ce(masked_batch), masked_batch)
        right.append(float(losses.double().sum()) / (slots * L))
        for name, normalise in WRONG_NORMALISATIONS.items():
            wrong[name].append(normalise(losses, masked_batch, drawn, slots))
    expected = sum(exact_cut(row, int(n)) for row, n in zip(ROWS, ELIGIBLE.sum(1), strict=True)) / (3 * L)
    assert abs(z_score(right, expected)) < 5
    for name, values in wrong.items():
        if name == "importance weight dropped" and schedule == "linear":
            assert values == pytest.approx(right, rel=1e-5)  # it is 1 there
        else:
            assert abs(z_score(values, expected)) > 6, name


def per_rate(losses, drawn):
    return losses.double().numpy() / drawn.density * drawn.rates  # sum of CE over the masked


# Each of them is somewhere in a public trainer.
WRONG_NORMALISATIONS = {
    "divided by the masked count": lambda losses, c, drawn, n: float(losses.sum()) / max(1, len(c.positions)),
    "rows without a mask left out": lambda losses, c, drawn, n: float(losses[losses > 0].mean()) / L,
    "1/t dropped": lambda losses, c, drawn, n: float((per_rate(losses, drawn) * drawn.density).mean()) / L,
    "importance weight dropped": lambda losses, c, drawn, n: float(np.mean(per_rate(losses, drawn) / drawn.rates)) / L,
    "divided by the eligible count": lambda losses, c, drawn, n: float(losses.sum()) / (n * 11 / 3),
}


def zeros(rows, length):
    """Rows of token 0, and all of their positions eligible."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return ids, everywhere(ids)


@pytest.mark.parametrize("kind", ["global", "none"])
def test_counted_estimator_is_the_exact_any_order_nelbo(kind):
    rows, steps = 16, 600
    ids = torch.cat([ROWS[:2].repeat(rows // 2, 1)])
    values, no_cut, rounded = [], [], []
    for step in range(steps):
        u = strata.uniforms(5, step, rows, kind, Stream.EVALUATION)
        uniforms = torch.from_numpy(noise.position_uniforms(5, step, np.arange(rows), L, Stream.EVALUATION))
        masked_batch = corrupt_counted(ids, everywhere(ids), uniforms, u, MASK)
        losses = row_losses(table_ce(masked_batch), masked_batch)
        values.append(float(losses.double().mean()) / L)
        counts = np.bincount((masked_batch.positions // L).numpy(), minlength=rows)
        no_cut.append(float((losses.numpy() * counts / L).mean()) / L)  # the mean CE over all positions: 1/k missing
        masked_batch = corrupt_counted(
            ids, everywhere(ids), uniforms, np.maximum(np.round(u * L) - 1, 0) / L, MASK
        )  # k = round(u L)
        rounded.append(float(row_losses(table_ce(masked_batch), masked_batch).double().mean()) / L)
    expected = np.mean([exact_any_order(row, L) for row in ROWS[:2]])
    assert abs(z_score(values, expected)) < 5
    assert abs(z_score(no_cut, expected)) > 10
    assert abs(z_score(rounded, expected)) > 6


def test_the_two_targets_meet_as_eps_vanishes_and_differ_before():
    """The oracles themselves: the eps-cut one misses the sets that rates below eps would have drawn."""
    row, uncut = ROWS[0], exact_any_order(ROWS[0], L)
    assert abs(exact_cut(row, L) / L - uncut) > 0.005
    assert exact_cut(row, L, eps=1e-9) / L == pytest.approx(uncut, rel=1e-7)


def test_counted_masks_are_uniform_among_sets_of_their_size():
    rows = 6000
    ids = ROWS[:1].repeat(rows, 1)
    uniforms = torch.from_numpy(noise.position_uniforms(6, 0, np.arange(rows), L))
    for k, sets in ((1, 4), (2, 6), (3, 4), (4, 1)):
        masked = corrupt_counted(ids, everywhere(ids), uniforms, np.full(rows, (k - 0.5) / L), MASK).noisy == MASK
        assert (masked.sum(dim=1) == k).all()
        counts = np.bincount((masked * 2 ** torch.arange(L)).sum(dim=1).numpy())
        counts = counts[counts > 0]
        assert len(counts) == sets and (sets == 1 or stats.chisquare(counts).pvalue > 1e-4)
    # Always the first k, or a window of k: the right number of masks, the wrong sets.
    windows = np.bincount(np.random.default_rng(0).integers(0, L, rows), minlength=6)
    assert stats.chisquare(windows).pvalue < 1e-12


@given(u=st.floats(0, 1, exclude_max=True), length=st.integers(1, 64))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_counts_are_k_of_one_to_length_and_weigh_length_over_k(u, length):
    uniforms = torch.from_numpy(noise.position_uniforms(0, 0, np.arange(1), length))
    masked_batch = corrupt_counted(*zeros(1, length), uniforms, np.array([u]), 7)
    k = len(masked_batch.positions)
    assert 1 <= k <= length and (k - 1) / length <= u + 1e-12 and u < k / length + 1e-12
    assert masked_batch.weights.tolist() == pytest.approx([length / k] * k, rel=1e-6)


# ---- variances, in closed form (mathematics.md section 9)


def bulk(rows, length, seed):
    """Uniforms of many independent rows at once."""
    bits = noise.philox(seed, Stream.POSITIONS, 2**40)
    return torch.from_numpy(noise.uniforms(bits, rows * length).reshape(rows, length))


def values_of(rates, uniforms, ce):
    """(1/L) row_losses of context-free or count-dependent models; ce(corruption, masked per row) -> [K]."""
    rows, length = uniforms.shape
    ids = torch.zeros(rows, length, dtype=torch.int64)
    masked_batch = corrupt(ids, everywhere(ids), uniforms, weighed(rates, np.ones(rows)), 1)
    counts = torch.bincount(masked_batch.positions // length, minlength=rows)
    return row_losses(ce(masked_batch, counts), masked_batch).double().numpy() / length


def half_square(a, b):
    """(mean, standard error) of the pair estimator of a variance: half the squared difference of two draws."""
    d = (a - b) ** 2 / 2
    return d.mean(), d.std() / np.sqrt(len(d))


def assert_within(estimate, expected, errors=4.5):
    value, error = estimate
    assert abs(value - expected) < errors * error, (value, expected, error)


MU = torch.tensor([0.2, 0.5, 1, 1, 2, 3, 0.7, 1.6])


def test_t1_masking_pattern_rate_and_data_noise():
    """A = .771355, B = 0, C = .390625: pairs that share x0 and t, x0, t, or nothing."""
    rows, eps = 300_000, 0.05
    generator = np.random.default_rng(1)
    scale = [torch.from_numpy(generator.choice([0.5, 1.5], rows).astype(np.float32)) for _ in range(2)]
    rates = [step_rates(DiffusionConfig(eps=eps, strata="none"), 1, step, rows).rates for step in (0, 1)]
    uniforms = [bulk(rows, 8, seed) for seed in (1, 2)]

    def draw(which_scale, which_rate, which_noise):
        return values_of(
            rates[which_rate],
            uniforms[which_noise],
            lambda c, _: scale[which_scale][c.positions // 8] * MU[c.positions % 8],
        )

    first = draw(0, 0, 0)
    assert abs(z_score(first, 1.25)) < 4.5
    A, B, C = 0.771355, 0.0, 0.390625
    assert_within(half_square(first, draw(0, 0, 1)), A)
    assert_within(half_square(first, draw(0, 1, 1)), A + B)
    assert_within(half_square(first, draw(1, 0, 1)), A + C)
    assert_within(half_square(first, draw(1, 1, 1)), A + B + C)
    # Masks shared between the two draws of a pair, the commonest silent bug, show no pattern noise at all.
    assert half_square(first, draw(0, 0, 0))[0] == 0


def t3_values(rates, uniforms):
    """CE_i = 1 + 4 (K - 1) / (L - 1) on L = 16, whose exact NELBO is 3."""
    return values_of(rates, uniforms, lambda c, counts: (1 + 4 * (counts - 1) / 15)[c.positions // 16])


def test_t3_pattern_and_rate_noise():
    """A = 1.580854, B = 1.330668, mean 3.002, at eps = 1e-3."""
    rows = 400_000
    rates = [step_rates(DiffusionConfig(eps=1e-3, strata="none"), 2, step, rows).rates for step in (0, 1)]
    uniforms = [bulk(rows, 16, seed) for seed in (3, 4)]
    first = t3_values(rates[0], uniforms[0])
    assert abs(z_score(first, 3.002)) < 4.5
    assert_within(half_square(first, t3_values(rates[0], uniforms[1])), 1.580854)
    assert_within(half_square(first, t3_values(rates[1], uniforms[1])), 1.580854 + 1.330668)


@pytest.mark.parametrize(("kind", "expected"), [("none", 2.9115), ("global", 1.5812)])
def test_t3_variance_of_a_step(kind, expected):
    """N Var of the mean of N = 64 rows: strata take out what the rate alone explains."""
    rows, steps = 64, 4000
    config = DiffusionConfig(eps=1e-3, strata=kind)
    rates = np.concatenate([step_rates(config, 4, step, rows).rates for step in range(steps)])
    means = t3_values(rates, bulk(rows * steps, 16, 5)).reshape(steps, rows).mean(axis=1)
    squares = rows * (means - means.mean()) ** 2
    assert_within((squares.mean(), squares.std() / np.sqrt(steps)), expected)
    other = {"none": 1.5812, "global": 2.9115}[kind]
    assert abs(squares.mean() - other) > 10 * squares.std() / np.sqrt(steps)


def test_t14_counted_strata_leave_no_variance_where_the_count_says_all():
    """T3's model, P = 16, N = 64: every k four times, so every batch gives exactly 3; independent ones vary."""
    rows = 64

    def mean(step, kind):
        u = strata.uniforms(7, step, rows, kind, Stream.EVALUATION)
        masked_batch = corrupt_counted(*zeros(rows, 16), bulk(rows, 16, step), u, 1)
        counts = torch.bincount(masked_batch.positions // 16, minlength=rows)
        ce = 1 + 4 * (counts[masked_batch.positions // 16] - 1) / 15
        return float(row_losses(ce, masked_batch).double().mean()) / 16

    assert [mean(step, "global") for step in range(20)] == pytest.approx([3.0] * 20, abs=1e-6)
    independent = np.array([mean(step, "none") for step in range(2000)])
    squares = rows * (independent - 3) ** 2
    assert_within((squares.mean(), squares.std() / np.sqrt(2000)), 1.51111)


def test_rows_without_a_mask_occur_as_often_as_they_must():
    """E (1-t)^P over U[eps, 1]; they are rows of the batch all the same."""
    rows, eps = 40_000, 0.05
    drawn = step_rates(DiffusionConfig(eps=eps, strata="none"), 6, 0, rows)
    ids = torch.zeros(rows, L, dtype=torch.int64)
    masked_batch = corrupt(ids, everywhere(ids), bulk(rows, L, 6), drawn, MASK)
    empty = np.bincount((masked_batch.positions // L).numpy(), minlength=rows) == 0
    expected = (1 - eps) ** (L + 1) / (L + 1) / (1 - eps)
    assert abs(empty.mean() - expected) < 4.5 * np.sqrt(expected * (1 - expected) / rows)
    assert empty.mean() > 0.1  # an implementation that forces a mask into every row has none
    losses = row_losses(torch.ones(len(masked_batch.positions)), masked_batch)
    assert len(losses) == rows and (losses[torch.from_numpy(empty)] == 0).all()


# ---- the bookkeeping


@st.composite
def micro_batches(draw):
    rows, length = draw(st.integers(1, 6)), draw(st.integers(1, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = generator.choice([0.0, 0.5, 1.0], (rows, 1))  # of eligible positions, scattered; in some rows none
    eligible = torch.from_numpy(generator.random((rows, length)) < share)
    ids = torch.from_numpy(generator.integers(0, 50, (rows, length)))
    uniforms = torch.from_numpy(noise.position_uniforms(draw(st.integers(0, 99)), 0, np.arange(rows), length))
    rates = np.array(draw(st.lists(st.floats(1e-3, 1), min_size=rows, max_size=rows)))
    return ids, eligible, uniforms, weighed(rates, generator.random(rows) * 3)


@given(batch=micro_batches())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_corruption_against_a_naive_loop(batch):
    ids, eligible, uniforms, drawn = batch
    untouched = ids.clone()
    masked_batch = corrupt(*batch, mask_id=50)
    positions, targets, weights = [], [], []
    noisy = ids.clone()
    for b in range(len(ids)):
        for i in range(ids.shape[1]):
            if eligible[b, i] and uniforms[b, i] < drawn.rates[b]:
                positions.append(b * ids.shape[1] + i)
                targets.append(int(ids[b, i]))
                weights.append(1 / drawn.density[b] / drawn.rates[b])
                noisy[b, i] = 50
    assert torch.equal(ids, untouched)
    assert torch.equal(masked_batch.noisy, noisy)
    assert masked_batch.positions.tolist() == positions and masked_batch.positions.dtype == torch.int64
    assert masked_batch.targets.tolist() == targets and masked_batch.targets.dtype == torch.int64
    assert (
        masked_batch.weights.tolist() == pytest.approx(weights, rel=1e-6)
        and masked_batch.weights.dtype == torch.float32
    )


@given(batch=micro_batches())
@settings(deadline=None, derandomize=True, max_examples=100)
def test_row_losses_against_a_naive_loop(batch):
    masked_batch = corrupt(*batch, mask_id=50)
    rows, length = batch[0].shape
    ce = torch.linspace(0.1, 9, len(masked_batch.positions))
    expected = [0.0] * rows
    for position, weight, value in zip(
        *(x.tolist() for x in (masked_batch.positions, masked_batch.weights, ce)), strict=True
    ):
        expected[position // length] += weight * value
    losses = row_losses(ce, masked_batch)
    assert losses.dtype == torch.float32 and losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_row_losses_carry_the_gradient_of_every_weight():
    ids, uniforms = torch.zeros(4, 16, dtype=torch.int64), bulk(4, 16, 9)
    drawn = weighed(np.array([0.3, 1e-3, 0.7, 1.0]), np.array([1.0, 1.0, 2.0, 0.5]))
    masked_batch = corrupt(ids, everywhere(ids), uniforms, drawn, 1)
    ce = torch.rand(len(masked_batch.positions), requires_grad=True)
    row_losses(ce, masked_batch).sum().backward()
    assert torch.equal(ce.grad, masked_batch.weights)


def test_a_batch_without_any_mask_is_legal():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    masked_batch = corrupt(ids, ~everywhere(ids), bulk(2, 5, 0), weighed(np.ones(2), np.ones(2)), 1)
    assert len(masked_batch.positions) == len(masked_batch.targets) == len(masked_batch.weights) == 0
    assert row_losses(torch.zeros(0), masked_batch).tolist() == [0, 0]


def test_a_rate_of_one_masks_everything():
    """Uniforms never reach 1."""
    ids = torch.zeros(3, 999, dtype=torch.int64)
    masked_batch = corrupt(ids, everywhere(ids), bulk(3, 999, 1), weighed(np.ones(3), np.ones(3)), 1)
    assert len(masked_batch.positions) == 3 * 999


def test_rates_of_a_step_are_those_of_its_slots_wherever_they_are_computed():
    config = DiffusionConfig(schedule="cosine")
    whole = step_rates(config, 1, 7, 24)
    part = step_rates(config, 1, 7, 24).at(np.array([20, 3]))
    assert part.rates.tolist() == [whole.rates[20], whole.rates[3]]
    assert part.density.tolist() == [whole.density[20], whole.density[3]]
    # A rank that draws the strata of its own rows gets other ones.
    assert step_rates(config, 1, 7, 12).rates.tolist() != whole.rates[:12].tolist()


def test_no_two_slots_share_their_masks():
    """Neither within a step nor between steps: rows masked alike are the commonest silent bug of public trainers."""
    rows, length = 24, 256
    ids = torch.zeros(rows, length, dtype=torch.int64)
    half = weighed(np.full(rows, 0.5), np.ones(rows))

    def masks(slots):
        steps = [torch.from_numpy(noise.position_uniforms(2, step, slots, length)) for step in (0, 1)]
        return torch.cat([corrupt(ids, everywhere(ids), u, half, 1).noisy for u in steps]).double().numpy()

    def closest(drawn):
        return np.abs(np.corrcoef(drawn)[np.triu_indices(2 * rows, 1)]).max()

    assert closest(masks(np.arange(rows))) < 5 / np.sqrt(length)
    assert closest(masks(np.arange(rows) % 12)) > 0.99  # two ranks that both count their rows from 0
