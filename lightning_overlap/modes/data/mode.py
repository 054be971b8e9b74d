"""The data-parallel mode: gradients reduced under backward, parameters gathered under the next forward.

    forward   | block 1 | block 2 | ...          | head |
    gather     1 | 2 | 3 | ...           |                          waited for where a weight is read (guard.py)
    backward                                     | head | ... | block 2 | block 1 |
    reduce                                               | head | ... | block 2 | block 1 |
    update                                                      | head | ...    | 2 | 1 |

A bucket is reduced as soon as the last of its gradients is there, updated on the rank that owns a piece of it, and
gathered, in the order in which forward reads it.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.markers import has_late_gradient, is_counted_elsewhere, stage_of
from lightning_overlap.modes.base import OptimizerHolder, Setup
from lightning_overlap.modes.data.buffers import HALF, LiveBucket, Phase, flatten, unflatten
from lightning_overlap.modes.data.config import DataChoices, DataParallel
from lightning_overlap.modes.data.gathers import Gathers
from lightning_overlap.modes.data.guard import CompleteBefore, GuardedParameters, ReferenceGuard
from lightning_overlap.modes.data.layout import Bucket, lateness, lay_out
from lightning_overlap.modes.data.optimizer import ShardedOptimizer
from lightning_overlap.ranks.group import Group, Pending
from lightning_overlap.ranks.world import make_group
from lightning_overlap.torch_seams import after_backward, parameters_of, set_parameters

WORTH_IT = 0.1
"""Buckets are laid out again if they can then be sent, on average, so much of a backward earlier."""


class DataMode(OptimizerHolder):
    """See the module's docstring."""

    name = "data"
    nesting = Nesting.PARAMETERS
    config: DataParallel
    choices: DataChoices

    def __init__(self, config: DataParallel, choices: DataChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self._buckets: list[LiveBucket] = []
        self._home: dict[int, tuple[LiveBucket, Tensor]] = {}  # id of a parameter -> its bucket and its gradient's view
        self._reducing: deque[tuple[LiveBucket, Pending]] = deque()
        self._crossing: deque[tuple[LiveBucket, Pending]] = deque()
        self._not_finite: list[str] = []  # what this rank has found in this backward
        self._frozen: list[tuple[str, nn.Parameter]] = []
        self._sparse: list[tuple[str, nn.Parameter]] = []  # whose gradients stay sparse, for an optimizer that steps whole parameters
        self._lengths: dict[Optimizer, list[int]] = {}
        self._optimizer: ShardedOptimizer | None = None
        self._hooks: list[Any] = []
        self._guarded: list[nn.Module] = []
        self._kinds: list[list[tuple[str, nn.Parameter]]] = []  # parameters that can share a buffer
        self._fired: dict[int, None] | None = {}  # ids of parameters in the order of their first gradients
        self._announced = self._backward_open = False
        self._said_unused = self._seen_backward = self._on_trial = False
        self._sharded = choices.is_sharded
        self._whole = choices.distributed_optimizer.value == "whole parameters"
        self._scatter = choices.gradients.value == "reduce-scatter"
        self._in_backward = choices.overlap_grad_reduce.value
        self._gathering = choices.overlap_param_gather.value
        self._step_in_backward = choices.overlap_optimizer_step.value == "in backward"
        self._step_by_bucket = choices.overlap_optimizer_step.value != "off"
        self._wire = torch.bfloat16 if config.reduce_scatter_with_fp32_accumulation else None
        self._make_groups(config.num_optimizer_instances)
        prefetch = None if config.param_gather_prefetch == "all" else int(config.param_gather_prefetch)
        # Ranks see at different times that something has arrived. Where they must post in one order, nothing is posted for that.
        aligned = choices.align_param_gather.value or (self.group.in_one_order and prefetch is None)
        self._gathers = Gathers(self._buckets, prefetch, aligned=aligned, guard=ReferenceGuard(self._complete))
        # Ranks may see gradients in different orders. What is matched by the order of posting is posted by bucket number.
        self._any_order = self.group.keyed and self._scatter and self._instances is None

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.group,) if self._instances is None else (self.group, self._instances)

    def _make_groups(self, instances: int) -> None:
        self._instances: Group | None = None
        if instances == 1:
            self.group = self.mesh.group("gradients", self.timeout, "data")
            return
        sets, size = self.mesh.sets("gradients"), self.mesh.size("gradients") // instances
        inner = [ranks[i : i + size] for ranks in sets for i in range(0, len(ranks), size)]
        outer = [ranks[i::size] for ranks in sets for i in range(size)]
        self.group = make_group(inner, "data", self.timeout)
        self._instances = make_group(outer, "data.instances", self.timeout)

    # -- set-up ------------------------------------------------------------------------------------------------------

    def parallelize(self, model: nn.Module) -> None:
        # What another mode completes after backward is sent after all else, a stage does not wait for another one's backward, and a
        # shard is counted in the norm as a whole.
        kinds: dict[tuple[bool, int, bool, str, str], list[tuple[str, nn.Parameter]]] = {}
        sparse = {id(part.weight) for part in model.modules() if _is_lookup(part) and part.sparse} if not self._sharded else set()
        for name, parameter in model.named_parameters():
            if id(parameter) in sparse and not has_late_gradient(parameter):
                self._sparse.append((name, parameter))
            elif parameter.requires_grad or self.choices.later_parameters:
                late, elsewhere = has_late_gradient(parameter), is_counted_elsewhere(parameter)
                kind = late, -stage_of(parameter), elsewhere, str(parameter.dtype), str(parameter.device)
                kinds.setdefault(kind, []).append((name, parameter))
            else:
                self._frozen.append((name, parameter))
        self._kinds = [kinds[kind] for kind in sorted(kinds, key=lambda kind: kind[:2])]
        self._build()
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                trained = parameter.requires_grad
                parameter.requires_grad_()  # torch takes no hook on one that is frozen yet
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._on_gradient))
                parameter.requires_grad_(trained)
        if self._sharded:
            self._guard(model)

    def refuse(self, model: nn.Module) -> None:
        for name, part in model.named_modules():
            if _is_lookup(part) and part.max_norm is not None and part.weight.requires_grad:
                raise ConfigError(
                    f"{name} has max_norm, with which forward writes the weight: each rank would write the rows of its own batch, and "
                    "ranks would hold other weights. Leave max_norm out, and scale all rows in on_train_batch_start: "
                    f"with torch.no_grad(): weight.renorm_({part.norm_type}, 0, {part.max_norm})"
                )

    def _lay_out(self, named: Sequence[tuple[str, nn.Parameter]]) -> tuple[Bucket, ...]:
        return lay_out(
            [p.numel() for _, p in named],
            bucket_size=self.choices.bucket_size.value,
            shards=self.group.size,
            sharded=self._sharded,
            high_busbw=self.config.pad_buckets_for_high_nccl_busbw,
        )

    def _build(self) -> None:
        """Buckets for the parameters, each kind in the order of its list, from the last to the first."""
        fp32 = self._sharded and self.config.grad_reduce_dtype == "fp32"
        for named in self._kinds:
            dtype = named[0][1].dtype
            self._buckets += flatten(
                named,
                self._lay_out(named),
                # Without a distributed optimizer the gradients are the user's, in the parameters' dtype.
                grad_dtype=torch.float32 if fp32 and dtype in HALF else dtype,
                group=self.group,
                divisor=self.mesh.size("gradients"),
                whole=self._whole,
                first_key=len(self._buckets),
            )
        for place, bucket in enumerate(sorted(self._buckets, key=lambda bucket: (stage_of(bucket.parameters[0]), bucket.order))):
            bucket.order = place
        for bucket in self._buckets:
            for parameter, view in zip(bucket.parameters, bucket.views(bucket.grads), strict=True):
                self._home[id(parameter)] = (bucket, view)
                parameter.grad_dtype = view.dtype  # autograd sums in it, and hooks read gradients in it

    def _follow_the_order_seen(self, fired: Sequence[int]) -> None:
        """Where the first backward's order scatters the buckets badly, they are laid out by it, once.

        The first rank's order counts for all. Weights, gradients and the optimizer's state move along.
        """
        place = {parameter: i for i, parameter in enumerate(fired)}
        orders = [sorted(range(len(named)), key=lambda i: place.get(id(named[i][1]), len(place))) for named in self._kinds]
        for group in reversed(self.groups):
            orders = group.share_object(orders)
        kinds = [[named[i] for i in reversed(order)] for named, order in zip(self._kinds, orders, strict=True)]
        gains = [
            self._lateness(named, order) - self._lateness(kind, range(len(kind) - 1, -1, -1))
            for named, order, kind in zip(self._kinds, orders, kinds, strict=True)
        ]
        if max(gains, default=0.0) < WORTH_IT:
            return
        self.sync_parameters()
        old, grads = list(self._buckets), [(p, p.grad) for b in self._buckets for p in b.parameters if p.grad is not None]
        self._kinds, self._home = kinds, {}
        self._buckets.clear()
        self._gathers.forget_order_seen()
        self._build()
        if self._optimizer is not None:
            self._optimizer.move(old)
        for parameter, grad in grads:
            view = self._home[id(parameter)][1]
            parameter.grad = view.copy_(grad)
        warnings.warn("buckets are laid out again, by the order of the gradients that was seen (said once)", stacklevel=2)

    def _lateness(self, named: Sequence[tuple[str, nn.Parameter]], order: Sequence[int]) -> float:
        return lateness(self._lay_out(named), [p.numel() for _, p in named], order)

    def _guard(self, model: nn.Module) -> None:
        for module in model.modules():
            own = [p for p in parameters_of(module).values() if p is not None and id(p) in self._home]
            if own:
                guarded = GuardedParameters(parameters_of(module), self._gathers.incomplete, self._complete)
                set_parameters(module, guarded)
                self._guarded.append(module)
                if isinstance(module, nn.RNNBase):  # reads its weights from a list of its own, past the guard
                    self._hooks.append(module.register_forward_pre_hook(CompleteBefore(guarded)))

    def prepare_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        everything = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        known = {*self._home, *(id(p) for _, p in self._sparse)}
        strange = [p for p in everything if p.requires_grad and id(p) not in known]
        if strange:
            raise ConfigError(
                f"{len(strange)} parameters of the optimizer are not parameters of the module at setup. Create parameters in "
                "__init__ or configure_model, and give the optimizer only those of self.parameters()."
            )
        self._lengths = {optimizer: _lengths(optimizer) for optimizer in optimizers}
        if self._sharded and optimizers:
            (optimizer,) = optimizers
            self._optimizer = ShardedOptimizer(
                optimizer,
                self._buckets,
                self._gathers,
                whole=self._whole,
                by_bucket=self._step_by_bucket,
                gather_at_once=self._gathering == "off",
                reduced_in_pieces=self._scatter,
            )

    # -- backward ----------------------------------------------------------------------------------------------------

    def start_forward(self) -> None:
        if self._fired is not None and not self._held and self._seen_backward:
            fired, self._fired = self._fired, None
            self._follow_the_order_seen(list(fired))
        if self._gathering != "under next forward":
            self.sync_parameters()

    @contextmanager
    def trial(self) -> Iterator[None]:
        self._on_trial = True
        try:
            yield
        finally:
            self._on_trial = False

    def start_backward(self) -> None:
        if self._on_trial:
            return
        self._announced = True
        self._gathers.post_all()  # a forward that left out modules may have left some unposted
        if not self._held:
            self._open_backward()

    def _open_backward(self) -> None:
        self._refuse_changes()
        self._bring_back()
        self._backward_open = True
        self.group.start_step()
        for bucket in self._buckets:
            collects = self._sharded or any(p.requires_grad for p in bucket.parameters)
            bucket.phase = Phase.COLLECTING if collects else Phase.IDLE
            bucket.missing = {id(p) for p in bucket.parameters} if collects else set()
        self._gathers.follow_order_seen()

    def _refuse_changes(self) -> None:
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            raise ConfigError(
                f"{thawed[0]} ({len(thawed)} in all) was frozen at setup and is trained now, and is in no bucket. Freeze and unfreeze "
                "between fits; or leave it trainable and give its group a learning rate of 0 until then."
            )
        if not self._sharded:
            known = {*self._home, *(id(p) for _, p in self._sparse)}
            if all(id(p) in known for o in self._lengths for group in o.param_groups for p in group["params"]):
                return
        if any(_lengths(optimizer) != lengths for optimizer, lengths in self._lengths.items()):
            raise ConfigError(
                "the optimizer's parameter groups have changed since setup, and what came in has no shard of the optimizer's "
                "state. Give the optimizer all parameters in configure_optimizers."
            )

    def _bring_back(self) -> None:
        """Weights that the user has put elsewhere (``p.data = ...``) come back into their bucket."""
        for bucket in self._buckets:
            for index, (parameter, place) in enumerate(zip(bucket.parameters, bucket.places, strict=True)):
                # Whoever puts an incomplete one elsewhere completes it by that.
                if bucket.key not in self._gathers.incomplete and parameter.data_ptr() != place:
                    view = bucket.views(bucket.data)[index]
                    view.copy_(parameter.data)
                    parameter.data = view
                    if self._optimizer is not None:
                        self._optimizer.adopt(bucket)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if self._on_trial:
            return
        if self._sharded and not self._announced:
            return  # a backward of the user's own, in validation say: its gradients are no training step's
        bucket, view = self._home[id(parameter)]
        grad = parameter.grad
        assert grad is not None, "the hook runs after the gradient is accumulated"
        if not self._held and not self._backward_open:
            self._open_backward()  # loss.backward() without Lightning
            after_backward(self.finish_backward)
        if self._fired is not None:
            self._fired.setdefault(id(parameter))
        if bucket.phase is not Phase.COLLECTING and not self._held:
            raise self._used_twice(bucket, parameter)
        if grad is not view:
            view.copy_(grad.to_dense() if grad.is_sparse else grad)
            parameter.grad = view
        if self._held:
            return
        if not has_late_gradient(parameter):
            bucket.missing.discard(id(parameter))
        if self._in_backward:
            for ready in [bucket] if self._any_order else self._buckets:
                if ready.missing:
                    break
                if ready.phase is Phase.COLLECTING:
                    self._launch(ready)
            self._progress(block=False)

    @staticmethod
    def _used_twice(bucket: LiveBucket, parameter: nn.Parameter) -> ConfigError:
        name = bucket.names[next(i for i, p in enumerate(bucket.parameters) if p is parameter)]
        return ConfigError(
            f"{name} was used again in one backward after its gradient had been sent. Reentrant activation checkpoints do "
            "this to shared parameters: pass use_reentrant=False, or set data_parallel.overlap_grad_reduce: false."
        )

    def _launch(self, bucket: LiveBucket) -> None:
        bucket.phase = Phase.REDUCING
        if self.config.check_for_nan_in_grad:
            self._check_finite(bucket)
        label = f"data.grads{bucket.label}"
        divisor: float | None = None
        if self.config.average_in_collective:
            divisor = bucket.divisor if self._instances is None else bucket.divisor / self._instances.size
        else:
            bucket.grads.div_(bucket.divisor)
        if self._scatter:
            pending = bucket.group.reduce_scatter(
                bucket.grads, bucket.bounds, key=bucket.key, label=label, divisor=divisor, wire=self._wire
            )
        else:
            pending = bucket.group.all_reduce(bucket.grads, label=label, divisor=divisor)
        self._reducing.append((bucket, pending))

    def _check_finite(self, bucket: LiveBucket) -> None:
        for name, view in zip(bucket.names, bucket.views(bucket.grads), strict=True):
            if not torch.isfinite(view).all():
                rank = self.group.ranks[self.group.rank]
                self._not_finite.append(f"rank {rank}: the gradient of {name} (bucket {bucket.key}) is not finite")

    def _refuse_not_finite(self) -> None:
        """Has every rank know of what one has found; nothing has been updated yet."""
        found = torch.tensor(float(len(self._not_finite)), device=self._buckets[0].grads.device)
        for group in self.groups:
            found = group.all_reduce(found, label="data.not_finite").wait()
        if found.item():
            said, self._not_finite = self._not_finite, []
            for group in self.groups:
                said = [sentence for others in group.all_gather_objects(said) for sentence in others]
            raise FloatingPointError("\n".join(said))

    def _progress(self, *, block: bool) -> None:
        """Takes in what has arrived, in the order of posting; all of it if ``block``."""
        if not block and self._instances is not None and self.group.in_one_order:
            return
        while self._reducing and (block or self._reducing[0][1].arrived()):
            bucket, pending = self._reducing.popleft()
            reduced = pending.wait()
            if self._instances is None:
                self._reduced(bucket)
            else:
                across = self._instances.all_reduce(
                    reduced,
                    label=f"data.grads{bucket.label}.instances",
                    divisor=self._instances.size if self.config.average_in_collective else None,
                )
                self._crossing.append((bucket, across))
        while self._crossing and (block or self._crossing[0][1].arrived()):
            bucket, pending = self._crossing.popleft()
            pending.wait()
            self._reduced(bucket)

    def _reduced(self, bucket: LiveBucket) -> None:
        bucket.phase = Phase.REDUCED if self._sharded else Phase.IDLE
        if self._step_in_backward and self._optimizer is not None:
            self._optimizer.update(bucket)

    def finish_backward(self) -> None:
        if self._on_trial:
            return
        self._announced = False
        if self._held or not self._backward_open:
            return
        self._backward_open, self._seen_backward = False, True
        unused = []
        for bucket in self._buckets:
            if bucket.phase is not Phase.COLLECTING:
                continue
            for name, parameter, view in zip(bucket.names, bucket.parameters, bucket.views(bucket.grads), strict=True):
                if parameter.grad is None:
                    view.zero_()
                    if parameter.requires_grad:
                        parameter.grad = view
                        unused.append(name)
                elif parameter.grad is not view:  # of a backward of the user's own
                    parameter.grad = view.copy_(parameter.grad)
            self._launch(bucket)
            self._progress(block=False)
        self._progress(block=True)
        self._reduce_sparse()
        if self.config.check_for_nan_in_grad:
            self._refuse_not_finite()
        if unused and not self._said_unused:
            self._said_unused = True
            warnings.warn(
                f"{len(unused)} parameters had no gradient on this rank and count as zero (said once): {', '.join(unused[:8])}",
                stacklevel=2,
            )
        if self._scatter:
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.grad = None  # partly reduced: nobody may take it for the gradient

    def _reduce_sparse(self) -> None:
        """As in DDP: the ranks' rows together, in the order of the parameters, after the rest."""
        for name, parameter in self._sparse:
            if parameter.requires_grad:
                empty = torch.zeros_like(parameter, layout=torch.sparse_coo)
                grad = empty if parameter.grad is None else parameter.grad
                grad = grad.coalesce() if grad.is_sparse else grad  # dense, where it is a head's weight, too
                for group in self.groups:
                    dense = grad.is_sparse and not group.sums_sparse
                    summed = grad.to_dense() if dense else grad
                    summed = group.all_reduce(summed, label=f"data.sparse[{name}]", divisor=group.size).wait()
                    grad = summed.to_sparse(1) if dense else summed
                parameter.grad = grad

    # -- parameters --------------------------------------------------------------------------------------------------

    def _complete(self, parameter: nn.Parameter) -> None:
        bucket, _ = self._home.get(id(parameter), (None, None))
        if bucket is None:
            return
        if self._backward_open and bucket.phase is not Phase.COLLECTING and bucket.key in self._gathers.incomplete:
            # Updated in this backward: it would be the wrong weight, and peers may send it only after this backward.
            raise self._used_twice(bucket, parameter)
        self._gathers.complete(bucket)

    def sync_parameters(self) -> None:
        self._gathers.finish_all()

    # -- what is shared with the rest --------------------------------------------------------------------------------

    def reduce_norm(self, sum_of_squares: Tensor) -> Tensor:
        if not self._sharded:
            return sum_of_squares
        return self.group.all_reduce(sum_of_squares, label="data.norm").wait()

    def _holds(self, optimizer: Optimizer) -> ShardedOptimizer | None:
        return self._optimizer if self._optimizer is not None and self._optimizer.owns(optimizer) else None

    def stepped_parameters(self, optimizer: Optimizer) -> list[nn.Parameter] | None:
        held = self._holds(optimizer)
        return None if held is None else held.parameters()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        held = self._holds(optimizer)
        return None if held is None else held.state()

    def load_optimizer_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> bool:
        held = self._holds(optimizer)
        if held is not None:
            held.load(state_dict)
        return held is not None

    def optimizer_shards(
        self, optimizer: Optimizer, saved: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, dict[str, Any]] | None:
        held = self._holds(optimizer)
        return None if held is None else held.shards(saved)

    def adopt_parameters(self) -> None:
        if self._optimizer is not None:
            self._optimizer.adopt_parameters()

    def release(self, *, complete: bool = True) -> None:
        if complete:
            self.sync_parameters()
        self._gathers.abandon()
        if self._optimizer is not None:
            self._optimizer.release()
        for hook in self._hooks:
            hook.remove()
        for module in self._guarded:
            set_parameters(module, dict(parameters_of(module)))
        unflatten(self._buckets)
        if complete:
            for group in self.groups:
                group.stop()
        self._guarded, self._hooks, self._home = [], [], {}


def _is_lookup(part: nn.Module) -> bool:
    return isinstance(part, nn.Embedding | nn.EmbeddingBag)


def _lengths(optimizer: Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]
