"""The estimators of the NELBO against its exact value, on models small enough to enumerate, and against each other."""

from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain import likelihood
from mdmtrain.data.text import Rows
from mdmtrain.diffusion.objective import corrupt_counted
from mdmtrain.likelihood import ESTIMATORS, Comparison, Estimate, Estimator, compare, estimate, passes_of
from tests.spawn import fake_world

L, MASK, EPS = 5, 9, 0.3
ALONE = fake_world()


class Table(torch.nn.Module):
    """Cross-entropies that are an arbitrary function of the masked set and the position, larger with more masked."""

    shape = SimpleNamespace(causal=False)
    sizes = np.array([[s.bit_count() for s in range(2**L)]]).T
    ce = torch.from_numpy(sizes * np.random.default_rng(4).gamma(4.0, 0.25, (2**L, L))).float()

    def forward(self, noisy, positions, targets, segments):
        codes = ((noisy == MASK) * 2 ** torch.arange(L)).sum(dim=1)
        return self.ce[codes[positions // L], positions % L]


class Joint(torch.nn.Module):
    """The exact conditionals of an arbitrary joint distribution of four tokens of a vocabulary of three."""

    shape = SimpleNamespace(causal=False)
    texts = torch.tensor(list(product(range(3), repeat=4)))
    p = torch.from_numpy(np.random.default_rng(5).dirichlet(np.full(81, 0.3)))

    def forward(self, noisy, positions, targets, segments):
        fits = ((noisy[:, None] == self.texts) | (noisy[:, None] == MASK)).all(dim=2)[positions // 4]
        right = (
            self.texts[None, :, :].expand(len(positions), -1, -1)[torch.arange(len(positions)), :, positions % 4]
            == (targets[:, None])
        )
        return -((fits & right) * self.p).sum(1).log().add(-(fits * self.p).sum(1).log()).float()


def sets(eligible):
    return [s for k in range(1, len(eligible) + 1) for s in combinations(eligible, k)]


def summed(masked):
    return float(Table.ce[sum(2**i for i in masked)][list(masked)].sum())


def any_order(eligible):
    """sum_k c_k, c_k the mean over all sets of k masked positions of their mean cross-entropy: nats of the row."""
    by_count = [[summed(s) / len(s) for s in sets(eligible) if len(s) == k] for k in range(1, len(eligible) + 1)]
    return sum(np.mean(values) for values in by_count)


def cut(eligible, eps=EPS):
    """The mean over t ~ U[eps, 1] of (1/t) sum_i M_i CE_i: nats of the row."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    t, P = eps + (1 - eps) * (nodes + 1) / 2, len(eligible)
    return sum(
        float((weights / 2 * t ** (len(s) - 1) * (1 - t) ** (P - len(s))).sum()) * summed(s) for s in sets(eligible)
    )


KINDS = [range(L), (1, 3, 4)]  # whole rows, and rows with two positions given


def table_rows(copies):
    """`copies` rows of each kind."""
    eligible = torch.zeros(2 * copies, L, dtype=torch.bool)
    for kind, positions in enumerate(KINDS):
        eligible[kind * copies : (kind + 1) * copies, list(positions)] = True
    return Rows(torch.zeros(2 * copies, L, dtype=torch.int64), eligible, None)


def z_scores(found, exact):
    """How many standard errors each kind of rows is off."""
    kinds = found.nats.reshape(2, -1)
    return (kinds.mean(axis=1) - exact) / (kinds.std(axis=1, ddof=1) / np.sqrt(kinds.shape[1]))


def run(name, copies=400, draws=4, model=Table, seed=3):
    return estimate(model(), table_rows(copies), Estimator(name, draws, seed, EPS), 1024, MASK, ALONE)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_has_its_exact_expectation(name):
    """With every position eligible, and with some given."""
    exact, other = ([f(kind) for kind in KINDS] for f in (any_order, cut))
    if name == "continuous":
        exact, other = other, exact
    found = run(name, copies=1500)
    assert (found.tokens == [5] * 1500 + [3] * 1500).all()
    assert np.abs(z_scores(found, exact)).max() < 4.5
    assert np.abs(z_scores(found, other)).max() > 6, "the two targets cannot be told apart here"


@pytest.mark.parametrize("name", ["counted", "systematic"])
def test_the_nelbo_by_rate_has_its_exact_expectation(name):
    """In eighths of the rate. Without the weights of the longer rows, it would be wrong where the kinds differ."""

    def by_count(eligible):
        P = len(eligible)
        return [np.mean([summed(s) / len(s) for s in sets(eligible) if len(s) == k]) for k in range(1, P + 1)]

    rates = (np.arange(8 * 15) + 0.5) / (8 * 15)  # 15 has 3 and 5 as factors: k is constant around each of these rates
    costs = [np.array(by_count(kind))[(rates * len(kind)).astype(int)].reshape(8, -1).mean(1) for kind in KINDS]
    sizes = [len(kind) for kind in KINDS]
    exact, unweighted = np.average(costs, axis=0, weights=sizes), np.mean(costs, axis=0)
    found = [run(name, copies=40, seed=seed) for seed in range(20)]
    values = np.array([one.by_rate for one in found])
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    assert (np.abs(values.mean(0) - exact) < 4.5 * error + 1e-6).all()  # all is masked in the last eighth: no noise
    assert (np.abs(values.mean(0) - unweighted) > 6 * error).any()
    assert values.mean() == pytest.approx(np.mean([one.nelbo for one in found]), rel=0.01)


WRONG = {
    "counts of the whole row, not of what is eligible": lambda ids, eligible, uniforms, u, mask_id: corrupt_counted(
        ids, eligible, uniforms, np.floor(u * L) / L, mask_id
    ),
    "weight L/k where P are eligible": lambda *arguments: (
        lambda c: replace(c, weights=c.weights * L / arguments[1].sum(1)[c.positions // L])
    )(corrupt_counted(*arguments)),
    "given positions masked too": lambda ids, eligible, *rest: corrupt_counted(ids, torch.ones_like(eligible), *rest),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_counts_are_seen(wrong, monkeypatch):
    monkeypatch.setattr(likelihood, "corrupt_counted", WRONG[wrong])
    assert np.abs(z_scores(run("counted", copies=1500), [any_order(kind) for kind in KINDS])).max() > 6


def test_the_chain_rule_along_any_order_gives_the_exact_likelihood():
    """Of a model whose conditionals come from one joint distribution: every order of every row, to float32."""
    texts, p = Joint.texts, Joint.p
    eligible = torch.ones_like(texts, dtype=torch.bool)
    found = estimate(Joint(), Rows(texts, eligible, None), Estimator("orders", 3, 1, EPS), 50, MASK, ALONE)
    assert found.nats == pytest.approx(-p.log().numpy(), abs=2e-5)
    assert found.noise.max() < 1e-9 and found.passes == 81 * 3 * 4
    eligible[:, :2] = False  # log p(last two | first two)
    given = torch.zeros(3, 3, dtype=p.dtype).index_put((texts[:, 0], texts[:, 1]), p, accumulate=True)
    found = estimate(Joint(), Rows(texts, eligible, None), Estimator("orders", 2, 1, EPS), 50, MASK, ALONE)
    assert found.nats == pytest.approx(-(p / given[texts[:, 0], texts[:, 1]]).log().numpy(), abs=2e-5)


@pytest.mark.parametrize("name", ["counted", "systematic"])
def test_the_others_reach_the_exact_likelihood(name):
    found = estimate(
        Joint(), Rows(Joint.texts, torch.ones_like(Joint.texts, dtype=torch.bool), None),
        Estimator(name, 64, 2, EPS), 512, MASK, ALONE,
    )  # fmt: skip
    off = float((found.nats + Joint.p.log().numpy()).sum())
    assert abs(off) < 4.5 * np.sqrt(found.noise.sum())
    assert np.sqrt(found.noise.sum()) < 0.02 * found.nats.sum(), "too coarse to tell"


@pytest.mark.parametrize(("name", "draws"), [("systematic", 20), ("orders", 4)])
def test_the_stated_noise_is_the_noise(name, draws):
    """Where rows draw independently. Errors from single draws, not from whole sweeps, would be far off."""
    found = run(name, copies=500, draws=draws)
    for kind in range(2):
        nats, noise = (part.reshape(2, -1)[kind] for part in (found.nats, found.noise))
        error = np.hypot(nats.var() * np.sqrt(2 / len(nats)), noise.std() / np.sqrt(len(noise)))
        assert abs(nats.var(ddof=1) - noise.mean()) < 5 * error
        assert error < 0.2 * nats.var(), "too coarse to tell"
        if name == "systematic":
            single = run("counted", copies=500, draws=20).noise.reshape(2, -1)[kind]
            assert single.mean() - nats.var(ddof=1) > 5 * error


def test_systematic_sweeps_hit_every_count_alike():
    """Ten draws of five counts: each twice, whatever the start; draws of one sweep spread evenly if there are fewer."""
    passes = passes_of(Estimator("systematic", 20, 0, EPS), np.array([5, 5, 5]))
    k = np.floor(passes.u * 5).astype(int) + 1
    assert [np.bincount(k[passes.group == sweep]).tolist() for sweep in range(6)] == [[0, 2, 2, 2, 2, 2]] * 6
    passes = passes_of(Estimator("systematic", 8, 0, EPS), np.full(2, 1000))
    for sweep in range(4):
        assert np.ptp(np.sort(passes.u[passes.group == sweep]) - np.arange(4) / 4) < 1e-12
    assert [
        len(np.unique(passes_of(Estimator("systematic", n, 0, EPS), np.full(1, 9)).group)) for n in (2, 32, 48)
    ] == [
        2,
        2,
        3,
    ]
    for draws in (7, 40):
        with pytest.raises(ValueError, match=f"--mc-num {draws}: the systematic estimator needs"):
            Estimator("systematic", draws, 0, EPS)
    starts = np.array([passes_of(Estimator("systematic", 2, seed, EPS), np.full(1, 7)).u[0] for seed in range(60)])
    assert np.bincount(np.floor(starts * 7).astype(int), minlength=7).min() > 0


def test_comparison_flags_what_the_errors_do_not_explain():
    estimators = [Estimator(name, 8, 7, EPS) for name in ESTIMATORS]
    found = {one: run(one.name, copies=100, draws=8, seed=7) for one in estimators}
    pairs = {pair.between: pair for pair in compare(found)}
    assert len(pairs) == 6
    for between, pair in pairs.items():
        assert (pair.allowed > 0) == ("continuous" in between)
    exact = [pair for between, pair in pairs.items() if "continuous" not in between]
    assert all(pair.agree for pair in exact)
    first = found[estimators[0]]
    wrong = {**found, estimators[0]: replace(first, nats=first.nats * 1.05)}
    assert not any(pair.agree for pair in compare(wrong) if "counted" in pair.between and not pair.allowed)
    few = {one: run(one.name, copies=1, draws=64, seed=7) for one in estimators[:2]}
    [pair] = compare(few)
    assert pair.standard_error >= np.hypot(*(found.noise_error for found in few.values()))
    assert Comparison(("a", "b"), 0.05, 0.01, 0.02).agree and not Comparison(("a", "b"), 0.05, 0.01, 0.0).agree


def test_standard_errors_of_a_ratio():
    """Rows of equal length give the error of a mean; a row counts by its tokens; one row has no error."""
    nats = np.random.default_rng(0).gamma(3.0, 1.0, 50)
    equal = Estimate(nats * 7, nats, np.full(50, 7), 50)
    assert equal.nelbo == pytest.approx(nats.mean())
    assert equal.standard_error == pytest.approx(nats.std(ddof=1) / np.sqrt(50))
    proportional = Estimate(np.array([2.0, 6.0, 10.0]), np.ones(3), np.array([1, 3, 5]), 3)
    assert proportional.nelbo == 2 and proportional.standard_error == 0
    assert proportional.noise_error == pytest.approx(np.sqrt(3) / 9)
    assert Estimate(nats[:1], nats[:1], np.array([3]), 1).standard_error == np.inf


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_number_of_ranks_computes_the_same(name, size):
    """The ranks of a world one after the other, their results gathered: equal to one rank's, bit for bit."""
    rows, one = table_rows(9), Estimator(name, 6, 1, EPS)
    parts = []

    def keep(value):
        parts.append(value)
        return [value]

    for rank in range(size):
        world = fake_world(keep, rank, size)
        with pytest.raises(KeyError):  # a rank alone lacks the others' batches
            estimate(Table(), rows, one, 8, MASK, world)
    together = fake_world(lambda value: parts, size=size)
    found = estimate(Table(), rows, one, 8, MASK, together)
    assert found.nats.tolist() == estimate(Table(), rows, one, 8, MASK, ALONE).nats.tolist()
