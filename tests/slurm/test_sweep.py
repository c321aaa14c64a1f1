"""A sweep as a job array: a task for each run, and the same table as one process after the other."""

import json
import signal

from launchers import sweep
from launchers.lifecycle import read_state
from tests.conftest import SOAK, read_metrics, write_config


def test_a_job_array_and_its_table(cluster, small_run, tmp_path, monkeypatch, capsys):
    """2 arms x 3 seeds in the soak, 2 x 1 otherwise; finished runs are not submitted again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep, "POLL", 0.5)
    tree = small_run({"run": {"steps": 6}, "optim": {"warmup_steps": 0}, "eval": {"every": 3, "rows": 4}})
    base = str(write_config(tree, tmp_path / "config.yaml"))
    seeds = [0, 1, 2] if SOAK else [0]
    options = ["--arms", "standard,counted", "--seeds", ",".join(map(str, seeds)), "--json", str(tmp_path / "table")]
    there = ["--dir", str(tmp_path / "array"), "--slurm", "--time 30"]
    sweep.main([base, *options, *there, "--workers", "2"])
    rows = json.loads((tmp_path / "table").read_text())["cells"]
    assert [(row["arm"], row["seeds"]) for row in rows] == [("standard", seeds), ("counted", seeds)]
    array = {read_state(tmp_path / f"array/{arm}/seed-{seed}").job for arm in ("standard", "counted") for seed in seeds}
    assert {job.partition("_")[0] for job in array} == {min(array).partition("_")[0]} and len(array) == 2 * len(seeds)
    log = (tmp_path / f"array/logs/job-{min(array)}.log").read_text()
    assert "finished at step 6 of 6" in log
    capsys.readouterr()
    sweep.main([base, *options, *there])
    assert "submitted" not in capsys.readouterr().out
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    sweep.main([base, "--arms", "counted", "--seeds", "0", "--dir", str(tmp_path / "here")])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert read_metrics(tmp_path / "here/counted/seed-0") == read_metrics(tmp_path / "array/counted/seed-0")
