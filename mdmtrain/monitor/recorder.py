"""Per-step numbers, kept on the device and read by the host only at the log interval."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import Config, RunPlan
from mdmtrain.diffusion.objective import Draws, Law
from mdmtrain.monitor.metrics import BY_OCTILE, HISTOGRAM, OCTILES, finite

BASELINE_DECAY = 0.95  # per step, of the control variate's mean by bin


@dataclass
class _Pending:
    """One step that has not been read yet: what the host knows, and what lies on the device."""

    step: int
    lr: float
    row_counts: np.ndarray  # int64 [bins], rows of the global batch in each cell of the sampler
    shares: np.ndarray  # float64 [bins], their probability
    effective: float  # effective sample size of the importance weights, over the number of slots
    numbers: Tensor  # float64 [2 bins + 4]: the sums, gradient norm, skipped


class StepRecorder:
    """Collects the steps between two flushes.

    The vector of sums (float64 [2 bins + 2], added up over ranks once a step) holds, by cell of the masking rate, the
    weighted losses of the rows and their P-POTS statistics; then the masked and the eligible positions.

    It also keeps the EMA control variate of arXiv 2511.18159: y - b_cell + sum_j P_j b_j, with b the running mean of
    the weighted loss y in each cell. b is a constant to the step, so the gradient does not change by a bit: it is
    a quieter curve of the same expectation (`loss_smooth`), no more; under global strata little is left to quieten.
    """

    def __init__(self, config: Config, plan: RunPlan, device: torch.device):
        self.skips_in_a_row = 0
        self._bins = config.diffusion.bins
        self._complement = config.diffusion.views == "complement"
        self._clip_norm = config.optim.clip_norm
        self._rows, self._positions = config.run.global_batch, plan.tokens_per_step
        self._device = device
        self._baseline = np.zeros(self._bins)
        self._seen = np.zeros(self._bins, dtype=bool)
        self._pending: list[_Pending] = []
        self._waited = 0.0
        self._flushed = time.monotonic()

    def state(self) -> dict:
        """What a resumed run needs to go on with the same numbers, for meta.json."""
        return {"skips_in_a_row": self.skips_in_a_row, "baseline": self._baseline.tolist(), "seen": self._seen.tolist()}

    def restore(self, state: dict) -> None:
        self.skips_in_a_row = state["skips_in_a_row"]
        self._baseline, self._seen = np.array(state["baseline"]), np.array(state["seen"])

    def new_sums(self) -> Tensor:
        return torch.zeros(2 * self._bins + 2, dtype=torch.float64, device=self._device)

    def statistics(self, sums: Tensor) -> Tensor:
        """The part of the sums that the sampler is fitted from: float64 [bins]."""
        return sums[self._bins : 2 * self._bins]

    def wait_for(self, batches: Iterator):
        """The next micro-batch; the time that it takes counts as waiting for data."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def add_micro_step(
        self, sums: Tensor, losses: Tensor, statistics: Tensor, cells: np.ndarray, masked: int, eligible: int
    ) -> None:
        """losses, statistics: float32 [B] on the device, of each row; cells: int64 [B], of their masking rates."""
        cell = torch.from_numpy(cells).to(self._device, non_blocking=True)
        sums.index_add_(0, cell, losses.double())
        sums.index_add_(0, cell + self._bins, statistics.double())
        sums[2 * self._bins] += masked
        sums[2 * self._bins + 1] += eligible

    def add_step(
        self, step: int, law: Law, draws: Draws, row_counts: np.ndarray, sums: Tensor, norm: Tensor, skipped: Tensor,
        lr: float,
    ) -> None:  # fmt: skip
        """step: number of iterations done, this one included; sums: added up over ranks."""
        shares = law.density.masses
        if self._complement:  # a row is the first or the second view with equal probability
            shares = (shares + shares[::-1]) / 2
        weights = law.omega(draws.rates) / draws.density
        effective = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
        numbers = torch.cat([sums, torch.stack([norm.double(), skipped.double()])])
        self._pending.append(_Pending(step, lr, row_counts, shares, effective, numbers))

    def flush(self) -> list[dict]:
        """The records of all steps since the last flush. Waits for the device."""
        assert self._pending, "flush follows at least one add_step"
        numbers = torch.stack([p.numbers for p in self._pending]).cpu().numpy()
        now = time.monotonic()
        elapsed, steps = now - self._flushed, len(self._pending)
        records = [
            self._record(p, row, self._positions * steps / elapsed, self._waited / elapsed)
            for p, row in zip(self._pending, numbers, strict=True)
        ]
        self._pending, self._waited, self._flushed = [], 0.0, now
        return records

    def resume_clock(self) -> None:
        """Leave the time since the last flush (an evaluation, a save) out of the next speed."""
        self._flushed = time.monotonic()

    def _record(self, pending: _Pending, numbers: np.ndarray, speed: float, wait: float) -> dict:
        by_bin, (masked, eligible, norm, skipped) = numbers[: self._bins], numbers[2 * self._bins :]
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        total, length = float(by_bin.sum()), self._positions / self._rows
        octile_sums = by_bin.reshape(OCTILES, -1).sum(axis=1)
        octile_counts = pending.row_counts.reshape(OCTILES, -1).sum(axis=1)
        return {
            "step": pending.step,
            "tokens": pending.step * self._positions,
            "loss": finite(total / self._positions),
            "nelbo": finite(total / max(eligible, 1.0)),
            "loss_smooth": finite(self._smooth(by_bin / length, pending, bool(skipped))),
            "grad_norm": finite(norm),
            "clipped": bool(self._clip_norm is not None and norm > self._clip_norm),
            "lr": pending.lr,
            "masked_fraction": masked / max(eligible, 1.0),
            "effective_sample_share": pending.effective,
            "skipped": bool(skipped),
            BY_OCTILE: [
                finite(s / (c * length)) if c else None for s, c in zip(octile_sums, octile_counts, strict=True)
            ],
            HISTOGRAM: octile_counts.tolist(),
            "tokens_per_second": speed,
            "data_wait": wait,
            "time": time.time(),
        }

    def _smooth(self, by_bin: np.ndarray, pending: _Pending, skipped: bool) -> float:
        """The step's loss with the control variate; then the baseline learns from the step. by_bin: sums of y."""
        counts = pending.row_counts
        value = (by_bin.sum() - (counts * self._baseline).sum()) / self._rows + (pending.shares * self._baseline).sum()
        if not skipped:
            hit = counts > 0
            means = by_bin[hit] / counts[hit]
            old = np.where(self._seen[hit], self._baseline[hit], means)
            self._baseline[hit] = BASELINE_DECAY * old + (1 - BASELINE_DECAY) * means
            self._seen |= hit
        return float(value)
