"""The tab Sweep: the same notebook for many values of its parameters."""

from __future__ import annotations

import ast
import base64
import html
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from ....errors import QtxError
from ....experiments.notebooks import notebook_path, notebooks_folder
from ....specs import ClusterSpec, SweepSpec, listed_word
from ...forms import SpecForm
from ...numbers import spaced
from ..process import Work
from ..tab import WorkbenchTab
from ..tab_host import TabHost
from .code_parts import Code, call, changed_fields, shell
from .html_parts import head_row, headline, notes_list


class SweepTab(WorkbenchTab):
    """The same notebook for many values of its parameters."""

    name, title, button, task = "sweep", "Sweep", "Sweep", "sweep"
    codes = ("python", "command")
    first_step = "Press <b>Sweep</b> to run a notebook once for every combination of the grid's values."

    def __init__(self, bench: TabHost):
        plan = SweepSpec(
            notebook="00_quickstart",
            sha256="0" * 64,  # of no file: the sweep that is started has the right one
            grid={"samplers": ["systematic", "head-tail"], "sample_counts": [16, 64]},
            parameters={"num_tokens": 128, "num_windows": 2},
        )
        fields = [name for name in SweepSpec.model_fields if name != "sha256"]
        form = SpecForm(plan, fields)
        form.suggest("notebook", sorted(path.stem for path in notebooks_folder().glob("*.ipynb")))
        self._parameters_of = ""
        form.observe(lambda _: self._suggest_parameters(), "spec")
        forms = {"plan": form, "cluster": SpecForm(ClusterSpec(kind="local"))}
        self._table = widgets.HTML()
        super().__init__(bench, forms, self._table)
        self._suggest_parameters()

    def _suggest_parameters(self) -> None:
        """Offer the names of the notebook's parameters for the grid."""
        notebook = self.form.spec.to_parameters()["notebook"]
        if notebook != self._parameters_of:
            self._parameters_of = notebook
            names: list[str] = []
            # What cannot be read is refused when the sweep is started.
            with suppress(QtxError, OSError, ValueError, LookupError, TypeError):
                names = _parameter_names(notebook_path(notebook))
            self.form.suggest("grid", names)
            self.form.suggest("parameters", names)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the task."""
        return {"home": self.bench.runs_folder(), **self.state()}

    def show(self, result: dict[str, Any]) -> None:
        """Show what was measured so far, the figure, and how far each notebook is."""
        pictures = "".join(
            f"<img class='qtx-wb-{theme}' alt='{html.escape(result['caption'])}' "
            f"src='data:image/png;base64,{base64.b64encode(result[theme].tobytes()).decode()}'>"
            for theme in ("light", "dark")
            if theme in result
        )
        finding = html.escape(result["finding"])
        run = result["run"]
        saved = notes_list([], f"Saved in the run <code>{html.escape(run)}</code>.") if run else ""
        measured = _wide_table("What was measured", result["measured"])
        self._table.value = (
            headline(finding[:1].upper() + finding[1:] if finding else _how_far(result), _detail(result))
            + f"<div class='qtx-wb-beside'>{measured}{pictures}</div>"
            + _wide_table("Notebooks", result["rows"])
            + saved
        )

    def _work_changed(self, work: Work) -> None:
        super()._work_changed(work)
        if work is self.work and work.state == "cancelled" and self.result is not None:
            rows = [
                {**row, "status": "cancelled"} if row["status"] in ("running", "waiting") else row
                for row in self.result["rows"]
            ]
            self.result = {**self.result, "status": "cancelled", "rows": rows}
            self.show(self.result)

    def cancelled_note(self) -> str:
        """What of the sweep is kept, and how to go on."""
        if self.result is None:
            return super().cancelled_note()
        done, total = self.result["done"], self.result["notebooks"]
        return (
            f"Cancelled. {done} of {total} notebooks are done and kept. Press <b>Sweep</b> again to run the "
            "others only."
        )

    def python_code(self) -> str:
        """Python that runs the same notebooks."""
        state = self.shown_state()
        plan, cluster = state["plan"], changed_fields(ClusterSpec(**state["cluster"]))
        run = call(
            "qtx.sweep", plan["notebook"], plan["grid"], parameters=plan["parameters"],
            repeats=plan["repeats"], seed=plan["seed"], cluster=Code(call("qtx.ClusterSpec", **cluster)),
        )  # fmt: skip
        return f"import qtx_lab as qtx\n\nrun = {run}\nprint(run.metrics())\n"

    def command(self) -> str:
        """The line of a shell that runs the same notebooks, on this machine."""
        state = self.shown_state()
        plan, cluster = state["plan"], state["cluster"]
        words = ["qtx-lab", "sweep", plan["notebook"]]
        for name, values in plan["grid"].items():
            words += ["-g", f"{name}={','.join(listed_word(value, {}) for value in values)}"]
        for name, value in plan["parameters"].items():
            words += ["-p", name, listed_word(value, {})]
        words += ["--repeats", str(plan["repeats"]), "--seed", str(plan["seed"])]
        if cluster["kind"] == "address":
            words += ["--cluster", cluster["address"]]
        elif cluster["num_workers"]:
            words += ["--workers", str(cluster["num_workers"])]
        return shell(*words)

    def picture(self) -> bytes | None:
        """The figure of the sweep as PNG, where it has one."""
        return self.result["light"].tobytes() if self.result and "light" in self.result else None

    def cost(self) -> str:
        """Notebooks of the next sweep."""
        spec = self.form.spec
        assert isinstance(spec, SweepSpec)
        combinations = prod(len(values) for values in spec.grid.values()) if spec.grid else 0
        return f"{spaced(combinations * spec.repeats)} notebooks"


def _parameter_names(path: Path) -> list[str]:
    """The names that the parameters cell of a notebook assigns; `declared_parameters` knows more, later."""
    cells = json.loads(path.read_bytes())["cells"]
    sources = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ())]
    statements = [node for source in sources[:1] for node in ast.parse(source).body]
    targets: list[ast.expr] = [node.target for node in statements if isinstance(node, ast.AnnAssign)]
    targets += [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _how_far(result: Mapping[str, Any]) -> str:
    """How many notebooks have ended, as a headline."""
    return f"{result['done']} of {result['notebooks']} notebooks are done"


def _detail(result: Mapping[str, Any]) -> str:
    """How the sweep stands, and what of it was not run again; HTML."""
    status = result["status"]
    how_far = f"{_how_far(result)}; the" if result["finding"] else "The"
    parts = [f"{how_far} sweep is {html.escape(status)}."]
    if result["taken"]:
        parts.append(
            f"{result['taken']} of them had been run before with the same parameters, code and inputs: their "
            "results are taken from there."
        )
    if result["measured"]:
        parts.append("± is half of the 95 % interval.")
    return " ".join(parts)


def _wide_table(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A table that scrolls sideways where it is too wide; empty where there are no rows."""
    if not rows:
        return ""
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row.values()) + "</tr>" for row in rows
    )
    return (
        f"<div class='qtx-wb-wide' tabindex='0' role='region' aria-label='{name}'>"
        f"<table class='qtx-wb-table'><caption>{name}</caption>"
        f"<thead>{head_row(rows[0])}</thead><tbody>{lines}</tbody></table></div>"
    )
