"""Which parameters of a sweep its result depends on: the share of variance that each explains by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special


@dataclass(frozen=True)
class Importance:
    """How much of a result's variance over a sweep comes from what.

    Parameters
    ----------
    table : DataFrame
        A row for each parameter, the largest first, and one each for "interactions" and "seed". Columns
        `name`, `share`, of the variance, and `half_width` of its 95 % interval, NaN for fewer than three
        seeds. For "seed" it is the share between runs of equal parameters.
    runs : int
        Number of runs.
    log : bool
        Whether the shares are of the logarithm of the result: for positive results over more than a decade.
    balanced : bool
        Whether each combination has as many runs as any other. If not, shares of parameters overlap.
    """

    table: pd.DataFrame
    runs: int
    log: bool
    balanced: bool


def importance(frame: pd.DataFrame, parameters: list[str], metric: str) -> Importance | None:
    """Shares of variance of a metric over the runs of a sweep, as in the functional analysis of variance.

    The share of a parameter is its main effect, ``Σ_v n_v (ȳ_v − ȳ)² / Σ_i (y_i − ȳ)²`` with ȳ_v the mean
    over the n_v runs that have its value v (Hutter, Hoos and Leyton-Brown, 2014; Sobol's first-order index),
    less what k values of a parameter without effect would explain: ``ε² = 1 − (1 − share)(n − 1)/(n − k)``,
    not below 0 (Kelley, 1935). The seed's share is within combinations, ``Σ_i (y_i − ȳ_c(i))² / (n − c) /
    (Σ_i (y_i − ȳ)² / (n − 1))`` over c combinations; what is left are interactions.

    Parameters
    ----------
    frame : DataFrame
        One row a run, with the parameters, `seed` and the metric. Rows without the metric are left out.
    parameters : list of str
        Columns that differ between runs, without the seed.
    metric : str
        A column of numbers.

    Returns
    -------
    Importance or None
        None where fewer than three runs have the metric, or it is the same in all.
    """
    y = pd.to_numeric(frame[metric], errors="coerce").to_numpy("float64", na_value=np.nan)
    keep = np.isfinite(y)
    y, frame = y[keep], frame[keep]
    if len(y) < 3 or not parameters or np.ptp(y) == 0:
        return None
    log = bool(y.min() > 0 and y.max() / y.min() > 10)
    y = np.log(y) if log else y
    codes = {name: pd.factorize(frame[name].astype(str))[0] for name in parameters}
    cells = pd.factorize(pd.MultiIndex.from_arrays(list(codes.values())))[0]
    counts = np.bincount(cells)
    full = np.prod([len(np.unique(x)) for x in codes.values()]) == len(counts)
    names = [*parameters, "interactions", "seed"]
    shares = _shares(y, codes, cells)
    widths = _half_widths(y, codes, cells, frame["seed"]) if counts.max() > 1 else np.full(len(names), np.nan)
    table = pd.DataFrame({"name": names, "share": shares, "half_width": widths})
    if counts.max() == 1:  # interactions and seed cannot be told apart
        table.loc[len(parameters), ["name", "share"]] = (
            "interactions and seed",
            max(0.0, 1 - shares[:-2].sum()),
        )
        table = table[:-1]
    first = table[: len(parameters)].sort_values("share", ascending=False, kind="stable")
    table = pd.concat([first, table[len(parameters) :]], ignore_index=True)
    return Importance(table, len(y), log, bool(full and (counts == counts[0]).all()))


def _half_widths(
    y: np.ndarray, codes: dict[str, np.ndarray], cells: np.ndarray, seeds: pd.Series
) -> np.ndarray:
    """Half of the 95 % intervals of the shares, by the jackknife that leaves out one seed at a time.

    Combinations share their seeds, so that seeds, not runs, are what is independent (Efron and Stein, 1981).
    """
    places, names = pd.factorize(seeds)
    r = len(names)
    if r < 3:
        return np.full(len(codes) + 2, np.nan)
    left = np.array([_shares(y, codes, cells, np.flatnonzero(places != i)) for i in range(r)])
    std_error = np.sqrt((r - 1) / r * ((left - left.mean(0)) ** 2).sum(0))
    return special.stdtrit(r - 1, 0.975) * std_error


def _shares(
    y: np.ndarray, codes: dict[str, np.ndarray], cells: np.ndarray, index: np.ndarray | None = None
) -> np.ndarray:
    """The shares of parameters, interactions and seed, (parameters + 2,)."""
    index = np.arange(len(y)) if index is None else index
    y, n = y[index], len(index)
    total = ((y - y.mean()) ** 2).sum()
    if total == 0:
        return np.zeros(len(codes) + 2)

    def explained(groups: np.ndarray) -> float:
        counts = np.bincount(groups)
        seen = counts > 0
        means = np.bincount(groups, y)[seen] / counts[seen]
        share = float((counts[seen] * (means - y.mean()) ** 2).sum() / total)
        k = int(seen.sum())
        return 1 - (1 - share) * (n - 1) / (n - k) if n > k else 1.0

    main = np.array([max(0.0, explained(groups[index])) for groups in codes.values()])
    all_cells = min(1.0, max(0.0, explained(cells[index])))
    return np.array([*main, max(0.0, all_cells - main.sum()), 1 - all_cells])
