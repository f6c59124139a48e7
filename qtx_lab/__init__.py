"""qtx_lab: a research workbench for sampled attention.

Every public name can be imported from here. The stub `__init__.pyi` lists where each name is defined. Editors
and type checkers read it, and so does this module, which loads a name when it is first used. `import qtx_lab`
itself therefore costs almost nothing, and a notebook that draws no circuit never loads qiskit.
"""

from importlib import metadata
from typing import Any

import lazy_loader

from .errors import naming_the_extra

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """A public name, which is loaded now; one whose packages are not installed says which extra has them."""
    with naming_the_extra(f"qtx_lab.{name}"):
        return _load(name)


# pyproject.toml is the only place that holds the version.
__version__ = metadata.version("qtx-lab")
__all__ = sorted([*__all__, "__version__"])
