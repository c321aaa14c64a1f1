"""The optimizer step: AdamW or Muon, the learning-rate schedule, clipping, skipping, and the weight average."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mdmtrain.config import OptimConfig
from mdmtrain.muon import Muon, local


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: warm-up, then cosine, or constant and linear decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    match config.schedule:
        case "cosine":
            progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
            return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
        case "wsd":
            decay_steps = max(1, round(steps * config.decay_fraction))
            left = min(1.0, (steps - step) / decay_steps)
            return config.lr * (floor + (1 - floor) * left)
    raise AssertionError(config.schedule)


class MuonAndAdamW:
    """Muon for some parameters and AdamW for the others, used as one optimizer."""

    found_inf: Tensor

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        self.param_groups = [*adamw.param_groups, *muon.param_groups]
        self.state = {**adamw.state, **muon.state}

    def step(self) -> None:
        for part in (self.adamw, self.muon):
            part.found_inf = self.found_inf
            part.step()

    def zero_grad(self) -> None:
        for part in (self.adamw, self.muon):
            part.zero_grad()


Optimizer = torch.optim.AdamW | MuonAndAdamW


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer of the configuration. Its state exists at once, so that a checkpoint can be loaded into it.

    With `name=muon`, Muon updates the matrices of the blocks and fused AdamW all other parameters. Otherwise AdamW
    updates all. Weight decay applies to matrices, not to the gains of the norms. `lr_ratio` of a group is its learning
    rate divided by `optim.lr`.
    """
    matrices = muon_matrices(model) if config.name == "muon" else {}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
    for p in others:
        step = torch.zeros((), dtype=torch.float32, device=local(p).device)
        adamw.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    if config.name == "adamw":
        return adamw
    muon = Muon(list(matrices.values()), config.lr, config.weight_decay)
    muon.param_groups[0]["lr_ratio"] = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    return MuonAndAdamW(muon, adamw)


def muon_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Muon updates, by name: the matrices of the blocks, without embedding and head."""
    return {name: p for name, p in model.named_parameters() if name.startswith("layers.") and p.ndim == 2}


def optimizer_step(optimizer: Optimizer, healthy: Tensor, lr: float, clip_norm: float | None) -> tuple[Tensor, Tensor]:
    """Clip the gradient and step. The step is skipped, on the device, if the loss or the gradient norm is not finite.

    healthy: bool scalar on the device, the same on every rank: whether the loss is finite. Returns (gradient norm
    before clipping, skipped: 1.0 or 0.0), scalars on the device. The host waits for them only with offloading.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # With offloading, the flag must be on the CPU too. It is copied here, because AdamW would not wait for its copy.
    skipped = (~(norm.isfinite() & healthy.to(norm.device))).float()
    if clip_norm is not None:
        clip_grads_with_norm_(parameters, clip_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    optimizer.found_inf = skipped  # if this is 1, parameters, moments and counters do not change
    optimizer.step()
    optimizer.zero_grad()
    return norm.to(healthy.device), skipped.to(healthy.device)


class GradientPair:
    """How noisy is the step's gradient: from the gradients g, g' of two steps in a row, without another backward pass.

    |g' - g|^2 / 2 estimates Tr Cov of the step's gradient and <g, g'> estimates |E g|^2, both before clipping
    (mathematics.md section 2; the noise scale of arXiv 1812.06162 is Tr Cov times the step's tokens over |E g|^2).
    Exact for fixed weights; here the second step has other weights, which adds half the squared change of E g to the
    first and, as the update was made of g itself, shifts both by the curvature along it: read them as trends.
    The copy of the gradient, this rank's part, lives from one step to the next and no longer.
    """

    def __init__(self, model: nn.Module):
        self._parameters = list(model.parameters())
        self._first: list[Tensor] = []

    @property
    def half(self) -> bool:
        """Has the first step been taken, and not the second?"""
        return bool(self._first)

    def keep(self) -> None:
        """The first step: after its backward pass."""
        self._first = [local(p.grad).clone() for p in self._parameters]

    def compare(self) -> Tensor:
        """The second step: this rank's part of (|g' - g|^2 / 2, <g, g'>), float64 [2] on the device. No wait."""
        total = torch.zeros(2, dtype=torch.float64, device=self._first[0].device)
        for first, p in zip(self._first, self._parameters, strict=True):
            second = local(p.grad)
            total[0] += (second - first).square().sum(dtype=torch.float64) / 2
            total[1] += (second * first).sum(dtype=torch.float64)
        self._first = []
        return total.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # zeros: one of the two was skipped


class EMA:
    """Exponential moving average of the weights, float32, sharded like the weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: Tensor) -> None:
        """Update the average with the model's weights, unless the step was skipped (skipped = 1.0)."""
        share = ((1.0 - self.decay) * (1.0 - skipped)).to(local(next(iter(self.tensors.values()))).device)
        for name, p in model.named_parameters():
            local(self.tensors[name]).lerp_(local(p), share)

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, p in model.named_parameters():
            average, live = local(self.tensors[name]), local(p)
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
