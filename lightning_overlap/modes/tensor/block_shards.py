"""How tensor parallelism shards a block, for the comparison of the first block with an unsharded copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_overlap.model.block_check import Advice, BlockCheck, BlockShards
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.modes.tensor.regions import Regions
from lightning_overlap.modes.tensor.replicated import ReplicatedGradients
from lightning_overlap.modes.tensor.sequence import gather_tokens, local_tokens
from lightning_overlap.state.pieces import Partition


class TensorShards(BlockShards):
    """See the module's docstring.

    Args:
        regions: the model's regions.
        partition: the sharded parameters.
        replicated: the parameters of whose gradient each rank has a summand.
        counts: by module and attribute, the unsharded value of a number that is sharded (the number of heads, for example).
    """

    nesting = Nesting.LAYERS
    advice = Advice(
        sharded="its layers",
        failure="Code in attention and mlp must take the number of heads and features from its tensors (view with -1 heads), and must "
        "not add its input to its output, or multiply the two (a residual belongs into the block's own forward)",
        output="(1) a fused layer needs its parts: 'column[3]', or 'column[1]' if it is not fused; (2) attention uses the unsharded "
        "number of heads: view with -1 heads, and take this rank's part of a table by head (ALiBi's slopes); (3) the block's own "
        "forward counts tokens or uses their positions, but sees only a part of them: do that in attention or mlp, or set "
        "tensor_parallel.sequence_parallel: false. Correct the roles or the module.",
        gradients="(1) attention or mlp has a path from its input to its output around its column and row layers (a residual, a "
        "gate), or changes a row layer's output (a norm, a scale): move that into the block's own forward, or set "
        "tensor_parallel.sequence_parallel: true; (2) the block's own forward reads more than one token (a table of positions, a "
        "count): set tensor_parallel.sequence_parallel: false.",
        switch="tensor_parallel.verify_blocks: false",
    )

    def __init__(
        self, regions: Regions, partition: Partition, replicated: ReplicatedGradients, counts: Mapping[tuple[str, str], int]
    ) -> None:
        self.group = regions.exchange.group
        self._regions, self._partition, self._replicated, self._counts = regions, partition, replicated, counts

    def start(self, check: BlockCheck, inputs: tuple[Any, Any]) -> None:
        state = self._regions.state
        state.prepared, state.inputs = None, {}

    def complete(self, check: BlockCheck, twin: nn.Module, inputs: tuple[Any, Any]) -> None:
        for (owner, name), count in self._counts.items():
            if f"{owner}.".startswith(f"{check.name}."):
                setattr(twin.get_submodule(owner[len(check.name) + 1 :]), name, count)
        gathered: dict[int, Tensor] = {}
        for parameter, copied in zip(check.block.parameters(), twin.parameters(), strict=True):
            if (piece := self._partition.pieces.get(id(parameter))) is not None:
                copied.data = gathered.setdefault(id(parameter), self._partition.gather(piece, parameter.data))

    def gather_input(self, check: BlockCheck, x: Tensor) -> Tensor:
        return self._gather(check, x) if self._has_sharded_input(check) else x

    def gather_output(self, check: BlockCheck, y: Tensor) -> Tensor:
        return self._gather(check, y) if self._regions.exchange.sharded and not check.leaves else y

    def shard_input_grad(self, check: BlockCheck, grad: Tensor) -> Tensor:
        return local_tokens(grad, self._regions.exchange) if self._has_sharded_input(check) else grad

    def shard_grad(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        piece = self._partition.pieces.get(id(parameter))
        return grad if piece is None else piece.of(grad, self.group.rank, self.group.size)

    def sum_grad(self, parameter: nn.Parameter, grad: Tensor) -> Tensor:
        is_summand = id(parameter) in self._replicated.parameters
        return self.group.all_reduce(grad.clone(), label="tensor.check").wait() if is_summand else grad

    def _has_sharded_input(self, check: BlockCheck) -> bool:
        return self._regions.exchange.sharded and not check.enters

    def _gather(self, check: BlockCheck, x: Tensor) -> Tensor:
        return gather_tokens(x, self._regions.tokens_of(x, check.name), self._regions.exchange)
