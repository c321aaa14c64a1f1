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


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, which reads the attribute `found_inf`: if it is 1, a step changes nothing."""

    found_inf: Tensor


class MuonAndAdamW:
    """Muon for some parameters and AdamW for the others, used as one optimizer."""

    found_inf: Tensor

    def __init__(self, muon: Muon, adamw: AdamW):
        self.muon, self.adamw = muon, adamw
        self.param_groups = [*adamw.param_groups, *muon.param_groups]
        self.state = {**adamw.state, **muon.state}

    def step(self) -> None:
        parts: tuple[AdamW, Muon] = (self.adamw, self.muon)
        for part in parts:
            part.found_inf = self.found_inf
            part.step()

    def zero_grad(self) -> None:
        for part in (self.adamw, self.muon):
            part.zero_grad()


Optimizer = AdamW | MuonAndAdamW


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Build the optimizer of the configuration. Its state is allocated, so that a checkpoint can be loaded into it.

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
    adamw = AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
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
    return norm.to(healthy.device, non_blocking=True), skipped.to(healthy.device, non_blocking=True)


class EMA:
    """Exponential moving average of the weights, float32, sharded like the weights."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, skipped: Tensor) -> None:
        """Update the average with the model's weights, unless the step was skipped (skipped = 1.0).

        skipped: scalar on the device of the weights.
        """
        share = (1.0 - self.decay) * (1.0 - skipped)
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
            average = local(self.tensors[name])
            live = local(p)
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
