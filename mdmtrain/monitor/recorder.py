"""Per-step numbers, kept on the device and read by the host only at the log interval."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import Config, RunPlan
from mdmtrain.diffusion.objective import StepRates
from mdmtrain.monitor.metrics import BY_OCTILE, HISTOGRAM, OCTILES, finite

MASKED, ELIGIBLE = OCTILES, OCTILES + 1  # places after the octiles in the vector of sums


@dataclass
class _Pending:
    """One step that has not been read yet: what the host knows, and what lies on the device."""

    step: int
    lr: float
    octile_counts: np.ndarray  # int64 [8], rows of the global batch in each octile of the rates
    numbers: Tensor  # float64 [12]: the sums, gradient norm, skipped


class StepRecorder:
    """Collects the steps between two flushes.

    The vector of sums (float64 [10], added up over ranks once a step) holds the weighted loss of the rows in each
    octile of the masking rate, then the masked and the eligible positions.
    """

    def __init__(self, config: Config, plan: RunPlan, device: torch.device):
        self.skips_in_a_row = 0
        self._eps = config.diffusion.eps
        self._clip_norm = config.optim.clip_norm
        self._positions = plan.tokens_per_step
        self._device = device
        self._pending: list[_Pending] = []
        self._waited = 0.0
        self._flushed = time.monotonic()

    def new_sums(self) -> Tensor:
        return torch.zeros(OCTILES + 2, dtype=torch.float64, device=self._device)

    def wait_for(self, batches: Iterator):
        """The next micro-batch; the time that it takes counts as waiting for data."""
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def add_micro_step(self, sums: Tensor, losses: Tensor, rates: np.ndarray, masked: int, eligible: int) -> None:
        """losses: float32 [B] on the device, the weighted sum of each row; rates: float64 [B], their masking rates."""
        octiles = torch.from_numpy(self._octiles(rates)).to(self._device, non_blocking=True)
        sums.index_add_(0, octiles, losses.double())
        sums[MASKED] += masked
        sums[ELIGIBLE] += eligible

    def _octiles(self, rates: np.ndarray) -> np.ndarray:
        """Which eighth of [eps, 1] each rate falls into: int64 [B]."""
        return np.minimum((rates - self._eps) / (1 - self._eps) * OCTILES, OCTILES - 1).astype(np.int64)

    def add_step(self, step: int, rates: StepRates, sums: Tensor, norm: Tensor, skipped: Tensor, lr: float) -> None:
        """step: number of iterations done, this one included; sums: added up over ranks."""
        counts = np.bincount(self._octiles(rates.rates), minlength=OCTILES)
        numbers = torch.cat([sums, torch.stack([norm.double(), skipped.double()])])
        self._pending.append(_Pending(step, lr, counts, numbers))

    def flush(self) -> list[dict]:
        """The records of all steps since the last flush. Waits for the device."""
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
        octile_sums, (masked, eligible, norm, skipped) = numbers[:OCTILES], numbers[OCTILES:]
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        total, length = float(octile_sums.sum()), self._positions / pending.octile_counts.sum()
        return {
            "step": pending.step,
            "tokens": pending.step * self._positions,
            "loss": finite(total / self._positions),
            "nelbo": finite(total / eligible),
            "grad_norm": finite(norm),
            "clipped": bool(self._clip_norm is not None and norm > self._clip_norm),
            "lr": pending.lr,
            "masked_fraction": masked / eligible,
            "skipped": bool(skipped),
            BY_OCTILE: [
                finite(s / (c * length)) if c else None for s, c in zip(octile_sums, pending.octile_counts, strict=True)
            ],
            HISTOGRAM: pending.octile_counts.tolist(),
            "tokens_per_second": speed,
            "data_wait": wait,
            "time": time.time(),
        }
