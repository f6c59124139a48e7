"""Rows, inner products and attention as circuits, without any backend; each loader has a file of its own."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DtypeError, quoted, unknown_name
from .base import Loader, check_rows
from .dynamic import DynamicLoader
from .mps import MpsLoader
from .softmax import SoftmaxExpectation, SoftmaxLoader
from .tree import TreeLoader
from .unary import UnaryLoader

LOADERS: dict[str, Callable[[], Loader]] = {
    "tree": TreeLoader,
    "dynamic": DynamicLoader,
    "unary": UnaryLoader,
    "mps": MpsLoader,
    "softmax": SoftmaxLoader,
}
"""Every loader that can be chosen by its name. `Loader` says how to add one."""


def make_loader(loader: str | Loader) -> Loader:
    """Return the loader of a name, with its default settings; a loader is returned as it is.

    Raises
    ------
    ArgumentError
        If no loader has that name.
    DtypeError
        If `loader` is neither a name nor a `Loader`.

    Examples
    --------
    >>> make_loader("mps")
    MpsLoader(layers=2)
    """
    if isinstance(loader, str):
        if loader not in LOADERS:
            raise unknown_name("loader", loader, LOADERS)
        return LOADERS[loader]()
    if isinstance(loader, type):
        raise DtypeError(
            f"loader={loader.__name__} is a class; it must be an object of it, as {loader.__name__}()."
        )
    if not isinstance(loader, Loader):
        raise DtypeError(
            f"loader={quoted(loader)} is a {type(loader).__name__}; it must be a name ({', '.join(LOADERS)}) "
            "or an object of a subclass of qtx_lab.Loader."
        )
    return loader


__all__ = [
    "LOADERS",
    "DynamicLoader",
    "Loader",
    "MpsLoader",
    "SoftmaxExpectation",
    "SoftmaxLoader",
    "TreeLoader",
    "UnaryLoader",
    "check_rows",
    "make_loader",
]
