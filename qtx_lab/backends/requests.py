"""What an engine is asked to run: rows, one circuit of mitigated rows, or a calibration of the readout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from qiskit import QuantumCircuit
from torch import Tensor

from ..circuits import Loader
from .counts import RowCounts, draw_counts, rows_at_once, tally


@dataclass(frozen=True, eq=False, repr=False)
class RowRequest:
    """Rows to measure, with everything that binds the circuit and reads its outcomes, even after a restart.

    Parameters
    ----------
    p : Tensor, float64, (R, n)
        Probabilities, as `check_rows` returns them. Rows of all zeros are not run.
    loader : Loader
        Makes the circuit and reads keys from its outcomes.
    shots : int
        Shots of each row.
    seed : int
        Seed of the simulation and of the classical baseline.
    diagnostics : mapping
        Passed on to `RowCounts`.
    """

    p: Tensor
    loader: Loader
    shots: int
    seed: int
    diagnostics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> Tensor:
        """Which rows have mass, bool (R,): only these are run."""
        return self.p.sum(-1) > 0

    def bindings(self) -> np.ndarray:
        """The angles of the rows that are run, float64 (R', P), in radians."""
        return self.loader.angles(self.p[self.running])

    def finish(self, outcomes: np.ndarray) -> RowCounts:
        """The counts of all outcomes at once.

        Parameters
        ----------
        outcomes : ndarray, uint8, (R', S, B)
            What the bindings gave; S >= `shots`, since devices may round shots up.
        """
        step = rows_at_once(self.shots, outcomes.shape[-1])
        parts = [self.tally(outcomes[start : start + step]) for start in range(0, len(outcomes), step)]
        return self.finish_counts(parts)

    def finish_by(
        self, run: Callable[..., np.ndarray], circuit: QuantumCircuit, bindings: np.ndarray
    ) -> RowCounts:
        """The counts of what `run`, an engine's, measures, as many rows at a time as fit into memory."""
        step = rows_at_once(self.shots, -(-circuit.num_clbits // 8))
        parts = [
            self.tally(run(circuit, bindings[start : start + step], self.shots, self.seed + start))
            for start in range(0, len(bindings), step)
        ]
        return self.finish_counts(parts)

    def tally(self, outcomes: np.ndarray) -> Tensor:
        """How often each key occurs in some rows' outcomes (R'', S >= shots, B): int64 (R'', n)."""
        n = self.p.shape[-1]
        return tally(torch.from_numpy(self.loader.keys(outcomes[:, : self.shots], n)), n)

    def finish_counts(self, parts: Sequence[Tensor]) -> RowCounts:
        """The result for all rows, from what `tally` gave for those that were run, part by part."""
        counts = torch.zeros(self.p.shape, dtype=torch.int64)
        if parts:
            counts[self.running] = torch.cat(list(parts))
        counts[self.p == 0] = 0
        spent = self.shots * self.running.long()
        return RowCounts(counts, spent - counts.sum(-1), self.shots, self.baseline(), self.diagnostics)

    def finish_partly(self, blocks: Sequence[tuple[int, np.ndarray]]) -> RowCounts:
        """The result of those rows and shots that were measured.

        Parameters
        ----------
        blocks : sequence of (int, ndarray)
            Number of the first row, among those that are run, and outcomes, uint8 (R'', S, B), of this row
            and the following ones. A row may be in several blocks.

        Returns
        -------
        RowCounts
            Rows that were not measured have no counts and no discarded shots. Its diagnostics name them in
            `missing_rows`, together with rows of which shots are missing, and have the shots of each row in
            `shots_by_row`.
        """
        running = int(self.running.sum())
        counts_of = torch.zeros(running, self.p.shape[-1], dtype=torch.int64)
        shots_of = torch.zeros(running, dtype=torch.int64)
        for start, outcomes in blocks:
            block = slice(start, start + len(outcomes))
            counts_of[block] += self.tally(outcomes)
            shots_of[block] += outcomes.shape[1]
        counts, spent = counts_of.new_zeros(self.p.shape), counts_of.new_zeros(len(self.p))
        counts[self.running], spent[self.running] = counts_of, shots_of
        counts[self.p == 0] = 0
        missing = (self.running & (spent < self.shots)).nonzero()[:, 0].tolist()
        diagnostics = {
            **self.diagnostics,
            "missing_rows": tuple(missing),
            "shots_by_row": tuple(spent.tolist()),
        }
        return RowCounts(counts, spent - counts.sum(-1), self.shots, self.baseline(), diagnostics)

    def classical(self) -> Tensor:
        """The baseline's counts, int64 (R, n): independent draws by pseudo-random numbers."""
        generator = torch.Generator().manual_seed(self.seed ^ 0x5EED)
        counts = torch.zeros(self.p.shape, dtype=torch.int64)
        if bool(self.running.any()):
            counts[self.running] = draw_counts(self.p[self.running], self.shots, generator)
        return counts

    def baseline(self) -> RowCounts:
        """The baseline as a result of its own: as many draws of each row, by pseudo-random numbers."""
        counts, spent = self.classical(), self.shots * self.running.long()
        facts = {"device": "pseudo-random numbers"}
        return RowCounts(counts, spent - counts.sum(-1), self.shots, diagnostics=facts)


@dataclass(frozen=True, eq=False, repr=False)
class MitigatedRowRequest:
    """One of the circuits with which a mitigation measures rows.

    The outcomes of one circuit are no result yet: the mitigation combines those of all circuits that have the
    same `batch`.

    Parameters
    ----------
    rows : RowRequest
        The rows, with the loader of this circuit. `rows.shots` is the whole budget of a row.
    mitigation : mapping
        Name and settings of the mitigation, as JSON can hold them.
    noise_level : float
        Noise of this circuit, as a multiple of the device's own.
    shots : int
        Shots of each row with this circuit.
    batch : str
        The same for all circuits of one call.
    """

    rows: RowRequest
    mitigation: Mapping[str, Any]
    noise_level: float
    shots: int
    batch: str


@dataclass(frozen=True)
class CalibrationRequest:
    """A prepared state whose measurement shows how bits are misread.

    Parameters
    ----------
    qubits : tuple of int
        The device's qubit that each bit of the register is measured from, lowest bit first.
    prepared : tuple of int
        0 or 1 for each of these bits: the state that is prepared.
    shots : int
        Shots of the state.
    seed : int
        Seed of a simulation.
    """

    qubits: tuple[int, ...]
    prepared: tuple[int, ...]
    shots: int
    seed: int


Request = RowRequest | MitigatedRowRequest | CalibrationRequest


@dataclass(frozen=True, eq=False, repr=False)
class PlannedRun:
    """A circuit that a call is going to run, so that all that the call costs is known before its first run.

    Parameters
    ----------
    circuit : QuantumCircuit
        Transpiled.
    rows : int
        Number of bindings.
    shots : int
        Shots of each.
    purpose : str
        What it is run for: "rows", "readout calibration", "noise level 3".
    kept : bool
        Whether the result is kept, so that a repeated call does not run it again.
    """

    circuit: QuantumCircuit
    rows: int
    shots: int
    purpose: str = "rows"
    kept: bool = False
