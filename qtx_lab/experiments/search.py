"""Searches: a sweep that tries the combinations which Optuna proposes, and stops those that cannot win."""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special
from tqdm.auto import tqdm

from ..checks import check_count, check_flags, check_functions
from ..errors import ArgumentError, BackendUnavailable, QtxError
from ..specs import ClusterSpec, SearchSpec, listed_word, split_words
from ..storage import runs_home, write_atomic
from ..theme import with_error
from .notebook_execution import NO_LIMITS, ExecutionLimits
from .notebooks import declared_parameters, notebook_path, parameter_schema, parameter_words, run_name
from .report import write_report
from .runs import Run
from .sweep_execution import cluster_client, mark_ended, mark_interrupted, run_notebooks
from .sweep_plan import PlannedNotebook, SweepPlan, listed_values, plan
from .sweep_results import write_results
from .sweeps import check_kinds, checked_workers, find_done

if TYPE_CHECKING:
    from distributed import Client
    from optuna import Study, Trial

    from ..training.cluster import Cluster

BATCH = 4
"""Combinations that are proposed together: a fixed number, whatever the number of workers."""
PROPOSALS = 20
"""How often Optuna is asked for a combination that was not tried yet, before the search ends."""
CONFIDENCE = 0.95
"""Confidence of the intervals by which combinations are stopped and the best one is reported."""

Combination = dict[str, Any]
Evaluate = Callable[[Sequence[tuple[Combination, int]]], Sequence[float | None]]
"""Gives the objective of each (combination, number of the repeat), None where its run failed."""


@dataclass(frozen=True)
class Dimension:
    """The values that a parameter may take in a search.

    Parameters
    ----------
    low, high : int or float or None
        Bounds of a range, both included; whole numbers where both are.
    log : bool
        Whether the range is searched on a logarithmic scale.
    values : tuple
        The values of a list. Numbers in rising order count as ordered, all others as names.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    values: tuple[Any, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether a range has whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ordered(self) -> bool:
        """Whether a list holds numbers in rising order."""
        if any(isinstance(x, bool) or not isinstance(x, int | float) for x in self.values):
            return False
        return list(self.values) == sorted(self.values)


@dataclass(frozen=True)
class SearchedCombination:
    """A combination that a search tried.

    Parameters
    ----------
    combination : dict
        Value of each parameter.
    objectives : list of float
        What its repeats measured, in their order.
    stopped : bool
        Whether it was stopped because its interval excludes the best combination.
    failed : bool
        Whether one of its runs failed, or measured no finite number.
    """

    combination: Combination
    objectives: list[float] = field(default_factory=list)
    stopped: bool = False
    failed: bool = False

    @property
    def mean(self) -> float:
        """Mean of the objectives."""
        return float(np.mean(self.objectives))

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % t-interval of the mean; NaN for a single repeat."""
        return _half_width(self.objectives)


def _half_width(values: Sequence[float]) -> float:
    count = len(values)
    if count < 2:
        return math.nan
    quantile = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(count))


def dimension(name: str, given: str | Sequence[Any]) -> Dimension:
    """Read what a parameter may be: a range "8..512" or "1e-4..1e-1:log", or a list of values.

    Raises
    ------
    ArgumentError
        If it is neither.

    Examples
    --------
    >>> dimension("draws", "8..512:log")
    Dimension(low=8, high=512, log=True, values=())
    >>> dimension("sampler", "sobol,head-tail").values
    ('sobol', 'head-tail')
    """
    refused = ArgumentError(
        f"search {name}={given!r} is not allowed: it must be a range such as 8..512, 0.1..0.9 or 8..512:log "
        "(from above 0), or a list of distinct values such as a,b."
    )
    if not isinstance(given, str):
        values = list(given) if isinstance(given, Sequence) else []
    elif ".." in given:
        bounds, _, scale = given.partition(":")
        try:
            low, high = (_number(part) for part in bounds.split(".."))
        except ValueError:
            raise refused from None
        if not low < high or scale not in ("", "log") or (scale == "log" and low <= 0):
            raise refused
        return Dimension(low, high, scale == "log")
    else:
        try:
            values = split_words(given)
        except ValueError:
            raise refused from None
    if not values or not all(isinstance(value, str | int | float | bool) for value in values):
        raise refused
    if len({_key({name: value}) for value in values}) < len(values):
        raise refused
    return Dimension(values=tuple(values))


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not math.isfinite(number):
            raise
        return number


def _key(combination: Combination) -> str:
    return json.dumps(combination, sort_keys=True)


def find_best(
    evaluate: Evaluate,
    dimensions: Mapping[str, Dimension],
    *,
    trials: int,
    repeats: int,
    maximize: bool = False,
    seed: int = 0,
) -> list[SearchedCombination]:
    """Search for the combination with the least objective, or the largest.

    Optuna's tree-structured Parzen estimator (Bergstra et al., Algorithms for hyper-parameter optimization,
    2011) proposes combinations. After each repeat, from the second one, a combination is stopped if the 95 %
    t-interval of its paired differences from the best one excludes zero: repeats of the same number have the
    same seed in all combinations. The test is made after every repeat, so a combination that is as good as
    the best one is stopped more often than in 1 of 40 cases. All is a function of the objectives and the
    seed.

    Parameters
    ----------
    evaluate : callable
        See `Evaluate`.
    dimensions : mapping
        What each parameter may be.
    trials : int
        Combinations that are tried; fewer where Optuna proposes no new ones any more.
    repeats : int
        Most repeats of a combination.
    maximize : bool
    seed : int

    Returns
    -------
    list of SearchedCombination
        In the order in which they were tried.

    Examples
    --------
    >>> tried = find_best(lambda asked: [(c["x"] - 3) ** 2 for c, _ in asked],
    ...                   {"x": Dimension(0, 10)}, trials=20, repeats=1)
    >>> best_of(tried).combination
    {'x': 3}
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    num_startup = max(BATCH, min(10, trials // 3))
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=num_startup, constant_liar=True)
    study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
    sign = -1.0 if maximize else 1.0
    distributions = {name: _distribution(given) for name, given in dimensions.items()}
    for first in _spread(distributions, num_startup, seed):
        study.enqueue_trial(first)
    tried: dict[str, SearchedCombination] = {}
    while len(tried) < trials:
        batch: dict[str, Trial] = {}
        for _ in range(PROPOSALS):
            trial = study.ask(distributions)
            key = _key({name: _value(dimensions[name], trial.params[name]) for name in dimensions})
            if key in tried:
                _tell(study, trial, tried[key])
            elif key in batch:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                batch[key] = trial
            if len(batch) == min(BATCH, trials - len(tried)):
                break
        if not batch:
            break
        tried |= {key: SearchedCombination(json.loads(key)) for key in batch}
        for repeat in range(repeats):
            going = [key for key in batch if not (tried[key].stopped or tried[key].failed)]
            objectives = evaluate([(tried[key].combination, repeat) for key in going]) if going else []
            for key, objective in zip(going, objectives, strict=True):
                tried[key] = _with(tried[key], objective)
            best = best_of(tried.values(), maximize)
            for key in going:
                tried[key] = _stopped_if_excluded(tried[key], best, sign)
        for key, trial in batch.items():
            _tell(study, trial, tried[key])
    return list(tried.values())


def _spread(distributions: Mapping[str, Any], count: int, seed: int) -> list[Combination]:
    """Combinations that share out the values of each parameter evenly: a Latin hypercube.

    Independent draws would leave out some of a handful of names.
    """
    from scipy.stats import qmc

    points = qmc.LatinHypercube(len(distributions), rng=np.random.default_rng(seed)).random(count)
    return [
        {name: _at(given, u) for u, (name, given) in zip(row, distributions.items(), strict=True)}
        for row in points
    ]


def _at(distribution: Any, u: float) -> Any:
    """The value of a distribution at a quantile u in [0, 1)."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(u * len(distribution.choices))]
    low, high = distribution.low, distribution.high
    if isinstance(distribution, IntDistribution):
        low, high = low - 0.5, high + 0.5
    x = low * (high / low) ** u if distribution.log else low + (high - low) * u
    return (
        min(max(round(x), distribution.low), distribution.high)
        if isinstance(distribution, IntDistribution)
        else x
    )


def _tell(study: Study, trial: Trial, one: SearchedCombination) -> None:
    """Tell Optuna what a combination measured."""
    from optuna.trial import TrialState

    if one.failed:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, one.mean)


def best_of(tried: Iterable[SearchedCombination], maximize: bool = False) -> SearchedCombination | None:
    """The combination with the best mean, of those that were neither stopped nor failed; None without one."""
    going = [one for one in tried if one.objectives and not (one.stopped or one.failed)]
    sign = -1.0 if maximize else 1.0
    return min(going, key=lambda one: sign * one.mean, default=None)


def _with(one: SearchedCombination, objective: float | None) -> SearchedCombination:
    """A combination with the objective of one more repeat, None if that failed."""
    if objective is None or not math.isfinite(objective):
        return SearchedCombination(one.combination, one.objectives, failed=True)
    return SearchedCombination(one.combination, [*one.objectives, objective])


def _stopped_if_excluded(
    one: SearchedCombination, best: SearchedCombination | None, sign: float
) -> SearchedCombination:
    """The combination, stopped if its interval excludes the best one."""
    if best is None or one is best or one.failed:
        return one
    pairs = zip(one.objectives, best.objectives, strict=False)
    worse = [sign * (mine - its) for mine, its in pairs]
    if len(worse) < 2 or not np.mean(worse) > _half_width(worse):
        return one
    return SearchedCombination(one.combination, one.objectives, stopped=True)


def _distribution(given: Dimension) -> Any:
    from optuna import distributions

    if given.low is not None and given.high is not None:
        if given.whole:
            return distributions.IntDistribution(int(given.low), int(given.high), log=given.log)
        return distributions.FloatDistribution(given.low, given.high, log=given.log)
    if given.ordered:  # the place in the list
        return distributions.IntDistribution(0, len(given.values) - 1)
    return distributions.CategoricalDistribution(given.values)


def _value(given: Dimension, suggested: Any) -> Any:
    return given.values[suggested] if given.values and given.ordered else suggested


def search(
    notebook: str | Path,
    space: Mapping[str, str | Sequence[Any]],
    objective: str,
    *,
    maximize: bool = False,
    trials: int = 40,
    repeats: int = 1,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int | None = None,
    cluster: ClusterSpec | Cluster | str | Client | None = None,
    home: str | Path | None = None,
    resume: bool = False,
    limits: ExecutionLimits = NO_LIMITS,
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> Run:
    """Search for the combination of values for which a notebook measures the least, or the most.

    Each notebook is a run of its own, as in `sweep`, and the search is a run with the same table and figure.
    Proposals hang only on the seed and on what the notebooks measured, not on how many workers there are: a
    search that was interrupted takes what it has done with `resume` and goes on as if it had not been.

    Parameters
    ----------
    notebook : str or path
        See `notebook_path`.
    space : mapping
        What each parameter that varies may be; see `dimension`.
    objective : str
        A number in the results of the notebook's runs.
    maximize : bool
        Search for the largest objective instead of the least.
    trials : int
        Combinations that are tried; see `find_best`.
    repeats : int
        Most notebooks for each combination, each with a seed of its own. From 2 on, a combination is stopped
        when its interval excludes the best one.
    parameters, workers, cluster, home, resume, limits, stop, progress
        See `sweep`.
    seed : int
        The seed of the proposals, and that from which the repeats' seeds are derived.

    Returns
    -------
    Run
        The run of the search; `results["best"]` has the best combination, its mean under the objective's name
        and half its interval as `half_width`, each with `results.` before it where a parameter has that name.

    Raises
    ------
    ArgumentError
        As `sweep`; or if `objective` is no number in a notebook's results.
    BackendUnavailable
        If Optuna is not installed, or the cluster cannot be reached.
    """
    if importlib.util.find_spec("optuna") is None:
        raise BackendUnavailable("A search needs optuna: pip install 'qtx-lab[search]'.")
    check_flags(maximize=maximize, resume=resume, progress=progress)
    check_functions(stop=stop)
    trials, repeats = check_count("trials", trials), check_count("repeats", repeats)
    check_kinds(space, parameters, cluster, "space")
    workers = checked_workers(workers, cluster)
    if not space:
        raise ArgumentError("space={} is not allowed: a search needs a parameter that varies.")
    dimensions = {name: dimension(name, given) for name, given in space.items()}
    path = notebook_path(notebook).resolve()
    declared = declared_parameters(path)
    for name, given in dimensions.items():
        if given.values:  # words as the parameter's kind says: 16 is a number for one, a text for another
            dimensions[name] = Dimension(values=tuple(listed_values(path, declared, name, given.values)))
    for corner in _corners(dimensions):  # what is not allowed is refused before any work
        first = plan(path, corner, parameters=parameters, repeats=repeats, seed=seed).spec
    spec = SearchSpec(
        **{**dict(first), "grid": {}},
        space={name: given if isinstance(given, str) else tuple(given) for name, given in space.items()},
        objective=objective,
        maximize=maximize,
        trials=trials,
    )
    home = runs_home(home).resolve()
    run = Run.create(
        spec,
        f"search-{run_name(path)}",
        home,
        title=f"A search with {path.name}",
        command=_command(notebook, path, spec),
    )
    work = _SearchRuns(run, path, spec, objective, resume)
    try:
        write_atomic(work.copied, path.read_bytes())
        with (
            cluster_client(workers, cluster) as client,
            client.as_current(),
            tqdm(
                total=trials * repeats, desc=f"search {path.stem}", unit="notebook", disable=not progress
            ) as bar,
        ):
            tried = find_best(
                lambda asked: work.evaluate(asked, client, stop, bar, limits),
                dimensions,
                trials=trials,
                repeats=repeats,
                maximize=maximize,
                seed=seed,
            )
        problem = work.write()
        _write_best(run, tried, spec)
        if best_of(tried, maximize) is None:
            problem = problem or f"No notebook measured a finite {objective}."
        run.finish("failed" if problem else "done", problem)
    except BaseException as error:
        with suppress(QtxError):  # the first error is the one to report
            mark_ended(run, error)
            work.folders = {**mark_interrupted(run), **work.folders}
            work.write()
            write_report(run)
        raise
    write_report(run)
    return run


def _corners(dimensions: Mapping[str, Dimension]) -> list[dict[str, list[Any]]]:
    """Grids of one combination in which each value of a list and each end of a range occurs."""
    listed = {name: list(d.values) or [d.low, d.high] for name, d in dimensions.items()}
    return [
        {name: [values[i % len(values)]] for name, values in listed.items()}
        for i in range(max(map(len, listed.values())))
    ]


class _SearchRuns:
    """The runs of a search: what was planned, and the folder of each notebook that has ended."""

    def __init__(self, run: Run, path: Path, spec: SearchSpec, objective: str, resume: bool):
        self.run, self.path, self.spec, self.objective, self.resume = run, path, spec, objective, resume
        self.copied = run.path / path.name
        self.planned: list[PlannedNotebook] = []
        self.grid: dict[str, list[Any]] = {name: [] for name in spec.space}
        self.folders: dict[str, Path] = {}

    def evaluate(
        self,
        asked: Sequence[tuple[Combination, int]],
        client: Client,
        stop: Callable[[], bool] | None,
        bar: tqdm,
        limits: ExecutionLimits,
    ) -> list[float | None]:
        """Run the notebooks of combinations and repeats; their objectives, None of one that failed."""
        notebooks = [self._plan(combination, repeat) for combination, repeat in asked]
        self.planned += notebooks
        if self.resume:
            earlier = find_done(self.run.path.parent, {notebook.key for notebook in notebooks})
            self.folders |= {key: path for key, path in earlier.items() if Run(path).status == "done"}
        missing = [notebook for notebook in notebooks if notebook.key not in self.folders]
        bar.update(len(notebooks) - len(missing))
        run_notebooks(client, self.run, self.copied, missing, self.folders, stop, bar, limits)
        return [self._objective(notebook) for notebook in notebooks]

    def _plan(self, combination: Combination, repeat: int) -> PlannedNotebook:
        for name, value in combination.items():
            if value not in self.grid[name]:
                self.grid[name].append(value)
        spec = self.spec
        planned = plan(
            self.path,
            {name: [value] for name, value in combination.items()},
            parameters=spec.parameters,
            repeats=spec.repeats,
            seed=spec.seed,
        )
        return planned.notebooks[repeat]

    def _objective(self, notebook: PlannedNotebook) -> float | None:
        folder = self.folders.get(notebook.key)
        manifest = Run(folder).manifest if folder is not None else {}
        if manifest.get("status") != "done":
            return None
        results = manifest.get("results") or {}
        value = results.get(self.objective)
        if self.objective in results and value is None:  # NaN or infinite, which JSON does not have
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            numbers = [
                n for n, x in results.items() if isinstance(x, int | float) and not isinstance(x, bool)
            ]
            raise ArgumentError(
                f"objective={self.objective!r} is no number in the results of {self.path.name}; there are "
                f"{', '.join(numbers) or 'none'}."
            )
        return float(value)

    def write(self) -> str | None:
        """Write the table and the figure; which notebooks are not done, if any."""
        grid = {name: tuple(sorted(values, key=_order)) for name, values in self.grid.items()}
        spec = self.spec.model_copy(update={"grid": grid})
        return write_results(self.run, SweepPlan(spec, self.planned), self.folders, self.objective)


def _command(notebook: str | Path, path: Path, spec: SearchSpec) -> str:
    """What to type to run this search again."""
    declared = declared_parameters(path)
    words = ["qtx-lab", "sweep", str(notebook)]
    for name, given in spec.space.items():
        if isinstance(given, list | tuple):
            schema = parameter_schema(path, declared, name)
            given = ",".join(listed_word(value, schema) for value in given)
        words += ["--search", f"{name}={given}"]
    words += ["--objective", str(spec.objective), *(["--maximize"] if spec.maximize else [])]
    words += parameter_words(path, declared, spec.parameters)
    counts = ["--trials", str(spec.trials), "--repeats", str(spec.repeats), "--seed", str(spec.seed)]
    return shlex.join([*words, *counts])


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers first, in their order, then texts."""
    return isinstance(value, str), value


def _write_best(run: Run, tried: Sequence[SearchedCombination], spec: SearchSpec) -> None:
    """Write the best combination into the results, and a sentence about the search first in the summary."""
    best = best_of(tried, spec.maximize)
    notebooks = sum(len(one.objectives) + one.failed for one in tried)
    stopped, failed = sum(one.stopped for one in tried), sum(one.failed for one in tried)
    counts = f"{len(tried)} combinations in {notebooks} notebooks; {stopped} were stopped, {failed} failed."
    summary = [counts, *run.manifest["results"].get("summary", [])]
    if best is None:
        run.update(results={"summary": summary})
        return
    words = ", ".join(f"{name}={value}" for name, value in best.combination.items())
    interval = "" if math.isnan(best.half_width) else " (95 % t-interval)"
    way = "largest" if spec.maximize else "least"
    sentence = (
        f"The {way} {spec.objective} is {with_error(best.mean, best.half_width)}{interval}, at {words}."
    )
    measured = {str(spec.objective): best.mean, "half_width": best.half_width}
    results: dict[str, Any] = {
        **best.combination,
        **{f"results.{name}" if name in best.combination else name: x for name, x in measured.items()},
    }
    run.update(results={"summary": [sentence, *summary], "best": results})
