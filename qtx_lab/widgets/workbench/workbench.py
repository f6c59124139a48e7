"""`Workbench`: the whole lab in one notebook cell; what it shows is kept in a run, and can be restored."""

from __future__ import annotations

import base64
import html
import io
import json
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from torch import Tensor

from ...errors import ArgumentError, QtxError, StorageError
from ...experiments import provenance
from ...experiments.runs import Run, runs
from ...storage import json_bytes, runs_home, storage_error, write_atomic, write_tensors
from ..forms import TURN
from ..views.base import heard_while_busy
from .process import Pace, Work, Worker
from .tab import Page
from .tabs import (
    CircuitPage,
    HardwarePage,
    MitigatePage,
    RunsPage,
    SamplePage,
    SourceSpec,
    SweepPage,
    TrainPage,
)

CSS = Path(__file__).parent / "workbench.css"

NAME = "workbench"
"""Of its runs."""

STATE = "workbench.json"
"""In the run's folder: the fields of all forms, and which tab is open."""

WRITE = 0.2
"""Least seconds between two writings of the state."""

MOST_KEPT = 256 << 20
"""Bytes of a result that is kept in the run."""

SPARE = 2
"""Idle worker processes that are kept: each holds a few hundred MB."""

_OPEN: WeakValueDictionary[Path, Workbench] = WeakValueDictionary()
"""The workbenches of this process by their run: one process has one for a run."""


class Workbench(widgets.VBox):
    """The whole lab in tabs that follow the work: Sample, Circuit, Mitigate, Hardware, Train, Sweep, Runs.

    Everything that takes long runs in other processes, so that the kernel stays free, and Cancel kills it at once. From
    code, a tab is an attribute: `wb.sample.form.change(num_samples=128)`, `wb.sample.start().wait()`,
    `wb.sample.result`.

    Parameters
    ----------
    q, k, v : Tensor, optional
        Your own inputs, (L, E), (H, L, E) or (layers, H, L, E), in place of a model's.
    model : str or path
        "reference" for the model that is shipped, or the folder of a Hugging Face model.
    text : str or path
        "reference" for the text that is shipped, or a UTF-8 file.
    num_tokens : int
        Length of the text's beginning that is used.
    tokens : sequence of str, optional
        With q, k and v: what stands at each key.
    is_causal : bool
        With q, k and v.
    home : path, optional
        Where the run is kept; see `runs_home`. Its folder is made when something is first changed or started.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        Some of q, k, v without the others, or together with a model; shapes that do not fit.

    Examples
    --------
    >>> bench = Workbench()
    >>> list(bench.pages)
    ['sample', 'circuit', 'mitigate', 'hardware', 'train', 'sweep', 'runs']
    >>> bench.sample.form.spec.num_samples
    64
    >>> bench.close()
    """

    _handle: Any
    _closed = True  # until it is made: what was refused is closed by ipywidgets all the same

    def __init__(
        self,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        model: str | Path = "reference",
        text: str | Path = "reference",
        num_tokens: int = 512,
        tokens: Sequence[str] | None = None,
        is_causal: bool = False,
        home: str | Path | None = None,
    ):
        own = sum(x is not None for x in (q, k, v))
        if own and (own < 3 or model != "reference" or text != "reference"):
            raise ArgumentError("q, k and v belong together, without model or text: give all three, or none.")
        self.home, self._turn = runs_home(home), threading.RLock()
        self._run: Run | None = None
        self._workers: list[Worker] = []
        self._closed, self._trouble, self.restoring = False, "", False
        self._write, self._handle = Pace(self._write_state, WRITE), None
        source = SourceSpec(model=str(model), text=str(text), num_tokens=num_tokens)
        if q is not None and k is not None and v is not None:
            path = self.run.path.resolve() / "inputs.safetensors"
            write_inputs(path, q, k, v, tokens, is_causal)
            source = SourceSpec(model=str(path))
        self.jobs = widgets.VBox()  # of the Hardware and the Runs tab
        self.sample = SamplePage(self, source)
        self.circuit = CircuitPage(self)
        self.mitigate = MitigatePage(self)
        self.hardware = HardwarePage(self)
        self.train = TrainPage(self)
        self.sweep = SweepPage(self)
        self.runs = RunsPage(self)
        self.pages: dict[str, Page] = {
            page.name: page
            for page in (
                self.sample, self.circuit, self.mitigate, self.hardware, self.train, self.sweep, self.runs
            )
        }  # fmt: skip
        self.tabs = widgets.Tab(
            [page.widget for page in self.pages.values()], titles=[page.title for page in self.pages.values()]
        )
        heard_while_busy(self.tabs)
        style = widgets.HTML(f"<style>{CSS.read_text(encoding='utf-8')}</style>", layout={"display": "none"})
        super().__init__([style, self.tabs])
        self.add_class("qtx-workbench")
        self.tabs.observe(lambda _: self.remember(), "selected_index")
        self._worker()  # its imports take seconds: they are over when the first button is pressed

    @property
    def run(self) -> Run:
        """The run that keeps what is shown; made when it is first needed.

        Raises
        ------
        StorageError
            If it cannot be made.
        """
        with self._turn:
            if self._run is None:
                source = self.pages["sample"].forms["source"].spec if hasattr(self, "pages") else SourceSpec()
                self._run = Run.create(source, NAME, self.home)
                _OPEN[self._run.path.resolve()] = self
            return self._run

    @classmethod
    def restore(cls, run: str | Path | None = None, home: str | Path | None = None) -> Workbench:
        """The workbench as it was last kept: after a restart of the kernel, or to look at it again.

        Parameters
        ----------
        run : path, optional
            Of the run's folder; the newest workbench in `home` that no other process has open, where None.

        Raises
        ------
        ArgumentError
            If there is none, or if another process has it open.
        StorageError
            If it cannot be read.
        """
        found = Run.open(run) if run is not None else _newest(home)
        path = found.path.resolve()
        if path in _OPEN:
            return _OPEN[path]
        if found.status == "running":
            raise ArgumentError(f"run={str(found.path)!r} is open in another process: close it there first.")
        bench = cls(home=found.path.parent if home is None else home)
        bench._adopt(found)
        return bench

    def begin(
        self,
        task: str,
        arguments: Mapping[str, Any],
        follow: Callable[[Work], object],
        take: Callable[[Any], object],
    ) -> Work:
        """Start a task of `tasks` in a worker that has nothing to do."""
        with self._turn:
            return self._worker().start(task, follow=follow, take=take, **arguments)

    def remember(self) -> None:
        """Keep the state of all forms in the run, soon."""
        if not self._closed and not self.restoring and hasattr(self, "pages"):
            self._write.ask()

    def keep(self, name: str, result: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
        """Keep what came of a page's work in the run.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        arrays = {key: value for key, value in result.items() if isinstance(value, np.ndarray)}
        if sum(array.nbytes for array in arrays.values()) > MOST_KEPT:
            raise StorageError(
                f"The result of {name} is not kept for a restart: it has more than {MOST_KEPT >> 20} MiB."
            )
        rest = {key: value for key, value in result.items() if key not in arrays}
        about = json.dumps({"result": rest, "made_by": made_by}, allow_nan=True).encode()
        content = io.BytesIO()
        arrays["json"] = np.frombuffer(about, np.uint8)
        np.savez(content, allow_pickle=False, **arrays)
        folder = self.run.path / "results"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        write_atomic(folder / f"{name}.npz", content.getvalue())

    def where(self) -> str:
        """Which run keeps it, for the line at the bottom; HTML."""
        if self._trouble:
            return f'<span class="qtx-wb-trouble">not kept: {html.escape(self._trouble)}</span>'
        return "not kept yet" if self._run is None else f"kept in {html.escape(self._run.path.name)}"

    def list_jobs(self) -> None:
        """Show the jobs and runs as they are now."""
        with (
            TURN
        ):  # it loads qiskit, as the checks of a circuit's form do, and two threads must not do so at once
            if not self.jobs.children:
                from ..views.job_table import JobTable

                self.jobs.children = (JobTable(self.home),)
        threading.Thread(target=self.jobs.children[0].refresh, daemon=True).start()  # may wait for a server

    def refresh_picture(self) -> None:
        """Put a picture of the open tab where this was displayed: the one that a saved notebook keeps."""
        if self._handle is not None:
            self._handle.update(self._repr_mimebundle_(), raw=True)

    def flush(self) -> None:
        """Write down now what is still to be written."""
        self._write.flush()

    def close(self) -> None:
        """Stop all work, write the state down, and end the run."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        with self._turn:
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()
        if self._run is not None:
            _OPEN.pop(self._run.path.resolve(), None)
            self._run.finish("done")
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        data: dict[str, Any] = super()._repr_mimebundle_(**kwargs) or {}
        page = list(self.pages.values())[self.tabs.selected_index or 0]
        picture = page.picture()
        if picture is not None:
            data["image/png"] = base64.b64encode(picture).decode()
        shown = "its picture when it was last kept" if picture else "nothing was drawn there yet"
        data["text/plain"] = f"qtx_lab workbench, tab {page.title}: {shown}. It works where a kernel runs."
        return data

    def _ipython_display_(self, **kwargs: Any) -> None:
        self._handle = display(self._repr_mimebundle_(), raw=True, display_id=True)

    def _worker(self) -> Worker:
        """One that is idle, made if there is none."""
        with self._turn:
            if self._closed:
                raise ArgumentError("The workbench is closed: make a new one, or restore it.")
            idle = [worker for worker in self._workers if not worker.busy]
            for worker in idle[SPARE:]:
                self._workers.remove(worker)
                worker.close()
            if not idle:
                idle = [Worker()]
                self._workers += idle
            idle[0].warm()
            return idle[0]

    def _write_state(self) -> None:
        with TURN:
            before = self.where()
            state = {
                "tab": list(self.pages)[self.tabs.selected_index or 0],
                "forms": {name: page.state() for name, page in self.pages.items()},
            }
            try:
                write_atomic(self.run.path / STATE, json_bytes(state))
                self._trouble = ""
            except QtxError as error:  # told in the line at the bottom of every page
                self._trouble = str(error)
            if self.where() != before:
                for page in self.pages.values():
                    page.redraw_bar()

    def _adopt(self, run: Run) -> None:
        """Go on in a run that another process has left."""
        try:
            state = json.loads((run.path / STATE).read_bytes())
            forms, tab = dict(state["forms"]), str(state["tab"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{run.path} holds no state of a workbench: {error}.") from error
        with TURN, self._turn:
            self.restoring = True  # what is shown meanwhile is not to be kept
            self._run = run
            _OPEN[run.path.resolve()] = self
            run.update(status="running", process=provenance.this_process())
            for name, page in self.pages.items():
                page.set_state(forms.get(name, {}))
                path = run.path / "results" / f"{name}.npz"
                if path.exists():
                    page.put(*read_result(path))
            self.tabs.selected_index = list(self.pages).index(tab) if tab in self.pages else 0
            self.restoring = False


def write_inputs(
    path: Path, q: Tensor, k: Tensor, v: Tensor, tokens: Sequence[str] | None, is_causal: bool
) -> None:
    """Keep q, k and v for the workers, (layers, heads, positions, features).

    Raises
    ------
    ShapeError, DtypeError, ArgumentError
        If they do not fit each other, or the tokens them.
    StorageError
        If they cannot be written.
    """
    from ...attention import sampled_attention
    from ...errors import DtypeError, ShapeError

    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; it must be a Tensor.")
        if x.ndim not in (2, 3, 4):
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}; it must be (L, E), (H, L, E) or (layers, H, L, E)."
            )
    lifted = [x.detach().cpu()[(None,) * (4 - x.ndim)].contiguous() for x in (q, k, v)]
    q, k, v = lifted
    sampled_attention(  # refuses what does not fit
        q[:1, :, :1], k[:1], v[:1], num_samples=1, enable_gqa=q.shape[1] != k.shape[1]
    )
    if len({len(x) for x in lifted}) > 1:
        raise ShapeError(f"q, k, v have {[len(x) for x in lifted]} layers; they must have the same.")
    if tokens is not None and len(tokens) != k.shape[-2]:
        raise ShapeError(
            f"tokens has {len(tokens)} entries; there are {k.shape[-2]} keys, and each needs one."
        )
    about = {"tokens": json.dumps(list(tokens or ())), "is_causal": json.dumps(bool(is_causal))}
    write_tensors(path, {"q": q, "k": k, "v": v}, about)


def read_result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A result that `Workbench.keep` wrote, and the forms that it was made by.

    Raises
    ------
    StorageError
        If it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}
        about = json.loads(arrays.pop("json").tobytes())
        return {**about["result"], **arrays}, about["made_by"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StorageError(f"Cannot read {path}: {error}.") from error


def _newest(home: str | Path | None) -> Run:
    table = runs(home)
    for row in table[table["name"] == NAME].itertuples():
        path = Path(row.path)
        if (path / STATE).exists() and (row.status != "running" or path.resolve() in _OPEN):
            return Run.open(path)
    raise ArgumentError("There is no workbench to restore: `Workbench()` starts one.")
