"""Show the records of a run in TensorBoard and, if monitor.wandb is set, in Weights & Biases."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mdmtrain.config import Config
from mdmtrain.monitor.metrics import (
    COMPONENTS,
    DENSITY,
    HISTOGRAM,
    LOSS_BY_OCTILE,
    LOSS_BY_SOURCE,
    OCTILES,
    STATISTIC_BY_OCTILE,
)

OVERVIEW = "Overview"  # the capital letter puts this group first
# Field of a training record -> group of tags. All others are in the group `train`.
GROUPS = {
    **dict.fromkeys(["loss", "tokens_per_second", "mfu", "memory_gib"], OVERVIEW),
    **dict.fromkeys(["grad_noise", "noise_scale_tokens", "effective_sample_share"], "variance"),
    **dict.fromkeys(["loss_smooth", "loss_smooth_variance_ratio"], "variance"),
    **dict.fromkeys(["grad_norm", "clipped", "skipped", "data_wait", "slowest_rank", "slowest_over_median"], "health"),
    **dict.fromkeys(["masked_tokens_min", "masked_tokens_max"], "health"),
}
OF_AN_EVALUATION = ("nelbo", "bits_per_byte")  # fields of an evaluation that the overview shows too
BY_OCTILE = {LOSS_BY_OCTILE: "loss_by_rate", STATISTIC_BY_OCTILE: "statistic_by_rate"}  # field -> group of tags
# The tab Custom Scalars: category -> chart -> tags, as regular expressions.
LAYOUT = {
    "overview": {
        "training loss": ["Multiline", [f"{OVERVIEW}/loss"]],
        "validation NELBO, nats/token": ["Multiline", [f"{OVERVIEW}/.*_nelbo"]],
        "validation bits/byte": ["Multiline", [f"{OVERVIEW}/.*_bits_per_byte"]],
        "tokens/s": ["Multiline", [f"{OVERVIEW}/tokens_per_second"]],
        "MFU": ["Multiline", [f"{OVERVIEW}/mfu"]],
        "peak memory, GiB": ["Multiline", [f"{OVERVIEW}/memory_gib"]],
    },
    "variance": {
        "gradient noise": ["Multiline", ["variance/grad_noise"]],
        "noise scale, tokens": ["Multiline", ["variance/noise_scale_tokens"]],
        "variance of a row's loss": ["Multiline", ["variance/(A|B_t|B_int|C)"]],
        "loss by masking rate": ["Multiline", ["loss_by_rate/.*"]],
    },
    "health": {
        "gradient norm": ["Multiline", ["health/grad_norm"]],
        "skipped steps": ["Multiline", ["health/skipped"]],
        "share of time waiting for data": ["Multiline", ["health/data_wait"]],
        "slowest rank over the median": ["Multiline", ["health/slowest_over_median"]],
    },
}


class Display(Protocol):
    """A place where records are shown."""

    def show(self, record: dict) -> None: ...

    def show_probe_cost(self, step: int, seconds: float, share: float) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def open_displays(run_dir: Path, resume_step: int, config: Config) -> list[Display]:
    """The configured displays. Raises ValueError if W&B cannot be started, OSError if the events cannot be written."""
    displays: list[Display] = []
    if config.monitor.wandb is not None:
        displays.append(Wandb(run_dir, config))
    if config.monitor.tensorboard:
        displays.append(TensorBoard(run_dir, resume_step, config))
    return displays


def check_displays(config: Config) -> None:
    """Raise ValueError if `open_displays` would fail. Called before anything is written into the run folder."""
    if config.monitor.wandb is not None and find_spec("wandb") is None:
        raise ValueError(
            "monitor.wandb: the package wandb is not installed: pip install wandb, or remove monitor.wandb"
        )


def scalars_of(record: dict) -> dict[str, float]:
    """The numbers of a record by their tags. Null values are omitted, so a curve has a gap there and not a zero."""
    return {tag: float(value) for tag, value in _tagged(record) if isinstance(value, (int, float))}


def _tagged(record: dict) -> Iterator[tuple[str, object]]:
    split = record.get("split")
    for name, value in record.items():
        if name in BY_OCTILE:
            yield from ((f"{BY_OCTILE[name]}/octile_{octile}", mean) for octile, mean in enumerate(value))
        elif name == COMPONENTS:
            yield from ((f"variance/{part}", size) for part, size in value.items())
        elif name == LOSS_BY_SOURCE:
            yield from ((f"sources/{source}", mean) for source, mean in value.items())
        elif split is not None and name != "step":
            yield f"{split}/{name}", value
            if name in OF_AN_EVALUATION:
                yield f"{OVERVIEW}/{split}_{name}", value
        elif name not in ("step", "time"):
            yield f"{GROUPS.get(name, 'train')}/{name}", value


def hyperparameters(config: Config) -> dict[str, bool | int | float | str]:
    """All settings by section.key. Lists and null are converted to text."""
    plain = (bool, int, float, str)
    tree = config.model_dump(mode="json")
    settings = {f"{section}.{key}": value for section, values in tree.items() for key, value in values.items()}
    return {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}


class TensorBoard:
    """Writes to RUN/events/NAME, so that TensorBoard lists the run by its name.

    A resumed run hides the events after the checkpoint's step. The configuration is shown as text and as
    hyperparameters.
    """

    def __init__(self, run_dir: Path, resume_step: int, config: Config):
        folder = run_dir / "events" / Path(os.path.abspath(run_dir)).name
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.parent.glob("events.out.*"):  # written by an older version of mdmtrain
            file.rename(folder / file.name)
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._events = cast(Any, self._writer.file_writer)  # torch declares it as None
        self._writer.add_custom_scalars(LAYOUT)
        self._writer.add_text("configuration", f"```yaml\n{config.to_yaml()}```", resume_step)
        experiment, start, self._end = hparams(hyperparameters(config), {f"{OVERVIEW}/validation_nelbo": 0.0})
        for summary in (experiment, start):
            self._events.add_summary(summary)

    def show(self, record: dict) -> None:
        step = record["step"]
        if HISTOGRAM in record:
            self._show_histogram(record[HISTOGRAM], step)
        if DENSITY in record:
            self._writer.add_figure("variance/rate_density", density_figure(record[DENSITY]), step)
        # One event with all values: thirty events of add_scalar take longer than the rest of a step's records.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars_of(record).items()]
        self._events.add_summary(Summary(value=values), step)

    def show_probe_cost(self, step: int, seconds: float, share: float) -> None:
        self._writer.add_scalar("variance/probe_seconds", seconds, step)
        self._writer.add_scalar("variance/probe_share_of_time", share, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._events.add_summary(self._end)
        self._writer.close()

    def _show_histogram(self, counts: list[int], step: int) -> None:
        middles = [(octile + 0.5) / OCTILES for octile in range(OCTILES)]
        total = sum(counts)
        self._writer.add_histogram_raw(
            "train/masking_rate",
            min=0.0,
            max=1.0,
            num=total,
            sum=sum(m * c for m, c in zip(middles, counts, strict=True)),
            sum_squares=sum(m * m * c for m, c in zip(middles, counts, strict=True)),
            bucket_limits=[(octile + 1) / OCTILES for octile in range(OCTILES)],
            bucket_counts=counts,
            global_step=step,
        )


class Wandb:
    """Copies the scalars to Weights & Biases, to the project monitor.wandb.

    A resumed run continues the same W&B run. Its id is in RUN/wandb-id. Steps that are trained again after a resume
    appear twice, because W&B cannot remove records.
    """

    def __init__(self, run_dir: Path, config: Config):
        import wandb  # an extra dependency: see check_displays

        kept = run_dir / "wandb-id"
        if not kept.exists():
            kept.write_text(wandb.util.generate_id() + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=config.monitor.wandb,
                name=Path(os.path.abspath(run_dir)).name,
                id=kept.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run_dir),
                config=config.model_dump(mode="json"),
            )
        except wandb.Error as error:
            raise ValueError(f"monitor.wandb: {error}: log in (wandb login), or set WANDB_MODE=offline") from None
        self._run.define_metric("*", step_metric="step")

    def show(self, record: dict) -> None:
        self._run.log({"step": record["step"], **scalars_of(record)})

    def show_probe_cost(self, step: int, seconds: float, share: float) -> None:
        self._run.log({"step": step, "variance/probe_seconds": seconds, "variance/probe_share_of_time": share})

    def flush(self) -> None:
        """Does nothing: W&B sends its records from a separate process."""

    def close(self) -> None:
        self._run.finish()


def density_figure(density: dict[str, list[float]]) -> Figure:
    """A figure of p(t) in use, of the density that the statistics call optimal, and of the uniform density.

    density: "used" and "wanted", the mean density in each cell of the rate.
    """
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    cells = len(density["used"])
    edges = [cell / cells for cell in range(cells + 1)]
    axes.stairs(density["wanted"], edges, color="#bbbbbb", fill=True, label="omega sqrt(E[statistic | t])")
    axes.stairs(density["used"], edges, color="#4477aa", linewidth=1.8, label="p(t), in use")
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":", label="uniform")
    axes.set(xlabel="masking rate t, from the smallest to the largest", ylabel="density", xlim=(0, 1), ylim=(0, None))
    axes.legend()
    return figure
