"""Pickles of modules that keep local functions, as models of transformers do whose activations are recomputed."""

from __future__ import annotations

import importlib
import io
import marshal
import pickle
from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any

from lightning_overlap.decision import ConfigError


def dumps(value: Any) -> bytes:
    """Pickles a value for another process with the same packages, which reads it by ``pickle.loads``.

    Raises:
        ConfigError: it holds something that cannot be pickled.
    """
    file = io.BytesIO()
    try:
        _Pickler(file).dump(value)
    except Exception as error:  # of any kind: pickle asks each object
        raise ConfigError(
            "processes of their own rehearse the training, so the module, its data and the Trainer's arguments must be pickled: "
            f"{type(error).__name__}: {error}. Make what this names later, in configure_model() or setup()"
        ) from error
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Pickles a local function or a lambda by its code: it has no name by which another process could find it."""
        if not isinstance(value, FunctionType) or not ("<locals>" in value.__qualname__ or value.__name__ == "<lambda>"):
            return NotImplemented
        enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
        return _function, (marshal.dumps(value.__code__), value.__module__, value.__defaults__, value.__kwdefaults__, enclosed)


def _function(code: bytes, module: str, defaults: Any, keyword_defaults: Any, enclosed: Sequence[Any]) -> FunctionType:
    names = vars(importlib.import_module(module))
    function = FunctionType(marshal.loads(code), names, None, defaults, tuple(map(CellType, enclosed)))
    function.__kwdefaults__ = keyword_defaults
    return function
