"""`CircuitView`: an attention row as a circuit, where it runs, what was measured, and the zero-noise fit."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import traitlets
from torch import Tensor

from ...backends import QiskitQuantumBackend, RowCounts
from ...backends.aer import AerEngine
from ...checks import MAX_SEED, check_count, check_number
from ...circuits import check_rows
from ...circuits.base import num_bits
from ...circuits.resources import resources
from ...errors import ArgumentError, DtypeError, ShapeError, unknown_name
from ...mitigation import ZeroNoiseExtrapolation
from ...mitigation.zne import METHODS
from ..measurement import (
    NUM_PARTS,
    FidelityPoint,
    Measurement,
    distances_of_counts,
    growing_parts,
    measure_in_parts,
)
from ..numbers import Distances
from .base import View
from .circuit_drawing import angle_roles, circuit_drawing, device_region, gate_errors
from .thread_worker import ThreadWorker
from .zero_noise import NoiseLevels, ZeroNoiseFit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .lens import AttentionLens

NO_ADVANTAGE = (
    "Loading a row that is known into a circuit gives no advantage over drawing from it on a classical "
    "computer: the grey baseline is the same number of classical draws."
)


MAX_LIVE_QUBITS = 6
"""Up to here a row that is edited, or other noise, is measured at once on simulators and twins."""

LIVE_PARTS = 3
"""Parts in which the shots of such a measurement are run."""

MAX_NOISE_SCALE = 20.0
"""Largest noise level that can be chosen."""

MAX_NOISE_LEVELS = 32
"""Noise levels whose compiled circuits are kept, so that a level is compiled once."""


class CircuitView(View):
    """A row's circuit and its cost, the qubits that it runs on, and what was measured against the exact row.

    On simulators and device twins the noise can be scaled: the zero-noise fit is drawn as the levels are
    moved. The row can be edited, by dragging its bars or with `edit`; up to six qubits it is then measured
    again at once, as when `noise_scale` changes. Every measurement is shown with a baseline, the same number
    of classical draws: loading a known row gives no advantage.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    p : Tensor, (R, n), optional
        Rows to choose from; `show_rows` and `follow` give others.
    row : int
        Which of them is shown.
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
        As `QiskitQuantumBackend.sample_rows` and `ZeroNoiseExtrapolation`; a row that does not exist.

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
    """Names of the rows."""
    row = traitlets.Int(0).tag(sync=True)
    shots = traitlets.Int(1024).tag(sync=True)
    noise_levels = traitlets.List(traitlets.Float()).tag(sync=True)
    method = traitlets.Unicode("linear").tag(sync=True)
    noise_scale = traitlets.Float(1.0).tag(sync=True)
    """Factor of all errors of a simulator or twin; 1 is the backend's own noise."""
    edited = traitlets.Bool(False, read_only=True).tag(sync=True)
    """Whether the shown row is an edited one; `reset_row` shows the original again."""
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
        self.backend, self._seed = backend, check_count("seed", seed, 0, MAX_SEED)
        self._p: Tensor | None = None
        self._edited_p: Tensor | None = None  # (1, n), in place of the shown row
        self._scaled = {1.0: backend}
        self._lock = threading.RLock()
        self._cancelled = threading.Event()
        self._runner = ThreadWorker(self.fail)
        self._measurement: Measurement | None = None  # of the shown row
        self._noise: NoiseLevels | None = None  # the shown row at noise levels
        self._fit: ZeroNoiseFit | None = None
        super().__init__(
            "circuit",
            shots=backend.shots if shots is None else shots,
            noise_levels=list(noise_levels),
            method=method,
        )
        ZeroNoiseExtrapolation(self.noise_levels, self.method)  # refuses what does not fit
        self.observe(lambda _: self._begin_row(), "row")
        self.observe(lambda _: self._change_noise(), "noise_scale")
        if p is not None:
            self.show_rows(p, row)

    @traitlets.validate("row", "shots", "method", "noise_scale")
    def _check(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        if name == "shots":
            value = check_count(name, value)
        elif name == "noise_scale":
            value = check_number(name, value, least=0, most=MAX_NOISE_SCALE)
            if value != 1 and not self._can_scale_noise():
                raise ArgumentError(
                    f"noise_scale={value:g} is not allowed: the noise of {self.backend.engine.name} cannot "
                    "be scaled here."
                )
        elif name == "method" and value not in METHODS:
            raise unknown_name("method", value, METHODS)
        elif name == "row":
            value = check_count(name, value, 0)
            if value >= max(1, self.num_rows):
                raise ArgumentError(f"row={value} is not allowed: it must be in 0..{self.num_rows - 1}.")
        return value

    @property
    def result(self) -> RowCounts:
        """The counts of the shown row so far, (1, n), with the classical baseline of as many draws.

        Raises
        ------
        ArgumentError
            If no row is shown.
        """
        return self._shown().counts

    def show_rows(self, p: Tensor, row: int = 0, *, names: Sequence[str] | None = None) -> None:
        """Show other rows; what was measured of the last ones is forgotten.

        Parameters
        ----------
        p : Tensor, (R, n)
        row : int
            Which of them is shown first.
        names : sequence of str, optional
            One for each row.

        Raises
        ------
        ShapeError, ArgumentError
            If these are no rows; if a name is missing; if there is no such row.
        """
        p = check_rows(p)
        if len(p) == 0:
            raise ArgumentError("p has no rows; at least one is needed.")
        names = [f"row {i}" for i in range(len(p))] if names is None else [str(x) for x in names]
        if len(names) != len(p):
            raise ShapeError(f"names has {len(names)} entries; p has {len(p)} rows, and each needs one.")
        row = check_count("row", row, 0)
        if row >= len(p):
            raise ArgumentError(f"row={row} is not allowed: it must be in 0..{len(p) - 1}.")
        with self._lock:
            self._p = p
            self.set_trait("names", names)
            self.set_trait("num_rows", len(p))
            if self.row == row:
                self._begin_row()
            else:
                self.row = row

    def follow(self, lens: AttentionLens) -> None:
        """Show the rows that are selected in a lens, now and whenever others are selected."""

        def show() -> None:
            if lens.selected_rows:
                self.show_rows(lens.rows(), names=[f"query {i}" for i in lens.selected_rows])

        show()
        lens.observe(lambda _: show(), "selected_rows")

    def edit(self, weights: Sequence[float] | Tensor) -> None:
        """Show other weights in place of the shown row, and measure them at once where that is fast.

        Parameters
        ----------
        weights : sequence of float or Tensor, (n,)
            One for each key; they are divided by their sum.

        Raises
        ------
        ShapeError
            If there is not one for each key.
        ArgumentError
            If one is negative or not finite, if all are 0, or if no row is shown.
        """
        row = self._edited_row(weights)
        with self._lock:
            self._edited_p = row
            self.set_trait("edited", True)
            self._forget_counts()
        self._send_exact()
        self._measure_live()

    def reset_row(self) -> None:
        """Show the row as it was before it was edited."""
        if self.edited:
            self._begin_row()

    def run(self, shots: int | None = None) -> None:
        """Measure the shown row in parts; returns at the end, or after `cancel` was called."""
        self._cancelled.clear()
        self._measure(self.shots if shots is None else shots)

    def cancel(self) -> None:
        """Stop a run after the part that is being measured."""
        self._cancelled.set()

    def fill(self, counts: RowCounts, curve: Sequence[Mapping[str, float]] = ()) -> None:
        """Show what was measured elsewhere of the shown row, in place of what was measured here.

        Parameters
        ----------
        counts : RowCounts, (1, n)
            With its classical baseline.
        curve : sequence of mapping
            The fidelity as shots arrived: `shots`, `fidelity`, `error` (standard error), `classical`, and
            perhaps `classical_error`.

        Raises
        ------
        ArgumentError
            If no row is shown.
        ShapeError
            If the counts have other keys, or no baseline.
        """
        shape = tuple(self._row_p().shape)
        if counts.classical is None or tuple(counts.counts.shape) != shape:
            raise ShapeError(
                f"counts has shape {tuple(counts.counts.shape)}; it must be {shape}, with a baseline."
            )
        points = tuple(
            FidelityPoint(
                int(x["shots"]),
                (x["fidelity"],),
                (x["error"],),
                (x["classical"],),
                (x.get("classical_error", np.nan),),
            )
            for x in curve
        )
        with self._lock:
            self._measurement = Measurement(counts, points)
        self._send_counts()

    def extrapolate(
        self, levels: Sequence[float] | None = None, method: str | None = None, key: int | None = None
    ) -> ZeroNoiseFit:
        """Measure the shown row at noise levels, `shots` at each, and extrapolate every key to no noise.

        Parameters
        ----------
        levels : sequence of float, optional
            `noise_levels` where None. Each level is measured once: moving one costs the shots of that one.
        method : str, optional
            `method` of the view where None.
        key : int, optional
            Whose probabilities are plotted; the row's most likely one where None.

        Raises
        ------
        ArgumentError
            Levels that `ZeroNoiseExtrapolation` refuses; a backend whose noise cannot be scaled.
        """
        levels, method = self.noise_levels if levels is None else list(levels), method or self.method
        self._row_p()
        ZeroNoiseExtrapolation(levels, method)  # refuses what does not fit
        if not self._can_scale_noise():
            raise ArgumentError(
                f"The noise of {self.backend.engine.name} cannot be scaled here: choose a device's twin, "
                "or noise."
            )
        noise = self._noise
        assert noise is not None
        fit = noise.fit(levels, method, self.shots, key)
        with self._lock:
            if self._noise is noise:  # otherwise another row is shown by now
                self._fit = fit
        return fit

    def frame(self) -> pd.DataFrame:
        """A row for each key: `exact`, `count`, `classical` (counts), `mitigated` and `mitigated_error`."""
        import pandas as pd

        p, measurement = self._row_p(), self._shown()
        columns = {
            "key": np.arange(p.shape[-1]),
            "exact": p[0].numpy(),
            "count": measurement.counts.counts[0].numpy(),
            "classical": measurement.baseline.counts[0].numpy(),
        }
        if self._fit is not None:
            columns |= {"mitigated": np.array(self._fit.p), "mitigated_error": np.array(self._fit.p_error)}
        return pd.DataFrame(columns)

    def figure(self, theme: str = "light") -> Figure:
        """Distribution, fidelity against shots and, where there is one, the zero-noise fit."""
        from .circuit_figure import circuit_figure, empty_figure

        if self._p is None:
            return empty_figure(theme, "No row is shown")
        measurement, backend = self._shown(), self.backend
        shots = measurement.counts.shots
        name = self.names[self.row].capitalize() + (", edited," if self.edited else "")
        noise = "" if self.noise_scale == 1 else f", noise × {self.noise_scale:g}"
        title = (
            f"{name} on {backend.engine.name}{noise}, {backend.loader.name} loader, {shots} shots, seed "
            f"{self._seed}"
        )
        curve = [point.of_row(0) for point in measurement.curve]
        return circuit_figure(
            self.frame(), curve, self._fit, theme, shots=shots, title=title, note=NO_ADVANTAGE
        )

    def _row_p(self) -> Tensor:
        """The shown row, (1, n), as it was edited."""
        if self._p is None:
            raise ArgumentError("No row is shown: give one with show_rows(p).")
        return self._p[self.row : self.row + 1] if self._edited_p is None else self._edited_p

    def _edited_row(self, weights: Sequence[float] | Tensor) -> Tensor:
        """Checked weights as a row, (1, n)."""
        w = torch.as_tensor(weights, dtype=torch.float64)
        n = self._row_p().shape[-1]
        if tuple(w.shape) != (n,):
            raise ShapeError(f"weights has shape {tuple(w.shape)}; it must be ({n},), one for each key.")
        if not bool(w.isfinite().all()) or bool((w < 0).any()) or not float(w.sum()) > 0:
            raise ArgumentError("weights must be finite numbers >= 0, of which one at least is above 0.")
        return (w / w.sum())[None]

    def _noisy_backend(self) -> QiskitQuantumBackend:
        """The backend with its noise scaled by `noise_scale`."""
        with self._lock:
            scale, engine = self.noise_scale, self.backend.engine
            if scale not in self._scaled:
                assert isinstance(engine, AerEngine)
                if len(self._scaled) >= MAX_NOISE_LEVELS:
                    self._scaled = {1.0: self.backend}
                self._scaled[scale] = self.backend.with_engine(engine.scaled(scale))
            return self._scaled[scale]

    def _forget_counts(self) -> None:
        """Begin the measurement of the shown row anew."""
        self._cancelled.set()
        p = self._row_p()
        self._measurement = Measurement.empty(*p.shape)
        self._noise, self._fit = NoiseLevels(self._noisy_backend(), p, self._seed), None

    def _change_noise(self) -> None:
        if self._p is not None:
            with self._lock:
                self._forget_counts()
            self._worker.put("live", self._measure_live)

    def _is_live(self) -> bool:
        """Whether a change of the row or of the noise is measured at once."""
        engine = self.backend.engine
        return isinstance(engine, AerEngine) and num_bits(self._row_p().shape[-1]) <= MAX_LIVE_QUBITS

    def _measure_live(self) -> None:
        """Measure the shown row anew, in few parts, or show that nothing is measured yet."""
        if not self._is_live():
            self._send_counts()
            return
        p, before = self._row_p(), self._shown()
        parts = growing_parts(self.shots, LIVE_PARTS)
        *_, last = measure_in_parts(self._noisy_backend().sample_rows, p, parts, seed=self._seed)
        with self._lock:
            if self._measurement is before:  # otherwise the row has changed again
                self._measurement = last
        self._send_counts()

    def _shown(self) -> Measurement:
        """What was measured of the shown row."""
        measurement = self._measurement
        if measurement is None:
            raise ArgumentError("No row is shown: give one with show_rows(p).")
        return measurement

    def _can_scale_noise(self) -> bool:
        engine = self.backend.engine
        return isinstance(engine, AerEngine) and not engine.ideal

    def _begin_row(self) -> None:
        """Forget what was measured, and show the row that is chosen now."""
        with self._lock:
            self._edited_p = None
            self.set_trait("edited", False)
            self._forget_counts()
        self._worker.put("circuit", self._send_circuit)
        self._worker.put("counts", self._send_counts)

    def _measure(self, shots: int) -> None:
        shots = check_count("shots", shots)
        p, before = self._row_p(), self._shown()
        # A job on a device is one part, because every part would wait in the queue anew.
        parts = growing_parts(shots, 1 if self.backend.engine.queues else NUM_PARTS)
        self.send({"kind": "running", "shots": shots})
        try:
            measurements = measure_in_parts(
                self._noisy_backend().sample_rows, p, parts, seed=self._seed, start=before
            )
            while not self._cancelled.is_set() and (now := next(measurements, None)) is not None:
                with self._lock:
                    if self._measurement is not before:
                        break  # another row is shown
                    self._measurement = before = now
                self._send_counts()
        finally:
            measured = self._measurement
            self.send({"kind": "ended", "shots": measured.counts.shots if measured else 0})

    def _on_message(self, content: Mapping[str, Any]) -> None:
        kind = content["kind"]
        if kind == "ready":
            self._worker.put("circuit", self._send_circuit)
            self._worker.put("counts", self._send_counts)
        elif kind == "run":
            self._cancelled.clear()
            self._runner.put("run", partial(self._measure, int(content["shots"])))
        elif kind == "cancel":
            self.cancel()
        elif kind == "edit":
            self._worker.put("edit", partial(self.edit, [float(x) for x in content["weights"]]))
        elif kind == "reset":
            self._worker.put("edit", self.reset_row)
        elif kind == "zne":
            key = content.get("key")
            levels = [float(level) for level in content["levels"]]
            task = partial(self._send_fit, levels, str(content["method"]), key if key is None else int(key))
            self._worker.put("zne", task)

    def _send_circuit(self) -> None:
        if self._p is None:
            return
        p, backend = self._row_p(), self.backend
        n = p.shape[-1]
        circuit = backend.loader.circuit(backend.loader.size(n))
        self.send(
            {"kind": "circuit", "loader": backend.loader.name, "drawing": circuit_drawing(circuit),
             "roles": angle_roles(backend.loader, n), "device": backend.engine.name,
             "noisy": self._can_scale_noise(), "live": self._is_live(), **self._exact()}
        )  # fmt: skip
        # Transpiling may take seconds; the picture of the circuit does not wait for it.
        needs = resources(backend.transpiled(n))
        self.send(
            {"kind": "device", "depth": needs.depth, "two_qubit_gates": needs.two_qubit_gates,
             "qubits": needs.qubits, "region": device_region(backend, n), "errors": gate_errors(backend, n)}
        )  # fmt: skip

    def _exact(self) -> dict[str, Any]:
        """The shown row and the angles that load it."""
        p = self._row_p()
        return {"exact": p[0].tolist(), "angles": self.backend.loader.angles(p)[0].tolist()}

    def _send_exact(self) -> None:
        self.send({"kind": "exact", **self._exact()})

    def _send_counts(self) -> None:
        measurement = self._measurement
        if measurement is None or measurement.counts.counts.shape != (p := self._row_p()).shape:
            return
        counts, baseline = measurement.counts, measurement.baseline
        measured, classical = (distances_of_counts(x.counts, p, self._seed) for x in (counts, baseline))
        self.send(
            {
                "kind": "counts",
                "shots": counts.shots,
                "discarded": int(counts.discarded.sum()),
                "counts": counts.counts[0].tolist(),
                "classical": baseline.counts[0].tolist(),
                "curve": [_without_nan(point.of_row(0)) for point in measurement.curve],
                "distance": _number_with_error(measured),
                "classical_distance": _number_with_error(classical),
                "not_modelled": list(counts.diagnostics.get("not_modelled", ())),
                "fallbacks": list(counts.diagnostics.get("fallbacks", ())),
            }
        )

    def _send_fit(self, levels: Sequence[float], method: str, key: int | None) -> None:
        self.send({"kind": "zne", **asdict(self.extrapolate(levels, method, key))})


def _number_with_error(distances: Distances) -> list[float] | None:
    """A row's distance and its standard error; None where nothing is measured."""
    value, std_error = distances.value[0], distances.std_error[0]
    return None if value != value else [value, std_error]


def _without_nan(point: Mapping[str, float]) -> dict[str, float | None]:
    """The same with None in place of NaN, which JSON does not have."""
    return {name: None if x != x else x for name, x in point.items()}
