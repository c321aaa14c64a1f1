"""A preparation in many processes: the same bytes, whatever was killed; failures are tried again, and said."""

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launchers import prepare as launcher
from mdmtrain.data.division import Division
from mdmtrain.data.inputs import find_inputs
from mdmtrain.data.parts import Preparation, work_folder
from mdmtrain.data.prepare import Options, prepare
from tests.conftest import SOAK
from tests.data.test_prepare import tree, words
from tools import prepare_data

KILLS = 20 if SOAK else 1  # for each number of tasks


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(8):
        texts = [words(40, chance) for chance in range(number, number + 30)]  # most are in several files
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


OPTIONS = Options(vocab_size=290, validation_fraction=0.2, shard_tokens=3000, part_bytes=9000, dedup=True)
ARGUMENTS = ["--vocab-size", "290", "--validation-fraction", "0.2", "--shard-tokens", "3000", "--part-bytes", "9000"]
ARGUMENTS += ["--dedup"]


@pytest.fixture
def calm(corpus, tmp_path) -> dict[str, bytes]:
    prepare(find_inputs([str(corpus)], [], [], tmp_path / "calm"), tmp_path / "calm", OPTIONS, 1)
    return tree(tmp_path / "calm")


def start(arguments: list[str]) -> int:
    """The command in a fork of this process, whose tasks are real processes. Returns its id."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            launcher.POLL = 0.05
            launcher.main(arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


def children(pid: int) -> list[int]:
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 12), st.data())
def test_the_largest_parts_are_dealt_first(sizes, tasks, data):
    """No task has more than the least one and a unit: what the last unit of a task was added to was the least."""
    units = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    deals = launcher.dealt(units, sizes, tasks)
    assert len(deals) == min(tasks, len(units)) and all(deals)
    assert sorted(unit for deal in deals for unit in deal) == units
    least = min(sum(sizes[unit] for unit in deal) for deal in deals)
    for deal in deals:
        assert deal == sorted(deal, key=lambda unit: (-sizes[unit], unit))
        assert sum(sizes[unit] for unit in deal[:-1]) <= least
    assert launcher.dealt(units, [1] * len(sizes), tasks) == [units[first::tasks] for first in range(len(deals))]


def test_progress_reads_only_the_files_of_parts_that_have_begun(corpus, tmp_path, monkeypatch):
    division = Division.of(find_inputs([str(corpus)], [], [], tmp_path / "out"), OPTIONS)
    work = work_folder(tmp_path / "out")
    launcher.running(work).mkdir(parents=True)
    making = Preparation(division, work)
    making.begin()
    show = launcher.Show(making, Console(), sizes=list(division.sizes))
    for unit, done in ((2, "7"), (5, "11"), (6, "")):  # the last one is just being written
        launcher.note(work, "hashes", unit).write_text(done)
    launcher.note(work, "hashes", 2).with_suffix(".error").write_text("not a number")
    read, plain = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, *rest: (read.append(file.name), plain(file, *rest))[1])
    assert show._done("hashes") == (18, 0)
    assert sorted(read) == ["hashes-00002", "hashes-00005", "hashes-00006"]


def killed(pid: int) -> bool:
    """SIGKILL to a process that certainly runs: it is stopped first. False if it has ended before."""
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        while (state := Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) not in "ZX":
            if state == "T":
                os.kill(pid, signal.SIGKILL)
                return True
            time.sleep(0.001)
    return False


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_killed_at_random_moments_the_bytes_are_those_of_a_calm_preparation(corpus, calm, tmp_path, tasks):
    """The launcher, or one of its tasks, at a random moment of a random step, until KILLS of them have been hit.

    A preparation that is finished before is compared, and another one begins.
    """
    chance, out, kills, finished = random.Random(tasks), tmp_path / "out", 0, 0
    done = work_folder(out) / "done"
    command = [str(corpus), *ARGUMENTS, "--out", str(out), "--tasks", str(tasks), "--max-attempts", "99"]
    while kills < KILLS or work_folder(out).exists() or not finished:
        pid, expected, processes = start(command), {0}, []
        if kills < KILLS:
            moment = len(list(done.glob("*"))) + chance.randrange(4)
            while not ended(pid) and len(list(done.glob("*"))) < moment:
                time.sleep(0.01)
            time.sleep(0.5 * chance.random())
            while not ended(pid) and not children(pid):
                time.sleep(0.01)
            processes = children(pid)
            victim = chance.choice([pid, *processes])
            if killed(victim):
                kills += 1
                expected = {-signal.SIGKILL}
                if victim != pid:
                    os.kill(pid, signal.SIGTERM)  # after it has seen the end of the task, or not
                    expected = {0, 1}
        status = status_of(pid)
        assert status in expected, f"status {status} after {kills} kills"
        for process in processes:
            deadline = time.monotonic() + 30
            while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert not Path(f"/proc/{process}").exists(), "a task outlives its launcher"
        if status == 0:
            assert tree(out) == calm and not work_folder(out).exists()
            shutil.rmtree(out)
            finished += 1
    assert kills == KILLS
    print(f"{tasks} tasks: {kills} kills of running processes, {finished} folders equal to the calm one")


def test_a_killed_task_is_started_again(corpus, calm, tmp_path):
    out = tmp_path / "out"
    pid = start([str(corpus), *ARGUMENTS, "--out", str(out), "--tasks", "2"])
    killed = set()
    while len(killed) < 2 and not ended(pid):
        for child in children(pid):
            if any(work_folder(out).glob("unfinished-parts-*")) and child not in killed:
                os.kill(child, signal.SIGKILL)
                killed.add(child)
                break
        time.sleep(0.005)
    assert status_of(pid) == 0 and tree(out) == calm and killed


def test_a_part_that_fails_is_tried_again_and_named(corpus, calm, tmp_path, monkeypatch, capsys, signals):
    monkeypatch.setattr(launcher, "POLL", 0.1)
    bad, out = corpus / "5.jsonl", tmp_path / "out"
    good = bad.read_text()
    bad.write_text(good + "{")
    tokenizer = tmp_path / "calm"
    command = [str(corpus), "--tokenizer", str(tokenizer), *ARGUMENTS[2:-1], "--out", str(out), "--tasks", "2"]
    with pytest.raises(
        ValueError, match=r"1 of 8 units failed 2 times; unit 5: .*5.jsonl:31: not JSON.*kept: 7; the same"
    ):
        launcher.main([*command, "--max-attempts", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("5.jsonl:31: not JSON") == 2 and "trying again" in said and "no attempts left" in said
    bad.write_text(good)
    launcher.main(command)
    prepare(
        find_inputs([str(corpus)], [], [], out),
        tmp_path / "plain",
        Options(str(tokenizer), validation_fraction=0.2, shard_tokens=3000, part_bytes=9000),
        1,
    )
    assert tree(out) == tree(tmp_path / "plain") and "MB/s" in capsys.readouterr().out
    launcher.main(command)
    assert capsys.readouterr().out.startswith("already prepared: ")


def test_a_dry_run_writes_nothing(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    command = [str(corpus), *ARGUMENTS, "--out", str(tmp_path / "out"), "--tasks", "3", "--dry-run"]
    launcher.main(command)
    assert "parts   8, the largest 0.0 MB, for 3 tasks" in capsys.readouterr().out
    launcher.main([*command, "--workers", "2", "--slurm", "--time 1:00:00 --mem 2G --setup 'module load x'"])
    script = capsys.readouterr().out
    for line in ("#SBATCH --array=0-2%3", "#SBATCH --cpus-per-task=2", "#SBATCH --mem=2G", "#SBATCH --time=1:00:00"):
        assert f"{line}\n" in script
    assert "\nmodule load x\n" in script and f"cd {work_folder(tmp_path / 'out')}/code" in script
    launcher.main([*command, "--tasks", "20", "--slurm", "--time 1:00:00"])
    said = capsys.readouterr().out
    assert "only 8 of 20 tasks have a part" in said and "#SBATCH --array=0-7%8\n" in said
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}


def test_help_offers_standard_input_only_where_it_is_read(capsys):
    for main, offered in ((launcher.main, False), (prepare_data.main, True)):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert ("- for standard input" in " ".join(capsys.readouterr().out.split())) == offered


REFUSED = {
    "standard input": (["-"], "", "can be read only once, and not by several tasks"),
    "no tasks": (["corpus", "--tasks", "0"], None, "'0' is not a positive number"),
    "several nodes": (["corpus"], "--nodes 2", "a task has one node and no GPU"),
    "GPUs": (["corpus"], "--gpus-per-node 2", "a task has one node and no GPU"),
    "our own option": (["corpus"], "--sbatch nodes=3", "launchers.slurm sets nodes itself"),
    "no Slurm": (["corpus"], "--partition x", "no Slurm on this machine"),
    "no such input": (["nothing"], None, "no input matches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_prepared_is_one_line(case, corpus, tmp_path, monkeypatch, signals):
    arguments, slurm, pattern = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    with open(corpus / "0.jsonl") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(ValueError, match=pattern) as error:
            options = [] if "--tasks" in arguments else ["--tasks", "2"]
            options += ["--slurm", slurm] if slurm else []
            launcher.main([*arguments, *ARGUMENTS[:-1], "--out", "out", *options])
    assert "\n" not in str(error.value) and {path.name for path in tmp_path.iterdir()} == {"corpus"}
