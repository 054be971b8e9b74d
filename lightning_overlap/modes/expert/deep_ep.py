"""DeepEP, whose CUDA kernels send tokens to their experts over NVLink and RDMA: its buffers and the transfers over them.

Of the libraries for Megatron-Core's flex dispatcher (DeepEP, HybridEP, NCCL-EP) it is the one with documented signatures and tests for
training. Written to those of version 2.1 (July 2026, ``deep_ep.ElasticBuffer``) and 2.5 (October 2026, ``deep_ep.EPBuffer``), which
agree in what is used here; never run, since it needs several GPUs.

A dispatch sends a token once to each rank that has an expert of it, and copies it there for each of these experts. The combine of the
same handle is its reverse: it sums the rows of a token. Each is the backward of the other.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_overlap.decision import ConfigError
from lightning_overlap.ranks.group import Group, Pending


@dataclass(frozen=True)
class Library:
    """The parts of DeepEP that are used.

    Attributes:
        make_buffer: the class of its buffers.
        index_dtype: of the experts' numbers.
        dtypes: of tokens that it sums.
    """

    make_buffer: Callable[..., Any]
    index_dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)


def library() -> Library:
    """The DeepEP that is installed.

    Raises:
        ConfigError: it cannot be imported, or is older than 2.1, in which gradients of weights come back.
    """
    try:
        import deep_ep
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        raise ConfigError(
            f"expert_parallel.dispatcher: flex needs DeepEP, which cannot be imported ({type(error).__name__}: {error}): build it for "
            "the torch that is installed, or set dispatcher: alltoall"
        ) from error

    kind = getattr(deep_ep, "EPBuffer", None) or getattr(deep_ep, "ElasticBuffer", None)
    if kind is None or "do_zero_padding" not in inspect.signature(kind.dispatch).parameters:
        raise ConfigError(
            "expert_parallel.dispatcher: flex needs DeepEP 2.1 or newer, and the deep_ep that is installed is older: install the "
            "present one from github.com/deepseek-ai/DeepEP, or set dispatcher: alltoall"
        )
    return Library(kind, deep_ep.topk_idx_t)


class _Event:
    """Waits for the event of a transfer."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def arrived(self) -> bool:
        return False

    def wait(self) -> None:
        self._event.current_stream_wait()


@dataclass
class Arrival:
    """Rows that a dispatch brings to this rank's experts.

    Attributes:
        rows: pending, ``(N, H)``, by expert, then by rank and token.
        weights: of each row, ``(N)``, fp32. Complete with the rows.
        sizes: by expert, number of its rows.
        handle: DeepEP's, of the combine and of its backward.
    """

    rows: Pending
    weights: Tensor
    sizes: list[int]
    handle: Any


class Buffer:
    """One of DeepEP's buffers. A transfer is queued behind the earlier ones; all ranks post in one order.

    Args:
        buffer: DeepEP's.
        group: the ranks.
        tokens: the most that a rank may send at once.
    """

    def __init__(self, buffer: Any, group: Group, tokens: int) -> None:
        self._buffer, self._group, self.tokens = buffer, group, tokens

    def event(self) -> Any:
        """What the device has to do up to now."""
        return self._buffer.capture()

    def dispatch(self, hidden: Tensor, indices: Tensor, weights: Tensor, experts: int, after: Any, label: str) -> Arrival:
        """Posts the dispatch of tokens. The host waits until it knows how many come.

        Args:
            hidden: ``(T, H)``, contiguous.
            indices: by token, its experts, ``(T, k)``; -1: none.
            weights: of these, ``(T, k)``, fp32, contiguous.
            experts: number of all experts.
            after: from :meth:`event`: when ``hidden`` was complete. What was queued later is not waited for.
            label: of the transfer.
        """
        rows, _, row_weights, handle, event = self._buffer.dispatch(
            hidden,
            topk_idx=indices,
            topk_weights=weights,
            num_experts=experts,
            previous_event=after,
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
            do_expand=True,
        )
        sizes: list[int] = handle.num_recv_tokens_per_expert_list
        return Arrival(self._posted(label, hidden, event, rows), row_weights, sizes, handle)

    def dispatch_again(self, gradient: Tensor, handle: Any, label: str) -> Pending:
        """Posts the backward of a combine: the gradient ``(T, H)`` of its sums goes to the rows ``(N, H)``."""
        # The number of experts is in the handle, but DeepEP chooses its multiprocessors before it looks there.
        settings = {"num_experts": handle.num_experts, "async_with_compute_stream": True, "do_expand": True}
        rows, _, _, _, event = self._buffer.dispatch(gradient, handle=handle, **settings)
        return self._posted(label, gradient, event, rows)

    def combine(self, rows: Tensor, handle: Any, label: str, weights: Tensor | None = None) -> tuple[Pending, Any]:
        """Posts a combine.

        Args:
            rows: ``(N, H)``, as they have come.
            handle: of their dispatch.
            label: of the transfer.
            weights: as a backward of the dispatch, the gradients of the rows' weights, ``(N)``, fp32.

        Returns:
            The pending sums, ``(T, H)``; and by token and choice the weights, ``(T, k)``, complete with these, or None.
        """
        sums, of_weights, event = self._buffer.combine(rows, handle=handle, topk_weights=weights, async_with_compute_stream=True)
        return self._posted(label, rows, event, sums), of_weights

    def destroy(self) -> None:
        """Frees the buffer. Collective."""
        self._buffer.destroy()

    def _posted(self, label: str, sent: Tensor, event: Any, result: Tensor) -> Pending:
        group = self._group
        return Pending(group.note(label, sent.nbytes), _Event(event), lambda: result, group.before_wait)


class Buffers:
    """DeepEP's buffers of a group, which all layers of one width share.

    Args:
        library: DeepEP.
        group: the ranks.
    """

    def __init__(self, library: Library, group: Group) -> None:
        self.library, self._group = library, group
        self._made: defaultdict[tuple[int, int], list[Buffer]] = defaultdict(list)

    def get(self, tokens: int, width: int, choices: int) -> Buffer:
        """Returns a buffer. Collective if none is large enough, so ranks ask for the same.

        Args:
            tokens: the most that a rank sends.
            width: H.
            choices: k.
        """
        made = self._made[width, choices]
        if not made or made[-1].tokens < tokens:
            # The smaller one stays, since a backward may have a handle of it. All together are at most twice as large as the last.
            tokens = max(tokens, 2 * made[-1].tokens if made else 0)
            settings = {"num_max_tokens_per_rank": tokens, "hidden": width, "num_topk": choices}
            # In arrival's order of rows, weight gradients would have other bits in each run.
            buffer = self.library.make_buffer(self._group.process_group, **settings, deterministic=True, explicitly_destroy=True)
            made.append(Buffer(buffer, self._group, tokens))
        return made[-1]

    def close(self) -> None:
        """Frees the buffers, before the group ends. Collective."""
        for made in self._made.values():
            for buffer in made:
                buffer.destroy()
        self._made.clear()
