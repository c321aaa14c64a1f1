"""The Muon optimizer for matrices that FSDP2 shards: each matrix is orthogonalized once per step, on one rank.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's momentum U S V^T by nearly U V^T, with
five Newton-Schulz iterations. These need the whole matrix, but a rank has only some of its rows. Therefore each
matrix has an owner. One all-to-all sends the rows of all matrices to their owners, which run the iterations, and a
second all-to-all returns the results. Owners are chosen so that all ranks have about the same work. See also
docs/optimizers.md.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial, which is steep at 0 and near 1 for larger values
MOMENTUM = 0.95
LEAST_NORM = 1e-7  # avoids a division by 0 for a matrix of zeros
ADAMW_RMS = 0.2  # root mean square of AdamW's updates (arXiv 2502.16982, section 2.2)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U S' V^T of a matrix U S V^T. The singular values S' are near 1 (0.7 to 1.2), except where S is tiny.

    matrix: [rows, columns], any floating dtype, which is also used for the computation. Returns the same shape and
    dtype.
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
    """The FLOPs of the matrix products in `orthogonalize`."""
    short, long = sorted((rows, columns))
    return ITERATIONS * (4 * short * short * long + 2 * short**3)


def update_scale(rows: int, columns: int) -> float:
    """The factor that gives an orthogonal matrix the root mean square of AdamW's updates, so that both can share lr."""
    return ADAMW_RMS * max(rows, columns) ** 0.5


def choose_owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """The owner of each matrix. Matrices are assigned in order of cost, each to the rank with the least work so far."""
    costs = [orthogonalize_flops(*shape) for shape in shapes]
    owners = [0] * len(shapes)
    work = [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = work.index(min(work))
        work[owners[index]] += costs[index]
    return owners


def rows_by_rank(rows: int, ranks: int) -> list[int]:
    """The number of a matrix's rows on each rank under FSDP2: equal chunks, of which the last may be short or empty."""
    chunk = -(-rows // ranks)
    return [min(chunk, max(0, rows - rank * chunk)) for rank in range(ranks)]


def newton_schulz_dtype(device_type: str) -> torch.dtype:
    """The dtype of the iterations and of the communication: bfloat16 on a GPU, which is fast and precise enough."""
    return torch.bfloat16 if device_type == "cuda" else torch.float32


class Exchange:
    """The owner of each matrix, and what one rank sends to the owners and receives from other ranks.

    shapes: (rows, columns) of the whole matrices. Counts are numbers of elements. The send buffer has this rank's rows
    of every matrix, ordered by owner. The receive buffer has all rows of the matrices that the rank owns, ordered by
    sender. Results return from the receive buffer into the send buffer.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], ranks: int, rank: int):
        owners = choose_owners(shapes, ranks)
        self.order = sorted(range(len(shapes)), key=owners.__getitem__)  # of the matrices, in the send buffer
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
        """For each matrix that this rank owns, its rows in a receive buffer: one flat view per sender."""
        pieces = buffer.split(self.received)
        return [pieces[position :: len(self.mine)] for position in range(len(self.mine))]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices that are whole, or sharded over dimension 0.

    The state is allocated at construction, so that a checkpoint can be loaded into it. Set `found_inf` before each
    step, as for fused AdamW: a scalar on the parameters' device. If it is 1, the step changes nothing. The
    Newton-Schulz iterations run on the device even if parameters are offloaded to the host.
    """

    found_inf: Tensor

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._matrices = matrices
        first = matrices[0]
        for p in matrices:
            self.state[p] = {"momentum": torch.zeros_like(p)}
        ranks, rank = 1, 0
        self._group = None
        self.device = first.device
        if isinstance(first, DTensor):
            mesh = first.device_mesh
            last = mesh.ndim - 1  # with HSDP, the last dimension of the mesh has the ranks of one copy
            ranks = mesh.size(last)
            rank = mesh.get_local_rank(last)
            self._group = mesh.get_group(last)
            self.device = torch.device(mesh.device_type)  # for CUDA: the current device
        self.dtype = newton_schulz_dtype(self.device.type)
        self._exchange = Exchange([(p.shape[0], p.shape[1]) for p in matrices], ranks, rank) if ranks > 1 else None
        if self._exchange is not None:
            for p, rows in zip(matrices, self._exchange.rows, strict=True):
                assert local(p).shape[0] == rows[rank], "FSDP2 does not shard as rows_by_rank assumes"

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override] # no closure
        skip = self.found_inf.bool()
        if self._exchange is None:
            for p in self._matrices:
                self._update(p, orthogonalize(self._momentum(p, skip).to(self.device, self.dtype)), skip)
        else:
            self._step_together(self._exchange, skip)

    def _step_together(self, exchange: Exchange, skip: Tensor) -> None:
        """The step for sharded matrices: send rows to the owners, orthogonalize, send the results back."""
        parameters = [self._matrices[index] for index in exchange.order]
        # Offloaded parameters need one copy to the device and one back. A copy of each matrix would wait for each.
        directions = torch.empty(sum(exchange.sent), dtype=self.dtype, device=local(parameters[0]).device)
        for p, slot in zip(parameters, directions.split(exchange.sent), strict=True):
            slot.view_as(local(p)).copy_(self._momentum(p, skip))
        sending = directions.to(self.device)
        receiving = torch.empty(sum(exchange.received), dtype=self.dtype, device=self.device)
        dist.all_to_all_single(receiving, sending, exchange.received_from, exchange.sent_to, self._group)
        for index, pieces in zip(exchange.mine, exchange.pieces(receiving), strict=True):
            orthogonalize_pieces(pieces, exchange.rows[index])
        dist.all_to_all_single(sending, receiving, exchange.sent_to, exchange.received_from, self._group)
        directions = sending.to(directions.device)
        for p, slot in zip(parameters, directions.split(exchange.sent), strict=True):
            self._update(p, slot.view_as(local(p)), skip)

    def _momentum(self, p: nn.Parameter, skip: Tensor) -> Tensor:
        """Update the momentum of this rank's rows, and return Nesterov's combination of it with the gradient."""
        gradient = local_gradient(p)
        momentum = local(self.state[p]["momentum"])
        moved = momentum.lerp(gradient, 1 - MOMENTUM)
        torch.where(skip, momentum, moved, out=momentum)
        return gradient.lerp(moved, MOMENTUM)

    def _update(self, p: nn.Parameter, direction: Tensor, skip: Tensor) -> None:
        """Apply weight decay and the update to this rank's rows. direction: [rows of this rank, columns]."""
        (group,) = self.param_groups
        values = local(p)
        decayed = values * (1 - group["lr"] * group["weight_decay"])
        moved = decayed.add_(direction.to(values.device), alpha=-group["lr"] * update_scale(*p.shape))
        torch.where(skip, values, moved, out=values)


def orthogonalize_pieces(pieces: Sequence[Tensor], rows: Sequence[int]) -> None:
    """Orthogonalize a matrix in place. pieces: its consecutive rows as flat tensors; rows: number of rows in each."""
    result = orthogonalize(torch.cat(list(pieces)).view(sum(rows), -1))
    for piece, part in zip(pieces, result.split(rows), strict=True):
        piece.view_as(part).copy_(part)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient, after a backward pass."""
    assert parameter.grad is not None, "no backward pass has filled the gradient"
    return local(parameter.grad)
