"""Operations are those of the products that were written down, and counting changes no number."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap.profiling.flops import FlopCount, StepFlops, peak_flops


def attend(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_forward_and_backward_are_counted_once():
    linear, x = nn.Linear(16, 32), torch.randn(4, 16)
    forward = 2 * 4 * 16 * 32
    with FlopCount() as count:
        linear(x).sum().backward()
    assert count.flops == 2 * forward, "the input needs no gradient"
    two = nn.Sequential(linear, nn.ReLU(), nn.Linear(32, 16))  # of one layer nothing is computed again
    with FlopCount() as count:
        checkpoint(two, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert count.flops == 6 * forward, "the forward that is computed again does not count"
    assert not count.unknown
    with FlopCount() as count:
        torch.zeros(4, 32).addmm_(x.detach(), linear.weight.detach().t())
        torch.zeros(1, 4, 32).baddbmm_(x.detach()[None], linear.weight.detach().t()[None])
        torch.mm(x.detach(), linear.weight.detach().t(), out=torch.empty(4, 32))
    assert (count.flops, count.unknown) == (3 * forward, set())


def test_attention_on_the_cpu_and_products_in_groups_are_counted():
    q = torch.randn(2, 3, 8, 16, requires_grad=True)
    with FlopCount() as count:
        attend(q)
    assert count.flops == 2 * 2 * (2 * 3) * 8 * 8 * 16
    with FlopCount() as count:
        attend(q).sum().backward()
    assert count.flops == (2 + 5) * 2 * (2 * 3) * 8 * 8 * 16
    rows, matrices = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(2, 16, 32, dtype=torch.bfloat16)
    ends = torch.tensor([8, 24], dtype=torch.int32)
    with FlopCount() as count:
        F.grouped_mm(rows, matrices, offs=ends)
    assert count.flops == 2 * 24 * 16 * 32
    with FlopCount() as count:
        F.grouped_mm(rows.t(), rows, offs=ends)  # gradients of two matrices
    assert count.flops == 2 * 24 * 16 * 16


def test_counting_changes_no_bit():
    def gradients():
        torch.manual_seed(1)
        module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        module(torch.randn(2, 5, 16)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in module.parameters()])

    expected = gradients()
    with FlopCount():
        assert gradients().equal(expected)


def test_an_operator_without_a_formula_is_named():
    @torch.library.custom_op("tests::twice_linear", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    steps = StepFlops("")
    steps.start_batch(may_count=True)
    twice(torch.ones(2))
    torch.cummax(torch.ones(2), 0)  # "mm" in a name is no product
    steps.end_batch(ends_step=True)
    assert steps.flops is None
    assert steps.obstacle == "no formula is known for twice_linear"


def test_one_step_is_counted():
    linear, x = nn.Linear(4, 4), torch.ones(1, 4)
    steps = StepFlops("")
    for may_count, ends_step in ((False, True), (True, False), (False, True), (True, True)):
        steps.start_batch(may_count=may_count)
        linear(x)
        steps.end_batch(ends_step=ends_step)
    assert steps.flops == 2 * 32, "both batches of the second step"
    blocked = StepFlops("a reason")
    blocked.start_batch(may_count=True)
    linear(x)
    blocked.end_batch(ends_step=True)
    assert (blocked.flops, blocked.obstacle) == (None, "a reason")


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 9.89e14),
        ("NVIDIA H100 PCIe", "bf16-true", 7.56e14),
        ("NVIDIA H200", "32-true", 6.69e13),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", 3.12e14),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16-mixed", None),
        ("NVIDIA L40", "bf16-mixed", None),
        ("NVIDIA L40S", "bf16-mixed", 3.62e14),
        ("NVIDIA H100 PCIe", "64-true", None),
    ],
)
def test_peaks_are_those_of_dense_products(name, precision, peak):
    with mock.patch("torch.cuda.get_device_name", return_value=name):
        assert peak_flops(torch.device("cuda"), precision) == peak
    assert peak_flops(torch.device("cpu"), precision) is None
