"""Run on a Slurm cluster: one command submits a job that looks after itself.

    python -m launchers.slurm configs/8b.yaml --nodes 16 --gpus-per-node 8 --time 1-0 [key=value ...]

The job stops and saves before its time limit and on preemption, and has itself requeued until the run is finished;
after a crash it starts again, without the node that crashed where others are left. `--dry-run` prints the job script.
Plain sbatch and srun: RUN/job/job.sh is all there is, and can be submitted by hand.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from launchers import slurm_client
from launchers.launch import Launch, environment, parse, parser, positive, prepare, write
from launchers.lifecycle import job_folder, write_state
from mdmtrain.checkpoint.run_folder import git_revision
from mdmtrain.checkpoint.store import write_atomically
from mdmtrain.monitor.logs import CommandParser, user_errors

OURS = ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "partition", "account", "qos",
        "constraint", "time", "exclude", "signal", "output", "error", "open-mode", "requeue", "no-requeue", "chdir",
        "job-name", "array")  # fmt: skip


def slurm_parser() -> CommandParser:
    made = parser("slurm", __doc__.split("\n\n")[0])
    made.add_argument("--cpus", type=positive, default=1, metavar="N", help="cores for each rank (1)")
    made.add_argument("--mem", metavar="SIZE", help="memory of a node, such as 64G; the partition's default without it")
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        made.add_argument(f"--{name}", help=f"as sbatch --{name}")
    made.add_argument("--time", metavar="LIMIT", help="limit of one start, as sbatch --time; the run may take longer")
    made.add_argument(
        "--stop-before",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="before the time limit, to finish a step and save (300); Slurm may be a minute early",
    )
    made.add_argument("--setup", action="append", default=[], metavar="LINE",
                      help="shell line to run first: 'module load cuda', '. cluster.sh'; may export RANK_PREFIX, "
                      "which goes before the ranks' command: 'apptainer exec --nv image.sif'")  # fmt: skip
    made.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option")
    return made


def directives(launch: Launch) -> list[str]:
    """The options of sbatch, without their dashes."""
    o = launch.options
    listed = [f"job-name={launch.run_dir.name}", f"nodes={o.nodes}", f"ntasks-per-node={o.ranks_per_node}",
              f"cpus-per-task={o.cpus}"]  # fmt: skip
    if o.gpus_per_node:
        listed.append(f"gpus-per-node={o.gpus_per_node}")
    for name in ("mem", "partition", "account", "qos", "constraint", "exclude", "time"):
        if getattr(o, name) is not None:
            listed.append(f"{name}={getattr(o, name)}")
    log = str(launch.log / "job-").replace("%", "%%")
    listed += [f"signal=USR2@{o.stop_before}", "requeue", f"output={log}%j.log", "open-mode=append",
               f"chdir={os.getcwd()}"]  # fmt: skip
    for extra in o.sbatch:
        key = extra.partition("=")[0].lstrip("-")
        if key in OURS:
            raise ValueError(f"--sbatch {extra}: launchers.slurm sets {key} itself; see --help for the option")
        listed.append(extra.lstrip("-"))
    return listed


def job_script(launch: Launch) -> str:
    """RUN/job/job.sh."""
    folder = job_folder(launch.run_dir)
    lines = ["#!/bin/bash"]
    for directive in directives(launch):
        key, equals, value = directive.partition("=")
        if any(character in value for character in '"\n'):
            raise ValueError(f"--{key}: {value!r}: sbatch cannot read quotes and line ends: choose another value")
        lines.append(f'#SBATCH --{key}="{value}"' if equals else f"#SBATCH --{key}")
    lines += [*launch.options.setup, ""]
    lines += [f"export {name}=${{{name}:-{value}}}" for name, value in environment(launch.options.cpus).items()]
    lines += [
        "export PYTHONUNBUFFERED=1",
        f"export PYTHONPATH={shlex.quote(str(folder / 'code'))}",
        f"export MDMTRAIN_REVISION={shlex.quote(git_revision() or '')}",
        shlex.join(["exec", sys.executable, str(folder / "code/launchers/supervise.py"), str(launch.run_dir)]),
    ]
    return "\n".join(lines) + "\n"


# ---- refusals


def refuse_what_the_cluster_lacks(options: argparse.Namespace) -> None:
    """Raise ValueError where no nodes of the partition can hold the job, or not for so long."""
    partition = slurm_client.partition(options.partition)
    where = f"partition {partition.name}"
    banned = slurm_client.expand(options.exclude or "")
    left = [node for node in partition.nodes if node.name not in banned]
    if options.nodes > len(left):
        without = f" after --exclude {options.exclude}" if len(left) < len(partition.nodes) else ""
        raise ValueError(f"--nodes {options.nodes}: {where} has {len(left)} nodes{without}; ask for fewer")
    cores = options.ranks_per_node * options.cpus
    for option, asked, have in (
        (f"--gpus-per-node {options.gpus_per_node}", options.gpus_per_node, [node.gpus for node in left]),
        (f"--ranks-per-node {options.ranks_per_node} x --cpus {options.cpus}", cores, [node.cpus for node in left]),
    ):
        enough = sum(number >= asked for number in have)
        if enough < options.nodes:
            raise ValueError(f"{option}: {enough} of the {len(left)} nodes of {where} have that many "
                             f"(most: {max(have)}); ask for fewer")  # fmt: skip
    limit = partition.default if options.time is None else slurm_client.seconds(options.time)
    if limit > partition.limit:
        raise ValueError(f"--time {options.time}: longer than {where} allows ({partition.limit / 60:.0f} minutes); "
                         "ask for less: the run goes on in another start")  # fmt: skip
    if limit <= options.stop_before + 60:
        raise ValueError(f"--stop-before {options.stop_before}: no time is left of a limit of {limit:.0f} s (Slurm may "
                         "signal 60 s early); lower it, or raise --time")  # fmt: skip


def submit(options: argparse.Namespace) -> None:
    """Check, write RUN/job, submit, say what comes next. Raises ValueError before anything is written."""
    launch = prepare(options)
    script = job_script(launch)
    print(*launch.explanation, sep="\n")
    if options.dry_run:
        print(f"\n{script}\nnothing submitted (--dry-run)")
        return
    refuse_what_the_cluster_lacks(options)
    try:
        slurm_client.slurm("sbatch", "--test-only", stdin=script)
    except ValueError as error:
        raise ValueError(f"Slurm would refuse this job: {error}: see sinfo and --help") from None
    state = write(launch, "slurm")
    path = job_folder(launch.run_dir) / "job.sh"
    write_atomically(path, script)
    # Held until its number is written down, so that the job finds it when it begins.
    job = slurm_client.slurm("sbatch", "--parsable", "--hold", str(path)).strip().split(";")[0]
    write_state(launch.run_dir, replace(state, job=job, log=str(launch.log / f"job-{job}.log")))
    slurm_client.slurm("scontrol", "release", job)
    print(f"submitted job {job}, {slurm_client.job_state(job).name.lower()}")
    print(f"  python -m launchers.status {launch.run_dir.parent} --watch")
    print(f"  tail -F {launch.log}/job-{job}.log")
    print(f"  python -m launchers.status cancel {launch.run_dir}")


def launch(arguments: Sequence[str], defaults: dict | None = None) -> None:
    """Submit as the command line says, on top of the options of an earlier launch. Raises ValueError."""
    submit(parse(slurm_parser(), arguments, defaults))


if __name__ == "__main__":
    with user_errors():
        launch(sys.argv[1:])
