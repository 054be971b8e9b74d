"""Reading a parameter completes it, wherever the reader stands.

While a bucket is gathered under the next forward, its weights are partly old. Waiting in a forward pre-hook of the module
that owns them is not enough: ``nn.MultiheadAttention`` reads its child's weight without calling the child, tied heads read
``embedding.weight``, callbacks copy weights for averages. All of them go through ``module._parameters``, so that is where
the first wait is. (DeepSpeed's ZeRO-3 intercepts the same place for parameters that are used outside their module.)

A reference that somebody keeps (a list of parameters, ``optimizer.param_groups``, an average's list) does not go through the
module. Therefore an incomplete parameter also has another class, whose ``__torch_function__`` waits before any function of torch
reads or writes it. The module's guard stays, since it comes first, and since extensions in C++ ask no ``__torch_function__``.

What neither sees: a view that was taken earlier (``parameter.data``, ``parameter.detach()``) and is used while its parameter is
incomplete. A write through a detached view is found by the parameter's version, and is an error (``Gathers.finish``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_overlap.model.trees import leaves
from lightning_overlap.torch_seams import WithoutSubclasses


class GuardedParameters(dict[str, "nn.Parameter | None"]):
    """``module._parameters`` that calls ``complete(parameter)`` before it gives one away, while ``incomplete`` is not empty."""

    def __init__(self, plain: dict[str, nn.Parameter | None], incomplete: Sized, complete: Callable[[nn.Parameter], None]) -> None:
        super().__init__(plain)
        self._incomplete = incomplete
        self._complete = complete

    def _checked(self, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is not None and not is_compiling() and self._incomplete:
            self._complete(parameter)
        return parameter

    def __getitem__(self, name: str) -> nn.Parameter | None:
        return self._checked(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self._checked(super().get(name, default))

    def values(self) -> Any:
        if is_compiling():  # what was compiled begins with complete weights
            return super().values()
        for parameter in super().values():
            self._checked(parameter)
        return super().values()

    def items(self) -> Any:
        self.values()
        return super().items()

    def __reduce__(self) -> Any:
        # A copy or a pickle of the module is an ordinary module.
        return dict, (dict(self.items()),)


class CompleteBefore:
    """A forward pre-hook that completes all of a module's parameters. Copies and pickles of the module do without."""

    def __init__(self, parameters: GuardedParameters) -> None:
        self._parameters = parameters

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._parameters.values()

    def __reduce__(self) -> Any:
        return CompleteBefore, (GuardedParameters({}, (), _nothing),)


def _nothing(parameter: nn.Parameter) -> None:
    """What completes nothing."""


_ATTRIBUTES = "grad_fn is_leaf shape dtype device ndim layout is_sparse is_cuda is_cpu is_meta nbytes itemsize _version output_nr name"
_SETTABLE = "grad grad_dtype requires_grad _backward_hooks _post_accumulate_grad_hooks"
_METHODS = (
    "size dim ndimension numel nelement stride element_size is_contiguous is_floating_point is_complex requires_grad_ register_hook "
    "register_post_accumulate_grad_hook __len__ __dir__"
)
_READ_NO_VALUES = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in f"{_ATTRIBUTES} {_SETTABLE}".split()),
        *(getattr(Tensor, name).__set__ for name in _SETTABLE.split()),
        *(getattr(Tensor, name) for name in _METHODS.split()),
        torch.numel,
        torch.is_floating_point,
        torch.is_complex,
    ]
)
"""Functions that ask for or change what belongs to a parameter besides its values: they wait for nothing."""


class IncompleteParameter:
    """The class of an incomplete parameter, before its own class. Every use of the values completes it."""

    complete: ClassVar[Callable[[nn.Parameter], None]]
    plain: ClassVar[type[nn.Parameter]]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _READ_NO_VALUES:
            with WithoutSubclasses():
                return function(*args, **kwargs)
        for used in leaves((args, kwargs)):
            if isinstance(used, IncompleteParameter):
                type(used).complete(used)  # type: ignore[arg-type]
        return function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        type(self).complete(self)  # type: ignore[arg-type]
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        type(self).complete(self)  # type: ignore[arg-type]
        return self.__reduce_ex__(protocol)


class ReferenceGuard:
    """Gives parameters a class that completes them when they are used, and takes it back.

    Args:
        complete: completes a parameter, and so calls :meth:`free` with it.
    """

    def __init__(self, complete: Callable[[nn.Parameter], None]) -> None:
        self._complete = complete
        self._classes: dict[type[nn.Parameter], type[nn.Parameter]] = {}
        self._said = False

    def guard(self, parameters: Iterable[nn.Parameter]) -> None:
        """From here on these are incomplete."""
        for parameter in parameters:
            if not isinstance(parameter, IncompleteParameter):
                parameter.__class__ = self._class_for(type(parameter))

    def _class_for(self, plain: type[nn.Parameter]) -> Any:
        if plain not in self._classes:
            names = {"complete": self._use, "plain": plain}
            self._classes[plain] = type(f"Incomplete{plain.__name__}", (IncompleteParameter, plain), names)
        return self._classes[plain]

    @staticmethod
    def free(parameters: Iterable[nn.Parameter]) -> None:
        """These are complete."""
        for parameter in parameters:
            if isinstance(parameter, IncompleteParameter):
                parameter.__class__ = type(parameter).plain  # type: ignore[assignment]

    def _use(self, parameter: nn.Parameter) -> None:
        if not self._said:
            self._said = True
            warnings.warn(
                "weights are used here through a reference that was kept, before forward has read them: their gather is waited for "
                "here, and is hidden less (said once). It is hidden again if they are used later, or only now and then",
                stacklevel=3,
            )
        self._complete(parameter)
