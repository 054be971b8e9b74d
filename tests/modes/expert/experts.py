"""An experts module in the form of Hugging Face's, and what one process computes with it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_overlap.modes.expert.layout import share

FORMS: dict[str, dict[str, bool]] = {
    "gated": {},
    "no_gate": {"has_gate": False},
    "transposed": {"is_transposed": True, "has_bias": True, "is_concatenated": False},
    "normed": {"has_post_expert_norm": True, "has_bias": True},
}
"""By name, the flags that are not as usual."""
WIDTH, INNER = 8, 12


class Experts(nn.Module):
    """Experts of a layer. Its forward is a loop, which gives an expert without tokens the gradient zero."""

    def __init__(self, experts: int, form: str = "gated", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = True, False, False
        self.is_concatenated, self.has_post_expert_norm = True, False
        for name, value in FORMS[form].items():
            setattr(self, name, value)
        self.act_fn = nn.SiLU()
        first = "gate_up_proj" if self.has_gate else "up_proj"
        for name, into, out in ((first, WIDTH, INNER * (2 if self.has_gate else 1)), ("down_proj", INNER, WIDTH)):
            shape = (experts, into, out) if self.is_transposed else (experts, out, into)
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=dtype) * 0.3))
            if self.has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, out, dtype=dtype)))
        if self.has_post_expert_norm:
            self.post_expert_norm = nn.LayerNorm(WIDTH, dtype=dtype)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1) if self.is_concatenated else (x[..., ::2], x[..., 1::2])
        return self.act_fn(gate) * up

    def expert(self, number: int, rows: Tensor) -> Tensor:
        def product(name: str, x: Tensor) -> Tensor:
            weight = getattr(self, name)[number]
            bias = getattr(self, f"{name}_bias")[number] if self.has_bias else 0
            return x @ (weight if self.is_transposed else weight.t()) + bias

        inner = product("gate_up_proj" if self.has_gate else "up_proj", rows)
        out = product("down_proj", self._apply_gate(inner) if self.has_gate else self.act_fn(inner))
        return self.post_expert_norm(out) if self.has_post_expert_norm else out

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for number in range(len(self.down_proj)):
            token, choice = torch.where(indices == number)
            total = total.index_add(0, token, self.expert(number, hidden[token]) * weights[token, choice, None])
        return total

    def part(self, rank: int, ranks: int) -> "Experts":
        """A copy that has a rank's experts only."""
        mine = share(len(self.down_proj), ranks, rank)
        copied = copy.deepcopy(self)
        for name, parameter in self.named_parameters(recurse=False):
            setattr(copied, name, nn.Parameter(parameter.detach()[mine.start : mine.stop].clone()))
        return copied


def whole_pass(experts: Experts, batches: list[tuple[Tensor, Tensor, Tensor]], grads: list[Tensor]) -> dict[str, Any]:
    """One process computes the tokens of all ranks: outputs and gradients."""
    inputs = [(h.clone().requires_grad_(), i, w.clone().requires_grad_()) for h, i, w in batches]
    experts = copy.deepcopy(experts)
    out = experts(*(torch.cat(each) for each in zip(*inputs, strict=True)))
    out.backward(torch.cat(grads))
    return {
        "out": out.detach(),
        "hidden": torch.cat([h.grad for h, _, _ in inputs]),
        "weights": torch.cat([w.grad for _, _, w in inputs]),
        **{name: p.grad for name, p in experts.named_parameters()},
    }
