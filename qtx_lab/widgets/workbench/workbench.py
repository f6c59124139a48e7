"""`Workbench`: the whole lab in one notebook cell; what it shows is saved in a run, and can be restored."""

from __future__ import annotations

import atexit
import base64
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload
from weakref import WeakValueDictionary

import ipywidgets as widgets
from IPython.display import display
from torch import Tensor

from ...checks import check_flags
from ...errors import ArgumentError, QtxError, SpecError, StorageError
from ...experiments import provenance
from ...experiments.manifest import creation_order
from ...experiments.runs import Run
from ...storage import json_bytes, runs_home, storage_error, write_atomic
from ..comms import hear_while_busy
from ..forms import FORM_LOCK, SpecForm
from ..throttle import ThrottledCall
from ..views.base import ONE_OUTPUT_HOSTS, display_with_picture
from .process import ProcessWorker, Work
from .saved import mark_cancelled, read_result, write_inputs, write_result
from .tab import WorkbenchTab
from .tabs import (
    CalibrateTab,
    CircuitTab,
    HardwareTab,
    MitigateTab,
    RunsTab,
    SampleTab,
    SourceSpec,
    SweepTab,
    TrainTab,
    spread_rows,
)

T = TypeVar("T", bound=WorkbenchTab)

CSS = Path(__file__).parent / "workbench.css"

RUN_NAME = "workbench"
"""Name of the runs in which workbenches are saved."""

STATE_FILE = "workbench.json"
"""The file in the run's folder that holds the fields of all forms, and which tab is open."""

INPUTS_FILE = "inputs.safetensors"
"""The file in the run's folder that holds the user's own q, k and v."""

OWN_FIELDS = ("layer", "head", "seed")
"""What can be chosen where q, k and v are the user's own."""

PICTURE_DELAY_S = 3.0
"""Seconds without a new result after which the picture of a saved notebook is renewed."""

SAVE_INTERVAL_S = 0.2
"""Seconds between two savings of the state, at least."""

MAX_IDLE_WORKERS = 2
"""Worker processes that stay when they have nothing to do; each takes a few hundred MB."""

WORKER_DELAY_S = 1.5
"""Seconds after the display in which no worker is started, because its imports would hold up the picture."""

_OPEN: WeakValueDictionary[Path, Workbench] = WeakValueDictionary()
"""The open workbenches of this process by their run; there is one for a run, at most."""

TABS: tuple[type[WorkbenchTab], ...] = (
    SampleTab, CircuitTab, MitigateTab, HardwareTab, CalibrateTab, TrainTab, SweepTab, RunsTab,
)  # fmt: skip
"""The tabs, in the order of the work."""

TITLES = {tab.name: tab.title for tab in TABS}
"""What stands on each tab, by its name."""

OPENING = '<div class="qtx-wb-empty" role="status">This tab comes here in a moment.</div>'
"""What stands in the place of a tab that is not yet made."""


class MadeWhenNeeded(Generic[T]):
    """A tab of a workbench, which is made when it is first opened, or when code first asks for it.

    Parameters
    ----------
    make : callable
        Makes the tab of a workbench.
    """

    def __init__(self, make: Callable[[Workbench], T]):
        self._make, self._name = make, ""

    def __set_name__(self, owner: type[Workbench], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, bench: None, owner: type[Workbench]) -> Self: ...

    @overload
    def __get__(self, bench: Workbench, owner: type[Workbench]) -> T: ...

    def __get__(self, bench: Workbench | None, owner: type[Workbench]) -> T | Self:
        if bench is None:
            return self
        if self._name not in bench.made_tabs:
            with FORM_LOCK:  # so that two threads do not make two
                if self._name not in bench.made_tabs:
                    bench.take_in(self._make(bench))
        tab: Any = bench.made_tabs[self._name]
        return tab


class TabsByName(Mapping[str, WorkbenchTab]):
    """The tabs of a workbench by name, in the order of the work; to look one up makes it.

    Parameters
    ----------
    bench : Workbench
    """

    def __init__(self, bench: Workbench):
        self._bench = bench

    def __getitem__(self, name: str) -> WorkbenchTab:
        tab: WorkbenchTab = getattr(self._bench, name)
        return tab

    def __iter__(self) -> Iterator[str]:
        return iter(TITLES)

    def __len__(self) -> int:
        return len(TITLES)


class Workbench(widgets.VBox):
    """The lab in tabs: Sample, Circuit, Mitigate, Hardware, Calibrate, Train, Sweep and Runs.

    Long work runs in other processes, so that the kernel stays free, and Cancel ends it at once. A tab is
    made when it is first opened, so that the first picture does not wait for all of them. From code, a tab is
    an attribute: `wb.sample.form.change(num_samples=128)`, `wb.sample.start().wait()`, `wb.sample.result`.

    Parameters
    ----------
    q, k, v : Tensor, optional
        Your own inputs, (L, E), (H, L, E) or (layers, H, L, E), in place of a model's.
    model : str or path
        A name as `language_models` lists them, such as "smollm2-135m", or the folder of a Hugging Face model.
    text : str or path
        "reference" for the text that is shipped, or a UTF-8 file.
    num_tokens : int
        Length of the text's beginning that is used.
    tokens : sequence of str, optional
        With q, k and v: what stands at each key.
    is_causal : bool
        With q, k and v.
    home : path, optional
        Folder of the run; see `runs_home`. The run's own folder is made when something is first changed or
        started.

    Raises
    ------
    ArgumentError, ShapeError, DtypeError
        If some of q, k, v are given without the others, or together with a model; if their shapes do not fit.

    Examples
    --------
    >>> bench = Workbench()
    >>> list(bench.tabs)
    ['sample', 'circuit', 'mitigate', 'hardware', 'calibrate', 'train', 'sweep', 'runs']
    >>> bench.sample.form.spec.num_samples
    64
    >>> bench.close()
    """

    source: SpecForm
    sample = MadeWhenNeeded(lambda bench: SampleTab(bench, bench.source))
    circuit = MadeWhenNeeded(lambda bench: CircuitTab(bench, bench.sample))
    mitigate = MadeWhenNeeded(lambda bench: MitigateTab(bench, bench.circuit))
    hardware = MadeWhenNeeded(lambda bench: HardwareTab(bench, bench.circuit))
    calibrate = MadeWhenNeeded(lambda bench: CalibrateTab(bench, bench.sample))
    train = MadeWhenNeeded(TrainTab)
    sweep = MadeWhenNeeded(SweepTab)
    runs = MadeWhenNeeded(RunsTab)

    _display_handle: Any
    _closed = True  # until it is made, because ipywidgets closes a widget whose arguments were refused

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
        check_flags(is_causal=is_causal)
        num_tensors = sum(x is not None for x in (q, k, v))
        if num_tensors and (num_tensors < 3 or model != "reference" or text != "reference"):
            raise ArgumentError("q, k and v belong together, without model or text: give all three, or none.")
        self.home, self._lock = runs_home(home), threading.RLock()
        self._run: Run | None = None
        self._workers: list[ProcessWorker] = []
        self._closed, self._save_problem = False, ""
        self.restoring = True  # nothing is saved before all is there
        self._save_call = ThrottledCall(self._save_state, SAVE_INTERVAL_S)
        self._picture_timer: threading.Timer | None = None
        self._worker_timer: threading.Timer | None = None
        self._display_handle = None
        self._source = SourceSpec(model=str(model), text=str(text), num_tokens=num_tokens)
        if q is not None and k is not None and v is not None:
            path = self.run.path.resolve() / INPUTS_FILE
            layers = write_inputs(path, q, k, v, tokens, is_causal)
            self._source = SourceSpec(model=str(path), layer=min(3, layers - 1))
            num_tokens = q.shape[-2]
        self.source = SpecForm(self._source, title="What is looked at")
        self.source.add_class("qtx-wb-source")
        self._arrange_source()
        self.source.observe(self._source_changed, "spec")
        self.job_box = widgets.VBox()  # in the Hardware and in the Runs tab
        self.made_tabs: dict[str, WorkbenchTab] = {}
        self.tabs = TabsByName(self)
        self._num_queries = num_tokens
        self._selected_rows: tuple[int, ...] = ()  # in the lens, while there is no Circuit tab
        self._saved_forms: dict[str, Any] = {}  # of the tabs that are not made yet
        opening, layout = widgets.HTML(OPENING), widgets.Layout()
        self._places = {name: widgets.VBox([opening], layout=layout) for name in TITLES}
        self.tab_bar = widgets.Tab(list(self._places.values()), titles=list(TITLES.values()))
        hear_while_busy(self.tab_bar)
        style = widgets.HTML(f"<style>{CSS.read_text(encoding='utf-8')}</style>", layout={"display": "none"})
        super().__init__([style, self.source, self.tab_bar])
        self.add_class("qtx-workbench")
        self.tab_bar.observe(lambda _: self._tab_opened(), "selected_index")
        _ = self.sample  # which is shown at first
        self.restoring = False
        if num_tensors:  # which have a run already, and can be restored from now on
            self.request_save()

    @property
    def run(self) -> Run:
        """The run in which everything is saved; made when it is first needed.

        Raises
        ------
        StorageError
            If it cannot be made.
        """
        with self._lock:
            if self._run is None:
                self._run = Run.create(self._source, RUN_NAME, self.home)
                _OPEN[self._run.path.resolve()] = self
            return self._run

    @property
    def open_tab_name(self) -> str:
        """Name of the tab that is open."""
        return list(TITLES)[self.tab_bar.selected_index or 0]

    @classmethod
    def restore(cls, run: str | Path | None = None, home: str | Path | None = None) -> Workbench:
        """The workbench as it was saved last: after a restart of the kernel, or to look at it again.

        Parameters
        ----------
        run : path, optional
            The run's folder; the newest workbench in `home` that no other process has open, where None.
        home : path, optional
            See `runs_home`.

        Raises
        ------
        ArgumentError
            If there is none, or if another process has it open.
        StorageError
            If it cannot be read.
        """
        saved = Run.open(run) if run is not None else _newest(home)
        path = saved.path.resolve()
        if path in _OPEN:
            return _OPEN[path]
        if saved.status == "running":
            raise ArgumentError(f"run={str(saved.path)!r} is open in another process: close it there first.")
        bench = cls(home=saved.path.parent if home is None else home)
        bench._continue_run(saved)
        return bench

    def start_task(
        self,
        task: str,
        arguments: Mapping[str, Any],
        on_change: Callable[[Work], object],
        on_data: Callable[[Any], object],
    ) -> Work:
        """Start a function of `tasks.registry` in an idle worker; see `ProcessWorker.start`."""
        with self._lock:
            return self._idle_worker().start(task, on_change=on_change, on_data=on_data, **arguments)

    def mark_cancelled(self, work: Work) -> None:
        """Record soon that the runs of this work were cancelled."""
        mark = partial(mark_cancelled, self.home, work.process_id)
        threading.Thread(target=mark, daemon=True).start()

    def open_tab(self, name: str) -> None:
        """Show the tab with this name."""
        self.tab_bar.selected_index = list(TITLES).index(name)

    def take_in(self, tab: WorkbenchTab) -> None:
        """Put a tab that was just made into its place, and into it what was saved of it."""
        self.made_tabs[tab.name] = tab
        if isinstance(tab, CircuitTab):
            self.fit_rows(self._num_queries)
            if self._selected_rows:
                tab.take_rows(self._selected_rows)
        if tab.name in self._saved_forms:
            try:
                self._show_saved(tab)
            except StorageError as error:
                tab.show_problem(str(error))
        self._places[tab.name].children = (tab.widget,)  # last, so that nobody sees fields that are replaced
        self.request_save()

    def _show_saved(self, tab: WorkbenchTab) -> None:
        """Show in a tab the fields and the result that are saved of it."""
        restoring, self.restoring = self.restoring, True  # nothing of this is to be saved
        try:
            tab.set_state(self._saved_forms.pop(tab.name))
            path = self.run.path / "results" / f"{tab.name}.npz"
            if path.exists():
                tab.show_saved(*read_result(path))
        finally:
            self.restoring = restoring

    def _tab_opened(self) -> None:
        self.request_save()
        tab = self.tabs[self.open_tab_name]
        tab.opened()
        if tab.result is not None:
            self.request_picture()

    def measure_rows(self, rows: tuple[int, ...]) -> None:
        """Enter these queries in the Circuit tab as the rows to measure, and open that tab."""
        self.choose_rows(rows)
        self.open_tab("circuit")

    def choose_rows(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Enter these queries in the Circuit tab as the rows to measure; those that it takes."""
        with FORM_LOCK:
            if self.restoring and "circuit" not in self.made_tabs:
                self._selected_rows = rows
                return spread_rows(rows)
            return self.circuit.take_rows(rows)

    def fit_rows(self, num_queries: int) -> None:
        """Leave out of the rows to measure those that there are not; the last one takes their place."""
        self._num_queries = num_queries
        if "circuit" in self.made_tabs:  # the tab is fitted, too, when it is made
            rows = self.circuit.rows
            if any(row >= num_queries for row in rows):
                self.choose_rows(tuple(row for row in rows if row < num_queries) or (num_queries - 1,))

    def request_save(self) -> None:
        """Save the state of all forms soon."""
        if not self._closed and not self.restoring:
            self._save_call.request()

    def save_result(self, name: str, result: Mapping[str, Any], forms: Mapping[str, Any]) -> None:
        """Save what came of a tab's work, and the forms that led to it, in the run.

        Raises
        ------
        StorageError
            If it is too large, or cannot be written.
        """
        write_result(self.run.path / "results" / f"{name}.npz", result, forms)
        self.request_picture()

    def runs_folder(self) -> str:
        """The folder in which the tasks make their runs: that of the workbench's own run."""
        return str(self.run.path.parent.resolve())

    def storage_note(self) -> str:
        """A text for the status line: the run in which everything is saved."""
        if self._save_problem:
            return f"not saved: {self._save_problem}"
        return "not saved yet" if self._run is None else f"saved in {self._run.path.name}"

    def storage_place(self) -> str:
        """The path of that run; empty before there is one."""
        return "" if self._run is None else str(self._run.path)

    def list_jobs(self) -> None:
        """List the jobs and the runs as they are now."""
        # This loads qiskit, as the check of a circuit's form does, and two threads must not do so at the same
        # time.
        with FORM_LOCK:
            if not self.job_box.children:
                from ..views.job_table import JobTable

                self.job_box.children = (JobTable(self.home),)
        # In a thread, because it may wait for a server.
        threading.Thread(target=self.job_box.children[0].refresh, daemon=True).start()

    def request_picture(self) -> None:
        """Renew soon the picture that a saved notebook shows in place of the workbench."""
        with self._lock:
            if self._picture_timer is not None:
                self._picture_timer.cancel()
            if self._display_handle is not None and not self._closed:
                self._picture_timer = threading.Timer(PICTURE_DELAY_S, self.refresh_picture)
                self._picture_timer.daemon = True
                self._picture_timer.start()

    def refresh_picture(self) -> None:
        """Renew the picture of the open tab that a saved notebook shows in place of the workbench."""
        if self._display_handle is not None:
            in_one = any(name in os.environ for name in ONE_OUTPUT_HOSTS)
            data = self._repr_mimebundle_() if in_one else self._saved_picture()
            self._display_handle.update(data, raw=True)

    def flush(self) -> None:
        """Write down now what is still to be written."""
        self._save_call.flush()

    def close(self) -> None:
        """Stop all work, write the state down, and end the run."""
        if not self._closed:
            self.end_work()
            super().close()

    def end_work(self) -> None:
        """Do as `close`, but leave the widgets to the browser, as at the end of the kernel."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        with self._lock:
            for timer in (self._picture_timer, self._worker_timer):
                if timer is not None:
                    timer.cancel()
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.close()
        if self._run is not None:
            _OPEN.pop(self._run.path.resolve(), None)
            self._run.finish("done")

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        data: dict[str, Any] = super()._repr_mimebundle_(**kwargs) or {}
        return {**data, **self._saved_picture()}

    def _saved_picture(self) -> dict[str, str]:
        """The output that stands for the workbench where there is no kernel.

        It shows the open tab or, where nothing was drawn there yet, the first tab that has a result.
        """
        shown = self.tabs[self.open_tab_name]
        if shown.result is None:
            shown = next((tab for tab in self.made_tabs.values() if tab.result is not None), shown)
        picture = shown.picture()
        data = self._saved_text(picture, shown.name)
        if picture is not None:
            data["image/png"] = base64.b64encode(picture).decode()
        return data

    def _saved_text(self, picture: bytes | None, name: str) -> dict[str, str]:
        """The words that stand for the workbench where there is no kernel."""
        content = "the picture of its last saving" if picture else "nothing was drawn there yet"
        text = f"qtx_lab workbench, tab {TITLES[name]}: {content}. It works where a kernel runs."
        return {"text/plain": text}

    def _ipython_display_(self, **kwargs: Any) -> None:
        if any(name in os.environ for name in ONE_OUTPUT_HOSTS):
            self._display_handle = display(self._repr_mimebundle_(), raw=True, display_id=True)
        else:
            widget = super()._repr_mimebundle_(**kwargs) or {}
            # The picture itself comes when the workbench is shown, because to draw it takes matplotlib.
            self._display_handle = display_with_picture(self._saved_text(None, self.open_tab_name), widget)
            if self.tabs[self.open_tab_name].result is not None:
                self.request_picture()
        self.sample.draw_first()
        # Its imports take seconds: they are over when the first button is pressed.
        self._worker_timer = threading.Timer(WORKER_DELAY_S, self._prepare_worker)
        self._worker_timer.daemon = True
        self._worker_timer.start()

    def _prepare_worker(self) -> None:
        """Start a worker, so that it is ready for the first work, unless the workbench is closed by now."""
        with suppress(ArgumentError):
            self._idle_worker()

    def _idle_worker(self) -> ProcessWorker:
        """A worker that has nothing to do; a new one if there is none. Spare ones are closed."""
        with self._lock:
            if self._closed:
                raise ArgumentError("The workbench is closed: make a new one, or restore it.")
            idle = [worker for worker in self._workers if not worker.busy]
            for worker in idle[MAX_IDLE_WORKERS:]:
                self._workers.remove(worker)
                worker.close()
            if not idle:
                idle = [ProcessWorker()]
                self._workers += idle
            idle[0].start_process()
            return idle[0]

    def _source_changed(self, change: Any) -> None:
        self._source = change.new

    def _arrange_source(self) -> None:
        """Show in the bar what can be chosen: of a user's own q, k and v only the layer and the head."""
        own = self.source.spec.to_parameters()["model"].endswith(INPUTS_FILE)
        self.source.show_fields(*(OWN_FIELDS if own else SourceSpec.model_fields))
        self.source.arrange("bar")

    def _save_state(self) -> None:
        with FORM_LOCK:
            before = self.storage_note()
            state = {
                "tab": self.open_tab_name,
                "source": self.source.spec.to_parameters(),
                "forms": self._saved_forms | {name: tab.state() for name, tab in self.made_tabs.items()},
                "lens": self.sample.lens_state(),
            }
            try:
                write_atomic(self.run.path / STATE_FILE, json_bytes(state))
                self.sample.save_first_picture()
                self._save_problem = ""
            except QtxError as error:  # shown in the status line of every tab
                self._save_problem = str(error)
            if self.storage_note() != before:
                for tab in self.made_tabs.values():
                    tab.request_status()

    def _continue_run(self, run: Run) -> None:
        """Show what is saved in a run that another process has left, and continue it."""
        try:
            state = json.loads((run.path / STATE_FILE).read_bytes())
            forms, open_tab = dict(state["forms"]), str(state["tab"])
            source = SourceSpec(**state["source"])
        except (OSError, ValueError, KeyError, TypeError, SpecError) as error:
            raise StorageError(f"{run.path} holds no state of a workbench: {error}.") from error
        with FORM_LOCK, self._lock:
            self.restoring = True  # nothing of this is to be saved
            self._run = run
            _OPEN[run.path.resolve()] = self
            run.update(status="running", process=provenance.this_process())
            self.source.spec = source
            self._arrange_source()
            self._saved_forms = {name: forms.get(name, {}) for name in TITLES}
            self._show_saved(self.sample)
            # Before the rows of Circuit, which may be others than those selected.
            self.sample.set_lens_state(state.get("lens") or {})
            self.open_tab(open_tab if open_tab in TITLES else "sample")
            self.restoring = False
            for tab in self.made_tabs.values():
                tab.request_status()  # says where all is saved


@atexit.register
def _close_all() -> None:
    """End the runs of the workbenches that are open when their kernel ends: those are not interrupted."""
    for bench in list(_OPEN.values()):
        with suppress(Exception):
            bench.end_work()


def _newest(home: str | Path | None) -> Run:
    """The run of a workbench that was created last and that no other process has open."""
    folder = runs_home(home)
    try:  # without `runs`, whose table takes pandas and DuckDB
        saved = [Run(path) for path in folder.iterdir() if (path / STATE_FILE).exists()]
    except FileNotFoundError:
        saved = []
    except OSError as error:
        raise storage_error(folder, error) from error
    free: list[tuple[tuple[int, int], Run]] = []
    for run in saved:
        with suppress(StorageError):  # of what is no run, or a broken one
            manifest = run.manifest
            is_free = manifest["status"] != "running" or run.path.resolve() in _OPEN
            if manifest["name"] == RUN_NAME and is_free:
                free.append((creation_order(manifest), run))
    if not free:
        raise ArgumentError("There is no workbench to restore: `Workbench()` starts one.")
    return max(free, key=lambda pair: pair[0])[1]
