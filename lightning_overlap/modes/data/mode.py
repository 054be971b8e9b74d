"""The data-parallel mode: gradients reduced under backward, parameters gathered under the next forward.

    forward   | block 1 | block 2 | ...          | head |
    gather     1 | 2 | 3 | ...           |                          waited for where a weight is read (guard.py)
    backward                                     | head | ... | block 2 | block 1 |
    reduce                                               | head | ... | block 2 | block 1 |
    update                                                      | head | ...    | 2 | 1 |

A bucket is reduced as soon as its last gradient has come. Each rank then updates its shard of the bucket, and the shards are
gathered in the order in which forward reads them.

    trained       sorts the parameters           backward      collects gradients in the buckets
    buckets       puts them into buckets         reductions    posts and finishes reductions
    optimizer     updates this rank's shards     gathers       posts and finishes gathers
    guard         waits where a parameter is read
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.modes.base import OptimizerHolder, Setup, Squares
from lightning_overlap.modes.data.backward import Backward, used_twice
from lightning_overlap.modes.data.buckets import Buckets
from lightning_overlap.modes.data.buffers import LiveBucket, Phase, unflatten
from lightning_overlap.modes.data.config import DataChoices, DataParallel
from lightning_overlap.modes.data.gathers import Gathers
from lightning_overlap.modes.data.guard import GuardedModules, ReferenceGuard
from lightning_overlap.modes.data.optimizer import ShardedOptimizer
from lightning_overlap.modes.data.reductions import Reductions
from lightning_overlap.modes.data.trained import TrainedParameters, is_lookup
from lightning_overlap.ranks.group import Group
from lightning_overlap.ranks.link import Urgency
from lightning_overlap.ranks.world import make_group


class DataMode(OptimizerHolder):
    """Shards gradients, updates and optimizer state over the ranks that see different data.

    It has more than 20 methods, because it fills two contracts; most are a line.

    Attributes:
        buckets: of the trained parameters.
    """

    name = "data"
    nesting = Nesting.PARAMETERS
    config: DataParallel
    choices: DataChoices

    def __init__(self, config: DataParallel, choices: DataChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self._sharers = self._make_groups(config.num_optimizer_instances)
        has_experts = self.mesh.size("experts") > 1
        self._experts = (
            self.mesh.group("expert_gradients", self.timeout, "data", background=Urgency.REDUCTION) if has_experts else None
        )
        self._stage = self.mesh.group("stage", self.timeout) if has_experts else None
        self.buckets = Buckets(config, choices)
        self._trained = TrainedParameters(choices)
        self._reductions = Reductions(config, choices, self._sharers, self._on_reduced)
        self._backward = Backward(choices, self.buckets, self._reductions, self._trained.sparse, self._before_backward)
        prefetch = None if config.param_gather_prefetch == "all" else int(config.param_gather_prefetch)
        # Ranks see at different times that a reduction is complete. Where all must post in one order, that may not trigger a gather.
        aligned = choices.align_param_gather.value or (self._sharers[0].in_one_order and prefetch is None)
        self._gathers = Gathers(self.buckets.live, prefetch, aligned=aligned, guard=ReferenceGuard(self._complete))
        self._modules = GuardedModules(self._gathers.incomplete, self._complete)
        self._optimizer: ShardedOptimizer | None = None
        self._hooks: list[Any] = []
        self._on_trial = False

    @property
    def groups(self) -> tuple[Group, ...]:
        more = (self._experts, self._stage)
        return (*self._sharers, *(group for group in more if group is not None))

    def _make_groups(self, instances: int) -> tuple[Group, ...]:
        """Makes the ranks over which the optimizer is sharded; with several optimizer instances also the ranks that have the same
        shard in all of them."""
        # Without other groups only gathers have something to yield to: reductions.
        has_others = self.mesh.size("batch") > 1 or self.mesh.size("experts") > 1
        background = Urgency.REDUCTION if has_others else Urgency.GATHER
        if instances == 1:
            return (self.mesh.group("gradients", self.timeout, "data", background=background),)
        # Made here, since optimizer instances divide the ranks of a named group, and no other mode knows these parts.
        sets, size = self.mesh.sets("gradients"), self.mesh.size("gradients") // instances
        inner = [ranks[i : i + size] for ranks in sets for i in range(0, len(ranks), size)]
        outer = [ranks[i::size] for ranks in sets for i in range(size)]
        make = partial(make_group, timeout=self.timeout, background=background)
        return make(inner, "data"), make(outer, "data.instances")

    # -- set-up ------------------------------------------------------------------------------------------------------

    def refuse(self, model: nn.Module) -> None:
        for name, part in model.named_modules():
            if is_lookup(part) and part.max_norm is not None and part.weight.requires_grad:
                raise ConfigError(
                    f"{name} has max_norm, so forward writes the weight: each rank would rescale the rows of its own batch, and the "
                    "ranks' weights would differ. Leave max_norm out, and rescale all rows in on_train_batch_start: "
                    f"with torch.no_grad(): weight.renorm_({part.norm_type}, 0, {part.max_norm})"
                )

    def parallelize(self, model: nn.Module) -> None:
        self.buckets.build(self._trained.sort(model, self._sharers[0], self._experts, self.mesh.size("gradients")))
        for bucket in self.buckets.live:
            for parameter in bucket.parameters:
                trained = parameter.requires_grad
                parameter.requires_grad_()  # torch refuses a hook on a frozen parameter
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))
                parameter.requires_grad_(trained)
        if self.choices.is_sharded:
            self._modules.guard(model, self.buckets.homes)

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        self._trained.set_optimizers(optimizers)
        if self.choices.is_sharded and optimizers:
            (optimizer,) = optimizers
            self._optimizer = ShardedOptimizer(
                optimizer,
                self.buckets.live,
                self._gathers,
                whole_parameters=self.choices.distributed_optimizer.value == "whole parameters",
                by_bucket=self.choices.overlap_optimizer_step.value != "off",
                gather_at_once=self.choices.overlap_param_gather.value == "off",
                scattered=self._reductions.scatter,
            )

    def _follow_gradient_order(self, order: Sequence[int]) -> None:
        """Rebuilds the buckets by the order of the gradients, if they can then be reduced earlier. Collective."""
        # The ranks that share experts may be of several groups, so all ranks of the stage use one order.
        kinds = self.buckets.reordered(order, self._sharers if self._stage is None else (self._stage,))
        if kinds is None:
            return
        self.sync_parameters()
        old = list(self.buckets.live)
        self._gathers.forget_read_order()
        self.buckets.build(kinds)
        if self._optimizer is not None:
            self._optimizer.move(old)
        warnings.warn("rebuilt the gradient buckets once, in the order in which the first backward produced gradients", stacklevel=2)

    # -- step --------------------------------------------------------------------------------------------------------

    @contextmanager
    def trial(self) -> Iterator[None]:
        self._on_trial = True
        try:
            yield
        finally:
            self._on_trial = False

    def start_forward(self) -> None:
        if self._backward.order is not None and self._backward.has_run and not self._holds_gradients:
            order, self._backward.order = list(self._backward.order), None
            self._follow_gradient_order(order)
        if self.choices.overlap_param_gather.value != "under next forward":
            self.sync_parameters()

    def start_backward(self) -> None:
        if not self._on_trial:
            self._gathers.post_all()  # forward may have skipped modules, whose gathers are then not posted
            self._backward.start(held=self._holds_gradients)

    def _before_backward(self) -> None:
        self._trained.refuse_changes()
        for bucket in self.buckets.move_back(self._gathers.incomplete):
            if self._optimizer is not None:
                self._optimizer.adopt(bucket)
        self._gathers.follow_read_order()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._on_trial:
            self._backward.collect(parameter, held=self._holds_gradients)

    def _on_reduced(self, bucket: LiveBucket) -> None:
        bucket.phase = Phase.REDUCED if self.choices.is_sharded else Phase.IDLE
        if self.choices.overlap_optimizer_step.value == "in backward" and self._optimizer is not None:
            self._optimizer.update(bucket)

    def finish_backward(self) -> None:
        if not self._on_trial:
            self._backward.finish(held=self._holds_gradients)

    def _complete(self, parameter: nn.Parameter) -> None:
        """Waits for the gather of a parameter that is read."""
        home = self.buckets.homes.get(id(parameter))
        if home is None:
            return
        bucket = home.bucket
        if self._backward.is_open and bucket.phase is not Phase.COLLECTING and bucket.key in self._gathers.incomplete:
            # Backward would use a newer weight than forward, and peers may post this gather only after this backward.
            raise used_twice(bucket, parameter, "was read in backward after the optimizer had updated it")
        self._gathers.complete(bucket)

    def sync_parameters(self) -> None:
        self._gathers.finish_all()

    def reduce_norm(self, squares: Squares) -> Squares:
        if not self.choices.is_sharded:
            return squares
        dense = self._sharers[0].all_reduce(squares.dense, label="data.norm").wait()
        if self._experts is None:
            return squares._replace(dense=dense)
        return Squares(dense, self._experts.all_reduce(squares.experts, label="data.expert_norm").wait())

    # -- optimizer state ---------------------------------------------------------------------------------------------

    def _holds(self, optimizer: Optimizer) -> ShardedOptimizer | None:
        return self._optimizer if self._optimizer is not None and self._optimizer.owns(optimizer) else None

    def stepped_parameters(self, optimizer: Optimizer) -> list[nn.Parameter] | None:
        sharded = self._holds(optimizer)
        return None if sharded is None else sharded.parameters()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        sharded = self._holds(optimizer)
        return None if sharded is None else sharded.state()

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> bool:
        sharded = self._holds(optimizer)
        if sharded is not None:
            sharded.load(state_dict)
        return sharded is not None

    def optimizer_shards(
        self, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]] | None:
        sharded = self._holds(optimizer)
        return None if sharded is None else sharded.shards(saved)

    def adopt_parameters(self) -> None:
        if self._optimizer is not None:
            self._optimizer.adopt_parameters()

    # -- end ---------------------------------------------------------------------------------------------------------

    def release(self, *, complete: bool = True) -> None:
        if complete:
            self.sync_parameters()
        self._gathers.abandon()
        if self._optimizer is not None:
            self._optimizer.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._modules.free()
        unflatten(self.buckets.live)
        if complete:
            for group in self.groups:
                group.stop()
        self.buckets.homes.clear()
