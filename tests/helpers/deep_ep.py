"""DeepEP as far as it is known: a stand-in with its signatures, which computes on the CPU what its documentation says."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_overlap.modes.expert.deep_ep import Library

SIGNATURES = {
    version: {
        name: inspect.Signature([inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for p in parameters])
        for name, parameters in methods.items()
    }
    for version, methods in json.loads((Path(__file__).parents[1] / "golden" / "deep_ep.json").read_text())["signatures"].items()
}
"""By version and method, its parameters."""
Pair = tuple[int, int, int]
"""A row: rank and token that it is of, and the number of the choice."""


def gather(group: Any, value: Any) -> list[Any]:
    """The values of all ranks: those of threads, or of a process group."""
    if hasattr(group, "gather_values"):
        return list(group.gather_values(value))
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group)
    return values


@dataclass
class Handle:
    """Of a dispatch.

    Attributes:
        num_experts: as given.
        topk_idx: as given.
        num_recv_tokens_per_expert_list: rows of each expert of this rank.
        pairs: the rows, in their order.
    """

    num_experts: int
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    pairs: list[Pair]


class EventOverlap:
    """Of a transfer. Its results are NaN before the wait."""

    def __init__(self, results: list[tuple[Tensor, Tensor]], note: Callable[[], None]) -> None:
        self._results, self._note = results, note

    def current_stream_wait(self) -> None:
        self._note()
        for empty, value in self._results:
            empty.copy_(value)


class StandIn:
    """DeepEP on one rank.

    Attributes:
        library: what the adapter sees of it.
        calls: names of what was called, with ``after`` if it does not wait for what was queued before it; and ``wait``.
        buffers: that were made and not destroyed.
    """

    def __init__(self, *dtypes: torch.dtype) -> None:
        self.library = Library(lambda *args, **kwargs: ElasticBuffer(self, *args, **kwargs), torch.int64, dtypes)
        self.calls: list[str] = []
        self.buffers: list[ElasticBuffer] = []

    def bind(self, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name, which both versions have."""
        bound = [methods[name].bind(*args, **kwargs) for methods in SIGNATURES.values()]
        for each in bound:
            each.apply_defaults()
        return {**bound[0].arguments}


class ElasticBuffer:
    """Sends tokens to experts."""

    def __init__(self, stand_in: StandIn, *args: Any, **kwargs: Any) -> None:
        given = stand_in.bind("__init__", args, kwargs)
        assert given["explicitly_destroy"], "released by the destructor, in any order"
        assert given["deterministic"]
        self.group, self.most, self.hidden = given["group"], given["num_max_tokens_per_rank"], given["hidden"]
        assert len(set(self._same("buffer", (self.most, self.hidden, given["num_topk"])))) == 1, "all ranks hold the same value"
        self._stand_in = stand_in
        stand_in.buffers.append(self)

    def destroy(self) -> None:
        self._stand_in.buffers.remove(self)
        self._same("destroy", None)

    def capture(self) -> str:
        self._stand_in.calls.append("capture")
        return "event"

    def dispatch(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None, Tensor | None, Handle, EventOverlap]:
        given = self._start("dispatch", args, kwargs)
        x, handle, weights = given["x"], given["handle"], given["topk_weights"]
        assert given["do_expand"]
        assert given["num_experts"], "it chooses its multiprocessors by it, also with a handle"
        indices = given["topk_idx"] if handle is None else handle.topk_idx
        assert len(x) == len(indices)
        assert 1 <= len(x) <= self.most
        if handle is None:
            assert indices.dtype == torch.int64
            assert weights.dtype == torch.float32
            assert indices.is_contiguous()
            assert weights.is_contiguous()
            assert indices.min() >= -1
            assert indices.max() < given["num_experts"]
            handle = self._handle(indices, given["num_experts"])
        else:
            assert given["topk_idx"] is None
            assert given["topk_weights"] is None, "not needed in a backward"
        everyone = self._same("dispatch", (x, weights))
        rows = [everyone[rank][0][token] for rank, token, _ in handle.pairs]
        results = [(x.new_full((len(rows), x.shape[1]), torch.nan), torch.stack([*rows, x[0]])[:-1])]
        if weights is not None:
            of_rows = [everyone[rank][1][token, choice] for rank, token, choice in handle.pairs]
            results.append((weights.new_full((len(rows),), torch.nan), torch.stack([*of_rows, weights[0, 0]])[:-1]))
        return results[0][0], None, results[1][0] if weights is not None else None, handle, self._event(results)

    def combine(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, EventOverlap]:
        given = self._start("combine", args, kwargs)
        x, handle, weights = given["x"], given["handle"], given["topk_weights"]
        assert len(x) == len(handle.pairs)
        assert weights is None or (weights.shape == (len(x),) and weights.dtype == torch.float32 and weights.is_contiguous())
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(len(handle.topk_idx), x.shape[1], dtype=wide)
        of_weights = torch.zeros(handle.topk_idx.shape)
        for pairs, rows, values in self._same("combine", (handle.pairs, x, weights)):  # each rank's sum is rounded, then theirs
            part = torch.zeros_like(total)
            for number, (rank, token, choice) in enumerate(pairs):
                if rank == self.group.rank():
                    part[token] += rows[number].to(wide)
                    if weights is not None:
                        of_weights[token, choice] = values[number]
            total += part.to(x.dtype)
        results = [(torch.full_like(total, torch.nan, dtype=x.dtype), total), (torch.full_like(of_weights, torch.nan), of_weights)]
        return results[0][0], results[1][0] if weights is not None else None, self._event(results)

    def _start(self, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        assert self in self._stand_in.buffers, "not destroyed"
        given = self._stand_in.bind(name, args, kwargs)
        self._stand_in.calls.append(name if given["previous_event"] is None else f"{name} after")
        assert given["async_with_compute_stream"]
        assert given["previous_event"] is None or given["allocate_on_comm_stream"], "as DeepEP asserts"
        assert given["x"].is_contiguous()
        assert given["x"].shape[1] == self.hidden
        return given

    def _handle(self, indices: Tensor, experts: int) -> Handle:
        size, rank = self.group.size(), self.group.rank()
        assert experts % size == 0
        everyone = self._same("indices", indices)
        counts, pairs = [], []
        for expert in range(experts // size * rank, experts // size * (rank + 1)):
            before = len(pairs)
            pairs += [
                (source, token, choice) for source in range(size) for token, choice in (everyone[source] == expert).nonzero().tolist()
            ]
            counts.append(len(pairs) - before)
        return Handle(experts, indices, counts, pairs)

    def _event(self, results: list[tuple[Tensor, Tensor]]) -> EventOverlap:
        return EventOverlap(results, lambda: self._stand_in.calls.append("wait"))

    def _same(self, name: str, value: Any) -> list[Any]:
        """The values of all ranks, which call the same."""
        everyone = gather(self.group, (name, value))
        assert [each for each, _ in everyone] == [name] * self.group.size(), "ranks post in one order"
        return [each for _, each in everyone]
