"""Some positions may be masked and others never: a response after its prompt, SyRM's scattered tokens, rows with none.

Uniforms of positions that are not eligible are 0: a law that let them would mask them first.
"""

from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from mdmtrain.diffusion.objective import MaskingRates, corrupt_counted, next_token, row_losses, row_statistics
from tests.diffusion.test_exact import COMBINATIONS, MASK, TABLE, L, bumpy, make_process

LISTED = torch.arange(10) < 1  # isad's
ISAD = [dict(masks="independent", views=views, weights="rate", isad_tokens=(0,)) for views in ("single", "mirror")]
SETS = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()


def name(choice):
    return "-".join(map(str, choice.values()))


def process_of(choice, **more):
    return make_process(bumpy if "schedule" not in choice else None, 0.8, LISTED if "isad_tokens" in choice else None,
                    **{"objective": "bell", **choice, **more})  # fmt: skip


def noise_of(rows, length, seed, eligible):
    uniforms = torch.from_numpy(np.random.default_rng(seed).random((rows, length), dtype=np.float32))
    return uniforms * eligible


@pytest.mark.parametrize("choice", [*COMBINATIONS, *ISAD], ids=name)
def test_only_the_number_of_eligible_positions_counts_and_not_where_they_are(choice):
    """A row with a scattered set is corrupted as the row of its eligible positions alone, view by view."""
    rows, length = 400, 9
    generator = np.random.default_rng(1)
    eligible = torch.from_numpy(generator.random((rows, length)) < generator.choice([0, 0.3, 0.7, 1], (rows, 1)))
    assert set(eligible.sum(dim=1).tolist()) == set(range(length + 1))
    ids = torch.from_numpy(generator.integers(0, 3, (rows, length)))
    uniforms, process = noise_of(rows, length, 2, eligible), process_of(choice)
    drawn, views = process.draw(3, 0, rows), process.config.rows_per_slot
    here = process.corrupt(ids, eligible, uniforms, drawn, MASK)

    order = (~eligible).long().argsort(dim=1, stable=True)  # eligible positions to the front, in their order
    gather = lambda values: values.gather(1, order)  # noqa: E731
    there = process.corrupt(gather(ids), gather(eligible), gather(uniforms), drawn, MASK)
    masked = (here.noisy == MASK).view(rows, views, length)
    assert not (masked & ~eligible[:, None]).any() and masked.any()
    moved = masked.gather(2, order[:, None].expand(-1, views, -1))
    assert torch.equal(moved, (there.noisy == MASK).view(rows, views, length))
    for part in ("targets", "weights", "unit"):
        assert torch.equal(getattr(here, part), getattr(there, part)), part
    assert here.weights.isfinite().all() and here.unit.isfinite().all()

    empty = ~eligible.any(dim=1).repeat_interleave(views)
    ce = torch.ones(len(here.positions))
    for values in (row_losses(ce, here), row_statistics(ce, here, "gradient"), row_statistics(ce, here, "loss")):
        assert len(values) == rows * views and (values[empty] == 0).all() and (values[~empty] > 0).any()


# ---- the target: sum over rows of P_j l_j, over the constant N L


def exact(process, eligible):
    """sum_k omega_k c_k of one row, the masked set among its eligible positions: what sum_i weight_i CE_i must have."""
    places, total = np.flatnonzero(eligible), 0.0
    for k in range(1, len(places) + 1):
        sets = [list(chosen) for chosen in combinations(places, k)]
        mean = np.mean([TABLE[sum(1 << i for i in chosen), chosen].mean() for chosen in sets])
        total += float(process.omega.of_count(np.array([len(places)]), np.array([k]))[0]) * mean
    return total


def step_loss(process, step, change=None, seen=SETS, slots=240):
    """The step's loss as a trainer has it: over N rows of L positions, whatever is eligible in them."""
    views = process.config.rows_per_slot
    eligible, seen = SETS.repeat(slots // 4, 1), seen.repeat(slots // 4, 1)
    uniforms = torch.from_numpy(np.random.default_rng(step).random((slots, L), dtype=np.float32))
    c = process.corrupt(
        torch.zeros_like(uniforms, dtype=torch.int64), seen, uniforms, process.draw(1, step, slots), MASK
    )
    masked = (c.noisy == MASK).numpy()
    ce = torch.tensor(TABLE[masked @ 2 ** np.arange(L)]).flatten()[c.positions].float()
    if change is not None:
        return change(c, ce, eligible.repeat_interleave(views, dim=0))
    return float(row_losses(ce, c).double().sum()) / (slots * views * L)


def z_score(values, expected):
    return (np.mean(values) - expected) / (np.std(values, ddof=1) / np.sqrt(len(values)))


@pytest.mark.parametrize("choice", COMBINATIONS, ids=name)
def test_rows_of_different_p_have_their_token_mean_over_a_constant(choice):
    process = process_of(choice)
    expected = sum(exact(process, row) for row in SETS.numpy()) / (len(SETS) * L)
    assert abs(z_score([step_loss(process, step) for step in range(60)], expected)) < 5


def over_the_masked_count(c, ce, eligible):
    return float(row_losses(ce, c).double().sum()) / max(1, len(c.positions))


def over_the_eligible_count(c, ce, eligible):
    return float(row_losses(ce, c).double().sum()) / int(eligible.sum())


def mean_of_row_means(c, ce, eligible):
    P = eligible.sum(dim=1).clamp(min=1)
    return float((row_losses(ce, c) / P).double().mean())


def outside_the_set_left_out(c, ce, eligible):
    """Masks and counts over the whole row, of which only the eligible positions enter the loss: P is L."""
    kept = eligible.flatten()[c.positions]
    return float((c.weights * ce)[kept].double().sum()) / eligible.numel()


EVERYWHERE = torch.ones_like(SETS)
COUNT = dict(masks="independent", views="single", weights="count")
COUNTED = dict(masks="counted", views="single", weights="rate")


@pytest.mark.parametrize(
    ("choice", "change", "seen"),
    [
        pytest.param(COMBINATIONS[0], None, EVERYWHERE, id="the prompt masked too"),
        pytest.param(COMBINATIONS[0], over_the_masked_count, SETS, id="over the masked count"),
        pytest.param(COMBINATIONS[0], over_the_eligible_count, SETS, id="over the eligible count"),
        pytest.param(COMBINATIONS[0], mean_of_row_means, SETS, id="every row its own mean"),
        pytest.param(COUNT, outside_the_set_left_out, EVERYWHERE, id="count: P over all positions"),
        pytest.param(COUNTED, outside_the_set_left_out, EVERYWHERE, id="counted: P over all positions"),
    ],
)
def test_wrong_sets_and_normalisations_are_rejected(choice, change, seen):
    process = process_of(choice)
    expected = sum(exact(process, row) for row in SETS.numpy()) / (len(SETS) * L)
    assert abs(z_score([step_loss(process, step, change, seen) for step in range(60)], expected)) > 6


# ---- T10: SyRM's P = 5, response and listed prompt tokens


def test_t10_variance_of_syrm_at_a_rate():
    """(1/(P^2 t)) sum sigma_i^2 + ((1-t)/(P^2 t)) sum mu_i^2 + (2/P^2) sum_{i<j} cov_ij, P = |R + S| = 5."""
    length, P, n = 9, 5, 7
    eligible = torch.zeros(length, dtype=torch.bool)
    eligible[[6, 7, 8]] = True  # R, the response
    eligible[[1, 4]] = True  # S, listed tokens of the prompt
    cross_entropy = np.random.default_rng(3).gamma(2.0, 1.0, (n, length)) * np.linspace(0.3, 2, n)[:, None]
    of_set = cross_entropy[:, eligible.numpy()]
    cov = np.cov(of_set.T, bias=True)
    process = make_process()
    for t in (0.1, 0.45, 0.9):
        states = torch.from_numpy(np.array(list(product([True, False], repeat=P))))
        uniforms = torch.zeros(len(states), length)
        uniforms[:, eligible] = torch.where(states, t / 2, (1 + t) / 2)
        chance = np.prod(np.where(states, t, 1 - t), axis=1)
        at = MaskingRates(np.full(len(states), t), np.ones(len(states)))
        ids = torch.arange(length).repeat(len(states), 1)
        c = process.corrupt(ids, eligible.repeat(len(states), 1), uniforms, at, 99)
        losses = np.stack([row_losses(torch.tensor(ce).float()[c.targets], c).double().numpy() for ce in cross_entropy])

        def variance(P, chance=chance, losses=losses):
            values = losses / P
            return (values**2 @ chance).mean() - (values @ chance).mean() ** 2

        closed = (np.trace(cov) / t + (1 - t) / t * (of_set.mean(axis=0) ** 2).sum() + cov.sum() - np.trace(cov)) / P**2
        assert variance(P) == pytest.approx(closed, rel=1e-5)
        assert abs(variance(length) / closed - 1) > 0.5, "P counted over all positions"
        assert abs(variance(3) / closed - 1) > 0.5, "P counted over the response alone"
        assert (losses @ chance).mean() / P == pytest.approx(of_set.mean(), rel=1e-6)  # the mean over R + S, not R
        assert abs(cross_entropy[:, 6:].mean() / of_set.mean() - 1) > 0.05


# ---- evaluation and the reference line


def test_evaluation_noise_is_the_any_order_nelbo_of_the_set():
    """Every k and every order of the uniforms: (1/P) sum_k c_k exactly, and 0 in a row with nothing eligible."""
    for eligible in SETS:
        places = np.flatnonzero(eligible)
        P = len(places)
        cases = list(product(range(P), permutations(range(P)))) or [(0, ())]
        uniforms = torch.zeros(len(cases), L)
        uniforms[:, places] = torch.tensor([order for _, order in cases], dtype=torch.float32) / 8
        u = np.array([(k + 0.5) / max(P, 1) for k, _ in cases])
        c = corrupt_counted(
            torch.zeros(len(cases), L, dtype=torch.int64), eligible.repeat(len(cases), 1), uniforms, u, 9
        )
        masked = (c.noisy == 9).numpy()
        assert not masked[:, ~eligible.numpy()].any()
        ce = torch.tensor(TABLE[masked @ 2 ** np.arange(L)]).flatten()[c.positions].float()
        exact_nelbo = exact(make_process(masks="counted"), eligible.numpy())
        assert row_losses(ce, c).double().mean().item() == pytest.approx(exact_nelbo, rel=1e-6)


def test_the_reference_line_predicts_responses_from_what_is_before_them():
    ids = torch.arange(10, 22).view(3, 4)
    eligible = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    c = next_token(ids, eligible)
    assert torch.equal(c.noisy, ids)
    assert c.positions.tolist() == [1, 2, 4, 5] and c.targets.tolist() == [12, 13, 15, 16]
    # A row's loss over P is its mean; a first position has nothing before it, and the others stand in for it.
    assert c.weights.tolist() == [1, 1, 1.5, 1.5]
    assert row_losses(torch.full((4,), 2.0), c).tolist() == [4, 6, 0]
