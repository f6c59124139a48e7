"""The code of a notebook, its cells and the modules beside it, and whether a result is of this code."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..specs import Spec
from . import provenance

NOT_CODE = {"injected-parameters", "papermill-error-cell-tag"}
"""Tags of cells that papermill adds."""

MAX_MODULES = 200
"""Modules beside a notebook that are looked at."""


def code_cells(path: Path) -> list[dict[str, Any]]:
    """Sources and tags of a notebook's code cells, without those that papermill adds.

    Raises
    ------
    StorageError
        If it cannot be read as a notebook.
    """
    with _reading(path):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            {"source": "".join(cell["source"]), "tags": sorted(cell.get("metadata", {}).get("tags", ()))}
            for cell in cells
            if cell["cell_type"] == "code" and not NOT_CODE & set(cell.get("metadata", {}).get("tags", ()))
        ]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make a StorageError of whatever is wrong with the content of a notebook that is read inside."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read as a notebook: {error}.") from error


def code_hash(path: Path) -> str:
    """SHA-256 of a notebook's code cells and their tags; texts and outputs do not change it."""
    return hashlib.sha256(json.dumps(code_cells(path), sort_keys=True).encode()).hexdigest()


def without_outputs(path: Path) -> bytes:
    """An executed notebook as it was before: without outputs and the cells that papermill adds.

    Raises
    ------
    StorageError
        If it cannot be read as a notebook.
    """
    with _reading(path):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"] = [
            cell for cell in notebook["cells"] if not NOT_CODE & set(cell.get("metadata", {}).get("tags", ()))
        ]
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
            cell.get("metadata", {}).pop("papermill", None)
        notebook["metadata"].pop("papermill", None)
        return json.dumps(notebook, indent=1, ensure_ascii=False).encode()


def local_modules(path: Path, folder: Path) -> dict[str, str]:
    """SHA-256 of the Python files in a folder that a notebook imports, directly or through one another.

    Parameters
    ----------
    path : Path
        The notebook.
    folder : Path
        The working directory of its kernel, where Python looks for modules first.
    """
    hashes: dict[str, str] = {}
    left = [name for cell in code_cells(path) for name in _imports(cell["source"])]
    while left and len(hashes) < MAX_MODULES:
        name = left.pop()
        base = folder.joinpath(*name.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            relative = str(file.relative_to(folder))
            if relative not in hashes and file.is_file():
                content = file.read_bytes()
                hashes[relative] = hashlib.sha256(content).hexdigest()
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                left += list(_imports(content.decode(errors="replace"), package))
    return dict(sorted(hashes.items()))


def _imports(source: str, package: str = "") -> Iterator[str]:
    """The modules that a text imports; none where it is not plain Python."""
    try:
        nodes = list(ast.walk(ast.parse(_without_magics(source))))
    except (SyntaxError, ValueError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = package.split(".") if package else []
                module = ".".join([*parts[: len(parts) - node.level + 1], *([module] if module else [])])
            yield from (name for name in (module, module.split(".")[0]) if name)
            yield from (f"{module}.{alias.name}" for alias in node.names if module)


def _without_magics(source: str) -> str:
    """A cell as Python."""
    from IPython.core.inputtransformer2 import TransformerManager

    return str(TransformerManager().transform_cell(source))


def canonical(value: Any) -> str:
    """A value as JSON in which 1 and 1.0 are the same, and 0 and -0.0, whose quotients differ, are not.

    >>> canonical({"b": 1.0, "a": [True, 0.5, -0.0]})
    '{"a": [true, 0.5, -0.0], "b": 1}'
    """

    def same(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: same(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [same(inner) for inner in item]
        if isinstance(item, float) and item.is_integer() and str(item) != "-0.0":
            return int(item)
        return item

    return json.dumps(same(value), sort_keys=True, default=str)


def cell_key(path: Path, spec: Spec) -> str:
    """A hash of a notebook's code and its spec, equal in all sweeps and on all machines."""
    content = f"{code_hash(path)} {type(spec).__name__} {canonical(spec.to_parameters())}"
    return hashlib.sha256(content.encode()).hexdigest()


def result_key(path: Path, spec: Spec, inputs: dict[str, str]) -> str:
    """A hash of all that a result depends on as far as it is known.

    These are the spec, the notebook's code, this package's code, all installed distributions, and the files
    that parameters name and the notebook imports.
    """
    parts = [cell_key(path, spec), provenance.source_hash(), canonical(inputs)]
    parts.append(canonical(dict(provenance.distributions())))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
