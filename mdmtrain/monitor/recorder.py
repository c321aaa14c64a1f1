"""The numbers of each step. They stay on the device, and the host reads them only at the log interval."""

import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import Config, RunPlan
from mdmtrain.data.order import START, Cursor
from mdmtrain.diffusion.objective import ForwardProcess, MaskingRates
from mdmtrain.monitor.metrics import HISTOGRAM, LOSS_BY_OCTILE, LOSS_BY_SOURCE, OCTILES, STATISTIC_BY_OCTILE, finite

BASELINE_DECAY = 0.95  # per step, for the control variate's mean in each bin
CURVE_DECAY = 0.99  # per step, for the variances of the two loss curves
SLOW = 1.5  # a rank is slow if its own seconds are more than this many times the median of the ranks
SLOW_FLUSHES = 3  # number of slow flushes in a row before the first warning
SLOW_WARNING = 50  # number of slow flushes between two warnings
PAIR_DECAY = 0.9  # per pair, for noise and signal in the noise scale


class Layout:
    """Named, consecutive parts of one vector. layout["masked"] is the slice of a part; length is that of the vector."""

    def __init__(self, sizes: dict[str, int]):
        self.length = 0
        self._slices: dict[str, slice] = {}
        for name, size in sizes.items():
            self._slices[name] = slice(self.length, self.length + size)
            self.length += size

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    def split(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """All parts of a vector by name."""
        return {name: vector[where] for name, where in self._slices.items()}


def sums_of_a_step(bins: int, ranks: int, sources: int) -> dict[str, int]:
    """The parts of the vector that is added up over ranks once a step, with their sizes. None depends on the batch."""
    return {
        "losses": bins,  # weighted losses of the rows, by cell of their masking rate
        "statistics": bins,  # P-POTS statistics of the rows, likewise
        "eligible": 1,  # positions that may be masked
        "pair": 2,  # what a GradientPair found; zeros in most steps
        "masked": ranks,  # masked positions of each rank
        "seconds": ranks,  # that each rank took by itself: waiting for data, and `awake`, but not in a collective
        "source_losses": sources,  # weighted losses of the rows of each source
        "source_rows": sources,  # and how many rows that are
        "memory": ranks,  # peak memory of each rank's process so far, bytes
    }


@dataclass
class _Pending:
    """One step whose numbers the host has not read yet: values known to the host, and numbers on the device."""

    step: int
    lr: float
    row_counts: np.ndarray  # int64 [bins], rows of the global batch in each cell of the sampler
    shares: np.ndarray  # float64 [bins], the probability of each cell
    effective: float  # effective sample size of the importance weights divided by the number of slots
    numbers: Tensor  # float64 [sums + 2]: see StepRecorder._numbers


class StepRecorder:
    """Collects the numbers of the steps between two flushes.

    The sums of a step are one float64 vector with the parts of `sums_of_a_step`.

    `loss_smooth` is the loss with the EMA control variate of arXiv 2511.18159: y - b_cell + sum_j P_j b_j, where b is
    the running mean of the weighted loss y in each cell. It has the same expectation as the loss and less variance. It
    is only a curve: b does not depend on the weights, so the gradient is the same. With global strata there is little
    variance to remove. `loss_smooth_variance_ratio` is the variance of the smooth curve over that of the raw one, each
    from the running mean of the squared differences of consecutive steps.
    """

    def __init__(
        self, config: Config, plan: RunPlan, device: torch.device, rank: int, mfu_per_speed: float | None = None
    ):
        """mfu_per_speed: the MFU at one token per second over all ranks, or None if the device's peak is unknown."""
        self._mfu_per_speed = mfu_per_speed
        self.skips_in_a_row = 0
        self.cursor = START  # see Cursor; every step since then has had the present number of tokens
        self._bins = config.diffusion.bins
        self._complement = config.diffusion.views == "complement"
        self._clip_norm = config.optim.clip_norm
        self._rows = config.run.global_batch
        self._positions = plan.tokens_per_step
        self._device = device
        self._rank = rank
        self._sources = config.data.names if len(config.data.sources) > 1 else ()
        self._rows_per_slot = plan.rows_per_slot
        parts = sums_of_a_step(self._bins, plan.world_size, len(self._sources))
        self._sums = Layout(parts)
        self._numbers = Layout(parts | {"norm": 1, "skipped": 1})  # the sums over ranks, and two more numbers
        self._means: dict[str, float] = {}
        self._last: list[float] = []  # loss and loss_smooth of the last step that was not skipped
        self._baseline = np.zeros(self._bins)
        self._seen = np.zeros(self._bins, dtype=bool)
        self._pending: list[_Pending] = []
        self._waited = 0.0
        self._flushed = time.monotonic()
        self._asleep = 0.0  # seconds asleep while waiting for data since the last step
        self._awake = awake()  # the value at the end of the last step
        self._own = np.zeros(plan.world_size)
        self._slow = 0

    def state(self) -> dict:
        """The state that a resumed run needs to continue with the same numbers, for meta.json."""
        baseline = {"baseline": self._baseline.tolist(), "seen": self._seen.tolist()}
        return {"skips_in_a_row": self.skips_in_a_row, "means": self._means, "last": self._last, **baseline}

    def restore(self, state: dict, cursor: Cursor = START, same_batch: bool = True) -> None:
        """Restore `state`. same_batch: the run resumes with the same data and global batch.

        Otherwise the variances between steps are different ones, and their running means start again.
        """
        self.cursor = cursor
        self.skips_in_a_row = state["skips_in_a_row"]
        if same_batch:
            self._means = state["means"]
            self._last = state["last"]
        self._baseline = np.array(state["baseline"])
        self._seen = np.array(state["seen"])

    def new_sums(self) -> Tensor:
        return torch.zeros(self._sums.length, dtype=torch.float64, device=self._device)

    def statistics(self, sums: Tensor) -> Tensor:
        """The part of the sums that the sampler is fitted to: float64 [bins]."""
        return sums[self._sums["statistics"]]

    def wait_for(self, batches: Iterator):
        """The next micro-batch. Records the time as waiting for data."""
        start = time.monotonic()
        busy = awake()
        batch = next(batches)
        waited = time.monotonic() - start
        self._waited += waited
        self._asleep += max(0.0, waited - (awake() - busy))
        return batch

    def add_micro_step(
        self, sums: Tensor, losses: Tensor, statistics: Tensor, cells: np.ndarray, masked: int, eligible: int
    ) -> None:
        """Add a micro-batch to the sums. losses, statistics: float32 [B] on the device, one value per row.

        cells: int64 [B], the cells of the rows' masking rates. masked, eligible: numbers of positions.
        """
        cell = torch.from_numpy(cells).to(self._device, non_blocking=True)
        sums[self._sums["losses"]].index_add_(0, cell, losses.double())
        sums[self._sums["statistics"]].index_add_(0, cell, statistics.double())
        sums[self._sums["eligible"]] += eligible
        sums[self._sums["masked"]][self._rank] += masked

    def add_sources(self, sums: Tensor, losses: Tensor, sources: Tensor) -> None:
        """losses: float32 [B] on the device; sources: int64 [slots], of each slot. Does nothing for a single source."""
        if self._sources:
            source = sources.repeat_interleave(self._rows_per_slot).to(self._device, non_blocking=True)
            sums[self._sums["source_losses"]].index_add_(0, source, losses.double())
            sums[self._sums["source_rows"]].index_add_(0, source, torch.ones_like(losses, dtype=torch.float64))

    def add_pair(self, sums: Tensor, pair: Tensor) -> None:
        """Add this rank's part of a GradientPair's result to the sums: float64 [2] on the device."""
        sums[self._sums["pair"]] = pair

    def add_own(self, sums: Tensor) -> None:
        """Add this rank's own seconds since the last step and its peak memory to the sums."""
        now = awake()
        sums[self._sums["memory"]][self._rank] += peak_memory(self._device)
        sums[self._sums["seconds"]][self._rank] += now - self._awake + self._asleep
        self._asleep = 0.0
        self._awake = now

    def add_step(
        self,
        step: int,
        process: ForwardProcess,
        draws: MaskingRates,
        row_counts: np.ndarray,
        sums: Tensor,
        norm: Tensor,
        skipped: Tensor,
        lr: float,
    ) -> None:
        """Keep the numbers of a step until `flush`. step: number of steps done, with this one. sums: over all ranks.

        norm: of the gradient, before clipping. skipped: 1 if the step was skipped, else 0.
        """
        shares = process.density.masses
        if self._complement:  # a row is the first or the second view with equal probability
            shares = (shares + shares[::-1]) / 2
        weights = process.omega(draws.rates) / draws.density
        effective = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
        numbers = torch.cat([sums, torch.stack([norm.double(), skipped.double()])])
        self._pending.append(_Pending(step, lr, row_counts, shares, effective, numbers))

    def flush(self) -> list[dict]:
        """The records of all steps since the last flush. Waits for the device."""
        assert self._pending, "flush follows at least one add_step"
        numbers = torch.stack([p.numbers for p in self._pending]).cpu().numpy()
        now = time.monotonic()
        elapsed = now - self._flushed
        steps = len(self._pending)
        records = [
            self._record(p, row, self._positions * steps / elapsed, self._waited / elapsed)
            for p, row in zip(self._pending, numbers, strict=True)
        ]
        self._own = numbers[:, self._numbers["seconds"]].sum(axis=0)
        slow = self._own.max() > SLOW * np.median(self._own) and self._own.max() > elapsed / 4
        self._slow = self._slow + 1 if slow else 0
        self._pending = []
        self._waited = 0.0
        self._flushed = now
        self._awake = awake()  # again, because CUDA may poll while it waits for the device
        return records

    def slow_rank(self) -> str | None:
        """A warning about a rank that was slow in each of the last SLOW_FLUSHES flushes.

        Otherwise None, and also until SLOW_WARNING more flushes have passed.
        """
        if self._slow % SLOW_WARNING != SLOW_FLUSHES:
            return None
        most = self._own.max()
        median = np.median(self._own)
        return (
            f"rank {self._own.argmax()} is slow: its own time (computing and waiting for data, without waiting for "
            f"other ranks) is {most / median:.1f} times the median of the ranks, and all ranks wait for it: check its "
            "node"
        )

    def resume_clock(self) -> None:
        """Exclude the time since the last flush (of an evaluation or a save) from the next tokens/s."""
        self._flushed = time.monotonic()
        self._awake = awake()

    def _record(self, pending: _Pending, numbers: np.ndarray, speed: float, wait: float) -> dict:
        parts = self._numbers.split(numbers)
        by_bin = parts["losses"]
        masked = parts["masked"].tolist()
        own = parts["seconds"].tolist()
        eligible = parts["eligible"].item()
        noise, signal = parts["pair"].tolist()
        norm = parts["norm"].item()
        skipped = parts["skipped"].item()
        after_skip = self.skips_in_a_row > 0
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        total = float(by_bin.sum())
        length = self._positions / self._rows
        smooth = self._smooth(by_bin / length, pending, bool(skipped))
        octile_counts = pending.row_counts.reshape(OCTILES, -1).sum(axis=1)

        def by_octile(sums: np.ndarray) -> list[float | None]:
            means = zip(sums.reshape(OCTILES, -1).sum(axis=1), octile_counts, strict=True)
            return [finite(s / c) if c else None for s, c in means]

        record = {
            "step": pending.step,
            "tokens": self.cursor.at(pending.step, 0, self._positions).tokens,
            "loss": finite(total / self._positions),
            "nelbo": finite(total / max(eligible, 1.0)),
            "loss_smooth": finite(smooth),
            "loss_smooth_variance_ratio": self._quieter(total / self._positions, smooth, bool(skipped)),
            "grad_norm": finite(norm),
            "clipped": bool(self._clip_norm is not None and norm > self._clip_norm),
            "lr": pending.lr,
            "masked_fraction": sum(masked) / max(eligible, 1.0),
            "masked_tokens_min": int(min(masked)),
            "masked_tokens_max": int(max(masked)),
            "effective_sample_share": pending.effective,
            "skipped": bool(skipped),
            LOSS_BY_OCTILE: by_octile(by_bin / length),
            STATISTIC_BY_OCTILE: by_octile(parts["statistics"]),
            HISTOGRAM: octile_counts.tolist(),
            "tokens_per_second": speed,
            "mfu": None if self._mfu_per_speed is None else speed * self._mfu_per_speed,
            "memory_gib": parts["memory"].max().item() / 2**30,
            "data_wait": wait,
            "slowest_rank": int(np.argmax(own)),
            "slowest_over_median": finite(float(max(own) / np.median(own))) if min(own) > 0 else None,
            "time": time.time(),
        }
        if self._sources:
            by_source = zip(self._sources, parts["source_losses"] / length, parts["source_rows"], strict=True)
            record[LOSS_BY_SOURCE] = {name: finite(loss / rows) if rows else None for name, loss, rows in by_source}
        if noise > 0 and not skipped and not after_skip:
            scale = self._follow("noise", noise, PAIR_DECAY) / self._follow("signal", signal, PAIR_DECAY)
            record["grad_noise"] = noise
            record["noise_scale_tokens"] = finite(scale * self._positions) if scale > 0 else None
        return record

    def _follow(self, name: str, value: float, decay: float) -> float:
        """Update a running mean, which begins with its first value, and return it."""
        self._means[name] = decay * self._means.get(name, value) + (1 - decay) * value
        return self._means[name]

    def _quieter(self, loss: float, smooth: float, skipped: bool) -> float | None:
        """Variance of the smooth curve over that of the raw one, from the differences of consecutive steps."""
        if not skipped:
            if self._last:
                for name, now, before in zip(("loss", "smooth"), (loss, smooth), self._last, strict=True):
                    self._follow(name, (now - before) ** 2 / 2, CURVE_DECAY)
            self._last = [loss, smooth]
        return self._means["smooth"] / self._means["loss"] if self._means.get("loss") else None

    def _smooth(self, by_bin: np.ndarray, pending: _Pending, skipped: bool) -> float:
        """The step's loss with the control variate. Then updates the baseline. by_bin: sums of y in each cell."""
        counts = pending.row_counts
        value = (by_bin.sum() - (counts * self._baseline).sum()) / self._rows + (pending.shares * self._baseline).sum()
        if not skipped:
            hit = counts > 0
            means = by_bin[hit] / counts[hit]
            old = np.where(self._seen[hit], self._baseline[hit], means)
            self._baseline[hit] = BASELINE_DECAY * old + (1 - BASELINE_DECAY) * means
            self._seen |= hit
        return float(value)


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process so far, in bytes: allocated on the GPU, or resident in main memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # Linux counts in KiB


def awake() -> float:
    """Seconds so far in which the loop's thread ran or waited for a core. Sleep in a collective does not count."""
    file = _schedstat(os.getpid())
    if file is None:  # not Linux, or a kernel without schedstat: only the time in which the thread ran
        return time.thread_time()
    return sum(map(int, os.pread(file, 100, 0).split()[:2])) / 1e9


@cache
def _schedstat(process: int) -> int | None:
    """The open schedstat file of the thread that calls first, or None if there is none.

    It stays open, because opening it each time would take as long as the records of a micro-step.
    """
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return None
