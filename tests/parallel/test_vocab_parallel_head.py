"""Output layer and cross-entropy over a split vocabulary, against F.cross_entropy of the whole one in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.allocations import Allocations
from support.distributed import run_distributed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megazebra.config import ParallelConfig
from megazebra.labels import IGNORE_INDEX
from megazebra.parallel.collectives import enter_tensor_parallel
from megazebra.parallel.cross_entropy import VocabParallelHead
from megazebra.parallel.mesh import Group, ParallelMesh
from megazebra.parallel.sharding import shard_of, unshard

B, S, E = 2, 17, 12
SCALE = 0.37  # of the loss, so that the incoming gradient matters
# float64, unit roundoff 1.1e-16: logits are sums of 12 products of size 1 to 10 (1e-14), a weight gradient a sum
# over 34 tokens of probabilities times 5 or so (2e-14), the loss a sum of 34 numbers below 20 (1e-13).
TOLERANCE = {"rtol": 0.0, "atol": 1e-11}


def _problem(vocab_size: int, ignored: str) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(vocab_size)
    hidden_BSE = torch.randn(B, S, E, generator=random, dtype=torch.float64)
    weight_VE = torch.randn(vocab_size, E, generator=random, dtype=torch.float64)
    labels_BS = torch.randint(0, vocab_size, (B, S), generator=random)
    labels_BS[0, 0], labels_BS[0, 1] = 0, vocab_size - 1
    if ignored == "some":
        labels_BS[torch.rand(B, S, generator=random) < 0.3] = IGNORE_INDEX
        labels_BS[1] = IGNORE_INDEX  # whole chunks of it
    elif ignored == "all":
        labels_BS[:] = IGNORE_INDEX
    return hidden_BSE, weight_VE, labels_BS


def _head(weight_VE: Tensor, tp: Group, chunk: int, softcap: float | None = None) -> VocabParallelHead:
    head = VocabParallelHead(*weight_VE.shape, tp, chunk=chunk, softcap=softcap).to(weight_VE.dtype)
    with torch.no_grad():
        head.weight.copy_(shard_of(weight_VE, head.weight, head.weight.shape, tp))
    return head


def _plain_logits(hidden_BSE: Tensor, weight_VE: Tensor, softcap: float | None) -> Tensor:
    logits_BSV = F.linear(hidden_BSE, weight_VE)
    return logits_BSV if softcap is None else softcap * torch.tanh(logits_BSV / softcap)


def _equals_the_unsharded_loss(tp: Group, vocab_size: int, chunk: int, softcap: float | None, ignored: str) -> None:
    hidden_BSE, weight_VE, labels_BS = _problem(vocab_size, ignored)
    hidden, weight = hidden_BSE.clone().requires_grad_(), weight_VE.clone().requires_grad_()
    logits = _plain_logits(hidden, weight, softcap)
    tokens = F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    loss = F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    (SCALE * loss).backward()

    head = _head(weight_VE, tp, chunk, softcap)
    own_hidden = hidden_BSE.clone().requires_grad_()
    own_loss = head(enter_tensor_parallel(own_hidden, tp, sequence_parallel=False), labels_BS)
    assert own_loss.dtype == torch.float64
    torch.testing.assert_close(own_loss, loss, **TOLERANCE)
    (SCALE * own_loss).backward()
    torch.testing.assert_close(own_hidden.grad, hidden.grad, **TOLERANCE)
    torch.testing.assert_close(unshard(head.weight.grad, head.weight, tp), weight.grad, **TOLERANCE)
    if head.padding:
        assert not head.weight.grad[-head.padding :].any()
    own_tokens = head(hidden_BSE, labels_BS, "none")
    assert not own_tokens.requires_grad
    torch.testing.assert_close(own_tokens.flatten(), tokens, **TOLERANCE)
    assert not own_tokens[labels_BS == IGNORE_INDEX].any()
    scores_2BS = head(hidden_BSE, labels_BS, "scores")
    torch.testing.assert_close(scores_2BS[0], own_tokens, rtol=0, atol=0)
    assert torch.equal(scores_2BS[1].bool(), logits.argmax(-1) == labels_BS)
    assert scores_2BS[1].eq(1).logical_or(scores_2BS[1].eq(0)).all()
    own_logits = head(hidden_BSE)
    assert own_logits.shape == (B, S, vocab_size)
    torch.testing.assert_close(own_logits, logits, **TOLERANCE)
    if ignored == "all":
        assert own_loss == 0
        assert not own_hidden.grad.any()


def _a_hit_is_the_first_of_equals(tp: Group) -> None:
    """Small whole numbers: logits are exact, and every one stands at several tokens of several ranks."""
    vocab_size = 61
    random = torch.Generator().manual_seed(0)
    hidden_BSE = torch.randint(-3, 4, (B, S, E), generator=random).float()
    weight_VE = torch.randint(-3, 4, (7, E), generator=random).float()[torch.arange(vocab_size) % 7]
    first_BS = F.linear(hidden_BSE, weight_VE).argmax(-1)
    assert (first_BS < 7).all()
    head = _head(weight_VE, tp, 5)
    for labels_BS, hits in ((first_BS, True), (first_BS + 7, False), (first_BS + 49, False)):
        labels_BS = labels_BS.clone()
        labels_BS[0, ::3] = IGNORE_INDEX
        assert torch.equal(head(hidden_BSE, labels_BS, "scores")[1].bool(), hits & (labels_BS != IGNORE_INDEX))


def _gradient_of_one_only(tp: Group) -> None:
    """A frozen output layer, or frozen hidden states: the other's gradient is the same."""
    hidden_BSE, weight_VE, labels_BS = _problem(61, "some")
    both = _head(weight_VE, tp, 7)
    hidden = hidden_BSE.clone().requires_grad_()
    both(hidden, labels_BS).backward()
    frozen = _head(weight_VE, tp, 7)
    frozen.weight.requires_grad_(False)
    own_hidden = hidden_BSE.clone().requires_grad_()
    frozen(own_hidden, labels_BS).backward()
    assert torch.equal(own_hidden.grad, hidden.grad)
    only_weight = _head(weight_VE, tp, 7)
    only_weight(hidden_BSE, labels_BS).backward()
    assert torch.equal(only_weight.weight.grad, both.weight.grad)
    with torch.no_grad():
        assert torch.equal(both(hidden_BSE, labels_BS), only_weight(hidden_BSE, labels_BS))


def _bf16_is_within_its_rounding(tp: Group) -> None:
    """Against float64 on the same rounded numbers. u: bf16 rounds by at most 2^-8 of a number.

    A logit is rounded once: off by u |logit| at most (d below), and with it a token's loss by 2 d and a
    probability p by a factor exp(2 d). The gradient g of a logit is rounded once more, then products are summed
    in float32 and rounded: once for hidden states, once a chunk and once at the end for weights. A margin of
    a tenth covers second-order terms and float32.
    """
    u, chunk = 2.0**-8, 7
    hidden_BSE, weight_VE, labels_BS = _problem(61, "some")
    hidden_BSE, weight_VE = (0.3 * hidden_BSE).bfloat16(), weight_VE.bfloat16()
    hidden, weight = hidden_BSE.double().requires_grad_(), weight_VE.double().requires_grad_()
    logits_NV = F.linear(hidden, weight).flatten(0, 1)
    labels_N = labels_BS.flatten()
    tokens_N = F.cross_entropy(logits_NV, labels_N, reduction="none", ignore_index=IGNORE_INDEX)
    tokens_N.sum().backward()

    d = u * logits_NV.detach().abs().amax(1)
    valid_N = labels_N != IGNORE_INDEX
    p_NV = logits_NV.detach().softmax(1) * valid_N[:, None]
    g_NV = p_NV.clone()
    g_NV[valid_N, labels_N[valid_N]] -= 1
    g_error_NV = 1.1 * (2 * d[:, None] * p_NV + u * g_NV.abs())
    head = _head(weight_VE, tp, chunk)
    own_hidden = hidden_BSE.clone().requires_grad_()
    loss = head(own_hidden, labels_BS)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - tokens_N.sum()) <= 1.1 * (2 * d * valid_N).sum()
    own_tokens_N = head(hidden_BSE, labels_BS, "none").flatten()
    assert own_tokens_N.dtype == torch.float32
    assert ((own_tokens_N - tokens_N.detach()).abs() <= 1.1 * 2 * d + 1e-6).all()
    loss.backward()
    assert own_hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    hidden_error_NE = (g_error_NV @ weight.detach().abs()) + 1.1 * u * hidden.grad.flatten(0, 1).abs()
    if tp.size == 1:  # with more, a partial sum is rounded on every rank
        assert ((own_hidden.grad.double() - hidden.grad).abs().flatten(0, 1) <= hidden_error_NE).all()
    magnitude_VE = g_NV.abs().T @ hidden.detach().abs().flatten(0, 1)
    weight_error_VE = g_error_NV.T @ hidden.detach().abs().flatten(0, 1) + 1.1 * 2 * u * magnitude_VE
    own_weight_grad = unshard(head.weight.grad, head.weight, tp).double()
    assert ((own_weight_grad - weight.grad).abs() <= weight_error_VE).all()


def _only_a_chunk_of_logits_exists(tp: Group) -> None:
    vocab_size, chunk, width = 500, 32, 4
    hidden_BSE = torch.randn(4, 128, width)
    labels_BS = torch.randint(0, vocab_size, (4, 128))
    rows = -(-vocab_size // tp.size)
    chunk_bytes = chunk * rows * 4
    others = max(rows * width * 4, hidden_BSE.nbytes)  # weight and hidden states, or their gradients
    assert others < chunk_bytes < 4 * 128 * rows * 4 / 8  # the case can tell
    for softcap in (None, 5.0):
        head = _head(torch.randn(vocab_size, width), tp, chunk, softcap)
        own_hidden = hidden_BSE.clone().requires_grad_()
        with Allocations() as allocated:
            head(own_hidden, labels_BS).backward()
        assert max(allocated.bytes) == chunk_bytes
        # Logits turn into their gradient in place; the soft-cap's slope needs a second matrix.
        assert allocated.bytes.count(chunk_bytes) == 4 * 128 // chunk * (1 if softcap is None else 2)
        with Allocations() as allocated:
            head(hidden_BSE, labels_BS, "none")
            head(hidden_BSE, labels_BS, "scores")
        assert max(allocated.bytes) == chunk_bytes
        with Allocations() as allocated:  # the measurement itself sees what it should
            head(hidden_BSE)
        assert max(allocated.bytes) >= 4 * 128 * rows * 4


def _counts(tp: Group) -> None:
    """For each chunk of C tokens: C maxima, then C sums of exponentials with C target logits."""
    hidden_BSE, weight_VE, labels_BS = _problem(61, "some")
    head = _head(weight_VE, tp, 7)
    tp.traffic.reset()
    hidden = hidden_BSE.clone().requires_grad_()
    head(hidden, labels_BS).backward()
    tally = tp.traffic.tallies["tp", "all_reduce", "loss"]
    assert tally.calls == 2 * math.ceil(B * S / 7)
    assert tally.bytes == 2 * (3 * B * S * 8) * (tp.size - 1) // tp.size
    assert tp.traffic.total_bytes == tally.bytes


def _checks(tp: Group) -> None:
    for vocab_size, chunk, softcap, ignored in [
        (61, 7, None, "some"),
        (61, B * S, None, "none"),
        (61, 1000, 3.0, "some"),
        (61, 1, None, "some"),
        (64, 7, 3.0, "none"),
        (61, 7, 3.0, "all"),
        (5, 7, None, "some"),  # with 4 ranks: two tokens each, the last rank holds only padding
        (3, 7, 3.0, "some"),
        (2, 7, None, "some"),  # with 4 ranks: two of them hold only padding
    ]:
        _equals_the_unsharded_loss(tp, vocab_size, chunk, softcap, ignored)
    _a_hit_is_the_first_of_equals(tp)
    _gradient_of_one_only(tp)
    _bf16_is_within_its_rounding(tp)
    _only_a_chunk_of_logits_exists(tp)
    if tp.size > 1:
        _counts(tp)


def _on_every_rank() -> None:
    for tensor in (2, 4):
        _checks(ParallelMesh.build(ParallelConfig(tensor=tensor)).tp)


def test_one_rank() -> None:
    _checks(ParallelMesh.build(ParallelConfig()).tp)


def test_two_and_four_ranks() -> None:
    run_distributed(_on_every_rank, 4)


def test_logits_of_one_rank_are_differentiable() -> None:
    hidden_BSE, weight_VE, _ = _problem(61, "none")
    head = _head(weight_VE, ParallelMesh.build(ParallelConfig()).tp, 7, softcap=3.0)
    hidden = hidden_BSE.clone().requires_grad_()
    expected = hidden_BSE.clone().requires_grad_()
    head(hidden).square().sum().backward()
    _plain_logits(expected, weight_VE, 3.0).square().sum().backward()
    torch.testing.assert_close(hidden.grad, expected.grad, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("vocab_size", "ranks", "padding"), [(61, 4, [0, 0, 0, 3]), (5, 4, [0, 0, 1, 2])])
def test_padding_of_every_rank(vocab_size: int, ranks: int, padding: list[int]) -> None:
    heads = [VocabParallelHead(vocab_size, 8, Group("tp", tuple(range(ranks)), r), chunk=1) for r in range(ranks)]
    assert [head.padding for head in heads] == padding
    assert sum(len(head.weight) - head.padding for head in heads) == vocab_size


def test_validation_makes_one_product_and_the_same_loss() -> None:
    """Without gradients the head must not form any: one matrix product of N x E x V a pass, and no more."""
    torch.manual_seed(0)
    head = VocabParallelHead(23, 8, ParallelMesh.build(ParallelConfig()).tp, chunk=5)
    torch.nn.init.normal_(head.weight)
    hidden, labels = torch.randn(2, 9, 8), torch.randint(0, 23, (2, 9))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        without_gradient = head(hidden, labels)
    assert counter.get_total_flops() == 2 * 18 * 8 * 23
    assert without_gradient.equal(head(hidden, labels).detach())
