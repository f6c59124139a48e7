"""Rows as circuits: one file per loader, the interface in `base.py`. Knows no backend."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DtypeError, unknown_name
from .base import Loader, check_rows
from .dynamic import DynamicLoader
from .mps import MpsLoader
from .tree import TreeLoader
from .unary import UnaryLoader

LOADERS: dict[str, Callable[[], Loader]] = {
    "tree": TreeLoader,
    "dynamic": DynamicLoader,
    "unary": UnaryLoader,
    "mps": MpsLoader,
}
"""Every loader that a name alone can make."""


def make_loader(loader: str | Loader) -> Loader:
    """The loader of that name, or the loader itself.

    Raises
    ------
    ArgumentError, DtypeError
        If no loader has that name; if the object is none.
    """
    if isinstance(loader, str):
        if loader not in LOADERS:
            raise unknown_name("loader", loader, LOADERS)
        return LOADERS[loader]()
    missing = [
        name for name in ("name", "exact", "size", "circuit", "angles", "keys") if not hasattr(loader, name)
    ]
    if missing or isinstance(loader, type):
        what = "a class, not an object" if isinstance(loader, type) else f"without {', '.join(missing)}"
        raise DtypeError(f"loader={loader!r} is {what}: it must be a name or an object that keeps `Loader`.")
    return loader


__all__ = [
    "LOADERS",
    "DynamicLoader",
    "Loader",
    "MpsLoader",
    "TreeLoader",
    "UnaryLoader",
    "check_rows",
    "make_loader",
]
