"""`CircuitView`: an attention row as a circuit, where it runs, what was measured, and the zero-noise fit."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import traitlets
from qiskit import QuantumCircuit
from qiskit.circuit import ControlFlowOp
from torch import Tensor

from ... import theme as look
from ...backends import QiskitQuantumBackend, RowCounts
from ...backends.aer import AerEngine
from ...backends.noise import fake_device, reduced_target
from ...checks import check_count
from ...circuits import check_rows
from ...circuits.fidelity import hellinger_fidelity
from ...circuits.resources import resources
from ...errors import ArgumentError, DtypeError, ShapeError, unknown_name
from ...mitigation import ZeroNoiseExtrapolation, project_to_simplex, scale_noise
from ...mitigation.zne import METHODS
from .base import View, Worker

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .lens import AttentionLens

NO_ADVANTAGE = (
    "Loading a row that is known into a circuit gives no advantage over drawing from it on a classical computer: "
    "the grey baseline is as many classical draws."
)

BATCHES = 16
"""Parts in which a simulator's shots are run, so that they are seen to arrive."""

MOST_COLUMNS = 240
"""Columns of gates that are drawn."""

RESAMPLES = 100
"""Of the bootstrap behind the error bars of a fidelity."""


class CircuitView(View):
    """A row's circuit and its cost, the qubits that it runs on, measured against exact, and fidelity as shots arrive.

    On simulators and device twins the noise can be scaled: the zero-noise fit is drawn as the levels are moved. Beside
    every measurement stands the baseline, as many classical draws: loading a known row gives no advantage.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    p : Tensor, (R, n), optional
        Rows to choose from; `show_rows` and `follow` give others.
    row : int
        Which is shown.
    shots : int, optional
        The backend's, where None.
    noise_levels : sequence of float
        Of the zero-noise extrapolation; 1 is the device's own noise.
    method : str
        One of "richardson", "linear", "polynomial", "exponential".
    seed : int
        Of shots and baseline.

    Raises
    ------
    DtypeError, ShapeError, ArgumentError
        As `QiskitQuantumBackend.sample_rows` and `ZeroNoiseExtrapolation`; a row that is not there.

    Examples
    --------
    >>> import torch
    >>> from qtx_lab.backends import QiskitQuantumBackend
    >>> view = CircuitView(QiskitQuantumBackend("aer"), torch.tensor([[0.5, 0.25, 0.25, 0.0]]), shots=400)
    >>> view.run()
    >>> int(view.result.counts.sum())
    400
    """

    num_rows = traitlets.Int(0, read_only=True).tag(sync=True)
    names = traitlets.List(traitlets.Unicode(), read_only=True).tag(sync=True)
    """What each row is called."""
    row = traitlets.Int(0).tag(sync=True)
    shots = traitlets.Int(1024).tag(sync=True)
    noise_levels = traitlets.List(traitlets.Float()).tag(sync=True)
    method = traitlets.Unicode("linear").tag(sync=True)
    methods = traitlets.List(traitlets.Unicode(), list(METHODS), read_only=True).tag(sync=True)
    note = traitlets.Unicode(NO_ADVANTAGE, read_only=True).tag(sync=True)

    def __init__(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor | None = None,
        *,
        row: int = 0,
        shots: int | None = None,
        noise_levels: Sequence[float] = (1.0, 2.0, 3.0),
        method: str = "linear",
        seed: int = 0,
    ):
        if not isinstance(backend, QiskitQuantumBackend):
            raise DtypeError(f"backend is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")
        self.backend, self._seed = backend, int(seed)
        self._p: Tensor | None = None
        self._turn = threading.RLock()
        self._stop = threading.Event()
        self._runner = Worker(self.fail)
        self._counts: Tensor | None = None  # (1, n) of the shown row
        self._classical: Tensor | None = None
        self._discarded = 0
        self._done = 0
        self._diagnostics: Mapping[str, Any] = {}
        self._curve: list[dict[str, float]] = []
        self._levels: dict[tuple[float, int], Tensor] = {}  # (level, shots) -> shares of the shown row
        self._extrapolated: dict[str, Any] | None = None
        super().__init__(
            "circuit",
            shots=backend.shots if shots is None else shots,
            noise_levels=list(noise_levels),
            method=method,
        )
        ZeroNoiseExtrapolation(self.noise_levels, self.method)
        self.observe(lambda _: self._show(), "row")
        if p is not None:
            self.show_rows(p, row)

    @traitlets.validate("row", "shots", "method")
    def _check(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "shots":
            check_count(name, value)
        elif name == "method" and value not in METHODS:
            raise unknown_name("method", value, METHODS)
        elif name == "row" and not 0 <= value < max(1, self.num_rows):
            raise ArgumentError(f"row={value} is not allowed: it must be in 0..{self.num_rows - 1}.")
        return value

    @property
    def result(self) -> RowCounts:
        """The shown row's counts so far, (1, n), with the classical baseline of as many shots."""
        with self._turn:
            if self._counts is None or self._classical is None:
                raise ArgumentError("No row is shown: give one with show_rows(p).")
            left = torch.tensor([self._discarded])
            baseline = RowCounts(self._classical.clone(), torch.zeros(1, dtype=torch.int64), self._done)
            return RowCounts(self._counts.clone(), left, self._done, baseline, self._diagnostics)

    def show_rows(self, p: Tensor, row: int = 0, *, names: Sequence[str] | None = None) -> None:
        """Show other rows, (R, n), by their names; what was measured of the last ones is forgotten."""
        p = check_rows(p)
        if len(p) == 0:
            raise ArgumentError("p has no rows; at least one is needed.")
        names = [f"row {i}" for i in range(len(p))] if names is None else [str(x) for x in names]
        if len(names) != len(p):
            raise ShapeError(f"names has {len(names)} entries; p has {len(p)} rows, and each needs one.")
        if not 0 <= row < len(p):
            raise ArgumentError(f"row={row} is not allowed: it must be in 0..{len(p) - 1}.")
        with self._turn:
            self._p = p
            self.set_trait("names", names)
            self.set_trait("num_rows", len(p))
            if self.row == row:
                self._show()
            else:
                self.row = row

    def follow(self, lens: AttentionLens) -> None:
        """Show the rows that are selected in a lens, now and whenever others are."""

        def show() -> None:
            if lens.selected_rows:
                self.show_rows(lens.rows(), names=[f"query {i}" for i in lens.selected_rows])

        show()
        lens.observe(lambda _: show(), "selected_rows")

    def run(self, shots: int | None = None) -> None:
        """Measure the shown row, in parts, and return when all is there or `cancel` was called."""
        self._stop.clear()
        self._measure(self.shots if shots is None else shots)

    def fill(self, found: RowCounts, curve: Sequence[Mapping[str, float]] = ()) -> None:
        """Show what was measured elsewhere of the shown row, in place of what was measured here.

        Parameters
        ----------
        found : RowCounts, (1, n)
            With its classical baseline.
        curve : sequence of mapping
            The fidelity as shots arrived: `shots`, `fidelity`, `error` (standard error), `classical`.

        Raises
        ------
        ArgumentError, ShapeError
            No row is shown; counts of other keys, or without a baseline.
        """
        shape = tuple(self._row_p().shape)
        if found.classical is None or tuple(found.counts.shape) != shape:
            raise ShapeError(
                f"found has counts {tuple(found.counts.shape)}; they must be {shape}, with a baseline."
            )
        with self._turn:
            self._counts, self._classical = found.counts.clone(), found.classical.counts.clone()
            self._discarded, self._done = int(found.discarded.sum()), found.shots
            self._curve, self._diagnostics = [dict(point) for point in curve], found.diagnostics
        self._send_counts()

    def cancel(self) -> None:
        """Stop a run after the part that is being measured."""
        self._stop.set()

    def frame(self) -> pd.DataFrame:
        """Of each key: `exact`, `count`, `classical` (counts), `mitigated` and `mitigated_error`."""
        import pandas as pd

        p = self._row_p()
        found = self.result
        assert found.classical is not None
        columns = {
            "key": np.arange(p.shape[-1]),
            "exact": p[0].numpy(),
            "count": found.counts[0].numpy(),
            "classical": found.classical.counts[0].numpy(),
        }
        if self._extrapolated is not None:
            columns |= {
                "mitigated": np.array(self._extrapolated["p"]),
                "mitigated_error": np.array(self._extrapolated["p_error"]),
            }
        return pd.DataFrame(columns)

    def figure(self, theme: str = "light") -> Figure:
        """Distribution, fidelity against shots and, where there is one, the zero-noise fit."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        c = look.colours_of(theme)
        accent = look.SAMPLER_COLOURS["systematic"] if theme == "light" else c["accent"]
        style: Any = look.matplotlib_style(theme)
        with mpl.rc_context(style):
            figure = Figure(figsize=(12.4, 4.6), layout="constrained")
            if self._p is None:
                figure.text(0.5, 0.5, "No row is shown", ha="center")
                return figure
            frame = self.frame()
            fit = self._extrapolated
            axes = figure.subplots(1, 3 if fit else 2, width_ratios=[1.6, 1, 1] if fit else [1.6, 1])
            ax, done = axes[0], max(1, self._done)
            kept = frame[(frame["exact"] > 0) | (frame["count"] > 0)]
            ax.stem(kept["key"], kept["exact"], linefmt=c["exact"], markerfmt=" ", basefmt=" ", label="exact")
            share = kept["classical"] / done
            ax.plot(
                kept["key"], share, "_", color=c["baseline"], markersize=9, label=f"{done} classical draws"
            )
            share = kept["count"] / max(1, frame["count"].sum())
            bars = 1.96 * np.sqrt(share * (1 - share) / max(1, frame["count"].sum()))
            ax.errorbar(
                kept["key"], share, bars, fmt="o", mfc="none", color=accent, markersize=5, capsize=2,
                label="measured (bars: 95 %)",
            )  # fmt: skip
            if fit:
                ax.errorbar(
                    kept["key"] + 0.2, kept["mitigated"], 1.96 * kept["mitigated_error"], fmt="o",
                    color=accent, markersize=5, capsize=2, label="extrapolated to no noise",
                )  # fmt: skip
            ax.set_xlabel("key")
            ax.set_ylabel("probability")
            ax.set_ylim(bottom=0)
            ax.legend(fontsize=9)
            ax = axes[1]
            curve = self._curve
            at = [point["shots"] for point in curve]
            ax.plot(at, [x["classical"] for x in curve], "--", color=c["baseline"], label="classical draws")
            ax.errorbar(
                at, [x["fidelity"] for x in curve], [1.96 * x["error"] for x in curve], fmt="o", mfc="none",
                color=accent, capsize=2, label="measured",
            )  # fmt: skip
            ax.set_xscale("log")
            ax.set_xlabel("shots")
            ax.set_ylabel("Hellinger fidelity")
            if curve:
                ax.legend(fontsize=9, loc="lower right")
            if fit:
                ax = axes[2]
                ax.plot(*np.array(fit["fit"]).T, color=accent, linewidth=1.2)
                ax.errorbar(
                    fit["levels"], fit["values"], 1.96 * np.array(fit["errors"]), fmt="o", mfc="none",
                    color=accent, capsize=2,
                )  # fmt: skip
                ax.errorbar(
                    [0], [fit["answer"]], [1.96 * fit["answer_error"]], fmt="o", color=accent, capsize=2
                )
                ax.axhline(fit["exact"], color=c["exact"], linewidth=1.2)
                ax.set_xlabel("noise level (1: the device's own)")
                ax.set_ylabel(f"probability of key {fit['key']}")
            figure.suptitle(
                f"{self.names[self.row].capitalize()} on {self.backend.engine.name}, {self.backend.loader.name} loader, "
                f"{self._done} shots, seed {self._seed}",
                x=0.01, ha="left", fontweight="bold", fontsize=12,
            )  # fmt: skip
            figure.supxlabel(NO_ADVANTAGE, fontsize=8.5, color=c["muted"])
        return figure

    def _row_p(self) -> Tensor:
        if self._p is None:
            raise ArgumentError("No row is shown: give one with show_rows(p).")
        return self._p[self.row : self.row + 1]

    def _on_message(self, content: Mapping[str, Any]) -> None:
        kind = content["kind"]
        if kind == "ready":
            self._worker.put("circuit", self._send_circuit)
            self._worker.put("counts", self._send_counts)
        elif kind == "run":
            self._stop.clear()
            self._runner.put("run", partial(self._measure, int(content["shots"])))
        elif kind == "cancel":
            self.cancel()
        elif kind == "zne":
            key = content.get("key")
            levels = [float(level) for level in content["levels"]]
            task = partial(self._send_fit, levels, str(content["method"]), key if key is None else int(key))
            self._worker.put("zne", task)

    def _show(self) -> None:
        """Begin with a row."""
        self._stop.set()
        with self._turn:
            n = self._row_p().shape[-1]
            self._counts = torch.zeros(1, n, dtype=torch.int64)
            self._classical = torch.zeros(1, n, dtype=torch.int64)
            self._discarded = self._done = 0
            self._curve, self._extrapolated, self._diagnostics = [], None, {}
            self._levels.clear()
        self._worker.put("circuit", self._send_circuit)
        self._worker.put("counts", self._send_counts)

    def _measure(self, shots: int) -> None:
        check_count("shots", shots)
        p = self._row_p()
        counts = self._counts
        parts = _batches(shots, 1 if hasattr(self.backend.engine, "submit") else BATCHES)
        self.send({"kind": "running", "asked": shots})
        try:
            for part in parts:
                if self._stop.is_set() or self._counts is not counts:
                    break
                with self._turn:
                    generator = torch.Generator().manual_seed(self._seed + 7919 * (self._done + 1))
                found = self.backend.sample_rows(p, part, generator=generator)
                assert found.classical is not None
                with self._turn:
                    if self._counts is not counts or counts is None or self._classical is None:
                        break  # another row is shown
                    counts += found.counts
                    self._classical += found.classical.counts
                    self._discarded += int(found.discarded.sum())
                    self._done += part
                    self._diagnostics = found.diagnostics
                    self._curve.append(self._fidelity(p))
                self._send_counts()
        finally:
            self.send({"kind": "ended", "done": self._done})

    def _fidelity(self, p: Tensor) -> dict[str, float]:
        assert self._counts is not None
        assert self._classical is not None
        generator = torch.Generator().manual_seed(self._seed)
        measured, classical = (
            hellinger_fidelity(counts, p, resamples=RESAMPLES, generator=generator)
            for counts in (self._counts, self._classical)
        )
        return {
            "shots": self._done,
            "fidelity": float(measured.value),
            "error": float(measured.std_error),
            "classical": float(classical.value),
        }

    def _send_circuit(self) -> None:
        if self._p is None:
            return
        p = self._row_p()
        drawn = self.backend.loader.circuit(self.backend.loader.size(p.shape[-1]))
        self.send(
            {"kind": "circuit", "loader": self.backend.loader.name, "drawing": drawing(drawn),
             "device": self.backend.engine.name, "noisy": self._can_scale(), "exact": p[0].tolist()}
        )  # fmt: skip
        facts = resources(self.backend.transpiled(p.shape[-1]))  # may take seconds: the picture comes first
        self.send(
            {"kind": "device", "depth": facts.depth, "two_qubit_gates": facts.two_qubit_gates,
             "qubits": facts.qubits, "region": region(self.backend, p.shape[-1])}
        )  # fmt: skip

    def _send_counts(self) -> None:
        with self._turn:
            if self._counts is None or self._classical is None:
                return
            message = {
                "kind": "counts",
                "done": self._done,
                "discarded": self._discarded,
                "counts": self._counts[0].tolist(),
                "classical": self._classical[0].tolist(),
                "curve": [dict(point) for point in self._curve],
                "not_modelled": list(self._diagnostics.get("not_modelled", ())),
                "fallbacks": list(self._diagnostics.get("fallbacks", ())),
            }
        self.send(message)

    def _can_scale(self) -> bool:
        engine = self.backend.engine
        return isinstance(engine, AerEngine) and not engine.ideal

    def _send_fit(self, levels: Sequence[float], method: str, key: int | None) -> None:
        fit = self.extrapolate(levels, method, key)
        self.send({"kind": "zne", **fit})

    def extrapolate(
        self, levels: Sequence[float] | None = None, method: str | None = None, key: int | None = None
    ) -> dict[str, Any]:
        """Measure the shown row at noise levels, `shots` at each, and extrapolate every key to no noise.

        Parameters
        ----------
        levels : sequence of float, optional
            `noise_levels` where None. Each level is measured once: moving one costs the shots of that one.
        method : str, optional
        key : int, optional
            Whose probabilities are plotted; the row's most likely one where None.

        Returns
        -------
        dict
            `levels`, `values`, `errors` (standard errors) and `fit` (points of the fitted curve) of the key's
            probability; `answer`, `answer_error`, `exact`; of all keys `p` and `p_error`; `shots` spent on these levels.

        Raises
        ------
        ArgumentError
            Levels that `ZeroNoiseExtrapolation` refuses; a backend whose noise cannot be scaled.
        """
        levels = self.noise_levels if levels is None else list(levels)
        zne = ZeroNoiseExtrapolation(
            levels, method or self.method, asymptote=1 / max(1, self._row_p().shape[-1])
        )
        if not self._can_scale():
            raise ArgumentError(
                f"The noise of {self.backend.engine.name} cannot be scaled here: choose a device's twin, or noise."
            )
        p, shots = self._row_p(), self.shots
        key = int(p[0].argmax()) if key is None else key
        if not 0 <= key < p.shape[-1]:
            raise ArgumentError(f"key={key} is not allowed: it must be in 0..{p.shape[-1] - 1}.")
        values = [self._at_level(level, p, shots) for level in zne.noise_levels]
        errors = [((x * (1 - x)).clamp_min(1 / shots**2) / shots).sqrt() for x in values]
        estimate = zne.extrapolate(values, errors)
        assert estimate.std_error is not None
        kept = project_to_simplex(estimate.output, p > 0)
        x = np.linspace(0, 1.04 * max(levels), 60)
        y = [float(v[0, key]) for v in values]
        found = {
            "levels": list(zne.noise_levels),
            "values": y,
            "errors": [float(e[0, key]) for e in errors],
            "fit": np.stack((x, _curve(zne, np.array(y), x)), -1).tolist(),
            "answer": float(estimate.output[0, key]),
            "answer_error": float(estimate.std_error[0, key]),
            "exact": float(p[0, key]),
            "key": key,
            "method": zne.method,
            "p": kept[0].tolist(),
            "p_error": estimate.std_error[0].tolist(),
            "shots": shots * len(levels),
            "fallbacks": list(estimate.fallbacks),
        }
        with self._turn:
            if self._p is not None and torch.equal(self._row_p(), p):
                self._extrapolated = found
        return found

    def _at_level(self, level: float, p: Tensor, shots: int) -> Tensor:
        with self._turn:
            known = self._levels.get((level, shots))
        if known is not None:
            return known
        generator = torch.Generator().manual_seed(self._seed + round(1e6 * level))
        shares = (
            scale_noise(self.backend, level, "model")
            .sample_rows(p, shots, generator=generator)
            .probabilities()
        )
        with self._turn:
            self._levels[level, shots] = shares
        return shares


def _batches(shots: int, most: int) -> list[int]:
    """Shots in parts that grow, so that the first are seen at once."""
    edges = np.unique(np.geomspace(min(shots, 16), shots, most).round().astype(int)) if most > 1 else [shots]
    return np.diff([0, *edges]).tolist()


def _curve(zne: ZeroNoiseExtrapolation, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The function that `zne` fits through y at its levels, at x."""
    at = np.array(zne.noise_levels)
    degree = {"richardson": len(at) - 1, "polynomial": zne.degree}.get(zne.method, 1)
    floor = float(zne.asymptote)
    if zne.method == "exponential" and ((y > floor).all() or (y < floor).all()):
        sign = np.sign(y[0] - floor)
        return floor + sign * np.exp(np.polyval(np.polyfit(at, np.log(np.abs(y - floor)), 1), x))
    return np.polyval(np.polyfit(at, y, degree), x)


def drawing(circuit: QuantumCircuit) -> dict[str, Any]:
    """A circuit as columns of boxes: `qubits`, `columns` (all there are), `gates` (name, qubits, column, count).

    Conditions that stand side by side on one qubit are one box, with their number.
    """
    gates: list[dict[str, Any]] = []
    free = [0] * circuit.num_qubits
    bits = 0  # first column in which the measured bits are known
    for instruction in circuit.data:
        operation = instruction.operation
        qubits = [circuit.find_bit(q).index for q in instruction.qubits]
        conditional = isinstance(operation, ControlFlowOp)
        if operation.name == "barrier" or not qubits:
            continue
        name = (
            operation.blocks[0].data[0].operation.name
            if conditional and operation.blocks[0].data
            else operation.name
        )
        last = gates[-1] if gates else None
        if last and conditional and last["conditional"] and last["qubits"] == qubits and last["name"] == name:
            last["count"] += 1
            continue
        span = range(min(qubits), max(qubits) + 1)
        column = max([free[q] for q in span] + [bits if conditional else 0])
        for q in span:
            free[q] = column + 1
        if operation.name == "measure":
            bits = max(bits, column + 1)
        gates.append(
            {"name": name, "qubits": qubits, "column": column, "count": 1, "conditional": conditional}
        )
    columns = max(free, default=0)
    return {
        "qubits": circuit.num_qubits,
        "columns": columns,
        "gates": [gate for gate in gates if gate["column"] < MOST_COLUMNS],
    }


def region(backend: QiskitQuantumBackend, n: int) -> dict[str, Any] | None:
    """The device's qubits that rows of n keys run on: `nodes` (qubit, readout error, x, y), `edges` (error); None where
    there is no device."""
    engine = backend.engine
    if not isinstance(engine, AerEngine) or engine.name == "aer":
        return None
    qubits = list(backend.transpiled(n).metadata["region"])
    target = reduced_target(fake_device(engine.name).target, qubits)
    readout = [
        target["measure"][(i,)].error if (i,) in target["measure"] else None for i in range(len(qubits))
    ]
    edges: dict[tuple[int, int], float] = {}
    for name in target.operation_names:
        for pair, properties in (target[name] or {}).items():
            if (
                pair is not None
                and len(pair) == 2
                and properties is not None
                and properties.error is not None
            ):
                key = (min(pair), max(pair))
                edges[key] = min(edges.get(key, 1.0), properties.error)
    places = _places(len(qubits), list(edges))
    return {
        "nodes": [
            {"qubit": q, "readout": e, "x": float(x), "y": float(y)}
            for q, e, (x, y) in zip(qubits, readout, places, strict=True)
        ],
        "edges": [{"a": a, "b": b, "error": error} for (a, b), error in edges.items()],
    }


def _places(count: int, edges: Sequence[tuple[int, int]]) -> np.ndarray:
    """Where to draw the nodes of a graph, (count, 2) in [0, 1]: distances as the graph's (classical scaling)."""
    hops = np.full((count, count), np.inf)
    np.fill_diagonal(hops, 0)
    for a, b in edges:
        hops[a, b] = hops[b, a] = 1
    for middle in range(count):
        hops = np.minimum(hops, hops[:, middle, None] + hops[None, middle])
    if not np.isfinite(hops).all() or count < 2:  # qubits that do not meet stand in rows of five
        row, column = np.divmod(np.arange(count), 5)
        return np.stack((column, row), -1) / 4
    centred = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-0.5 * centred @ hops**2 @ centred)
    places = vectors[:, -2:][:, ::-1] * np.sqrt(np.maximum(values[-2:][::-1], 0))
    size = np.ptp(places[:, 0]) or 1.0
    return (places - places.min(0)) / size
