"""The decomposition of the loss's variance and the fit before training, on a model whose every expectation is a sum."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain.diffusion import noise
from mdmtrain.diffusion.noise import Stream
from mdmtrain.diffusion.objective import plain_process, row_losses
from mdmtrain.diffusion.rates import Density
from mdmtrain.variance.components import loss_components, paired_rates
from mdmtrain.variance.probe import Probe
from tests.diffusion.test_forward_process import EPS, IDS, MASK, SEQUENCES, TABLE, L, make_process, run, target
from tests.spawn import fake_world


class TableModel(torch.nn.Module):
    """The cross-entropies of TABLE: [sequence, masked set, position]; a row is known by its clean tokens."""

    def forward(self, noisy, positions, targets, segments):
        clean = noisy.flatten().index_copy(0, positions, targets).view_as(noisy)
        sequence = (clean[:, None] == IDS[None]).all(dim=2).long().argmax(dim=1)
        code = ((noisy == MASK).long() * 2 ** torch.arange(L)).sum(dim=1)
        return TABLE[sequence, code].flatten()[positions].float()


def probe_of(model, length, **diffusion) -> Probe:
    tree = {
        "run": {"dir": "r", "steps": 9, "global_batch": 4, "micro_batch": 2},
        "model": {"preset": "2m"},
        "data": {"sources": [{"path": "p"}], "sequence_length": length},
        "optim": {"lr": 0.1},
        "diffusion": {"eps": EPS, "bins": 16, **diffusion},
        "eval": {"batch": 2048},
    }
    return Probe(model, configuration.validate(tree, "test"), MASK, fake_world())


def split_of(ids: np.ndarray) -> SimpleNamespace:
    """A split of plain text that is these tokens."""
    everywhere = lambda start, count: np.ones(count, dtype=bool)  # noqa: E731
    read = lambda start, count: ids[start : start + count]  # noqa: E731
    return SimpleNamespace(tokens=len(ids), read=read, eligible=everywhere, prompts=False, pad_id=0)


SPLIT = split_of(IDS.flatten().numpy())


def exact(process) -> dict[str, float]:
    """A, B_t, B_int, C of y = weight / L sum_M CE by quadrature over t and a sum over sequences and masks."""
    nodes, width = np.polynomial.legendre.leggauss(60)
    edges = process.density.edges
    t = np.concatenate([a + (b - a) * (nodes + 1) / 2 for a, b in pairwise(edges)])
    dt = np.concatenate([width / 2 * mass for mass in process.density.masses])  # t as it is drawn
    subsets = np.arange(2**L)
    member = (subsets[:, None] >> np.arange(L)) & 1
    size = member.sum(axis=1)
    chance = t[:, None] ** size * (1 - t[:, None]) ** (L - size)  # [t, M]
    total = (TABLE.numpy() * member).sum(axis=2)  # [x0, M]
    y = total[:, None, :] * (process.omega(t) / process.density.at(t) / t / L)[None, :, None]  # [x0, t, M]
    g = (chance * y).sum(axis=2)
    v = (chance * y**2).sum(axis=2) - g**2
    mean = (g @ dt).mean()
    B = ((g**2) @ dt - (g @ dt) ** 2).mean()
    B_t = float((g.mean(axis=0) ** 2) @ dt - mean**2)
    return {"A": float((v @ dt).mean()), "B_t": B_t, "B_int": float(B - B_t), "C": float((g @ dt).var())}


def sample(process, probes: int, a: int, b: int, c: int) -> np.ndarray:
    """y of many independent probes at once: float64 [probes, a, b, c]."""
    bits = noise.philox(11, Stream.PROBE, 0)
    draws = paired_rates(process, probes * a, b, bits)
    sequence = torch.from_numpy((bits.random_raw(probes * a) % np.uint64(SEQUENCES)).astype(np.int64))
    sequence = sequence.repeat_interleave(b * c)
    rows = np.arange(probes * a * b * c)
    U = torch.from_numpy(noise.uniforms(bits, len(rows) * L)).view(-1, L)
    masked_batch = process.corrupt(
        IDS[sequence], torch.ones(len(rows), L, dtype=torch.bool), U, draws.at(rows // c), MASK
    )
    code = ((masked_batch.noisy == MASK).long() * 2 ** torch.arange(L)).sum(dim=1)
    ce = TABLE[sequence, code].flatten()[masked_batch.positions].float()
    return (row_losses(ce, masked_batch).double() / L).numpy().reshape(probes, a, b, c)


def z(values: np.ndarray, expected: float) -> float:
    return float((values.mean() - expected) / (values.std() / np.sqrt(len(values))))


@pytest.mark.parametrize(("uniform", "objective"), [(True, "nelbo"), (False, "plain")])
def test_components_are_unbiased_and_wrong_ones_are_not(uniform, objective):
    process = make_process("independent", "single", "rate", objective, uniform=uniform)
    truth, values = exact(process), sample(process, 60000, 4, 2, 2)
    found = loss_components(values)
    for name, expected in truth.items():
        assert abs(z(found[name], expected)) < 5, (name, found[name].mean(), expected)
    cells = values.mean(axis=-1)
    B = found["B_t"] + found["B_int"]
    wrong = {
        "C, forgetting that two sequences share rates": (found["C"] - found["B_t"] / (2 * 3), "C"),
        "B, with the noise of the masks in it": (B + found["A"] / 2 - found["B_t"], "B_int"),
        "B_t as the variance of the pair's mean": (
            cells.reshape(-1, 2, 2, 2).mean(axis=2).var(axis=-1, ddof=1).mean(axis=-1), "B_t"),
        "B_t from sequences with rates of their own": (
            loss_components(np.roll(values, 1, axis=1))["B_t"], "B_t"),
    }  # fmt: skip
    for name, (estimates, component) in wrong.items():
        assert abs(z(estimates, truth[component])) > 5, name


def test_the_probe_of_a_run_measures_its_own_process():
    """The whole way: rows, shared rates, masks and weights, the model, the mean over many probes."""
    probe, process = probe_of(TableModel(), L), make_process("independent", "single", "rate", "plain", uniform=False)
    found = [probe.decompose(process, [SPLIT], step)[0] for step in range(1, 600)]
    for name, expected in exact(process).items():
        assert abs(z(np.array([f[name] for f in found]), expected)) < 5, name
    again, seconds, share = probe.decompose(process, [SPLIT], 7)
    assert again == found[6] and again != found[7]  # a function of the step
    assert seconds > 0 and 0 < share <= 1


def test_a_pair_of_views_counts_as_its_mean():
    """MIRROR on T4 of mathematics.md is in the total: A of the mean of two views is below that of one."""
    single, mirror = (
        [
            probe_of(TableModel(), L).decompose(make_process("independent", views, "rate"), [SPLIT], s)
            for s in range(1, 200)
        ]
        for views in ("single", "mirror")
    )
    A = [np.mean([f["A"] for f, *_ in found]) for found in (single, mirror)]
    assert A[1] < 0.75 * A[0]


# ---- the fit before training


class One(torch.nn.Module):
    """T2: a single position that always costs 1 nat."""

    def forward(self, noisy, positions, targets, segments):
        return torch.ones(len(positions))


def test_t2_the_fit_on_a_grid_is_the_closed_form():
    """E[l^2 | t] = 1/t: p ~ t^(-1/2), by cells of the mean of 1/t."""
    probe = probe_of(
        One(), 1, sampler="ppots", when="once", target="loss", floor=1e-9, fit_rates=70, fit_sequences=15, fit_masks=60
    )
    process = plain_process(probe._config.diffusion)
    split = split_of(np.zeros(5, dtype=np.int64))
    p, edges = probe.fit(process, [split]).p, process.density.edges
    inverse = np.log(edges[1:] / edges[:-1]) / np.diff(edges)
    best = np.sqrt(inverse) / np.sqrt(inverse).mean()
    middles, hits = (edges[1:] + edges[:-1]) / 2, 70 * 15 * 60 / 16
    se = best * np.sqrt((1 / middles - 1 + 0.1) / hits) / 2  # of sqrt(mean of M/t^2); .1: the last cell's rest
    assert (np.abs(p - best) < 5 * se + 1e-3).all()
    flat, steep = np.ones(16), inverse / inverse.mean()  # nothing learned; the square root forgotten
    assert (np.abs(flat - best) > 5 * se + 1e-3).sum() > 8 and (np.abs(steep - best) > 5 * se + 1e-3).sum() > 8


@pytest.mark.parametrize("views", ["single", "mirror", "complement"])
def test_the_loss_stays_unbiased_under_the_fitted_density(views):
    probe = probe_of(
        TableModel(), L, sampler="ppots", when="once", views=views, fit_rates=8, fit_sequences=4, fit_masks=2
    )
    plain = make_process("independent", views, "rate")
    p = probe.fit(plain, [SPLIT]).p
    process = make_process("independent", views, "rate", sampler="ppots")
    object.__setattr__(process, "density", Density(plain.density.edges, p))
    assert p.max() > 1.2 and (p * np.diff(process.density.edges)).sum() == pytest.approx(np.ptp(process.density.edges))
    losses = np.array([run(process, step, 240) for step in range(200)])
    assert abs(z(losses, target(process))) < 5


def test_every_cell_gets_its_share_or_the_grid_is_refused():
    with pytest.raises(ValueError, match="fit_rates x fit_sequences must be at least 32"):
        probe_of(One(), 1, sampler="ppots", when="once", fit_rates=31, fit_sequences=1, fit_masks=4)
    probe = probe_of(One(), 1, sampler="ppots", when="once", fit_rates=16, fit_sequences=2, fit_masks=1)
    assert np.isfinite(probe.fit(plain_process(probe._config.diffusion), [SPLIT]).p).all()
