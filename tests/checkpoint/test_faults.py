"""Storage that fails, and settings that change between two starts: nothing committed is lost, no sample repeats."""

import errno
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from mdmtrain import config as configuration
from mdmtrain.checkpoint import storage, store
from mdmtrain.checkpoint.loading import load_model
from mdmtrain.data.loader import Dataset, open_sources
from tests.checkpoint.models import as_version1
from tests.conftest import read_metrics
from tests.spawn import run_world
from tests.test_worlds import close


@pytest.fixture
def tree_of(small_run, tmp_path):
    """tree_of(name, {section: changes}): the tree of a run of 12 steps with checkpoints at 3, 6, 9 and 12."""

    def tree(name: str, changes: dict | None = None) -> dict:
        base = {
            "run": {"dir": str(tmp_path / name), "steps": 12, "micro_batch": 8},
            "model": {"d_model": 16, "n_layers": 1, "d_ff": 32},
            "checkpoint": {"save_every": 3, "keep_last": 4},
            "monitor": {"log_every": 1, "tensorboard": False, "probe_every": None},
            "eval": {"every": 100, "rows": 4, "samples": 1, "batch": 4},
        }
        merged = {s: {**base.get(s, {}), **(changes or {}).get(s, {})} for s in {*base, *(changes or {})}}
        return small_run(merged)

    return tree


def train_with(world, runs: list[tuple[dict, str | None]]) -> list[dict]:
    """Train each tree in turn under a fault. What this rank saw: steps, order log, error."""
    from mdmtrain import train as module
    from mdmtrain.parallel.world import AgreedError

    store.RETRY_SECONDS = (0.05, 0.05)
    write, read, step = store.write_file, Dataset.__getitems__, module.optimizer_step
    seen = []
    for tree, fault in runs:
        if fault == "disturb":
            world.agree(lambda tree=tree: disturb(Path(tree)), main_only=True)
            continue
        failures = {"once": 1, "for good": 1 << 30}.get(fault, 0)
        saw = {"steps": 0, "order": {}, "error": ""}

        def write_file(file, blocks):
            nonlocal failures
            if world.rank == world.size - 1 and failures and "step-00000006" in str(file):
                failures -= 1
                raise OSError(errno.EIO, "Input/output error")
            return write(file, blocks)

        def getitems(dataset, wanted, saw=saw):
            batch = read(dataset, wanted)
            for (at, slot), sample, uniforms in zip(wanted, batch.samples.tolist(), batch.uniforms, strict=True):
                saw["order"][at, slot] = (tuple(sample), uniforms.numpy().tobytes())
            return batch

        def optimizer_step(*arguments, saw=saw):
            saw["steps"] += 1
            return step(*arguments)

        store.write_file, Dataset.__getitems__ = write_file, getitems
        module.optimizer_step = optimizer_step
        try:
            module.train(configuration.validate(tree, "test"), world)
        except AgreedError as error:
            saw["error"] = str(error)
        seen.append(saw)
    return seen


def die_while_saving(tree: dict, elsewhere: dict) -> None:
    """One rank that is killed when it has written the second checkpoint's tensors, beside a loop that goes on.

    Before that, a run that keeps its checkpoints in this process's memory and goes on from there.
    """
    world = alone()
    part = {**elsewhere, "run": {**elsewhere["run"], "steps": 6}}
    assert [saw["steps"] for saw in train_with(world, [(part, None), (elsewhere, None)])] == [6, 6]
    assert load_model("memory://somewhere", None, world).meta["step"] == 12
    write = store.write_marker

    def killed(folder, *arguments):
        if folder.name == "step-00000006":
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, *arguments)

    store.write_marker = killed
    train_with(world, [(tree, None)])


def alone():
    from mdmtrain.parallel.world import init_world

    torch.set_num_threads(1)
    return init_world()


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def disturb(folder: Path) -> None:
    """Runs in the middle of the calm one; a flipped bit in two checkpoints; one as an older version wrote it."""
    for name, newest in (("flipped", 9), ("hsdp", 6), ("dtype", 6), ("batch", 6), ("old", 6)):
        shutil.copytree(folder / "calm", folder / name)
        for step in (9, 12):
            if step > newest:
                shutil.rmtree(folder / name / f"checkpoints/step-{step:08d}")
    for number, checkpoint in ((2, "flipped/checkpoints/step-00000009"), (1, "elsewhere/step-00000012")):
        flip(folder / checkpoint / f"shard-0000{number}-of-00002.safetensors")
    as_version1(folder / "old/checkpoints/step-00000006")


def log_of(run: Path) -> str:
    return (run / "logs/rank-0.log").read_text()


def test_faults_of_storage_and_changes_on_resuming(tree_of, tmp_path):
    memory = tree_of("memory", {"checkpoint": {"dir": "memory://somewhere"}})
    process = multiprocessing.get_context("spawn").Process(target=die_while_saving, args=(tree_of("killed"), memory))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = sorted(folder.name for folder in (tmp_path / "killed/checkpoints").iterdir())
    assert left == ["step-00000003", "step-00000006"]
    assert [f.name for f in store.complete_checkpoints(tmp_path / "killed")] == ["step-00000003"]

    file_url = {"checkpoint": {"dir": f"file://{tmp_path}/elsewhere"}}
    first = [
        (tree_of("calm"), None),
        (tree_of("waiting", {"checkpoint": {"asynchronous": False}}), None),
        (tree_of("healed"), "once"),
        (tree_of("failed"), "for good"),
        (tree_of("failed"), None),
        (tree_of("killed"), None),
        (tree_of("elsewhere", file_url), None),
    ]
    batch = {"run": {"global_batch": 32, "steps": 9}, "checkpoint": {"allow_changed": ["global_batch"]}}
    on = {"run": {"global_batch": 32}}
    second = [
        (tree_of("flipped"), None),
        (tree_of("elsewhere", file_url), None),
        (tree_of("hsdp", {"parallel": {"replicate": 2}, "run": {"micro_batch": 2}, "data": {"workers": 1}}), None),
        (tree_of("dtype", {"parallel": {"compute_dtype": "bfloat16"}}), None),
        (tree_of("batch", on), None),
        (tree_of("batch", batch), None),
        (tree_of("batch", on), None),
        (tree_of("old"), None),
    ]
    ranks = run_world(train_with, 2, [*first, (str(tmp_path), "disturb"), *second])
    _, _, healed, failed, again, killed, _, flipped, elsewhere, *_ = ranks[0]
    calm = read_metrics(tmp_path / "calm")
    for name in ("waiting", "healed", "failed", "elsewhere", "flipped"):
        assert read_metrics(tmp_path / name) == calm, name
    close(calm, read_metrics(tmp_path / "killed"), 1e-4)  # its first steps were one rank's
    assert [r["step"] for r in read_metrics(tmp_path / "memory") if "loss" in r] == [*range(1, 13)]
    assert not healed["error"] and log_of(tmp_path / "healed").count("trying again") == 1
    # All ranks stop after the same step, soon: not at the next checkpoint, and not at the end of the run.
    assert failed["error"] == ranks[1][3]["error"] and failed["steps"] == ranks[1][3]["steps"] < 12
    assert failed["error"].startswith(f"cannot write checkpoint {tmp_path / 'failed/checkpoints/step-00000006'}: ")
    assert "Input/output error" in failed["error"] and log_of(tmp_path / "failed").count("trying again") == 2
    assert again["steps"] == killed["steps"] == 9  # from step 3
    assert not (tmp_path / "elsewhere/checkpoints").exists()
    assert store.find(tmp_path / "elsewhere") == storage.place(f"file://{tmp_path}/elsewhere/step-00000012")

    # ---- again, each from the middle of a run
    assert (flipped["steps"], elsewhere["steps"]) == (6, 3)  # from the checkpoint before
    for name in ("flipped", "elsewhere"):
        assert "skipping a damaged checkpoint: " in log_of(tmp_path / name)
    assert read_metrics(tmp_path / "old") == calm
    close(calm, read_metrics(tmp_path / "hsdp"), 1e-4)
    losses, rounded = ([r["loss"] for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("calm", "dtype"))
    assert rounded != losses and rounded == pytest.approx(losses, rel=2e-2)

    # ---- a larger batch: the order goes on where it stood, and no noise comes twice
    refused, *changed = ([rank[n] for rank in ranks] for n in (11, 12, 13))
    assert (
        "its global_batch is 16, not 32" in refused[0]["error"]
        and "allow_changed='[global_batch]'" in refused[0]["error"]
    )
    config = configuration.validate(tree_of("calm", {"run": {"steps": 99}}), "test")
    dataset = Dataset(config, open_sources(config.data, "train"))
    slots = range(16)
    whole = [tuple(s) for step in range(18) for s in dataset.__getitems__([(step, n) for n in slots]).samples.tolist()]
    order = {place: row for part in changed for rank in part for place, row in rank["order"].items() if place[0] < 12}
    assert sorted(order) == [(step, slot) for step in range(6, 12) for slot in range(32)]
    assert [order[place][0] for place in sorted(order)] == whole[6 * 16 : 6 * 16 + 6 * 32]
    before = [dataset.__getitems__([(step, n) for n in slots]).uniforms.numpy() for step in range(6)]
    noise = {row.tobytes() for rows in before for row in rows} | {row[1] for row in order.values()}
    assert len(noise) == 6 * 16 + 6 * 32
    tokens = [record["tokens"] for record in read_metrics(tmp_path / "batch") if "tokens" in record]
    assert tokens == list(np.cumsum([16 * 64] * 6 + [32 * 64] * 6))
    assert store.read_meta(store.newest(tmp_path / "batch"))["tokens"] == tokens[-1]
