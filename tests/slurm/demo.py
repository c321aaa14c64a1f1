"""make slurm-demo: a cluster of two nodes on this machine, the quickstart on both, and a job that takes them away.

The run saves, goes back into the queue, comes again and finishes. Everything of the cluster is gone afterwards.
`python -m tests.slurm.demo --nodes 16`: as many nodes as memory holds, about 0.4 GB each.
"""

import os
import shutil
import time
from pathlib import Path

from launchers import slurm, status
from launchers.lifecycle import newest_step, read_state
from mdmtrain.command import CommandParser, user_errors
from tests.slurm.cluster import Cluster, missing

RUN = Path("runs/slurm-demo")
LAUNCH = ["configs/quickstart.yaml", "--time", "30", f"run.dir={RUN}", "run.steps=300",
          "checkpoint.save_every=100", "eval.every=300", "monitor.log_every=20"]  # fmt: skip
TELLING = ("start ", "step 100  ", "stopped by", "requeued", "resumed", "finished")


def watch(until) -> None:
    while not until():
        status.main([str(RUN)])
        time.sleep(10)


def main() -> None:
    parser = CommandParser(prog="python -m tests.slurm.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=2, help="default: 2")
    nodes = parser.parse_args().nodes
    if reason := missing():
        raise ValueError(reason)
    shutil.rmtree(RUN, ignore_errors=True)
    with Cluster(nodes) as cluster:
        os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
        print(cluster.run("sinfo"))
        launch = [*LAUNCH, "--nodes", str(nodes)]
        print(f"$ python -m launchers.slurm {' '.join(launch)}")
        slurm.launch(launch)
        watch(lambda: newest_step(RUN) >= 100)
        urgent = ["sbatch", "-p", "urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"]
        print(f"$ {' '.join(urgent)}\n{cluster.run(*urgent)}")
        watch(lambda: read_state(RUN).phase in ("finished", "failed"))
        status.main([str(RUN)])
    print(f"{read_state(RUN).log} says, among other things:")
    for line in Path(read_state(RUN).log).read_text(errors="replace").splitlines():
        if line.startswith(TELLING):
            print(f"  {line}")


if __name__ == "__main__":
    with user_errors():
        main()
