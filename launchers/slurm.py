"""Submit a run to Slurm as a job that saves before its time limit, is requeued, and resumes until it is finished.

    python -m launchers.slurm configs/8b.yaml --nodes 16 --gpus-per-node 8 --time 1-0 [key=value ...]

The job also saves and is requeued when it is preempted. After a crash it starts again, without the node that crashed if
enough other nodes are left. submitit submits the job: `executor` is submitit's executor with our parameters, and
`supervise` (supervise.py) is the callable. `--dry-run` prints the job script. docs/cluster.md is the user's guide; it
also shows how to submit from your own submitit script.
"""

import argparse
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers import launch as launch_module
from launchers import slurm_client
from launchers.launch import Launch, environment, parse, parser, positive, write
from launchers.lifecycle import job_folder, write_state
from launchers.supervise import supervise
from mdmtrain.checkpoint.run_folder import git_revision
from mdmtrain.command import CommandParser, user_errors
from mdmtrain.cost import GIB, GPUS, Assumptions, cost
from mdmtrain.files import writing

OURS = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "mem", "partition", "account", "qos", "constraint",
        "time", "exclude", "clusters", "signal", "output", "error", "open-mode", "requeue", "no-requeue", "hold",
        "chdir", "job-name", "array")  # fmt: skip
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")  # any of these replaces our --gres
# Variables that users set for all their jobs. They are defaults of our options, so that they are validated and shown.
DEFAULTS = {
    "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "qos": "SBATCH_QOS", "mem": "SBATCH_MEM_PER_NODE",
    "constraint": "SBATCH_CONSTRAINT", "time": "SBATCH_TIMELIMIT", "clusters": "SBATCH_CLUSTERS",
}  # fmt: skip
PYTHON = f"exec {shlex.quote(sys.executable)}"  # exec: Slurm must see the supervisor's end, not that of a shell


def slurm_parser() -> CommandParser:
    made = parser("slurm", __doc__.split("\n\n")[0])
    made.add_argument("--cpus", type=positive, metavar="N", help="cores for each rank (default: 1 + data.workers)")
    made.add_argument(
        "--mem", metavar="SIZE", help="memory for each node, such as 64G (default: the partition's default)"
    )
    for name in ("partition", "account", "qos", "constraint", "exclude"):
        made.add_argument(f"--{name}", help=f"as sbatch --{name}")
    made.add_argument(
        "--time", metavar="LIMIT", help="time limit of one start, as sbatch --time; the run may need several starts"
    )
    made.add_argument(
        "--stop-before",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="stop and save this long before the time limit (default: 300); Slurm may send the signal 60 s earlier",
    )
    made.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line that the job script runs first, such as 'module load cuda' or '. cluster.sh'; it may export "
        "RANK_PREFIX, a command that runs the ranks, such as 'apptainer exec --nv image.sif'",
    )
    made.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option")
    made.add_argument("--clusters", metavar="NAME", help="submit to another cluster of the same federation")
    made.add_argument(
        "--gpu", choices=sorted(GPUS), help="print the estimated memory and time of the run on this kind of GPU"
    )
    made.set_defaults(**{name: os.environ.get(variable) for name, variable in DEFAULTS.items()})
    return made


def prepare(options: argparse.Namespace) -> Launch:
    """launch.prepare, and the default of --cpus: one core for each process of a rank. Raises ValueError."""
    if options.clusters and "," in options.clusters:
        raise ValueError(f"--clusters {options.clusters}: name one cluster: a run cannot be tracked on several")
    launch = launch_module.prepare(options)
    options.cpus = options.cpus or 1 + launch.config.data.workers
    return launch


def read_launch(arguments: Sequence[str]) -> Launch:
    """A validated launch from command-line arguments, for your own submitit script. Raises ValueError."""
    return prepare(parse(slurm_parser(), arguments, None))


# ---- submitit


class RunExecutor(submitit.SlurmExecutor):
    """submitit's executor for jobs whose batch step runs the supervisor, which starts the ranks itself.

    It uses these private members of submitit: _make_submission_file_text, _submitit_command_str and the parameter
    map_count.
    """

    @classmethod
    def affinity(cls) -> int:
        return 2  # available also without Slurm, so that --dry-run can print the script anywhere

    def script(self, tasks: int) -> str:
        """The job script for one run, or for an array of several."""
        self.parameters["map_count"] = tasks if tasks > 1 else None
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            del self.parameters["map_count"]


def job_parameters(launches: Sequence[Launch], folder: Path | None = None, at_once: int | None = None) -> dict:
    """submitit's parameters for one run, or for an array of runs that differ only in their configuration.

    folder: holds the logs (default: the run folder); at_once: largest number of array tasks that run at the same time.
    The executor that gets these parameters must be made with python=PYTHON. Raises ValueError for a path or an option
    that sbatch would not read correctly.
    """
    options = launches[0].options
    config = launches[0].config
    runs = [str(one.run_dir) for one in launches]
    return {
        **common_parameters(options, folder or launches[0].run_dir, len(runs), runs),
        "signal_delay_s": options.stop_before,
        "array_parallelism": at_once or len(runs),
        "setup": setup_lines(options, runs, max(1, options.cpus - config.data.workers)),
    }


def common_parameters(options: argparse.Namespace, folder: Path, tasks: int, paths: list[str]) -> dict:
    """submitit's parameters that all our jobs have. folder: holds the logs; paths: what else the script names.

    Raises ValueError for a path or an option that sbatch would not read correctly.
    """
    log = f"{folder}/logs/job-".replace("%", "%%") + ("%A_%a.log" if tasks > 1 else "%j.log")
    # nodes and ntasks_per_node are given here because submitit waits for a result of each task that it knows of.
    extra = {"nodes": options.nodes, "ntasks_per_node": options.ranks_per_node, "requeue": True, "output": log}
    if options.clusters:
        extra["clusters"] = options.clusters
    for word in options.sbatch:
        key, equals, value = word.lstrip("-").partition("=")
        if key in OURS:
            raise ValueError(f"--sbatch {word}: launchers.slurm sets {key} itself; see --help for the option")
        extra[key] = value if equals else True
    if options.gpus_per_node and not set(extra) & set(GPU_OPTIONS):
        extra["gres"] = f"gpu:{options.gpus_per_node}"
    names = ("mem", "partition", "account", "qos", "constraint", "exclude", "time")
    named = {name: getattr(options, name) for name in names}
    refuse_what_sbatch_cannot_read([*paths, str(folder)], {**named, **extra})
    return {
        "job_name": folder.name,
        "cpus_per_task": options.cpus,
        **named,
        "stderr_to_stdout": True,
        "use_srun": False,  # srun would start a supervisor for each rank
        "wckey": None,
        "additional_parameters": extra,
    }


def refuse_what_sbatch_cannot_read(folders: list[str], options: dict) -> None:
    """Raise ValueError for characters that sbatch or submitit would change in a path or an option."""
    for folder in folders:
        for mark in ("%j", "%t", "%A", "%a", "\\", "\n", "\r"):
            if mark in folder:
                raise ValueError(
                    f"{folder!r}: sbatch and submitit replace {mark!r} in a path: choose another run.dir, or --out"
                )
    for key, value in options.items():
        if isinstance(value, str) and any(character in value for character in "\\\n\r"):
            raise ValueError(f"--{key}: {value!r}: sbatch cannot read backslashes and line ends: choose another value")


def setup_lines(options: argparse.Namespace, runs: list[str], threads: int) -> list[str]:
    """The lines of the job script before the supervisor's command. threads: OMP_NUM_THREADS of a rank."""
    return [
        "trap '' USR1 USR2 HUP  # until the supervisor installs its own handlers",
        *options.setup,
        f"runs=({shlex.join(runs)})",
        'run="${runs[${SLURM_ARRAY_TASK_ID:-0}]}"',
        *code_lines('"$run/job/code"', environment(threads)),
    ]


def code_lines(code: str, variables: dict[str, str]) -> list[str]:
    """The lines that check what the node sees, set variables, and enter the copy of the code (quoted for the shell)."""
    return [
        f"for path in {code} {shlex.join([sys.executable, os.getcwd()])}; do",
        '  [ -e "$path" ] && continue',
        '  echo "error: $SLURMD_NODENAME does not see $path: it must be on a file system that all nodes share"',
        "  exit 2",
        "done",
        *(f"export {name}=${{{name}:-{value}}}" for name, value in variables.items()),
        "export PYTHONUNBUFFERED=1 SUBMITIT_LOG_LEVEL=WARNING",
        "export SUBMITIT_PREEMPT_SIGNAL=URG  # submitit's own requeueing must not react to USR2",
        f"export MDMTRAIN_REVISION={shlex.quote(git_revision() or '')}",
        f"cd {code}  # python -m imports from here, so edits do not change a queued job",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
    ]


def executor(launches: Sequence[Launch], folder: Path, at_once: int | None = None) -> RunExecutor:
    """The executor for one run or an array. folder: of the run or of the sweep. The job is submitted with a hold."""
    parameters = job_parameters(launches, folder, at_once)
    parameters["additional_parameters"]["hold"] = True
    made = RunExecutor(job_folder(folder) / "submitit", python=PYTHON)
    made.update_parameters(**parameters)
    return made


# ---- refusals


def refuse_what_the_cluster_lacks(
    options: argparse.Namespace,
    tasks: int,
    many: tuple[str, str] = ("runs", "start the sweep in parts, with --arms or --seeds"),
) -> None:
    """Raise ValueError if the cluster allows fewer tasks in an array, or if the partition has too few nodes, GPUs or
    cores, or too short a time limit, for the job.
    """
    cluster = options.clusters or ""
    if tasks > 1:
        most = slurm_client.most_array_tasks(cluster)
        if tasks > most:
            raise ValueError(
                f"{tasks} {many[0]}: this cluster allows {most} tasks in a job array (MaxArraySize): {many[1]}"
            )
    name = options.partition
    if not name:
        defaults = [one[:-1] for one in slurm_client.partitions(cluster) if one.endswith("*")]
        if not defaults:
            return  # Slurm itself reports if it cannot choose a partition for this job
        name = defaults[0]
    partition = slurm_client.partition(name, cluster)
    where = f"partition {partition.name}"
    banned = slurm_client.expand(options.exclude or "")
    left = [node for node in partition.nodes if node.name not in banned]
    if options.nodes > len(left):
        without = f" after --exclude {options.exclude}" if len(left) < len(partition.nodes) else ""
        raise ValueError(f"--nodes {options.nodes}: {where} has {len(left)} nodes{without}; request fewer")
    cores = options.ranks_per_node * options.cpus
    for option, asked, have in (
        (f"--gpus-per-node {options.gpus_per_node}", options.gpus_per_node, [node.gpus for node in left]),
        (f"--ranks-per-node {options.ranks_per_node} x --cpus {options.cpus}", cores, [node.cpus for node in left]),
    ):
        enough = sum(number >= asked for number in have)
        if enough < options.nodes:
            raise ValueError(f"{option}: {enough} of the {len(left)} nodes of {where} have that many "
                             f"(most: {max(have)}); request fewer")  # fmt: skip
    limit = partition.default if options.time is None else slurm_client.seconds(options.time)
    if limit > partition.limit:
        raise ValueError(f"--time {options.time}: longer than {where} allows ({partition.limit / 60:.0f} minutes); "
                         "request less: the run resumes in the next start")  # fmt: skip
    if limit <= options.stop_before + 60:
        raise ValueError(f"--stop-before {options.stop_before}: leaves no time to train within the time limit of "
                         f"{limit:.0f} s (Slurm may signal 60 s earlier); lower it, or raise --time")  # fmt: skip


def refuse_what_slurm_refuses(script: str, cluster: str) -> None:
    """Raise ValueError with Slurm's own message if `sbatch --test-only` refuses the script."""
    try:
        slurm_client.slurm("sbatch", "--test-only", stdin=script, cluster=cluster)
    except ValueError as error:
        hint = "see sinfo and --help"
        if "partition" in str(error):
            hint = f"choose one with --partition: {', '.join(slurm_client.partitions(cluster))}"
        raise ValueError(f"Slurm would refuse this job: {error}: {hint}") from None


@contextmanager
def no_files_if_refused(folder: Path) -> Iterator[None]:
    """If sbatch refuses the job, remove the files that submitit has written to `folder`, and raise ValueError."""
    before = set(folder.glob("*"))
    try:
        with redirect_stderr(io.StringIO()):  # submitit also prints the error that it raises
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        for path in set(folder.glob("*")) - before:
            path.unlink()
        raise ValueError(f"sbatch: {'; '.join(str(error).splitlines())}") from None


def submit(launches: list[Launch], folder: Path, at_once: int | None = None) -> list[str]:
    """Submit one run as a job, or several that differ only in their configuration as a job array. Returns the job ids.

    folder: of the run, or of the sweep. Raises ValueError if Slurm would refuse the job, before a file is written.
    """
    made = executor(launches, folder, at_once)
    options = launches[0].options
    cluster = options.clusters or ""
    refuse_what_the_cluster_lacks(options, len(launches))
    refuse_what_slurm_refuses(made.script(len(launches)), cluster)
    if left_out := sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in DEFAULTS.values()):
        print(f"not passed on: {', '.join(left_out)}: give these options with --sbatch")
    states = [write(one, "slurm") for one in launches]
    with writing(made.folder):
        for needed in (made.folder, folder / "logs"):
            needed.mkdir(parents=True, exist_ok=True)
    with slurm_client.outside_allocations(), no_files_if_refused(made.folder):
        jobs = [job.job_id for job in made.map_array(supervise, [one.run_dir for one in launches])]
    # The job is held until state.json has its id, because the supervisor reads that file when it starts.
    number = jobs[0].partition("_")[0]
    for one, state, job in zip(launches, states, jobs, strict=True):
        log = str(folder / f"logs/job-{job}.log")
        write_state(one.run_dir, replace(state, job=job, log=log, cluster=cluster, submitit=str(made.folder)))
    slurm_client.slurm("scontrol", "release", number, cluster=cluster)
    now = slurm_client.job_state(jobs[0], cluster)
    print(f"submitted job {number}, {now.name.lower()}")
    if not now.requeue:
        print("note: this cluster does not requeue the job: after a time limit or a preemption the run is saved and "
              "stopped; resume it with launchers.status resume")  # fmt: skip
    print(f"  python -m launchers.status {folder.parent if len(launches) == 1 else folder} --watch")
    print(f"  tail -F {folder}/logs/job-{jobs[0]}.log")
    print(f"  python -m launchers.status cancel {' '.join(str(one.run_dir) for one in launches)}")
    return jobs


def estimates(launch: Launch) -> list[str]:
    """The estimates of tools/plan_run.py for this run on the kind of GPU that --gpu names."""
    gpu = launch.options.gpu
    one = cost(launch.config, launch.shape, launch.plan.world_size, GPUS[gpu], Assumptions())
    fits = "fits into" if one.fits else "DOES NOT FIT into"
    return [f"memory {one.memory_total / GIB:.1f} GiB per GPU: {fits} {GPUS[gpu].memory / GIB:.0f} GiB of {gpu}",
            f"step {one.step_seconds:.3g} s, {one.tokens_per_second:,.0f} tokens/s, {one.days:,.2f} days in total "
            "(estimated from data sheets: see tools/plan_run.py)"]  # fmt: skip


def launch(arguments: Sequence[str], defaults: dict | None = None) -> None:
    """Submit with the options of the command line. `defaults`: the options of an earlier launch. Raises ValueError."""
    options = parse(slurm_parser(), arguments, defaults)
    one = prepare(options)
    print(*one.explanation, *(estimates(one) if options.gpu else ()), sep="\n")
    if options.dry_run:
        print(f"\n{executor([one], one.run_dir).script(1)}\nnothing submitted (--dry-run)")
    else:
        submit([one], one.run_dir)


if __name__ == "__main__":
    with user_errors():
        launch(sys.argv[1:])
