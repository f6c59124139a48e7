"""qtx_lab: a research workbench for sampled attention.

Every public name can be imported from here. The stub `__init__.pyi` lists where each name is defined. Editors
and type checkers read it, and so does this module, which loads a name when it is first used. `import qtx_lab`
itself therefore costs almost nothing, and a notebook that draws no circuit never loads qiskit.
"""

from importlib import metadata

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# pyproject.toml is the only place that holds the version.
__version__ = metadata.version("qtx-lab")
__all__ = sorted([*__all__, "__version__"])
