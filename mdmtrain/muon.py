"""Muon for matrices that FSDP2 shards: each matrix is orthogonalised once a step, on one rank.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum U S V^T by U V^T, nearly, with
five Newton-Schulz iterations. These need the whole matrix, and a rank has only some of its rows. Each matrix therefore
has an owner. One all-to-all brings the rows of all matrices to their owners, the owners work, and a second all-to-all
takes the results back. Owners are chosen such that all ranks have about the same work. docs/optimizers.md says more.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial: steepest at 0, kept near 1 above
MOMENTUM = 0.95
LEAST_NORM = 1e-7  # a matrix of zeros is not divided by 0
ADAMW_RMS = 0.2  # root mean square of AdamW's updates (arXiv 2502.16982, section 2.2)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U S' V^T of a matrix U S V^T, with all singular values S' near 1 (.7 to 1.2) but for those that were tiny.

    matrix: [rows, columns], any floating dtype, in which all is computed. The result has its shape and dtype.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=LEAST_NORM)  # the largest singular value is at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if tall else x


def orthogonalize_flops(rows: int, columns: int) -> int:
    """FLOPs of the matrix products in `orthogonalize`."""
    short, long = sorted((rows, columns))
    return ITERATIONS * (4 * short * short * long + 2 * short**3)


def update_scale(rows: int, columns: int) -> float:
    """Makes an orthogonal matrix's root mean square that of AdamW's updates: one learning rate serves both."""
    return ADAMW_RMS * max(rows, columns) ** 0.5


def choose_owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """The owner of each matrix: the costliest matrix left goes to the rank with the least work, the first of equals."""
    costs = [orthogonalize_flops(*shape) for shape in shapes]
    owners, work = [0] * len(shapes), [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = work.index(min(work))
        work[owners[index]] += costs[index]
    return owners


def rows_by_rank(rows: int, ranks: int) -> list[int]:
    """How many of a matrix's rows FSDP2 gives each rank: equal chunks, of which the last may be short or empty."""
    chunk = -(-rows // ranks)
    return [min(chunk, max(0, rows - rank * chunk)) for rank in range(ranks)]


def newton_schulz_dtype(device_type: str) -> torch.dtype:
    """The dtype of the iterations, and of what is sent: bfloat16 on a GPU, where it is fast; the method bears it."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


class Exchange:
    """Which rank owns which matrix, and what one rank sends to the owners and receives.

    shapes: (rows, columns) of the whole matrices. Counts are numbers of elements. A buffer to send has the rank's rows
    of every matrix, ordered by owner; a buffer to receive has the rows of the rank's own matrices, ordered by sender.
    Results go back the same way, from the second buffer into the first.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], ranks: int, rank: int):
        owners = choose_owners(shapes, ranks)
        self.order = sorted(range(len(shapes)), key=owners.__getitem__)  # of the matrices, in a buffer to send
        self.mine = [index for index in self.order if owners[index] == rank]
        self.rows = [rows_by_rank(rows, ranks) for rows, _ in shapes]
        self.sent = [self.rows[index][rank] * shapes[index][1] for index in self.order]
        self.received = [self.rows[i][sender] * shapes[i][1] for sender in range(ranks) for i in self.mine]
        self.sent_to = [0] * ranks
        for index, count in zip(self.order, self.sent, strict=True):
            self.sent_to[owners[index]] += count
        own = len(self.mine)
        self.received_from = [sum(self.received[sender * own : (sender + 1) * own]) for sender in range(ranks)]

    def pieces(self, buffer: Tensor) -> list[tuple[Tensor, ...]]:
        """For each matrix of this rank, its rows in a buffer to receive: a flat view for each sender."""
        pieces = buffer.split(self.received)
        return [pieces[position :: len(self.mine)] for position in range(len(self.mine))]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum on the given matrices, whole or sharded over dimension 0; its state is there at once.

    Set `found_inf` before each step, as for fused AdamW: a scalar on the parameters' device; where it is 1, nothing
    changes. Where parameters are offloaded to the host, the Newton-Schulz iterations run on the device all the same.
    """

    found_inf: Tensor

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._matrices, first = matrices, matrices[0]
        for p in matrices:
            self.state[p] = {"momentum": torch.zeros_like(p)}
        ranks, rank, self._group, self.device = 1, 0, None, first.device
        if isinstance(first, DTensor):  # with HSDP the last dimension of the mesh has the ranks of one copy
            mesh, last = first.device_mesh, first.device_mesh.ndim - 1
            ranks, rank, self._group = mesh.size(last), mesh.get_local_rank(last), mesh.get_group(last)
            self.device = torch.device(mesh.device_type)  # of a GPU: the current one
        self.dtype = newton_schulz_dtype(self.device.type)
        self._exchange = Exchange([tuple(p.shape) for p in matrices], ranks, rank) if ranks > 1 else None
        if self._exchange is not None:
            for p, rows in zip(matrices, self._exchange.rows, strict=True):
                assert local(p).shape[0] == rows[rank], "FSDP2 shards in another way than rows_by_rank"

    @torch.no_grad()
    def step(self) -> None:
        skip = self.found_inf.bool()
        if self._exchange is None:
            for p in self._matrices:
                self._update(p, orthogonalize(self._momentum(p, skip).to(self.device, self.dtype)), skip)
        else:
            self._step_together(self._exchange, skip)

    def _step_together(self, exchange: Exchange, skip: Tensor) -> None:
        """The step of ranks that share the matrices: rows to the owners, the owners' work, results back."""
        sending = torch.empty(sum(exchange.sent), dtype=self.dtype, device=self.device)
        receiving = torch.empty(sum(exchange.received), dtype=self.dtype, device=self.device)
        parameters, slots = [self._matrices[index] for index in exchange.order], sending.split(exchange.sent)
        for p, slot in zip(parameters, slots, strict=True):
            slot.view_as(local(p)).copy_(self._momentum(p, skip))
        dist.all_to_all_single(receiving, sending, exchange.received_from, exchange.sent_to, self._group)
        for index, pieces in zip(exchange.mine, exchange.pieces(receiving), strict=True):
            orthogonalize_pieces(pieces, exchange.rows[index])
        dist.all_to_all_single(sending, receiving, exchange.sent_to, exchange.received_from, self._group)
        for p, slot in zip(parameters, slots, strict=True):
            self._update(p, slot.view_as(local(p)), skip)

    def _momentum(self, p: nn.Parameter, skip: Tensor) -> Tensor:
        """Move the momentum of this rank's rows, and return what Nesterov's method makes of it and the gradient."""
        gradient, momentum = local(p.grad), local(self.state[p]["momentum"])
        moved = momentum.lerp(gradient, 1 - MOMENTUM)
        torch.where(skip, momentum, moved, out=momentum)
        return gradient.lerp(moved, MOMENTUM)

    def _update(self, p: nn.Parameter, direction: Tensor, skip: Tensor) -> None:
        """Decay this rank's rows and move them against the direction, [rows here, columns]."""
        (group,), values = self.param_groups, local(p)
        decayed = values * (1 - group["lr"] * group["weight_decay"])
        moved = decayed.add_(direction.to(values.device), alpha=-group["lr"] * update_scale(*p.shape))
        torch.where(skip, values, moved, out=values)


def orthogonalize_pieces(pieces: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Orthogonalise in place a matrix that comes as consecutive rows: flat tensors of so many rows each."""
    result = orthogonalize(torch.cat(pieces).view(sum(rows), -1))
    for piece, part in zip(pieces, result.split(rows), strict=True):
        piece.view_as(part).copy_(part)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
