"""Counter-based noise: pinned for ever, without overlap, and any slice of it drawn alone is the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdmtrain.diffusion import noise
from mdmtrain.diffusion.noise import Stream

# ---- golden values: they pin the streams for ever. A change here means that old runs can no longer be continued.


def test_golden_bits_and_uniforms():
    assert noise.philox(0, Stream.POSITIONS, 0).random_raw(4).tolist() == [
        15023647771317767168,
        8110679283269960230,
        5528858672019317250,
        11282472352219738416,
    ]
    assert in_units(noise.uniforms(noise.philox(17, Stream.POSITIONS, 3, 5), 6)) == [
        *(11200807, 15409525, 12498941, 4178596, 11405325, 3042788)
    ]
    largest = noise.philox(2**63 - 1, Stream.INIT, 2**64 - 1, 2**40, block=7)
    assert in_units(noise.uniforms(largest, 3)) == [6353241, 15548579, 16048215]
    assert in_units(noise.position_uniforms(17, 3, np.array([5, 6]), 3)) == [
        [11200807, 15409525, 12498941],
        [11921523, 8739176, 4686170],
    ]


def test_golden_normals():
    drawn = noise.normals(17, "layers.0.mlp.up_proj.weight", 5, 6)
    golden = [-0.42380985617637634, 1.617374062538147, 1.685109257698059]
    golden += [1.647737979888916, 0.612655520439148, -0.10862741619348526]
    # One unit in the last place is left to the C library's logarithm and cosine.
    np.testing.assert_allclose(drawn, golden, rtol=1.2e-7, atol=0)


def test_stream_numbers_are_never_reused():
    assert {stream.name: stream.value for stream in Stream}.items() >= {
        *(("STRATA", 1), ("POSITIONS", 2), ("ORDER", 3), ("INIT", 4), ("LENGTH", 5), ("EVALUATION", 6)),
        ("GENERATION", 7),
    }
    assert len(Stream.__members__) == len({stream.value for stream in Stream})


def in_units(uniforms):
    return (uniforms.astype(np.float64) * 2**24).astype(int).tolist()


# ---- no overlap


def test_neighbouring_slots_steps_streams_and_seeds_share_no_word():
    def words(seed, stream, step, slot):
        return noise.philox(seed, stream, step, slot).random_raw(8192)

    keys = [(s, stream, step, slot) for s in (0, 1) for stream in (1, 2) for step in (0, 1) for slot in (0, 1, 2)]
    assert shared_words([words(*key) for key in keys]) == 0

    # The slot in word 0, where the draws are counted: slot 1 is slot 0 with its first four words left out.
    def overlapping(slot):
        return np.random.Philox(key=[0, 2], counter=[slot, 0, 0, 0]).random_raw(8192)

    assert shared_words([overlapping(slot) for slot in (0, 1, 2)]) > 0
    # One generator for all slots, as a trainer that forgets to key by slot has.
    assert shared_words([words(0, 2, 0, 0), words(0, 2, 0, 0)]) == 8192


def shared_words(draws):
    return sum(map(len, draws)) - len(np.unique(np.concatenate(draws)))


def test_slots_and_steps_are_uncorrelated():
    count = 20_000
    rows = np.stack([noise.position_uniforms(5, step, np.arange(4), count) for step in (0, 1)]).reshape(8, count)
    correlations = np.corrcoef(rows)[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(count)
    # Antithetic rows (U and 1 - U) are disjoint as well, and would not pass.
    assert abs(np.corrcoef(rows[0], 1 - rows[0])[0, 1]) > 4.5 / np.sqrt(count)


def test_uniforms_are_on_the_half_open_interval_in_steps_of_two_to_the_minus_24():
    drawn = noise.uniforms(noise.philox(1, Stream.POSITIONS, 0), 50_000)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert np.array_equal(drawn * 2**24, np.floor(drawn * 2**24))
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4
    # Rounding 64 bits to float32 reaches 1.0, and a masking rate of 1 would leave that position visible.
    assert np.float32(np.float64(2**64 - 1) / 2**64) == 1.0


@given(slots=st.lists(st.integers(0, 10_000), min_size=1, max_size=8), length=st.integers(1, 40))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_slot_has_the_same_noise_in_whatever_company_it_is_drawn(slots, length):
    together = noise.position_uniforms(3, 9, np.array(slots), length)
    for row, slot in zip(together, slots, strict=True):
        assert np.array_equal(row, noise.position_uniforms(3, 9, np.array([slot]), length + 5)[0, :length])


# ---- normals


@given(first=st.integers(0, 300), count=st.integers(0, 120))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_any_slice_of_normals_is_the_slice_of_the_whole(first, count):
    whole = noise.normals(7, "w", 0, 420)
    drawn = noise.normals(7, "w", first, count)
    assert drawn.dtype == np.float32
    assert np.array_equal(drawn, whole[first : first + count])
    # A shard that starts at the block below `first`, or at 0, is right only where `first` says so.
    if count and first % 8:
        assert not np.array_equal(noise.normals(7, "w", first - first % 8, count), drawn)


def test_slices_of_a_parameter_beyond_four_billion_values():
    first = 2**35 + 3
    assert np.array_equal(noise.normals(7, "w", first, 20)[5:], noise.normals(7, "w", first + 5, 15))
    # A 32-bit block counter would come round to the beginning.
    assert not np.array_equal(noise.normals(7, "w", first, 5), noise.normals(7, "w", 3, 5))


def test_normals_are_standard_normal_and_white():
    count = 200_000
    x = noise.normals(11, "w", 0, count).astype(np.float64)
    assert is_white_normal(x)
    assert not is_white_normal(1.02 * x)  # a wrong scale
    assert not is_white_normal(np.repeat(x[::2], 2))  # the cosine taken twice
    uniform = noise.uniforms(noise.philox(11, Stream.INIT, 0), count).astype(np.float64)
    assert not is_white_normal((uniform - 0.5) * np.sqrt(12))  # right mean and variance, wrong law


def is_white_normal(x):
    """Moments 1 to 4, and correlations at lags 1 to 9 of values and of squares, within 4.5 standard errors."""
    n = len(x)
    scores = [
        x.mean() * np.sqrt(n),
        ((x**2).mean() - 1) / np.sqrt(2 / n),
        (x**3).mean() / np.sqrt(15 / n),
        ((x**4).mean() - 3) / np.sqrt(96 / n),
    ]
    squares = (x**2 - 1) / np.sqrt(2)
    for lag in range(1, 10):
        scores += [(y[lag:] * y[:-lag]).mean() * np.sqrt(n - lag) for y in (x, squares)]
    return max(map(abs, scores)) < 4.5


def test_parameters_of_different_names_and_seeds_are_independent():
    count = 100_000
    names = ["layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "layers.10.mlp.up_proj.weight"]
    drawn = [noise.normals(0, name, 0, count) for name in names] + [noise.normals(1, names[0], 0, count)]
    correlations = np.corrcoef(drawn)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(count)
    # Keyed by shape and seed alone, equal layers would start equal.
    assert np.corrcoef(drawn[0], noise.normals(0, names[0], 0, count))[0, 1] > 0.999
