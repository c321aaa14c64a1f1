"""The sampler of masking rates during a run: statistics for each bin, and the density fitted to them (online P-POTS).

Statistics do not include p and omega, so they stay valid when p is refitted or omega is annealed. A density depends
only on past steps, so the loss is unbiased.
"""

import numpy as np
import torch
from torch import Tensor

from mdmtrain.config import DiffusionConfig
from mdmtrain.diffusion.objective import ForwardProcess, omega_at, rate_range
from mdmtrain.diffusion.rates import Density, fit, optimum, uniform_density


class RateSampler:
    """Statistics for each bin, on the device, and the density, on the host. Both are the same on every rank."""

    def __init__(self, config: DiffusionConfig, device: torch.device, delimiters: Tensor | None = None):
        self._config = config
        self._delimiters = delimiters
        self.density = uniform_density(*rate_range(config), config.bins)
        zeros = {
            name: torch.zeros(config.bins, dtype=torch.float64, device=device) for name in ("sums", "counts", "hits")
        }
        self.tensors = {**zeros, "p": torch.ones(config.bins, dtype=torch.float64, device=device)}
        self._process: ForwardProcess | None = None

    def fits(self, when: str) -> bool:
        """Whether p is fitted at this time. when: "online" (during training) or "once" (before it)."""
        return self._config.sampler == "ppots" and self._config.when == when

    def process(self, progress: float) -> ForwardProcess:
        """The forward process at `progress` in [0, 1] of the run. Returns the same object while nothing changes."""
        omega = omega_at(self._config, progress)
        if self._process is None or self._process.omega != omega or self._process.density is not self.density:
            self._process = ForwardProcess(self._config, self.density, omega, self._delimiters)
        return self._process

    def add(self, statistic_sums: Tensor, counts: np.ndarray, skipped: Tensor) -> None:
        """Add the statistics of one step. The host does not wait for the device.

        statistic_sums: float64 [bins] on the device, summed over ranks; counts: int [bins], rows in each bin; skipped:
        1.0 for a skipped step, which changes nothing.
        """
        device = statistic_sums.device
        count = torch.from_numpy(counts.astype(np.float64)).to(device, non_blocking=True)
        decay = self._config.statistics_decay
        bad = skipped.bool()
        for name, new in (("sums", statistic_sums), ("counts", count)):
            old = self.tensors[name]
            old.copy_(torch.where(bad, old, decay * old + new))
        self.tensors["hits"].add_(torch.where(bad, torch.zeros_like(count), count))

    def due(self, step: int) -> bool:
        """Whether p is refitted after `step` steps."""
        return self.fits("online") and step % self._config.refit_every == 0

    def fitted(self) -> np.ndarray:
        """The density fitted to the statistics: float64 [bins]. The present density until every bin has enough rows."""
        hits = self.tensors["hits"].cpu().numpy()
        if hits.min() < self._config.min_hits:
            return self.density.p
        return fit_density(self._now(), *self._sums_and_counts()).p

    def picture(self) -> dict[str, list[float]]:
        """For display: the density in use, and the optimum for the statistics without floor (0 in empty bins)."""
        wanted = optimum(*_bin_means(self._now(), *self._sums_and_counts()))
        return {"used": self.density.p.tolist(), "wanted": wanted.tolist()}

    def _now(self) -> ForwardProcess:
        """The process of the last step. Its omega may be annealed, which also changes p."""
        return self._process or self.process(0.0)

    def _sums_and_counts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.tensors["sums"].cpu().numpy(), self.tensors["counts"].cpu().numpy()

    def use(self, p: np.ndarray) -> None:
        """Use this density from the next step on. p: float64 [bins]."""
        self.density = Density(self.density.edges, p)
        self.tensors["p"].copy_(torch.from_numpy(p))

    def restored(self) -> None:
        """Set the density from `tensors`. Call this after a checkpoint was loaded into them."""
        self.density = Density(self.density.edges, self.tensors["p"].cpu().numpy())


def fit_density(process: ForwardProcess, sums: np.ndarray, counts: np.ndarray) -> Density:
    """The P-POTS density fitted to statistics, with the form and the floor of the process's configuration.

    sums, counts: float64 [bins], the sum of the rows' statistics in each bin, and the number of these rows.
    """
    return fit(*_bin_means(process, sums, counts), process.config.floor, process.config.form)


def _bin_means(
    process: ForwardProcess, sums: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, mean statistic (0 in empty bins) and omega of the bins."""
    edges = process.density.edges
    means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    return edges, means, process.omega((edges[:-1] + edges[1:]) / 2)


def token_table(tokens: tuple[str | int, ...], pieces: list[str], key: str) -> Tensor | None:
    """A table that marks the listed tokens: bool [vocabulary], or None if the list is empty.

    tokens: ids or pieces; key: the configuration key of the list, for messages. Raises ValueError for an unknown token.
    """
    if not tokens:
        return None
    ids = {piece: number for number, piece in enumerate(pieces)}
    table = torch.zeros(len(pieces), dtype=torch.bool)
    for token in tokens:
        index = token if isinstance(token, int) else ids.get(token, -1)
        if not 0 <= index < len(pieces):
            raise ValueError(f"{key}: the tokenizer has no piece {token!r}: give an id or a piece of the tokenizer")
        table[index] = True
    return table
