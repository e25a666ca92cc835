"""Output layer and cross-entropy over a vocabulary split over tp, in chunks of tokens.

Logits exist for one chunk at a time (chunk x V/tp), never for the whole sequence: both gradients are formed
while the chunk's logits are there, since the loss is a plain sum and its incoming gradient one scalar.

Legend: N tokens (rows of all sequences), C tokens of a chunk, E hidden, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megazebra.labels import IGNORE_INDEX
from megazebra.parallel.collectives import all_gather, all_reduce
from megazebra.parallel.mesh import Group
from megazebra.parallel.sharding import mark_sharded

Reduction = Literal["sum", "none", "scores"]


class _Chunk:
    """Losses of one chunk's labels, and what their gradient needs.

    hits: also find which labels are the likeliest token, hit_C.
    """

    def __init__(
        self, hidden_CE: Tensor, weight_VE: Tensor, labels_C: Tensor, head: VocabParallelHead, *, hits: bool = False
    ) -> None:
        compute = torch.promote_types(hidden_CE.dtype, torch.float32)
        logits_CV = (hidden_CE @ weight_VE.T).to(compute)
        self.tanh_CV: Tensor | None = None
        if head.softcap is not None:
            self.tanh_CV = logits_CV.div_(head.softcap).tanh_()
            logits_CV = head.softcap * self.tanh_CV
        if head.padding:
            logits_CV[:, weight_VE.shape[0] - head.padding :] = -torch.inf
        self.valid_C = labels_C != IGNORE_INDEX
        local_C = labels_C - head.first_token
        self.here_C = self.valid_C & (local_C >= 0) & (local_C < weight_VE.shape[0])
        self.target_C = local_C.masked_fill(~self.here_C, 0)
        target_logit_C = logits_CV.gather(1, self.target_C[:, None])[:, 0].masked_fill(~self.here_C, 0)
        maximum_C = all_reduce(logits_CV.amax(dim=-1), head.tp, maximum=True, label="loss")
        if hits:
            self.hit_C = self.valid_C & (labels_C == self._likeliest(logits_CV, maximum_C, head))
        # In place: besides the soft-cap's, there is one matrix of this size.
        self.exp_CV = logits_CV.sub_(maximum_C[:, None]).exp_()
        sums_2C = torch.stack([self.exp_CV.sum(dim=-1), target_logit_C])
        self.sum_exp_C, target_logit_C = all_reduce(sums_2C, head.tp, label="loss")
        self.loss_C = (maximum_C + self.sum_exp_C.log() - target_logit_C).masked_fill(~self.valid_C, 0)

    @staticmethod
    def _likeliest(logits_CV: Tensor, maximum_C: Tensor, head: VocabParallelHead) -> Tensor:
        """The token with the largest logit over all ranks; of several the first, as torch.argmax has it."""
        first_C = head.first_token + logits_CV.argmax(dim=-1)
        first_C.masked_fill_(logits_CV.amax(dim=-1) < maximum_C, head.vocab_size)  # another rank has it
        return -all_reduce(-first_C, head.tp, maximum=True, label="loss")

    def take_logit_gradient(self) -> Tensor:
        """d(sum of losses)/d(logits before the soft-cap): softmax minus one-hot, [C, V]. Ends the chunk."""
        grad_CV = self.exp_CV.mul_((self.valid_C / self.sum_exp_C)[:, None])
        rows = torch.arange(grad_CV.shape[0], device=grad_CV.device)
        grad_CV[rows, self.target_C] -= self.here_C.to(grad_CV.dtype)
        if self.tanh_CV is not None:
            grad_CV.mul_(self.tanh_CV.square_().neg_().add_(1))
        return grad_CV


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NE: Tensor, weight_VE: Tensor, labels_N: Tensor, head: VocabParallelHead) -> Tensor:
        compute = torch.promote_types(hidden_NE.dtype, torch.float32)
        total = hidden_NE.new_zeros((), dtype=compute)
        grad_hidden_NE = torch.empty_like(hidden_NE) if ctx.needs_input_grad[0] else None
        grad_weight_VE = torch.zeros_like(weight_VE, dtype=compute) if ctx.needs_input_grad[1] else None
        for rows in head.chunks(hidden_NE.shape[0]):
            hidden_CE = hidden_NE[rows]
            chunk = _Chunk(hidden_CE, weight_VE, labels_N[rows], head)
            total += chunk.loss_C.sum()
            if grad_hidden_NE is None and grad_weight_VE is None:
                continue
            grad_CV = chunk.take_logit_gradient().to(hidden_NE.dtype)
            del chunk
            if grad_hidden_NE is not None:
                torch.mm(grad_CV, weight_VE, out=grad_hidden_NE[rows])
            if grad_weight_VE is not None:
                if grad_weight_VE.dtype == grad_CV.dtype:
                    grad_weight_VE.addmm_(grad_CV.T, hidden_CE)
                else:
                    grad_weight_VE += grad_CV.T @ hidden_CE
        ctx.weight_dtype = weight_VE.dtype
        ctx.save_for_backward(grad_hidden_NE, grad_weight_VE)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place: V x E in fp32 is large. A second backward through the same graph is an error of autograd's.
        grad_hidden_NE, grad_weight_VE = ctx.saved_tensors
        if grad_hidden_NE is not None:
            grad_hidden_NE = grad_hidden_NE.mul_(grad)
        if grad_weight_VE is not None:
            grad_weight_VE = grad_weight_VE.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden_NE, grad_weight_VE, None, None


class VocabParallelHead(nn.Module):
    """Output layer with the vocabulary split over tp, padded to a multiple of it (padding is never predicted).

    Hidden states [B, S, E] are replicated over tp; labels [B, S] are int64, IGNORE_INDEX where not counted.
    `forward` is the only entry, since ZeRO-3 gathers a module's weights around it:
    with labels and reduction 'sum', the summed cross-entropy (fp32 scalar, the same on every tp rank);
    with 'none', the loss of every token [B, S], without gradients;
    with 'scores', that and whether the label is the likeliest token (1 or 0, the first of equals), fp32 [2, B, S];
    without labels, the logits [B, S, vocab_size] (differentiable where tp is 1).
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: Group, *, chunk: int, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.tp = tp
        self.chunk = chunk
        self.softcap = softcap
        self.vocab_size = vocab_size
        rows = -(-vocab_size // tp.size)
        self.first_token = tp.rank * rows
        self.padding = min(rows, max(0, self.first_token + rows - vocab_size))
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        mark_sharded(self.weight, dim=0, full_size=vocab_size)

    def forward(self, hidden_BSE: Tensor, labels_BS: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        if labels_BS is None:
            return self._logits(hidden_BSE)
        hidden_NE, labels_N = hidden_BSE.flatten(0, 1), labels_BS.flatten()
        if reduction == "sum" and torch.is_grad_enabled():
            return _SummedLoss.apply(hidden_NE, self.weight, labels_N, self)
        hits = reduction == "scores"
        losses, chunk_hits = [], []
        with torch.no_grad():
            for rows in self.chunks(len(labels_N)):
                chunk = _Chunk(hidden_NE[rows], self.weight, labels_N[rows], self, hits=hits)
                losses.append(chunk.loss_C)
                if hits:
                    chunk_hits.append(chunk.hit_C.to(chunk.loss_C.dtype))
                del chunk  # before the next one's logits are there
        if reduction == "sum":
            return torch.stack([loss_C.sum() for loss_C in losses]).sum()
        if hits:
            return torch.cat([*losses, *chunk_hits]).view(2, *labels_BS.shape)
        return torch.cat(losses).view_as(labels_BS)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        return (slice(start, start + self.chunk) for start in range(0, num_tokens, self.chunk))

    def _logits(self, hidden_BSE: Tensor) -> Tensor:
        logits_BSV = F.linear(hidden_BSE, self.weight)
        if self.softcap is not None:
            logits_BSV = self.softcap * torch.tanh(logits_BSV / self.softcap)
        if self.tp.size > 1:
            logits_BSV = all_gather(logits_BSV.detach(), self.tp, dim=-1, label="logits")
        return logits_BSV[..., : self.vocab_size]
