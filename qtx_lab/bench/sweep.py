"""`qtx-lab bench sweep`: what run folders and sweeps add to papermill's time, and the time to list runs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nbformat

from ..experiments.notebook_execution import THREADS
from ..experiments.notebooks import run_notebook
from ..experiments.runs import Run, runs
from ..experiments.sweeps import sweep
from ..specs import ExperimentSpec
from ..training import open_cluster
from ..training.cluster import Cluster
from .base import BenchRow, span, time_in_turns

PARAMETERS = "x = 0\nout = ''"

CASES = {
    "an empty notebook": "answer = x / 7",
    "a notebook with sampled attention": (
        "import torch\nimport qtx_lab as qtx\n"
        "q, k, v = torch.randn(3, 8, 512, 64, generator=torch.Generator().manual_seed(x))\n"
        "g = torch.Generator().manual_seed(x)\n"
        "answer = [qtx.sampled_attention(q, k, v, generator=g).output.sum().item() for _ in range(20)][-1]"
    ),
}
"""The cell that the notebooks run; the second takes about as long as a small experiment."""

SAVE_ANSWER = "open(out + str(x), 'w').write(repr(answer))"


def bench_sweep(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Measure the seconds that a notebook takes by bare papermill, by `run_notebook`, and in a sweep.

    The sweep has one worker, which is running already.

    The methods take turns. `error` is the number of notebooks whose answer is not that of bare papermill. The
    rows have the detail `overhead`, the fraction by which a notebook takes longer than with bare papermill.
    The time to start the cluster, which a sweep pays once, is printed but has no row. Listing many runs is a
    case of its own, compared with reading their manifests alone; its `error` is the number of runs that are
    listed too few or too many.
    """
    del copy_bandwidth
    turns, count = (2, 2) if quick else (5, 4)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        rows = bench_listing(Path(folder), 1_000 if quick else 10_000)
        for case, source in CASES.items():
            notebook = write_notebook(Path(folder), source)
            rows += bench_notebooks(case, notebook, Path(folder), turns, count)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Tell numerical libraries of new processes to use one thread, as a sweep does."""
    earlier = {name: os.environ.get(name) for name in THREADS}
    os.environ |= dict.fromkeys(THREADS, "1")
    try:
        yield
    finally:
        for name, value in earlier.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def bench_listing(folder: Path, count: int) -> list[BenchRow]:
    """`runs` with a condition, compared with reading each manifest by json alone."""
    with Run.create(ExperimentSpec(), "trial", folder) as run:
        pass
    manifest = json.loads((run.path / "manifest.json").read_bytes())
    home = folder / "listed"
    for i in range(count):
        (home / f"{i:05d}").mkdir(parents=True)
        manifest["results"] = {"error": i / count, "bits_per_byte": 2.0}
        (home / f"{i:05d}" / "manifest.json").write_text(json.dumps(manifest, indent=2))

    def by_json() -> int:
        manifests = [json.loads((path / "manifest.json").read_bytes()) for path in sorted(home.iterdir())]
        return sum(manifest["results"]["error"] < 0.5 for manifest in manifests)

    def by_runs() -> int:
        return len(runs(home, where="results.error < 0.5 and status = 'done'"))

    methods = {"json alone": by_json, "runs, filtered": by_runs}
    wrong = {name: abs(method() - count // 2) for name, method in methods.items()}
    timings = time_in_turns(methods, 5)
    baseline = timings["json alone"].median
    rows = [
        BenchRow(
            case=f"{count:,} runs",
            method=name,
            seconds=timing.median,
            baseline="json alone",
            ratio=None if wrong[name] else baseline / timing.median,
            error=wrong[name],
            check=f"{wrong[name]} runs too few or too many" if wrong[name] else "pass",
            low=timing.low,
            high=timing.high,
        )
        for name, timing in timings.items()
    ]
    print(f"\n{count:,} runs")
    for row in rows:
        print(f"  {row.method:<18}{row.seconds:>6.2f} s {span(row, 1, '.2f')}  {row.check}")
    return rows


def write_notebook(folder: Path, source: str) -> Path:
    """Write a notebook with parameters, one cell of source, and one that saves the answer."""
    content = nbformat.v4.new_notebook()
    content.cells = [nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, source, SAVE_ANSWER)]
    content.cells[0].metadata["tags"] = ["parameters"]
    path = folder / "case.ipynb"
    nbformat.write(content, path)
    return path


def bench_notebooks(case: str, path: Path, folder: Path, turns: int, count: int) -> list[BenchRow]:
    """Run `count` notebooks by each method in each turn."""
    start = time.perf_counter()
    with open_cluster("local", num_workers=1) as cluster:
        methods = notebook_methods(path, folder, count, cluster)
        methods["sweep"](str(folder / "warm"))
        start_seconds = time.perf_counter() - start
        calls = {name: partial(method, str(folder / name)) for name, method in methods.items()}
        timings = time_in_turns(calls, turns)
    answers = {name: [Path(f"{folder / name}{x}").read_text() for x in range(count)] for name in methods}
    baseline = timings["bare papermill"].median
    rows = []
    for name, timing in timings.items():
        wrong = sum(a != b for a, b in zip(answers[name], answers["bare papermill"], strict=True))
        rows.append(
            BenchRow(
                case=case,
                method=name,
                seconds=timing.median / count,
                baseline="bare papermill",
                ratio=None if wrong else baseline / timing.median,
                error=wrong,
                check=f"{wrong} other answers" if wrong else "pass",
                low=timing.low / count,
                high=timing.high / count,
                details={"overhead": timing.median / baseline - 1},
            )
        )
    print(f"\n{case}: {turns} turns of {count} notebooks each")
    print_overheads(rows)
    print(
        f"  starting a cluster of one worker and running its first {count} notebooks: {start_seconds:.1f} s"
    )
    return rows


def notebook_methods(
    path: Path, folder: Path, count: int, cluster: Cluster
) -> dict[str, Callable[[str], None]]:
    """Ways to run a notebook `count` times; each takes the beginning of the files of the answers."""
    import papermill

    def bare(out: str) -> None:
        for x in range(count):
            papermill.execute_notebook(
                str(path),
                str(folder / "bare.ipynb"),
                {"x": x, "out": out},
                kernel_name="python3",
                language="python",
                progress_bar=False,
            )

    def in_a_run(out: str) -> None:
        for x in range(count):
            run_notebook(path, {"x": x, "out": out}, home=folder / "runs", progress=False, fresh=True)

    def swept(out: str) -> None:
        sweep(
            path,
            {"x": list(range(count))},
            parameters={"out": out},
            cluster=cluster.client,
            home=folder / "runs",
            progress=False,
            fresh=True,
        )

    return {"bare papermill": bare, "run_notebook": in_a_run, "sweep": swept}


def print_overheads(rows: Sequence[BenchRow]) -> None:
    """Print the rows of `bench_notebooks`."""
    print(f"  {'method':<18}{'s a notebook':>14}{'(low–high)':>16}{'overhead':>10}  check")
    for row in rows:
        print(
            f"  {row.method:<18}{row.seconds:>14.2f}{span(row, 1, '.2f'):>16}"
            f"{row.details['overhead']:>+10.1%}  {row.check}"
        )
