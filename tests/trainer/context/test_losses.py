"""What reads sharded logits past torch's functions is an error, never another number."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_overlap import ConfigError, ContextParallel
from lightning_overlap.torch_seams import WithoutSubclasses
from tests.helpers.models import Transformer
from tests.helpers.sequences import compare, train


class FusedLoss(Function):
    """A loss of hidden states and the head's weight in one kernel (Liger's, say), which reads memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with WithoutSubclasses(), torch.enable_grad():
            variables = x.detach().as_subclass(Tensor).requires_grad_(), weight.detach().requires_grad_()
            loss = F.cross_entropy(F.linear(*variables).flatten(0, 1), labels.flatten())
            ctx.gradients = torch.autograd.grad(loss, variables)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(gradient * grad for gradient in ctx.gradients), None


def mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Net(Transformer):
    """Ends in one of several losses."""

    def __init__(self, ending: str) -> None:
        super().__init__(blocks=3)
        self.ending = ending

    def loss(self, ids: Tensor) -> Tensor:
        x, labels = self.embedding(ids[:, :-1]), ids[:, 1:]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.ending == "fused" and self.training:
            return FusedLoss.apply(x, self.head.weight, labels)
        logits = self.head(x)
        if self.ending == "pointer" and not self.training:
            logits.data_ptr()  # as a kernel's launcher does
        if self.ending.startswith("checkpoint"):
            return checkpoint(mean, logits, labels, use_reentrant="reentrant" in self.ending)  # type: ignore[no-any-return]
        if self.ending == "compiled":
            return torch.compile(mean, backend="aot_eager")(logits, labels)  # type: ignore[no-any-return]
        return mean(logits, labels)


EQUAL = ("checkpoint", "plain")
ERRORS = {
    "fused": "was given a tensor whose tokens are sharded over the ranks",
    "checkpoint, reentrant": "A checkpoint that is called with it needs use_reentrant=False",
    "pointer": "a kernel outside of torch reads the memory of a tensor whose tokens are sharded over the ranks",
    "compiled": "a compiled function was called with a tensor whose tokens are sharded over the ranks",
}


def outcomes(endings: list[str], boundary: str) -> list[Any]:
    strategy = {"context_parallel": ContextParallel(size=2, boundary=boundary), "verify_first_step": False}  # type: ignore[arg-type]
    results: list[Any] = []
    for ending in endings:
        try:
            results.append(train(strategy, Net, {"ending": ending}, {}))
        except ConfigError as error:
            results.append(str(error))
    return results


def test_losses(world: Any) -> None:
    expected = train(None, Net, {"ending": "plain"}, {})
    for results in world(2).run(outcomes, [*EQUAL, *ERRORS], "loss"):
        for ending, result in zip([*EQUAL, *ERRORS], results, strict=True):
            if ending in EQUAL:
                compare(result, expected)
            else:
                assert isinstance(result, str), f"{ending} trains"
                # What such a function computes of a sharded tensor is undefined, so losses may differ before backward.
                assert ERRORS[ending] in result or (ending == "fused" and "share a batch but computed different losses" in result)


def test_whole_logits_go_everywhere(world: Any) -> None:
    for results in world(2).run(outcomes, list(ERRORS), "blocks"):
        for ending, result in zip(ERRORS, results, strict=True):
            assert not isinstance(result, str), f"{ending}: {result}"
            compare(result, train(None, Net, {"ending": "plain"}, {}))
