"""How Sphinx makes the documentation: pages, API reference and executed notebooks, without a network."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from numpydoc.xref import DEFAULT_LINKS
from sphinx.application import Sphinx
from sphinx.util import logging

NOTEBOOKS = Path(__file__).parent
ROOT = NOTEBOOKS.parent
sys.path.insert(0, str(ROOT))

import qtx_lab  # noqa: E402
from qtx_lab.samplers import BASELINES, SAMPLERS  # noqa: E402
from qtx_lab.stability import EXPERIMENTAL  # noqa: E402

# Notebooks keep their runs, and jupyter-cache what they printed, beside the pages.
os.environ["QTX_LAB_HOME"] = str(ROOT / "build" / "docs-runs")
# Kernels have a profile of their own, without start-up files of whoever builds and without a warning of TCP.
PROFILE = ROOT / "build" / "docs-ipython" / "profile_default"
PROFILE.mkdir(parents=True, exist_ok=True)
(PROFILE / "ipython_kernel_config.py").write_text('c.IPKernelApp.log_level = "ERROR"\n', encoding="utf-8")
os.environ["IPYTHONDIR"] = str(PROFILE.parent)
REDUCED = json.loads((NOTEBOOKS / "reduced.json").read_text(encoding="utf-8"))

# --- The project --------------------------------------------------------------------------------

project = "qtx_lab"
author = "the qtx_lab contributors"
project_copyright = "the qtx_lab contributors, Apache-2.0"
version = release = metadata.version("qtx-lab")
extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_nb", "sphinx_design"]
exclude_patterns = ["results", "**/.ipynb_checkpoints"]
nitpicky = True
suppress_warnings = ["config.cache", "myst.header"]  # chapters begin with a second level where they like

# --- Pages and notebooks ------------------------------------------------------------------------

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / "docs-executions")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True  # a cell's error on the terminal, too, and not in a file alone
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # the default fetches from a network; views show pictures
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

# --- Reference ----------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {word: word for word in DEFAULT_LINKS}  # Python's own words would link to a network
numpydoc_xref_aliases |= {name: f"qtx_lab.{name}" for name in qtx_lab.__all__}

# --- Looks --------------------------------------------------------------------------------------

html_theme = "pydata_sphinx_theme"
html_title = "qtx_lab"
html_static_path = ["docs.css"]
html_css_files = ["docs.css"]
toc_object_entries_show_parents = "hide"  # the side has room for a method's own name
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_math_renderer = "mathml"


def rooms() -> dict[str, list[str]]:
    """The public names of each room, as the package's stub says where they are defined."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(Path(qtx_lab.__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = found.setdefault(node.module.partition(".")[0], [])
            names += [alias.asname or alias.name for alias in node.names]
    return found


def first_line(thing: object) -> str:
    """The one line that says what a thing is."""
    return (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")


def list_table(rows: list[list[str]], *options: str) -> list[str]:
    """A table in reStructuredText, whose first row is its header."""
    lines = ["", ".. list-table::", "   :header-rows: 1", *(f"   {option}" for option in options), ""]
    for row in rows:
        lines += [f"   {'  -' if i else '* -'} {cell}" for i, cell in enumerate(row)]
    return [*lines, ""]


def fields_of(spec: Any) -> list[str]:
    """The fields of a spec as a table."""
    rows = [["field", "default", "allowed", "what it says"]]
    for name, field in spec.model_json_schema()["properties"].items():
        bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        kinds = [kind.get("type", "object") for kind in field.get("anyOf", [field])]
        allowed = (
            ["any of " + ", ".join(map(str, field["enum"]))] if "enum" in field else [" or ".join(kinds)]
        )
        allowed += [f"{sign} {field[key]}" for key, sign in bounds.items() if key in field]
        default = json.dumps(field.get("default"), ensure_ascii=False)
        about = escaped(field.get("description", ""))
        rows.append([f"``{name}``", f"``{default}``", ", ".join(allowed), about])
    return list_table(rows)


def signature_of(spec: Any) -> str:
    """The fields of a spec with their defaults; what is allowed for each is in the table of the fields."""
    fields = spec.model_fields.items()
    defaults = (f"{name}{'' if x.is_required() else f'={x.get_default()!r}'}" for name, x in fields)
    return f"(*, {', '.join(defaults)})" if fields else "()"


def page_of(thing: Any, path: str) -> str:
    """The page of what can be imported by this path, in reStructuredText."""
    name = path.rpartition(".")[2]
    kind = "module" if inspect.ismodule(thing) else "class" if inspect.isclass(thing) else "function"
    lines = [name, "=" * len(name), ""]
    if path == f"qtx_lab.{name}" and name in EXPERIMENTAL:
        lines += [".. admonition:: Experimental", "   :class: caution", ""]
        lines += [f"   {EXPERIMENTAL[name]} See :doc:`what that means <../stability>`.", ""]
    if kind == "module":
        return "\n".join([*lines, f".. automodule:: {thing.__name__}", "   :members:", ""])
    is_spec = kind == "class" and "model_fields" in dir(thing)
    lines += [f".. auto{kind}:: {path}{signature_of(thing) if is_spec else ''}"]
    if is_spec:
        lines += fields_of(thing)
    elif kind == "class" and not issubclass(thing, Exception):
        lines += ["   :members:"]
    return "\n".join([*lines, ""])


def rooms_page(rooms: dict[str, list[str]]) -> str:
    """The public names of each room, with one line each."""
    lines = ["By room", "=======", ""]
    for room, names in rooms.items():
        lines += [room, "-" * len(room), "", escaped(first_line(import_module(f"qtx_lab.{room}")))]
        rows = [["name", "what it is"]]
        for name in names:
            mark = " *Experimental.*" if name in EXPERIMENTAL else ""
            rows.append([f":doc:`{name}`", escaped(first_line(getattr(qtx_lab, name))) + mark])
        lines += list_table(rows, ":widths: 30 70")
        lines += [".. toctree::", "   :hidden:", "", *(f"   {name}" for name in names), ""]
    return "\n".join(lines)


def samplers_pages() -> dict[str, str]:
    """A table of all samplers that have a name, and a page for each class that has none as a public name."""
    rows = [["name", "class", "unbiased", "independent", "what it does"]]
    pages = {}
    for name, make in {**SAMPLERS, **BASELINES}.items():
        sampler = make()
        kind = type(sampler)
        if kind.__name__ not in qtx_lab.__all__:
            pages[f"{kind.__name__}.rst"] = page_of(kind, f"{kind.__module__}.{kind.__name__}")
        abilities = ["yes" if able else "no" for able in (sampler.unbiased, sampler.independent)]
        rows.append([f"``{name}``", f":doc:`{kind.__name__}`", *abilities, escaped(first_line(kind))])
    lines = ["Samplers by name", "================", ""]
    lines += ["What ``sampler=`` takes, and so do specs, forms and sweeps. The last ones are what others do."]
    lines += list_table(rows)
    lines += [".. toctree::", "   :hidden:", "", *(f"   {Path(page).stem}" for page in pages), ""]
    return {"samplers.rst": "\n".join(lines), **pages}


def experimental_page() -> str:
    """The names that may change in any release, and why."""
    rows = [["name", "why"], *([f":doc:`{name}`", why] for name, why in EXPERIMENTAL.items())]
    return "\n".join(["Experimental names", "==================", *list_table(rows, ":widths: 30 70")])


def results_page(path: Path) -> str:
    """A committed result of a benchmark as a table, with the machine that measured it."""
    result = json.loads(path.read_text(encoding="utf-8"))
    title = f"{result['bench']}: {path.name}"
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    hidden = {"front", "baseline", "settings"}
    names = [name for name, value in result["rows"][0].items() if name not in hidden]
    rows = [names]
    for row in result["rows"]:
        cells = [row.get(name) for name in names]
        rows.append([f"{x:.3g}" if isinstance(x, float) else "" if x is None else str(x) for x in cells])
    return "\n".join([title, "=" * len(title), "", f"Measured on {machine}.", *list_table(rows)])


def write_reference(app: Sphinx) -> None:
    """Write a page for each public name and each measured table, and their indices, where not current."""
    folder = NOTEBOOKS / "reference" / "api"
    folder.mkdir(exist_ok=True)
    names = rooms()
    pages = {"index.rst": rooms_page(names), "experimental.rst": experimental_page(), **samplers_pages()}
    for name in [name for room in names.values() for name in room]:
        pages[f"{name}.rst"] = page_of(getattr(qtx_lab, name), f"qtx_lab.{name}")
    for path in sorted((NOTEBOOKS / "results").glob("*.json")):
        if "rows" in json.loads(path.read_text(encoding="utf-8")):
            pages[f"measured_{path.stem}.rst"] = results_page(path)
    for stale in folder.glob("*.rst"):
        if stale.name not in pages:
            stale.unlink()
    for file, content in pages.items():
        if not (folder / file).exists() or (folder / file).read_text(encoding="utf-8") != content:
            (folder / file).write_text(content, encoding="utf-8")


def reduce_parameters(app: Sphinx, docname: str, content: list[str]) -> None:
    """Give a notebook the parameters with which it takes seconds, in a cell after its own."""
    if docname in REDUCED:
        notebook = nbformat.reads(content[0], as_version=4)
        tagged = ["parameters" in cell.metadata.get("tags", []) for cell in notebook.cells]
        lines = [f"{name} = {value!r}" for name, value in REDUCED[docname].items()]
        source = "\n".join(["# For the documentation: a short run.", *lines])
        notebook.cells.insert(tagged.index(True) + 1, nbformat.v4.new_code_cell(source, id="reduced"))
        content[0] = nbformat.writes(notebook)


LITERAL = re.compile(r"(``.*?``|:[\w:]+:`[^`]*`|`[^`]*`_*)")
HAT = re.compile(r"\b([A-Za-z])_hat(?=\b|_)")
GREEK = {"sum": "Σ", "prod": "Π", "chi": "χ", "psi": "ψ", "lambda": "λ"}
SUBSCRIPT = re.compile(
    r"(?<![\w.*])(sum|prod|chi|psi|lambda|mean|var|[A-Za-zα-ωΑ-Ω]\u0302?)"
    r"_(?:\{([^{}]*)\}|\(([^()]*)\)|([A-Za-z0-9]{1,2}?))(?![^\W²³]|`)"
)
POWER = re.compile(
    r"(?<=[\w)|`\u0302])(?:\\ )?\^(?:\{([^{}]*)\}|\(([^()]*)\)|([-−]?[^\W_]+(?:_[^\W_]{2,})*))"
)


def escaped(text: str) -> str:
    """A docstring's line with bars that are bars, as in |x|, and with U_i and S^-5 set as mathematics."""

    def index(match: re.Match[str]) -> str:
        return next(group for group in match.groups()[-3:] if group is not None)

    parts = LITERAL.split(text)
    for i in range(0, len(parts), 2):
        part = HAT.sub("\\1\u0302", parts[i])
        part = re.sub(r"(?<!\\)\|", r"\\|", part)
        part = SUBSCRIPT.sub(
            lambda match: rf"\ *{GREEK.get(match[1], match[1])}*\ :sub:`{index(match)}`\ ", part
        )
        parts[i] = POWER.sub(lambda match: rf"\ :sup:`{index(match)}`\ ", part)
    return "".join(parts)


def escape_docstring(
    app: Sphinx, what: str, name: str, thing: object, options: Any, lines: list[str]
) -> None:
    """Formulae in docstrings are formulae, and bars are bars, except in examples."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = escaped(line)


def link_public_name(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Link a type to the page of its public name, wherever it is defined; other names are plain text."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    name = target.rpartition(".")[2]
    if name in qtx_lab.__all__ and (target == name or target.startswith("qtx_lab.")):
        return env.get_domain("py").resolve_xref(
            env, node["refdoc"], app.builder, "obj", f"qtx_lab.{name}", node, contnode
        )
    return contnode if node.get("reftype") in ("class", "exc", "obj", "data") else None


SIGNS = {
    "‖": r"\Vert ",
    "−": "-",
    "≤": r"\le ",
    "≥": r"\ge ",
    "²": "^2",
    "·": r"\cdot ",
    "∈": r"\in ",
    "×": r"\times ",
}
"""Signs that chapters write as they look, and docutils knows by their commands."""


def mathml(formula: str, *, as_block: bool = False) -> str:
    """A formula as MathML, which browsers draw by themselves."""
    for character, command in SIGNS.items():
        formula = formula.replace(character, command)
    return tex2mathml(formula, as_block=as_block)


def check_math(app: Sphinx, doctree: nodes.document) -> None:
    """Warn of a formula that cannot be drawn, whatever is built."""
    for node in doctree.findall(lambda node: isinstance(node, nodes.math | nodes.math_block)):
        try:
            mathml(node.astext())
        except MathError as error:
            logging.getLogger(__name__).warning("%s in %s", error, node.astext(), location=node)


def inline_math(self: Any, node: Any) -> None:
    """A formula in a line."""
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def block_math(self: Any, node: Any) -> None:
    """A displayed formula."""
    self.body.append(f'<div class="formula">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("builder-inited", write_reference)
    app.connect("source-read", reduce_parameters)
    app.connect("doctree-read", check_math)
    app.connect("autodoc-process-docstring", escape_docstring, priority=900)
    app.connect("missing-reference", link_public_name)
