"""Counts the floating-point operations of a step, and knows how many a device can do at most."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import torch

from lightning_overlap.torch_seams import DispatchMode, flop_formulas, is_in_backward

PEAKS = (
    ("GB200", 2.5e15, 1.25e15, 8e13),
    ("B200", 2.25e15, 1.12e15, 7.5e13),
    ("GH200", 9.89e14, 4.95e14, 6.69e13),
    ("H200 NVL", 8.35e14, 4.18e14, 6e13),
    ("H200", 9.89e14, 4.95e14, 6.69e13),
    ("H100 PCIe", 7.56e14, 3.78e14, 5.12e13),
    ("H100 NVL", 8.35e14, 4.18e14, 6e13),
    ("H100", 9.89e14, 4.95e14, 6.69e13),
    ("A100", 3.12e14, 1.56e14, 1.95e13),
    ("L40S", 3.62e14, 1.83e14, 9.16e13),
    ("L4", 1.21e14, 6e13, 3.03e13),
)
"""Words of a GPU's name, with FLOP/s of dense products in 16 bits, TF32 and fp32, from NVIDIA's data sheets. The first match counts.

Lightning has a table, too (``lightning.fabric.utilities.throughput``), but some of its figures are those of sparse matrices.
"""
PRODUCTS = re.compile(r"(^|_)(mm|bmm|addmm|baddbmm|matmul|linear|trilinear|gemm|conv|convolution|attention|attn|lstm|gru|rnn)(_|$)")
"""Finds operators that multiply matrices, by their names."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns FLOP/s of dense products that a device can do at most; None if it is not in :data:`PEAKS`.

    Args:
        device: of this rank.
        precision: Lightning's name of it.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    row = next((row for row in PEAKS if re.search(rf"\b{row[0]}\b", name)), None)
    if row is None or "MIG" in name or precision.startswith(("64", "transformer-engine")):
        return None
    _, half, tf32, single = row
    if precision.startswith(("16", "bf16")):
        return half
    return tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else single


class FlopCount(DispatchMode):
    """Counts the operations of products, convolutions and attention, forward and backward, while it is entered.

    It sees operators below autograd and runs each as it is, so no number changes. Each costs some microseconds more, so that one step
    only is counted. The formulas are torch's; its ``FlopCounterMode`` would also hook every module.

    Attributes:
        flops: operations of the model. What an activation checkpoint computes again is not among them, nor is what a gradient of a
            gradient adds.
        unknown: names of operators that multiply matrices and have no formula.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.unknown: set[str] = set()
        self._formulas = flop_formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = getattr(func, "overloadpacket", func)  # an operator of higher order has no overloads
        formula = self._formulas.get(operator)
        if formula is None:
            name = getattr(operator, "__name__", str(operator))
            if PRODUCTS.search(name):
                self.unknown.add(name)
        elif not (is_in_backward() and torch.is_grad_enabled()):  # an activation checkpoint computes a part of the forward again
            self.flops += int(formula(*args, **kwargs, out_val=result))
        return result


class StepFlops:
    """Counts the operations of one step of a fit on this rank: the first one that may be counted.

    Args:
        obstacle: why no step may be counted; empty: one may.

    Attributes:
        flops: of the step; None until it has ended.
        obstacle: why they are not counted.
    """

    def __init__(self, obstacle: str) -> None:
        self.flops: int | None = None
        self.obstacle = obstacle
        self._count: FlopCount | None = None  # of the step under way, if it is counted
        self._entered = ExitStack()

    def start_batch(self, *, may_count: bool) -> None:
        """Begins a batch.

        Args:
            may_count: whether its step begins with it, and may be counted.
        """
        self._entered.close()  # Lightning may have left the batch before without its end
        if may_count and self.flops is None and not self.obstacle:
            self._count = FlopCount()
        if self._count is not None:
            self._entered.enter_context(self._count)

    def end_batch(self, *, ends_step: bool) -> None:
        """Ends a batch, also one that has failed.

        Args:
            ends_step: whether its step ends with it.
        """
        self._entered.close()
        if ends_step and self._count is not None:
            count, self._count = self._count, None
            if count.unknown:
                self.obstacle = f"no formula is known for {', '.join(sorted(count.unknown))}"
            else:
                self.flops = count.flops
