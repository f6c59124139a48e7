"""qtx_lab: a research workbench for sampled attention.

Every public name is importable from here. `__init__.pyi` says where each one lives, for editors and for this
module alike, which loads it when it is first used: `import qtx_lab` costs nothing, and a notebook that draws no
circuit never loads qiskit.
"""

from importlib import metadata

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = metadata.version("qtx-lab")
__all__ = sorted([*__all__, "__version__"])
