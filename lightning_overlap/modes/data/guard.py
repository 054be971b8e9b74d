"""Whoever reads a parameter waits until it is complete.

While a bucket is gathered under the next forward, its parameters are partly old. A forward pre-hook that waits is not enough:
``nn.MultiheadAttention`` reads the weight of a child without calling it, tied heads read ``embedding.weight``, and callbacks copy
weights for averages. All of them read ``module._parameters``, which is therefore replaced by a dictionary that waits.
(DeepSpeed's ZeRO-3 intercepts the same dictionary for parameters that are used outside their module.)

A kept reference (a list of parameters, ``optimizer.param_groups``) does not go through the module. So an incomplete parameter also
has another class, whose ``__torch_function__`` waits before a function of torch reads or writes it. The dictionary is still needed:
it waits first, and C++ extensions do not call ``__torch_function__``.

Neither sees an earlier view (``parameter.data``, ``parameter.detach()``) that is used while its parameter is incomplete. The
parameter's version shows a write through a detached view, which is an error (``Gathers.finish``).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Container, Iterable, Sized
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_overlap.model.trees import leaves
from lightning_overlap.torch_seams import WithoutSubclasses, parameters_of, set_parameters


class GuardedParameters(dict[str, "nn.Parameter | None"]):
    """``module._parameters`` that calls ``complete(parameter)`` before it returns a parameter, while ``incomplete`` is not empty."""

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
        if is_compiling():  # compiled code starts with complete parameters
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
    """A forward pre-hook that completes all of a module's parameters. In copies and pickles of the module it does nothing."""

    def __init__(self, parameters: GuardedParameters) -> None:
        self._parameters = parameters

    def __call__(self, module: nn.Module, args: Any) -> None:
        self._parameters.values()

    def __reduce__(self) -> Any:
        return CompleteBefore, (GuardedParameters({}, (), _nothing),)


def _nothing(parameter: nn.Parameter) -> None:
    """Completes nothing."""


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
"""Functions that read no values of a parameter, only its attributes: they do not wait."""


class IncompleteParameter:
    """The first base of an incomplete parameter's class; its ordinary class is the second. Every use of the values waits for them."""

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


class GuardedModules:
    """Modules whose parameters are completed before they are read.

    Args:
        incomplete: empty while all parameters are complete.
        complete: completes a parameter.
    """

    def __init__(self, incomplete: Sized, complete: Callable[[nn.Parameter], None]) -> None:
        self._incomplete = incomplete
        self._complete = complete
        self._modules: list[nn.Module] = []
        self._hooks: list[Any] = []

    def guard(self, model: nn.Module, ids: Container[int]) -> None:
        """Guards the modules of a model that hold any of the parameters with these ids."""
        for module in model.modules():
            if any(p is not None and id(p) in ids for p in parameters_of(module).values()):
                guarded = GuardedParameters(parameters_of(module), self._incomplete, self._complete)
                set_parameters(module, guarded)
                self._modules.append(module)
                if isinstance(module, nn.RNNBase):  # reads its weights from a list, not from the dictionary
                    self._hooks.append(module.register_forward_pre_hook(CompleteBefore(guarded)))

    def free(self) -> None:
        """Makes the modules ordinary again."""
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            set_parameters(module, dict(parameters_of(module)))
        self._modules, self._hooks = [], []


class ReferenceGuard:
    """Gives incomplete parameters a class that completes them when they are used.

    Args:
        complete: completes a parameter, and so calls :meth:`free` with it.
    """

    def __init__(self, complete: Callable[[nn.Parameter], None]) -> None:
        self._complete = complete
        self._classes: dict[type[nn.Parameter], type[nn.Parameter]] = {}
        self._warned = False

    def guard(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives parameters the guarding class."""
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
        """Gives parameters, which are complete, their ordinary class again."""
        for parameter in parameters:
            if isinstance(parameter, IncompleteParameter):
                parameter.__class__ = type(parameter).plain  # type: ignore[assignment]

    def _use(self, parameter: nn.Parameter) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "weights are used through a kept reference before forward has read them, so their gather is waited for and is less "
                "hidden (warned once). Use them after forward, or less often",
                stacklevel=3,
            )
        self._complete(parameter)
