"""The expert mode: a rank holds some of the experts of each layer, and the ranks send each other the tokens of their experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn

from lightning_overlap.decision import ConfigError
from lightning_overlap.model.boundary import Nesting
from lightning_overlap.model.expert_layers import ExpertLayer, find_experts
from lightning_overlap.model.markers import EXPERT
from lightning_overlap.model.patches import replace_method
from lightning_overlap.modes.base import Setup, Squares
from lightning_overlap.modes.expert import deep_ep
from lightning_overlap.modes.expert.balance import RankBalance, find_routers
from lightning_overlap.modes.expert.common_tokens import gather_parts, take_part
from lightning_overlap.modes.expert.config import ExpertChoices, ExpertFacts, ExpertParallel
from lightning_overlap.modes.expert.deep_ep import Buffers
from lightning_overlap.modes.expert.dispatch import Dispatch, ExpertDispatch
from lightning_overlap.modes.expert.flex import FlexDispatch
from lightning_overlap.modes.expert.gather import GatherDispatch
from lightning_overlap.modes.expert.grouped import LocalExperts
from lightning_overlap.modes.expert.layout import Layout
from lightning_overlap.modes.expert.replay import RoutingReplay
from lightning_overlap.modes.expert.shared import Order, SharedExperts, order_of_calls
from lightning_overlap.modes.piece_holder import PieceHolder
from lightning_overlap.nn.moe import MoELayer
from lightning_overlap.ranks.group import Group
from lightning_overlap.state.pieces import Partition, Piece


class ExpertMode(PieceHolder):
    """See the module's docstring.

    The gradient of an expert is the sum over the tokens that all ranks have sent to it. The data mode sums it over the ranks with the
    same experts, and divides it by the number of ranks that average gradients, like all others. In a trial, and where there is no data
    mode, since all ranks of a stage are tensor ranks, this mode does it.
    """

    name = "expert"
    nesting = Nesting.EXPERTS
    holders = "experts"
    replicas = "expert_gradients"
    keeps_bits = False
    overlap_keeps_bits = True
    announcements = ("expert.counts", "expert.indices")

    config: ExpertParallel
    choices: ExpertChoices

    def __init__(self, config: ExpertParallel, choices: ExpertChoices, setup: Setup) -> None:
        super().__init__(config, choices, setup)
        self.group: Group = self.mesh.group("experts", self.timeout, "expert")
        self._tensor = self.mesh.group("tensor", self.timeout, "expert") if self.mesh.size("tensor") > 1 else None
        for group in filter(None, (self.group, self._tensor)):
            group.before_wait = setup.lanes.hand_over
        self._same = self.mesh.group("expert_gradients", self.timeout)
        self._samples = self.mesh.group("samples", self.timeout)
        self._buffers = Buffers(deep_ep.library(), self.group) if choices.dispatcher.value == "flex" else None
        self._undo: list[Callable[[], object]] = []
        self._in_trial = False
        self._balance: RankBalance | None = None
        self._replay: RoutingReplay | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        groups = [self.group, self._same, self._samples, *(self._balance.groups if self._balance is not None else ())]
        return tuple(groups if self._tensor is None else [*groups, self._tensor])

    @property
    def forward_spans_samples(self) -> bool:
        return self.mesh.degrees.experts_span_samples or (self._balance is not None and self._balance.spans_samples)

    @property
    def uncounted_transfers(self) -> str:
        if self.choices.dispatcher.value != "flex":
            return ""
        return (
            "expert_parallel.dispatcher flex sends by kernels of DeepEP, of which only the host's waits are seen; with dispatcher: "
            "alltoall, all transfers are seen"
        )

    # -- set-up ------------------------------------------------------------------------------------------------------

    def refuse(self, model: nn.Module) -> None:
        _, layers = _find_layers(model, self.config, self.setup.roles)
        find_routers(model, layers, self.config.update_bias_rate)
        norms = [layer.name for layer in layers if getattr(layer.module, "has_post_expert_norm", False)]
        if norms and self._tensor is not None:
            raise ConfigError(
                f"expert_parallel.size={self.group.size} with tensor_parallel: {norms[0]} has a norm that all experts share, whose "
                "gradient would not be summed over the tensor ranks; set tensor_parallel: 1"
            )

    def parallelize(self, model: nn.Module) -> None:
        _, layers = _find_layers(model, self.config, self.setup.roles)
        routers = find_routers(model, layers, self.config.update_bias_rate)
        self._balance = RankBalance(self.setup, model, routers if self.choices.balance.value else ())
        if self.group.size == 1:
            layers, routers = (), []
        self._names = [f"{layer.name}.{name}" for layer in layers for name in layer.parameters]
        self.partition = Partition(model, _pieces_of(layers), self.group, "expert.whole")
        orders = {layer.name: order_of_calls(model, layer) for layer in layers}
        self.partition.shard()
        self._replay = RoutingReplay(self.setup.boundary.forwards, [router.module for router in routers])
        self._install = partial(self._patch, model, layers, orders)
        self._install()

    def _patch(self, model: nn.Module, layers: Sequence[ExpertLayer], orders: Mapping[str, Order]) -> None:
        """Makes the model compute with this rank's experts, until :meth:`_uninstall`."""
        if self._balance is not None:
            self._undo += self._balance.install()
        for parameter in self.partition.parameters.values():
            setattr(parameter, EXPERT, True)
            self._undo.append(partial(vars(parameter).pop, EXPERT, None))
        for part in model.modules() if layers else ():
            if hasattr(part, "ep_plan") and callable(generate := getattr(part, "generate", None)):
                # Ranks with other samples write texts of other lengths: with this, transformers calls the model until all have ended.
                self._undo.append(replace_method(part, "generate", partial(generate, synced_gpus=True)))
        for layer in layers:
            dispatch = partial(self._dispatch, layer, self._make_dispatch(layer), LocalExperts(layer.module))
            order, forwards = orders[layer.name], self.setup.boundary.forwards
            if order.obstacle:
                self._undo.append(replace_method(layer.module, "forward", partial(dispatch, shared=None)))
            else:
                overlapped = self.choices.overlap_shared_experts.value
                self._undo += SharedExperts(model, layer, order, dispatch, forwards, overlapped=overlapped).install()

    def _make_dispatch(self, layer: ExpertLayer) -> Dispatch:
        split, parts = self.choices.split.value, self.choices.parts.value
        assert split != "auto", "the model is known"
        assert parts != "auto", "the model is known"
        make: Callable[..., Dispatch] = ExpertDispatch if self.choices.dispatcher.value == "alltoall" else GatherDispatch
        if self._buffers is not None:
            make = partial(FlexDispatch, buffers=self._buffers)
        return make(
            self.group,
            Layout(layer.count, self.group.size, split, parts),
            overlap=self.choices.overlap_dispatch.value,
            delay_wgrad=self.choices.delay_wgrad.value,
        )

    def _dispatch(
        self,
        layer: ExpertLayer,
        dispatch: Dispatch,
        experts: LocalExperts,
        hidden: Tensor,
        indices: Tensor,
        weights: Tensor,
        shared: Callable[[], None] | None,
    ) -> Tensor:
        """The forward of the experts' module: for the arguments see :class:`Dispatch`. Collective."""
        if hidden.dim() != 2 or indices.shape != weights.shape or len(indices) != len(hidden):
            raise ConfigError(
                f"{layer.name} is called with hidden states, indices and weights of the shapes {tuple(hidden.shape)}, "
                f"{tuple(indices.shape)} and {tuple(weights.shape)}; expert_parallel needs (T, H), (T, k) and (T, k)"
            )
        if self._tensor is None or self.setup.boundary.is_cut(Nesting.LAYERS):
            return dispatch(hidden, indices, weights, experts, shared)
        tokens = len(hidden)
        hidden, indices, weights = (take_part(x, self._tensor) for x in (hidden, indices, weights))
        return gather_parts(dispatch(hidden, indices, weights, experts, shared), tokens, self._tensor)

    def _uninstall(self) -> None:
        """Makes the model compute as the user wrote it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    # -- training ----------------------------------------------------------------------------------------------------

    @contextmanager
    def trial(self) -> Iterator[None]:
        counts = self._balance.counts if self._balance is not None else None
        self._in_trial = True
        try:
            with counts.trial() if counts is not None else nullcontext():
                yield
        finally:
            self._in_trial = False

    def start_forward(self) -> None:
        self.sync_parameters()
        self.setup.boundary.start_forward()

    def start_backward(self) -> None:
        self.setup.boundary.start_backward()

    def measurements(self) -> dict[str, float]:
        """How the tokens of each layer are spread over experts and ranks."""
        counts = self._balance.counts if self._balance is not None else None
        return counts.loads(self.group.size) if counts is not None and self.config.log_expert_load else {}

    def sync_parameters(self) -> None:
        """Completes the routers' biases."""
        if self._balance is not None and self._balance.counts is not None:
            self._balance.counts.apply()

    def finish_backward(self) -> None:
        self.setup.boundary.finish_backward()
        if self._holds_gradients:
            return
        if not self._in_trial and self._balance is not None and self._balance.counts is not None:
            self._balance.counts.post()
        if self._in_trial or self.mesh.size("gradients") == 1:
            self._sum_gradients()

    def _sum_gradients(self) -> None:
        """Sums the gradients of experts over the ranks with the same experts. Collective."""
        for parameter in self.partition.parameters.values():
            if parameter.grad is not None:
                self._same.sum(parameter.grad).div_(self.mesh.size("context"))

    def local_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An expert's gradient in a trial has the tokens of all samples of the ranks, so it is compared with the sum over these."""
        total = dict(gradients)
        for name in self._names:
            if name in total:
                total[name] = self._samples.sum(total[name].clone())
        return {name: self.local_part(name, gradient) for name, gradient in total.items()}

    def reduce_norm(self, squares: Squares) -> Squares:
        return squares._replace(experts=self.group.all_reduce(squares.experts, label="expert.norm").wait())

    def release(self, *, complete: bool = True) -> None:
        if self._replay is None:
            return
        self._uninstall()
        self._replay.remove()
        self._replay = None
        if self._balance is not None:
            self._balance.release(complete=complete)
        self.partition.restore(complete=complete)
        if complete and self._buffers is not None:
            self._buffers.close()
        if complete:
            for group in self.groups:
                group.stop()


def _pieces_of(layers: Sequence[ExpertLayer]) -> dict[nn.Parameter, Piece]:
    """How the parameters are sharded: each rank has the entries of its experts."""
    return {p: Piece(p.shape, 0, (layer.count,)) for layer in layers for p in layer.spread_parameters}


def _find_layers(model: nn.Module, config: ExpertParallel, roles: Mapping[str, str]) -> tuple[str, Sequence[ExpertLayer]]:
    """Finds the layers as :func:`find_experts` does, if something is to be done with them: routers of ``nn`` are known without it."""
    if config.size == 1 and not config.update_bias_rate and not config.log_expert_load:
        return "", ()
    return find_experts(model, roles, config.size)


def look(model: nn.Module, config: ExpertParallel, roles: Mapping[str, str]) -> ExpertFacts | None:
    """See :class:`lightning_overlap.modes.descriptor.Look`."""
    own = [module for module in model.modules() if isinstance(module, MoELayer)]
    source, layers = _find_layers(model, config, roles)
    if not own and not layers:
        return None
    counts = sorted({layer.count for layer in layers})
    orders = [order_of_calls(model, layer) for layer in layers]
    obstacle = next((order.obstacle for order in orders if order.obstacle), "") if all(o.obstacle for o in orders) else ""
    plural = "layers" if len(layers) > 1 else "layer"
    return ExpertFacts(
        f"{source}: {len(layers)} {plural} of {' or '.join(map(str, counts))} experts",
        min(counts, default=0),
        obstacle,
        has_biases=any(layer.router.update_bias_rate for layer in own),
        has_losses=any(layer.has_loss for layer in own),
        counts=tuple(counts),
    )
