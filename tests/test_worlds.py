"""One run on 1, 2 and 4 ranks is the same run (DESIGN.md, law 1)."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mdmtrain import config as configuration
from tests.conftest import read_metrics
from tests.spawn import run_world


def trace_and_train(world, tree: dict) -> dict:
    """On one rank: what each of its slots reads and masks in 20 steps, the initial weights, then a real run."""
    from mdmtrain.config import resolve
    from mdmtrain.data.loader import open_sources, train_loader
    from mdmtrain.diffusion.objective import plain_process
    from mdmtrain.model.presets import model_shape
    from mdmtrain.parallel.parallelize import build_model, init_weights
    from mdmtrain.train import train
    from mdmtrain.variance.probe import Probe

    config = configuration.validate(tree, "test")
    plan = resolve(config, world.size)
    batches = iter(train_loader(config, plan, world.rank, open_sources(config.data, "train"), 0, pin_memory=False))
    slots, shared, empty = {}, {"U": [], "u": [], "length": []}, 0
    for step in range(config.run.steps):
        process = plain_process(config.diffusion)
        draws = process.draw(config.run.seed, step, config.slots_per_step)
        for _ in range(plan.accumulation):
            batch = next(batches)
            drawn = draws.at(batch.slots.numpy())
            noisy = process.corrupt(batch.ids, batch.eligible, batch.uniforms, drawn, mask_id=4).noisy
            empty += not (noisy == 4).any()
            shared["U"] += [row.tobytes() for row in batch.uniforms.numpy()]
            shared["u"] += drawn.rates.tolist()
            shared["length"] += batch.eligible.sum(dim=1).tolist()
            for row, slot in enumerate(batch.slots.tolist()):
                content = hashlib.sha256(noisy[row].numpy().tobytes() + drawn.rates[row].tobytes()).hexdigest()
                slots[step, slot] = (tuple(batch.samples[row].tolist()), content)

    model = build_model(model_shape(config.model, 512), config.parallel, world)
    init_weights(model, config.run.seed)
    weights = {
        n: hashlib.sha256(p.full_tensor().detach().numpy().tobytes()).hexdigest() for n, p in model.named_parameters()
    }
    probe = Probe(model, config, 4, world)
    found = probe.decompose(process, open_sources(config.data, "validation"), step=7)[0]
    p = probe.fit(plain_process(config.diffusion), open_sources(config.data, "train")).p
    train(config, world)
    return {"slots": slots, "weights": weights, "noise": shared, "empty": empty, "probe": (found, p.tobytes())}


def resume_and_train(world, tree: dict) -> None:
    from mdmtrain.train import train

    train(configuration.validate(tree, "test"), world)


PER_RANK = ("masked_tokens_min", "masked_tokens_max")


def assert_no_shared_noise(ranks: list[dict]) -> None:
    """Masking noise, rates and lengths of each rank are its own, in every step."""
    for kind in ("U", "u"):
        drawn = [value for rank in ranks for value in rank[kind]]
        assert len(set(drawn)) == len(drawn), f"two slots share {kind}"
    lengths = [tuple(rank["length"]) for rank in ranks]
    assert len(set(lengths)) == len(lengths), "two ranks cut their rows alike"
    if len(ranks) > 1:
        with pytest.raises(AssertionError):  # both ranks count their slots from 0
            assert_no_shared_noise([ranks[0], ranks[0]])


def close(a: list[dict], b: list[dict], relative: float) -> None:
    """Equal records of any two numbers of ranks, floats within a relative tolerance."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name, value in x.items():
            if name in PER_RANK or isinstance(value, dict):  # differences of the probe cancel: it is compared by itself
                continue
            values, others = (value, y[name]) if isinstance(value, list) else ([value], [y[name]])
            for one, other in zip(values, others, strict=True):
                same = one == other or (isinstance(one, float) and other == pytest.approx(one, rel=relative))
                assert same, (x["step"], name, one, other)


def test_the_same_run_on_1_2_and_4_ranks(small_run, tmp_path):
    """Samples, rates, masks, initial weights bit for bit; losses to 1e-5; a run saved on 2 ranks resumes on any."""
    results, metrics, trees = {}, {}, {}
    # The loader processes differ too: they must not matter.
    for size, micro, workers in ((1, 16, 0), (2, 8, 1), (2, 4, 0), (4, 1, 0)):
        run_dir = str(tmp_path / f"ranks-{size}-micro-{micro}")
        tree = small_run({"run": {"dir": run_dir, "steps": 20, "global_batch": 16, "micro_batch": micro, "seed": 5}})
        tree["data"]["workers"] = workers
        tree["diffusion"] = {"fit_rates": 32, "fit_sequences": 4, "fit_masks": 2}
        ranks = run_world(trace_and_train, size, tree)
        merged = {}
        for rank in ranks:
            assert not merged.keys() & rank["slots"].keys(), "two ranks drew the same slot"
            merged.update(rank["slots"])
        assert_no_shared_noise([rank["noise"] for rank in ranks])
        assert all(rank["probe"] == ranks[0]["probe"] for rank in ranks)
        results[size, micro] = (merged, ranks[0]["weights"], ranks[0]["probe"])
        metrics[size, micro], trees[size, micro] = read_metrics(run_dir), tree
    slots, weights, probe = results[1, 16]
    assert len(slots) == 20 * 16
    assert len({content for _, content in slots.values()}) == len(slots), "two slots share their noise and data"
    for other_slots, other_weights, other_probe in results.values():
        assert other_slots == slots
        assert other_weights == weights
        assert other_probe == probe, "the decomposition or the fit depends on the number of ranks"
    for other in metrics.values():
        close(metrics[1, 16], other, 1e-5)
    # Some micro-batch had no mask on one rank alone: a rank that skipped it would have left the others waiting.
    assert sum(rank["empty"] for rank in ranks) > 0
    assert metrics[1, 16][-1]["nelbo"] < 0.95 * metrics[1, 16][0]["nelbo"], "it does not learn"

    # From the checkpoint of step 10, written by 2 ranks.
    saved = Path(trees[2, 8]["run"]["dir"])
    for size in (1, 2, 4):
        tree = small_run({"run": {"dir": str(tmp_path / f"resumed-{size}"), "steps": 20, "global_batch": 16}})
        tree["run"]["micro_batch"] = 4
        tree["run"]["seed"] = 5
        tree["diffusion"] = {"fit_rates": 32, "fit_sequences": 4, "fit_masks": 2}
        if size == 2:
            tree["run"]["micro_batch"] = 8
        run_dir = Path(tree["run"]["dir"])
        shutil.copytree(saved, run_dir)
        shutil.rmtree(run_dir / "checkpoints/step-00000020")
        run_world(resume_and_train, size, tree)
        resumed = read_metrics(run_dir)
        if size == 2:
            assert resumed == metrics[2, 8], "the same world must continue bit for bit"
        close(metrics[2, 8], resumed, 1e-4)


def gradients(world, shape_values: dict) -> torch.Tensor:
    """The gradient of a fixed global batch of 4 rows, dealt to the ranks."""
    from mdmtrain.config import ParallelConfig
    from mdmtrain.model.presets import ModelShape
    from mdmtrain.parallel.parallelize import build_model, init_weights

    model = build_model(ModelShape(**shape_values), ParallelConfig(), world)
    init_weights(model, 1)
    ids = torch.arange(4 * 8).view(4, 8) % 60
    mine = ids.chunk(world.size)[world.rank]
    # Rank 0 alone has masked positions: the others take part in every collective all the same.
    positions = torch.arange(5) if world.rank == 0 else torch.arange(0)
    ce = model(mine, positions, mine.flatten()[positions])
    (ce.sum() / 32).backward()
    return torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_add_up_and_a_rank_without_masks_is_legal(tied):
    shape = dict(vocab_size=64, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, tied_embeddings=tied)
    alone = run_world(gradients, 1, shape)[0]
    both = run_world(gradients, 2, shape)
    assert torch.equal(both[0], both[1])
    torch.testing.assert_close(both[0], alone, rtol=1e-5, atol=1e-8)  # an average over ranks would be half of it
    assert alone.abs().max() > 1e-3


def train_and_watch(world, *trees: dict) -> list[tuple[dict, list[bytes], set[int]]]:
    """Real runs, as this rank sees them: bits of the rates that each step drew and of each density, sizes of sums."""
    from mdmtrain.diffusion.objective import ForwardProcess
    from mdmtrain.diffusion.sampler import RateSampler
    from mdmtrain.parallel.world import World
    from mdmtrain.train import train

    rates, densities, sizes, draw, use, add = {}, [], set(), ForwardProcess.draw, RateSampler.use, World.sum

    def watched_draw(process, seed, step, *more):
        draws = draw(process, seed, step, *more)
        rates[step] = draws.rates.tobytes()
        return draws

    def watched_use(sampler, p):
        use(sampler, p)
        densities.append(sampler.density.p.tobytes())

    def watched_sum(world, tensor):
        sizes.add(tensor.numel() * tensor.element_size())
        return add(world, tensor)

    ForwardProcess.draw, RateSampler.use, World.sum = watched_draw, watched_use, watched_sum
    seen = []
    for tree in trees:
        train(configuration.validate(tree, "test"), world)
        seen.append((dict(rates), list(densities), set(sizes)))
        rates.clear(), densities.clear(), sizes.clear()
    return seen


def test_a_fitted_sampler_is_the_same_on_all_ranks_and_after_a_resume(small_run, tmp_path):
    """P-POTS with MIRROR pairs, online and once: one density on all ranks; a resumed run goes on bit for bit."""

    def trees(ranks, micro):
        # A probe after step 11: its two gradients would be those of step 10, which saves, and 11.
        for when, every, more in (
            ("online", 4, {"refit_every": 5}),
            ("once", 11, {"fit_rates": 16, "fit_sequences": 2, "fit_masks": 2}),
        ):
            run = {"dir": str(tmp_path / f"{when}-{ranks}"), "steps": 20, "global_batch": 16, "micro_batch": micro}
            process = {"sampler": "ppots", "when": when, "views": "mirror_dedup", "bins": 8, "min_hits": 2, **more}
            monitor = {
                "log_every": 5,
                "tensorboard": False,
                "probe_every": every,
                "probe_sequences": 4,
                "probe_rates": 2,
                "probe_masks": 2,
            }
            yield small_run({"run": {**run, "seed": 5}, "diffusion": process, "monitor": monitor})

    quiet = next(iter(trees(0, 8)))
    quiet["monitor"] = {**quiet["monitor"], "probe_every": None}
    (alone,) = run_world(train_and_watch, 1, *trees(1, 8), quiet)
    both = run_world(train_and_watch, 2, *trees(2, 4))
    assert both[0] == both[1], "the ranks disagree: did each fit its own density?"
    ones, (online, once) = np.ones(8).tobytes(), both[0]
    assert len(online[1]) == 4 and online[1][-1] != ones, "nothing was fitted"
    assert len(once[1]) == 1 and once[1][0] != ones, "not fitted once, before the first step"
    assert once[:2] == alone[1][:2]
    first = 5 * (1 + [p != ones for p in online[1]].index(True))  # steps before the first fit
    assert [alone[0][0][step] for step in range(first)] == [online[0][step] for step in range(first)]
    assert np.frombuffer(alone[0][1][-1]) == pytest.approx(np.frombuffer(online[1][-1]), rel=1e-3)
    # What the variance machinery adds to a step's communication: numbers by bin, three by rank, and three more.
    assert [run[2] for run in both[0]] == [{8 * (2 * 8 + 3 + 3 * 2)}] * 2
    names = ("online-0", "online-1", "online-2", "once-1", "once-2")
    records = {name: read_metrics(tmp_path / name) for name in names}
    seen = {"grad_noise", "noise_scale_tokens", "probe", "rate_density"}
    unseen = [{k: v for k, v in r.items() if k not in seen} for r in records["online-1"]]
    assert records["online-0"] == unseen, "a look at the run changed it"
    close(records["online-1"], records["online-2"], 1e-4)
    close(records["once-1"], records["once-2"], 1e-4)
    fours = [4, 8, 12, 16, 20]
    for name, probed, paired in (("online-2", fours, fours), ("once-2", [11], [])):
        assert [r["step"] for r in records[name] if "probe" in r] == probed
        assert [r["step"] for r in records[name] if "grad_noise" in r] == paired
    for when in ("online", "once"):
        shutil.rmtree(tmp_path / f"{when}-2/checkpoints/step-00000020")
    again = run_world(train_and_watch, 2, *trees(2, 4))
    assert again[0] == again[1]
    for when, before, after in zip(("online", "once"), both[0], again[0], strict=True):
        assert read_metrics(tmp_path / f"{when}-2") == records[f"{when}-2"]
        densities = before[1][2:] if when == "online" else []  # the checkpoint has it
        assert after[:2] == ({step: before[0][step] for step in range(10, 20)}, densities)
