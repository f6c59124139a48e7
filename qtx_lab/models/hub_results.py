"""Results as rows of the leaderboard of the sparse-attention hub (skylight-org), with their spread."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, ShapeError
from ..storage import write_atomic


@dataclass(frozen=True)
class HubResult:
    """One result, under the names of the columns of the hub's tables.

    Parameters
    ----------
    benchmark : str
        What the data set belongs to.
    dataset : str
    baseline : str
        The method of attention.
    llm : str
    metric : str
    value : float
        A mean over samples.
    standard_deviation : float or None
        Of the score of a sample, so that over the root of `sample_size` it is the standard error of `value`.
        None where it is not known.
    sample_size : int
        Samples evaluated.
    target_sparsity : float or None
        Per cent of the keys that the method may read.
    additional_params : dict
        What else was set or measured.

    References
    ----------
    .. [1] `DB_Schema.md` in github.com/skylight-org/website: tables `configurations` and `results`.
    """

    benchmark: str
    dataset: str
    baseline: str
    llm: str
    metric: str
    value: float
    standard_deviation: float | None
    sample_size: int
    target_sparsity: float | None = None
    additional_params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_scores(
        cls,
        scores: Sequence[float] | np.ndarray,
        *,
        benchmark: str,
        dataset: str,
        baseline: str,
        llm: str,
        metric: str,
        target_sparsity: float | None = None,
        additional_params: Mapping[str, Any] | None = None,
    ) -> HubResult:
        """The mean of scores, one a sample, and their standard deviation.

        Raises
        ------
        ShapeError
            If there are fewer than 2.

        Examples
        --------
        >>> names = {"benchmark": "qtx", "dataset": "many-keys", "baseline": "exact", "llm": "reference"}
        >>> row = HubResult.of_scores([1, 0, 1, 1], metric="match", **names)
        >>> row.value, row.standard_deviation, row.sample_size
        (0.75, 0.5, 4)
        """
        x = np.asarray(scores, dtype=np.float64)
        if x.ndim != 1 or len(x) < 2:
            raise ShapeError(
                f"scores has shape {x.shape}; it must be (n,), a score for each of 2 or more samples."
            )
        return cls(
            benchmark,
            dataset,
            baseline,
            llm,
            metric,
            float(x.mean()),
            float(x.std(ddof=1)),
            len(x),
            target_sparsity,
            additional_params or {},
        )


def lm_eval_rows(
    results: Mapping[str, Any],
    *,
    baseline: str,
    llm: str,
    target_sparsity: float | None = None,
    additional_params: Mapping[str, Any] | None = None,
) -> list[HubResult]:
    """The rows of what lm-evaluation-harness returns, or writes as JSON: one for each task and metric.

    Parameters
    ----------
    results : mapping
        With "results" and "n-samples".
    baseline, llm, target_sparsity, additional_params
        As in `HubResult`.

    Raises
    ------
    ArgumentError
        If it is no result of the harness.

    Examples
    --------
    >>> seen = {"results": {"colours": {"acc,none": 0.75, "acc_stderr,none": 0.25}},
    ...         "n-samples": {"colours": {"original": 4, "effective": 4}}}
    >>> row = lm_eval_rows(seen, baseline="exact", llm="reference")[0]
    >>> row.dataset, row.metric, row.value, row.standard_deviation
    ('colours', 'acc', 0.75, 0.5)
    """
    if "results" not in results or "n-samples" not in results:
        raise ArgumentError(
            "results is not what lm-evaluation-harness returns: results and n-samples are missing."
        )
    rows = []
    for task, values in results["results"].items():
        if task not in results["n-samples"]:
            continue  # a group of tasks, which has no samples of its own
        size = int(results["n-samples"][task]["effective"])
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or isinstance(value, str):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            rows.append(
                HubResult(
                    "lm-evaluation-harness",
                    task,
                    baseline,
                    llm,
                    metric if filtered == "none" else name,
                    float(value),
                    float(error) * math.sqrt(size) if known else None,
                    size,
                    target_sparsity,
                    additional_params or {},
                )
            )
    return rows


def write_hub_rows(path: str | Path, rows: Iterable[HubResult]) -> None:
    """Write rows as lines of JSON, whole or not at all.

    Raises
    ------
    StorageError
        If the file cannot be written.
    """
    lines = [json.dumps(asdict(row), sort_keys=True) for row in rows]
    write_atomic(Path(path), "".join(f"{line}\n" for line in lines).encode())
