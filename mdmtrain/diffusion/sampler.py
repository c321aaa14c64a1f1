"""The sampler of a run as it learns: statistics by bin of the rate, and the density fitted to them (P-POTS, online).

Statistics are kept without p and omega, so neither a refit nor an annealed weighting invalidates them. A density only
ever comes from past steps, so the loss stays exactly unbiased.
"""

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion.objective import ForwardProcess, omega_at, rate_range
from mdmtrain.diffusion.rates import Density, fit, optimum, uniform_density


class RateSampler:
    """Per-bin statistics on the device, the density on the host. The same on every rank."""

    def __init__(self, config: DiffusionConfig, device: torch.device, delimiters: Tensor | None = None):
        self._config, self._delimiters = config, delimiters
        self.density = uniform_density(*rate_range(config), config.bins)
        zeros = {
            name: torch.zeros(config.bins, dtype=torch.float64, device=device) for name in ("sums", "counts", "hits")
        }
        self.tensors = {**zeros, "p": torch.ones(config.bins, dtype=torch.float64, device=device)}
        self._process: ForwardProcess | None = None

    def fits(self, when: str) -> bool:
        """Is p fitted "online", or "once", before training?"""
        return self._config.sampler == "ppots" and self._config.when == when

    def process(self, progress: float) -> ForwardProcess:
        """How the step at `progress` in [0, 1] of the run draws and weighs; the same object while nothing changes."""
        omega = omega_at(self._config, progress)
        if self._process is None or self._process.omega != omega or self._process.density is not self.density:
            self._process = ForwardProcess(self._config, self.density, omega, self._delimiters)
        return self._process

    def add(self, statistic_sums: Tensor, counts: np.ndarray, skipped: Tensor) -> None:
        """One step's statistics, summed over ranks: float64 [bins] on the device; counts: rows per bin. No wait.

        A skipped step (1.0) leaves everything as it was.
        """
        device = statistic_sums.device
        count = torch.from_numpy(counts.astype(np.float64)).to(device, non_blocking=True)
        decay, bad = self._config.statistics_decay, skipped.bool()
        for name, new in (("sums", statistic_sums), ("counts", count)):
            old = self.tensors[name]
            old.copy_(torch.where(bad, old, decay * old + new))
        self.tensors["hits"].add_(torch.where(bad, torch.zeros_like(count), count))

    def due(self, step: int) -> bool:
        """Is it time to refit, `step` steps done?"""
        return self.fits("online") and step % self._config.refit_every == 0

    def fitted(self) -> np.ndarray:
        """The density that the statistics ask for: float64 [bins]; the present one until every bin has enough rows."""
        hits = self.tensors["hits"].cpu().numpy()
        if hits.min() < self._config.min_hits:
            return self.density.p
        return fit_density(self._now(), *self._sums_and_counts()).p

    def picture(self) -> dict[str, list[float]]:
        """The density in use, and the one that the statistics ask for by themselves (0 where there are none yet)."""
        wanted = optimum(*_bin_means(self._now(), *self._sums_and_counts()))
        return {"used": self.density.p.tolist(), "wanted": wanted.tolist()}

    def _now(self) -> ForwardProcess:
        """The process of the last step: annealing changes omega, and p with it."""
        return self._process or self.process(0.0)

    def _sums_and_counts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tensors["sums"].cpu().numpy(), self.tensors["counts"].cpu().numpy()

    def use(self, p: np.ndarray) -> None:
        """Draw from this density from the next step on."""
        self.density = Density(self.density.edges, p)
        self.tensors["p"].copy_(torch.from_numpy(p))

    def restored(self) -> None:
        """After a checkpoint was loaded into `tensors`."""
        self.density = Density(self.density.edges, self.tensors["p"].cpu().numpy())


def fit_density(process: ForwardProcess, sums: np.ndarray, counts: np.ndarray) -> Density:
    """P-POTS: the density that statistics by bin of the rate ask for, in the form and with the floor of the process.

    sums, counts: float64 [bins], the statistics of rows in each bin, and how many rows there were.
    """
    return fit(*_bin_means(process, sums, counts), process.config.floor, process.config.form)


def _bin_means(
    process: ForwardProcess, sums: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, mean statistic (0 where there is none) and omega of the bins."""
    edges = process.density.edges
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return edges, means, process.omega((edges[:-1] + edges[1:]) / 2)


def token_table(tokens: tuple[str | int, ...], pieces: list[str], key: str) -> Tensor | None:
    """Listed tokens (ids or pieces; `key` lists them) as a table: bool [vocabulary], or None.

    Raises ValueError for one that is not there.
    """
    if not tokens:
        return None
    table = torch.zeros(len(pieces), dtype=torch.bool)
    for token in tokens:
        index = token if isinstance(token, int) else pieces.index(token) if token in pieces else -1
        if not 0 <= index < len(pieces):
            raise ValueError(f"{key}: the tokenizer has no piece {token!r}: give an id or a piece it has")
        table[index] = True
    return table
