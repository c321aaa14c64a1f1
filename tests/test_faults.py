"""What goes wrong with a rank, a step or a machine: what is said, and that nothing is lost (docs/faults.md)."""

import contextlib
import ctypes
import io
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from launchers import lifecycle
from mdmtrain import config as configuration
from mdmtrain.checkpoint import store
from mdmtrain.config import RunConfig
from mdmtrain.exit_status import STOPPED_EARLY
from mdmtrain.monitor.progress import TrainingProgress
from mdmtrain.parallel import world as parallel
from mdmtrain.parallel.watchdog import Watchdog, judge
from tests.conftest import read_metrics, write_config
from tests.spawn import run_world
from tests.test_bad_inputs import LIMIT, WARM, Outcome, server  # noqa: F401 (a fixture)

# ---- in a world of two: skipped steps, stops, a slow rank


SLOW_BATCH = 0.5  # seconds


def watched(world, trees: dict[str, dict]) -> dict:
    """Several runs, some disturbed; what this rank saw of each."""
    from mdmtrain import likelihood, train
    from mdmtrain.monitor.recorder import StepRecorder
    from mdmtrain.parallel.stop import Interrupted
    from mdmtrain.parallel.world import AgreedError
    from mdmtrain.variance import probe

    said, read = io.StringIO(), []
    cross_entropy, wait_for, save, deal = train.masked_cross_entropy, StepRecorder.wait_for, store.save, probe.deal

    def run(name: str, **faults: Callable) -> str:
        read.clear()
        with contextlib.ExitStack() as at_the_end:
            at_the_end.enter_context(contextlib.redirect_stdout(said))
            for target, fault in faults.items():
                places = {"masked_cross_entropy": train, "wait_for": StepRecorder, "corrupt": likelihood, "save": store}
                place = (places | {"deal": probe})[target]
                at_the_end.enter_context(patch.object(place, target, fault))
            try:
                train.train(configuration.validate(trees[name], "test"), world)
            except (AgreedError, Interrupted) as error:
                return f"{type(error).__name__}: {error}"
        return ""

    def noted(recorder, batches):
        read.append(wait_for(recorder, batches))
        return read[-1]

    def poison(*bad_steps: int):
        def poisoned(*arguments):
            ce = cross_entropy(*arguments)
            return ce * float("nan") if world.rank == 1 and (len(read) - 1) // 2 in bad_steps else ce

        return {"wait_for": noted, "masked_cross_entropy": poisoned}

    def signal_at(batch: int):
        """Rank 1 gets SIGTERM while it prepares its batch-th batch of an evaluation."""
        count, corrupt = 0, likelihood.corrupt

        def corrupting(*arguments):
            nonlocal count
            count += 1
            if count <= 8 < batch:  # an evaluation made up before any step
                time.sleep(SLOW_BATCH)
            if world.rank == 1 and count == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            batches.append(count)
            return corrupt(*arguments)

        def slow_save(*arguments):  # that of step 2 is still being written
            time.sleep(0.5)
            return save(*arguments)

        return {"corrupt": corrupting, "save": slow_save}

    def stop_second_batch(count, batch, values, *arguments):
        """Rank 1 gets SIGTERM in its second batch of a probe."""

        def stopping(numbers):
            batches.append(len(batches))
            if world.rank == 1 and len(batches) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return values(numbers)

        return deal(count, batch, stopping, *arguments)

    def spin(recorder, batches):
        end = time.thread_time() + (0.2 if world.rank == 1 else 0.0)
        while time.thread_time() < end:
            pass
        return wait_for(recorder, batches)

    seen = {"calm": run("calm"), "skip": run("skip", **poison(2))}
    seen["read"] = [pair for batch in read[4:6] for pair in batch.samples.tolist()]
    seen["abort"] = run("abort", **poison(2, 3, 4, 5))
    batches: list[int] = []
    seen["stops"] = [run("stopped", **signal_at(2)), len(batches)]  # in the evaluation after step 3
    seen["stops"] += [store.newest(Path(trees["stopped"]["run"]["dir"])).name]
    seen["stops"] += [read_metrics(trees["stopped"]["run"]["dir"])[-1] if world.is_main else {}]
    seen["stops"] += [run("stopped", **signal_at(8 + 2)), run("stopped")]  # in that after step 6, then not at all
    batches.clear()
    seen["probe"] = [run("probed", deal=stop_second_batch), len(batches), run("probed")]
    seen["late"], seen["profiled"], seen["slow"] = run("late"), run("profiled"), run("slow", wait_for=spin)
    return {**seen, "said": said.getvalue()}


def tree(run_dir: Path, corpus: Path, **run) -> dict:
    return {
        "run": {"dir": str(run_dir), "seed": 5, "steps": 6, "global_batch": 16, "micro_batch": 4, **run},
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64},
        "data": {"sources": [{"path": str(corpus)}], "sequence_length": 64, "workers": 0},
        "optim": {"lr": 3e-3, "ema_decay": 0.9},
        "checkpoint": {"save_every": 100},
        "monitor": {"log_every": 2, "tensorboard": False, "probe_every": None},
        "eval": {"every": 3, "rows": 16, "samples": 2, "batch": 2},
    }


@pytest.fixture(scope="module")
def two_ranks(corpus, tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("faults")
    trees = {name: tree(folder / name, corpus) for name in ("calm", "skip", "stopped")}
    trees["stopped"]["checkpoint"]["save_every"] = 2
    trees["abort"] = tree(folder / "abort", corpus, max_skips=3)
    trees |= {"late": tree(folder / "late", corpus, time_limit=1e-6), "slow": tree(folder / "slow", corpus)}
    trees["late"]["monitor"] |= {"log_every": 1, "probe_every": 2}
    trees["slow"]["monitor"] |= {"log_every": 1}
    trees["probed"] = tree(folder / "probed", corpus)
    trees["probed"]["monitor"] |= {"probe_every": 2}
    trees["profiled"] = tree(folder / "profiled", corpus)
    trees["profiled"]["monitor"] |= {"profile_at": 1, "profile_steps": 2}
    return folder, run_world(watched, 2, trees)


def test_a_poisoned_step_is_skipped_everywhere_and_its_samples_are_told(two_ranks):
    folder, seen = two_ranks
    assert [one["skip"] for one in seen] == ["", ""]
    records = [r for r in read_metrics(folder / "skip") if "split" not in r]
    assert [r["step"] for r in records if r["skipped"]] == [3] and len(records) == 6
    assert records[2]["loss"] is None and records[3]["loss"] is not None
    (line,) = (folder / "skip/skipped.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told["step"] == 3 and [len(windows) for windows in told["samples"].values()] == [16]
    # The loaders of both ranks gave just these, in the order of the slots.
    (windows,) = told["samples"].values()
    assert [[0, window] for window in windows] == seen[0]["read"] + seen[1]["read"]
    for one in seen:
        assert one["abort"].startswith("AgreedError: 4 steps in a row had a non-finite loss")
    lines = (folder / "abort/skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 5, 6]


def test_a_stop_in_an_evaluation_is_agreed_and_the_evaluation_made_up(two_ranks):
    folder, seen = two_ranks
    for one in seen:
        first, batches, checkpoint, _, second, third = one["stops"]
        assert (first, checkpoint) == ("", "step-00000003")
        assert batches in (2, 3, 4), "of 8 batches a rank"
        assert second == "Interrupted: 15" and third == ""
        assert batches == seen[0]["stops"][1], "the ranks left at different batches"
    assert seen[0]["stops"][3]["step"] == 3 and "split" not in seen[0]["stops"][3]
    assert "stopped by SIGTERM after step 3 before its evaluation, checkpoint saved" in seen[0]["said"]
    assert read_metrics(folder / "stopped") == read_metrics(folder / "calm")
    for file in (folder / "calm/checkpoints/step-00000006").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "stopped/checkpoints/step-00000006" / file.name).read_bytes()


def test_clocks_start_with_the_first_step(two_ranks):
    """The evaluation that the second start makes up takes seconds: they are no part of the speed of step 4."""
    folder, _ = two_ranks
    with open(folder / "stopped/metrics.jsonl", encoding="utf-8") as lines:
        (speed,) = [r["tokens_per_second"] for r in map(json.loads, lines) if r["step"] == 4 and "split" not in r]
    assert 16 * 64 / speed < 8 * SLOW_BATCH


@pytest.mark.parametrize(("factor", "shown"), [(0.5, "loss 2.0000  bits/byte 1.500"), (None, "loss 2.0000  7 tok")])
def test_bits_per_byte_are_shown_only_of_a_bound(capsys, factor, shown):
    """The loss per eligible token of another objective than the NELBO bounds no bits."""
    progress = TrainingProgress(0, 10, bits_per_nat=factor, visible=True)
    progress.start()
    record = {"step": 2, "loss": 2.0, "nelbo": 3.0, "tokens_per_second": 7.0, "data_wait": 0.0}
    progress.update(record | {"mfu": None, "memory_gib": 0.0})
    assert shown in capsys.readouterr().out


def test_the_time_left_counts_steps_alone(capsys, monkeypatch):
    clock = iter([100.0, 104.0])  # the steps begin; two of ten are done
    monkeypatch.setattr("mdmtrain.monitor.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = TrainingProgress(0, 10, bits_per_nat=1.0, visible=True)
    progress.start()
    record = {"step": 2, "loss": 1.0, "nelbo": 1.0, "tokens_per_second": 1.0, "data_wait": 0.0}
    record |= {"mfu": None, "memory_gib": 0.0}
    progress.update(record)
    assert capsys.readouterr().out.rstrip().endswith("ETA 0:16")


def test_a_time_limit_is_a_stop_that_says_so(two_ranks):
    folder, seen = two_ranks
    assert "stopped by the time limit (run.time_limit) after step 2, checkpoint saved" in seen[0]["said"]
    assert [r["step"] for r in read_metrics(folder / "late")] == [1, 2]


def test_a_stop_waits_for_no_diagnostic(two_ranks):
    """A probe and the second gradient of a pair belong to step 2, after which the run stops."""
    folder, _ = two_ranks
    first, second = read_metrics(folder / "late")
    assert "probe" not in first and "probe" not in second
    reasons = (folder / "late/logs/rank-0.log").read_text()
    assert "after step 2: save (the time limit (run.time_limit)), log (monitor.log_every)" in reasons


def test_a_stop_in_a_probe_discards_the_probe_only(two_ranks):
    folder, seen = two_ranks
    for one in seen:
        first, batches, second = one["probe"]
        assert (first, second) == ("", "")
        assert batches in (2, 3, 4), "of 128 batches a rank"
        assert batches == seen[0]["probe"][1], "the ranks left at different batches"
    assert "stopped by SIGTERM after step 2, checkpoint saved" in seen[0]["said"]
    records = [r for r in read_metrics(folder / "probed") if "split" not in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "probe" in r] == [4, 6]
    for file in (folder / "calm/checkpoints/step-00000006").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "probed/checkpoints/step-00000006" / file.name).read_bytes()


def test_a_slow_rank_is_named_and_the_wait_of_the_others_is_not_counted(two_ranks):
    folder, _ = two_ranks
    with open(folder / "slow/metrics.jsonl", encoding="utf-8") as lines:
        records = [r for r in map(json.loads, lines) if "split" not in r]
    assert {r["slowest_rank"] for r in records} == {1}
    # Of two ranks the median is the mean: a rank whose wait counted as its own would have 1.0.
    assert min(r["slowest_over_median"] for r in records[1:]) > 1.5
    assert "rank 1 is slow" in (folder / "slow/logs/rank-0.log").read_text()
    assert "is slow" not in (folder / "calm/logs/rank-0.log").read_text()


def test_a_profile_of_the_steps_that_were_asked_for(two_ranks):
    folder, _ = two_ranks
    trace = json.loads((folder / "profiled/profile/step-1.json").read_text())
    steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 2 and not (folder / "calm/profile").exists()


# ---- whole processes: hangs, deaths, stops in preparation, memory


def rank(number: int, size: int, port: int, config: str, fault: Callable | None, out: str) -> None:
    """One rank as a launcher starts it, with a fault put into it."""
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{number}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{out}.{number}.torchrun"
    if size > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault is not None:
        fault(number)
    sys.argv = ["train", config]
    runpy.run_module("mdmtrain.train", run_name="__main__", alter_sys=True)


def at_step(step: int, act: Callable[[], None]) -> None:
    """Have `act` called when batch number `step` (from 0) is asked for."""
    from mdmtrain.monitor.recorder import StepRecorder

    wait_for, count = StepRecorder.wait_for, iter(range(1_000_000))

    def waiting(recorder, batches):
        if next(count) == 2 * step:  # two micro-steps
            act()
        return wait_for(recorder, batches)

    StepRecorder.wait_for = waiting


def stuck_in_a_lock() -> None:
    threading.Lock().acquire()
    time.sleep(1000)


def hang(number: int) -> None:
    if number == 1:
        at_step(4, stuck_in_a_lock)


def die(victim: int, number: int) -> None:
    if number == victim:
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL))


def crash(number: int) -> None:
    if number == 1:
        at_step(4, lambda: ctypes.string_at(0))  # reads address 0


def stop_in_preparation(number: int) -> None:
    """Rank 0 hashes shards for ever; rank 1, which waits for it in a collective, is told to stop."""
    from mdmtrain.data import shards

    if number == 0:
        shards.sha256_of = lambda file: time.sleep(1000)
    else:
        from mdmtrain.parallel.watchdog import Watchdog

        entered = Watchdog.__enter__

        def entering(watch):  # from here on, signals are handled
            threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            return entered(watch)

        Watchdog.__enter__ = entering


def run_out_of_memory(number: int) -> None:
    if number == 1:
        at_step(1, lambda: torch.empty(1 << 50))


def cut_a_shard(number: int) -> None:
    from mdmtrain.data.shards import PreparedSplit

    opened = PreparedSplit.__init__

    def opening(split, folder, *arguments, **named):
        opened(split, folder, *arguments, **named)
        if split.split == "train":
            at_step(2, lambda: os.truncate(Path(folder) / "train-00000.bin", 0))

    PreparedSplit.__init__ = opening


FAULTS = {
    "hang": (hang, 2),
    "die 0": (partial(die, 0), 2),
    "die 1": (partial(die, 1), 2),
    "crash": (crash, 2),
    "stop": (stop_in_preparation, 2),
    "memory": (run_out_of_memory, 2),
    "cut": (cut_a_shard, 1),
}


@pytest.fixture(scope="module")
def broken(server, corpus, tmp_path_factory) -> Callable[[str], tuple[Path, list[Outcome]]]:  # noqa: F811
    """Its folder and how its ranks ended, of each run by name: they wait most of the time, so three go at once."""
    folder = tmp_path_factory.mktemp("broken")

    def run(name: str) -> tuple[Path, list[Outcome]]:
        fault, size = FAULTS[name]
        wanted = tree(folder / name, corpus, steps=20, step_timeout=0.05)
        wanted["eval"]["every"] = 100
        if name == "cut":
            shutil.copytree(corpus, folder / "corpus")
            wanted["data"] |= {"sources": [{"path": str(folder / "corpus")}], "workers": 1, "prefetch": 1}
        config = str(write_config(wanted, folder / f"{name}.yaml"))
        arguments = (size, get_free_port(), config, fault, str(folder / f"{name}-rank"))
        processes = [WARM.Process(target=rank, args=(number, *arguments)) for number in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT)
            process.kill()
        texts = [[(folder / f"{name}-rank.{n}.{one}").read_text() for one in ("out", "err")] for n in range(size)]
        return folder / name, [Outcome(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]

    with ThreadPoolExecutor(3) as pool:
        running = {name: pool.submit(run, name) for name in FAULTS}
        yield lambda name: running[name].result()


def told_torchrun(folder: Path) -> list[str]:
    """The messages in the error files of two ranks, which torchrun prints at its end."""
    files = [folder.parent / f"{folder.name}-rank.{number}.torchrun" for number in (0, 1)]
    return [json.loads(file.read_text())["message"] for file in files]


def test_a_hung_rank_is_named_with_its_stack(broken):
    folder, (zero, one) = broken("hang")
    assert (zero.status, one.status) == (1, 1)
    assert zero.err.startswith("error: no progress for 0.05 minutes: ") and zero.err.count("\n") == 1, zero.err
    assert "rank 1 is behind, in data (step 4) for " in zero.err
    assert "the other ranks wait in forward (step 4), in gloo:" in zero.err
    assert one.err == ""
    assert all(zero.err.startswith(message) for message in told_torchrun(folder)), "torchrun would show no reason"
    assert "stuck_in_a_lock" in (folder / "logs/rank-1.log").read_text()
    assert "in all_gather" in (folder / "logs/rank-0.log").read_text()  # a collective of torch's


@pytest.mark.parametrize(("victim", "said"), [(0, "rank 0 has died"), (1, "rank 1 is not responding")])
def test_a_dead_rank_is_named(broken, victim, said):
    """Rank 0 holds the store where the others would ask."""
    _, outcomes = broken(f"die {victim}")
    assert outcomes[victim].status == -signal.SIGKILL
    assert outcomes[1 - victim].status == 1
    *before, last = outcomes[1 - victim].err.splitlines()
    assert last.startswith(f"error: a connection broke: {said}"), outcomes
    assert not any(line.startswith(("error", "Traceback")) for line in before)  # torch speaks of the store, in C++


def test_a_crash_in_a_library_leaves_every_stack(broken):
    folder, (zero, one) = broken("crash")
    assert one.status == -signal.SIGSEGV and zero.status == 1
    stacks = (folder / "logs/rank-1.log").read_text()
    assert "Fatal Python error: Segmentation fault" in stacks and "string_at" in stacks
    assert zero.err.splitlines()[-1].startswith("error: a connection broke: rank 1 is not responding")


def test_a_stop_in_preparation_is_prompt_and_leaves_nothing(broken):
    folder, (zero, one) = broken("stop")
    assert (zero.status, one.status) == (STOPPED_EARLY, STOPPED_EARLY)
    assert zero.out == "stopped by SIGTERM in preparation, before any step: run the same command to start again\n"
    assert zero.err == one.err == one.out == ""
    assert [f"{message}\n" for message in told_torchrun(folder)] == [zero.out, zero.out]
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "logs"]


def test_out_of_memory_says_what_to_change(broken):
    _, (zero, one) = broken("memory")
    assert one.status == 2 and zero.status == 1 and zero.err == ""
    line = one.refusal()
    assert line.startswith("error: rank 1: out of memory (") and "lower run.micro_batch=4" in line
    assert "parallel.activation_checkpointing=full" in line and "tools/plan_run.py" in line


def test_a_shard_cut_under_a_loader_is_named(broken):
    folder, (only,) = broken("cut")
    line = only.err.splitlines()[-1].strip("\0")  # torch's own line about the loader's process ends with one
    assert only.status == 2 and line.startswith(
        f"error: {folder.parent}/corpus/train-00000.bin has 0 bytes, the manifest"
    )


# ---- the verdict by itself


def place(progress: list[int], where: str = "data (step 7)") -> dict:
    return {"place": where, "seconds": 600.0, "progress": progress, "last": "gloo:all_reduce [[3]] (collective 9)"}


def test_a_launcher_that_has_gone_is_missed_at_once(monkeypatch):
    """Killed while its ranks imported torch, it cannot take them with it: they would look for its store for an hour."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as store_of_torchrun:
        monkeypatch.setenv("MASTER_PORT", str(store_of_torchrun.getsockname()[1]))
        parallel.check_launcher()
    with pytest.raises(ValueError, match=r"torchrun at .* has ended"):
        parallel.check_launcher()


def test_a_run_that_owes_an_evaluation_alone_has_no_steps_to_watch():
    """It was stopped after its last step: the next start evaluates, waits for exports, and never begins a step."""
    watch = Watchdog(SimpleNamespace(rank=0, size=1), RunConfig(dir="x", steps=1, global_batch=1, micro_batch=1))
    for phase in ("preparation", "evaluation", "checkpoint", "export"):
        watch.at(phase)


def test_the_verdict():
    ahead = place([40, 10, 9], "forward (step 7)")
    named, line = judge("no progress", {0: ahead, 1: ahead, 2: place([39, 9, 9]), 3: ahead}, 4)
    assert named == [2] and "rank 2 is behind, in data (step 7) for 600 s" in line and "wait in forward" in line
    # In the same phase, the one that has not come to the collective where the others wait.
    named, _ = judge("no progress", {0: ahead, 1: place([40, 9, 9], ahead["place"])}, 2)
    assert named == [1]
    named, line = judge("lost", {0: ahead, 3: ahead}, 4)
    assert named == [1, 2] and "ranks 1, 2 are not responding" in line
    assert judge("no progress", {0: ahead, 1: ahead}, 2)[0] == []
    assert judge("lost", {0: ahead, 1: {"left": "out of memory"}}, 2) == ([1], "")  # it has said so itself


def test_a_run_without_its_last_evaluation_is_not_finished():
    running = lifecycle.State("slurm", "7", "running", starts=1, began_at=20)
    stopped = lifecycle.Ended(STOPPED_EARLY, early=True)
    assert lifecycle.conclude(running, stopped, 100, 100, 3).phase == "requeued"
