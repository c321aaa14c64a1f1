"""One stratification of the global batch: strata at every scale, uniform for every slot, worth what theory says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdmtrain.diffusion import noise, strata
from mdmtrain.diffusion.noise import Stream


def draw(seed, step, count, kind="global"):
    return strata.uniforms(seed, step, count, kind)


def stratum(u, count):
    return np.floor(u * count + 1e-9).astype(int)  # u = s / count, rounded, may lie a last place below s


def is_stratified(u, count):
    """One of `count` values in each of `count` strata."""
    return sorted(stratum(u, count)) == list(range(count))


def shuffled(seed, step, count):
    """The obvious implementation: strata in a random order. Whole batches are stratified, ranks are not."""
    generator = np.random.default_rng([seed, step])
    return (generator.permutation(count) + generator.random(count)) / count


# ---- structure


@given(seed=st.integers(0, 2**63 - 1), step=st.integers(0, 10**7), count=st.integers(1, 2000))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_every_batch_and_every_aligned_power_of_two_block_is_stratified(seed, step, count):
    u = draw(seed, step, count)
    assert u.shape == (count,) and u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert is_stratified(u, count)
    block = 2
    while count % block == 0:
        assert all(is_stratified(part, block) for part in u.reshape(-1, block)), block
        block *= 2


@pytest.mark.parametrize("count", [1280, 2000, 1024])
def test_the_checker_rejects_a_plain_shuffle_and_independent_draws(count):
    plain = shuffled(0, 0, count)
    assert is_stratified(plain, count)
    assert not all(is_stratified(part, 8) for part in plain.reshape(-1, 8))
    assert not is_stratified(draw(0, 0, count, "none"), count)


def test_golden_values():
    """They pin the streams for ever: a change here means that old runs can no longer be continued."""
    assert stratum(draw(17, 3, 12), 12).tolist() == [9, 0, 7, 3, 11, 2, 6, 5, 10, 1, 8, 4]
    assert stratum(draw(17, 3, 16), 16).tolist() == [15, 1, 11, 6, 12, 3, 9, 4, 14, 0, 10, 7, 13, 2, 8, 5]
    assert stratum(draw(17, 3, 15), 15).tolist() == [10, 6, 3, 12, 5, 2, 14, 9, 0, 13, 8, 4, 11, 7, 1]
    jitter = draw(17, 3, 12)[:3] * 12 % 1
    assert np.round(jitter * 2**24).tolist() == [775326, 9172701, 108620]
    assert (draw(17, 3, 4, "none") * 2**24).astype(int).tolist() == [11914492, 3206753, 1955316, 6865378]


def test_unknown_kind_is_refused():
    with pytest.raises(AssertionError):
        draw(0, 0, 4, "blocks")


@pytest.mark.parametrize("kind", ["global", "none"])
def test_steps_seeds_and_streams_draw_anew(kind):
    draws = [draw(seed, step, 64, kind) for seed in (0, 1) for step in (0, 1, 2)]
    draws.append(strata.uniforms(0, 0, 64, kind, Stream.EVALUATION))
    assert len({values.tobytes() for values in draws}) == len(draws)
    assert draws[0].tobytes() == draw(0, 0, 64, kind).tobytes()
    if kind == "global":  # a new jitter in the old order is not a new stratification
        assert len({tuple(stratum(values, 64)) for values in draws}) == len(draws)


# ---- each slot by itself is uniform: nothing ties a slot (a rank, its data) to a band of noise

STEPS, SLOTS = 4000, 12


@pytest.fixture(scope="module")
def many_steps():
    return np.stack([draw(1, step, SLOTS) for step in range(STEPS)])


def uniformity(values, bins):
    """p-value of the chi-square test of equal counts."""
    return stats.chisquare(np.bincount(stratum(values, bins), minlength=bins)).pvalue


def test_each_slot_is_uniform_over_the_steps(many_steps):
    for slot in range(SLOTS):
        assert uniformity(many_steps[:, slot], SLOTS) > 1e-4 / SLOTS
        assert uniformity(many_steps[:, slot], 50) > 1e-4 / SLOTS  # the jitter within the stratum too
    # A fixed map slot -> stratum, as public trainers have: every batch is stratified, and no slot is uniform.
    jitter = np.random.default_rng(0).random((STEPS, SLOTS))
    fixed = (np.arange(SLOTS) + jitter) / SLOTS
    assert is_stratified(fixed[0], SLOTS) and uniformity(fixed[:, 3], SLOTS) < 1e-12
    # No jitter: uniform over strata, not within them.
    assert uniformity(stratum(many_steps[:, 3], SLOTS) / SLOTS, 50) < 1e-12


def test_no_two_slots_keep_their_distance(many_steps):
    """A common random shift modulo N would make each slot uniform, and every pair of slots rigid."""
    order = stratum(many_steps, SLOTS)
    shifted = (order[:1] + np.arange(STEPS)[:, None]) % SLOTS
    for other in range(1, SLOTS):
        assert len(np.unique((order[:, other] - order[:, 0]) % SLOTS)) >= 4
        assert len(np.unique((shifted[:, other] - shifted[:, 0]) % SLOTS)) == 1


# ---- what it is worth: mathematics.md section 9, T6, T6g, T14


def variance_and_error(x):
    squares = (x - x.mean()) ** 2
    return squares.mean(), squares.std() / np.sqrt(len(x))


def assert_variance(x, expected):
    variance, error = variance_and_error(x)
    assert abs(variance - expected) < 4.5 * error, (variance, expected, error)


def linear(u):
    return 1 + 5 * u  # T6's g; its variance over t is 25/12


def test_t6_variance_of_a_batch_mean():
    iid = np.array([linear(draw(2, step, 16, "none")).mean() for step in range(5000)])
    global_ = np.array([linear(draw(2, step, 16)).mean() for step in range(5000)])
    by_fours = np.array([linear(np.concatenate([draw(r, s, 4) for r in range(4)])).mean() for s in range(2500)])
    assert_variance(iid, 25 / 12 / 16)  # .130208
    assert_variance(global_, 25 / 12 / 16**3)  # .000509
    assert_variance(by_fours, 25 / 12 / 4**3 / 4)  # .008138, strata of four: must not pass for the batch's own
    assert by_fours.var() > 10 * global_.var()
    for means in (iid, global_, by_fours):
        assert abs(means.mean() - 3.5) < 4.5 * means.std() / np.sqrt(len(means))


def test_t6g_eight_ranks_are_stratified_together():
    together = np.array([linear(draw(3, step, 64)).mean() for step in range(3000)])
    each = np.array([np.mean([linear(draw(rank, step, 8)).mean() for rank in range(8)]) for step in range(1500)])
    assert_variance(together, 25 / 12 / 64**3)  # 7.9e-6
    assert_variance(each, 25 / 12 / 8**3 / 8)  # 5.09e-4: each rank by itself
    # A rank's share of the common draw is as good as a stratification of its own.
    share = np.array([linear(draw(3, step, 64)[24:32]).mean() for step in range(3000)])
    assert_variance(share, 25 / 12 / 8**3)
    # Strata in shuffled order lose that: a rank has eight almost independent rates.
    assert np.var([linear(shuffled(3, step, 64)[24:32]).mean() for step in range(1000)]) > 20 * share.var()


def test_strata_by_rank_are_each_its_own_and_cost_what_they_cost():
    """Eight ranks of eight: 5.09e-4 against the 7.9e-6 of one stratification; and no two ranks share their draw."""
    steps = np.stack([strata.uniforms(3, step, 64, "rank", blocks=8) for step in range(1500)])
    assert all(is_stratified(block, 8) for block in steps[:20].reshape(-1, 8))
    assert not any(is_stratified(step, 64) for step in steps)
    assert len({block.tobytes() for block in steps.reshape(-1, 8)}) == 1500 * 8
    means = linear(steps).mean(axis=1)
    assert_variance(means, 25 / 12 / 8**3 / 8)
    assert abs(means.mean() - 3.5) < 4.5 * means.std() / np.sqrt(len(means))


def test_t6b_what_strata_leave_is_the_data():
    """g = 1 + (5 + 3z) t, z ~ N(0, 1), n = 64: n Var is 5.0833 without strata, 3.0005 with."""
    z = np.random.default_rng(0).standard_normal((3000, 64))
    for kind, expected in (("none", 5.0833), ("global", 3.0005)):
        u = np.stack([draw(9, step, 64, kind) for step in range(3000)])
        assert_variance(np.sqrt(64) * (1 + (5 + 3 * z) * u).mean(axis=1), expected)


def imbalance(kind, repeats):
    """Masked tokens of the busiest of 64 ranks over the mean, 8 rows of 1,024 tokens each; one value per repeat."""
    generator = np.random.default_rng(0)
    ratios = []
    for step in range(repeats):
        rates = 1e-3 + (1 - 1e-3) * kind(4, step, 512)
        tokens = generator.binomial(1024, rates).reshape(64, 8).sum(axis=1)
        ratios.append(tokens.max() / tokens.mean())
    return np.array(ratios)


def owen(seed, step, count):
    """Owen's nested scrambling of the radical inverse, bit by bit: an independent oracle for powers of two."""
    generator = np.random.default_rng([seed, step])
    slots, high = np.arange(count), np.zeros(count, dtype=int)
    for level in range(count.bit_length() - 1):
        flips = generator.integers(0, 2, size=2**level)  # one coin for every interval of this level
        high = 2 * high + ((slots >> level & 1) ^ flips[high])
    return (high + generator.random(count)) / count


def test_t14_masked_tokens_are_balanced_over_ranks():
    def matches(ratios, expected, tolerance=0.0005):
        return abs(ratios.mean() - expected) < 4.5 * ratios.std() / np.sqrt(len(ratios)) + tolerance

    repeats = 300
    spread = imbalance(draw, repeats)
    oracle = imbalance(owen, repeats)
    independent = imbalance(lambda seed, step, count: draw(seed, step, count, "none"), repeats)
    permuted = imbalance(shuffled, repeats)
    # The 1.035 of mathematics.md is scipy's Sobol sequence, whose linear scrambling is slightly smoother: Owen's
    # gives 1.048.
    assert matches(spread, 1.048) and matches(oracle, 1.048)
    assert matches(independent, 1.47, 0.005)
    assert matches(permuted, 1.47, 0.005)  # stratified as a whole, yet as unbalanced as independent draws
    assert not any(matches(wrong, 1.048) for wrong in (independent, permuted, imbalance(by_eights, repeats)))


def by_eights(seed, step, count):
    """Each rank's eight rows stratified by themselves: 1.062."""
    generator = np.random.default_rng([seed, step])
    return np.concatenate([(generator.permutation(8) + generator.random(8)) / 8 for _ in range(count // 8)])


def test_no_two_slots_share_their_jitter():
    u = draw(8, 0, 1024)
    jitter = u * 1024 % 1
    assert len(np.unique(jitter)) > 1020
    assert abs(np.corrcoef(jitter[::2], jitter[1::2])[0, 1]) < 4.5 / np.sqrt(512)
    assert noise.uniforms(noise.philox(8, Stream.STRATA, 0), 4).tolist() != jitter[:4].tolist()
