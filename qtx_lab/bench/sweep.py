"""`qtx-lab bench sweep`: what a run folder and a sweep add to a notebook, over papermill by itself; and listing many runs."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import nbformat
from tqdm.auto import tqdm

from ..experiments.notebooks import THREADS, run_notebook
from ..experiments.runs import Run, runs
from ..experiments.sweeps import sweep
from ..specs.base import ClusterSpec, ExperimentSpec

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
"""What the notebooks do; the second takes about as long as a small experiment."""

KEEP = "open(out + str(x), 'w').write(repr(answer))"


def bench_sweep(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Seconds a notebook: bare papermill, `run_notebook`, and a sweep on one worker that is up, in turns.

    Rows as in `run_bench`, with `overhead`, the part by which a notebook takes longer than with bare papermill. `error`
    is the number of notebooks whose answer is not bare papermill's. Starting the cluster is a row of its own: it is paid
    once a sweep. Listing many runs is a case of its own, over reading their manifests alone.
    """
    del copy
    turns, count = (2, 2) if quick else (5, 4)
    rows: list[dict[str, Any]] = []
    threads = {name: os.environ.get(name) for name in THREADS}
    os.environ |= dict.fromkeys(THREADS, "1")  # as in a sweep
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows += _listing(Path(folder), 1_000 if quick else 10_000)
            for case, source in CASES.items():
                rows += _compare(case, _write(Path(folder), source), Path(folder), turns, count)
    finally:
        for name, value in threads.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return rows


def _listing(folder: Path, count: int) -> list[dict[str, Any]]:
    """`runs` with a condition, over reading each manifest by json alone."""
    with Run.create(ExperimentSpec(), "trial", folder) as run:
        pass
    stored = json.loads((run.path / "manifest.json").read_bytes())
    home = folder / "listed"
    for i in range(count):
        (home / f"{i:05d}").mkdir(parents=True)
        stored["results"] = {"error": i / count, "bits_per_byte": 2.0}
        (home / f"{i:05d}" / "manifest.json").write_text(json.dumps(stored, indent=2))

    def bare() -> int:
        found = [json.loads((path / "manifest.json").read_bytes()) for path in sorted(home.iterdir())]
        return sum(facts["results"]["error"] < 0.5 for facts in found)

    def listed() -> int:
        return len(runs(home, where="results.error < 0.5 and status = 'done'"))

    methods = {"json alone": bare, "runs, filtered": listed}
    wrong = {name: abs(method() - count // 2) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(5):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    middle = {name: median(times) for name, times in seconds.items()}
    rows = [
        {
            "case": f"{count:,} runs",
            "method": name,
            "seconds": middle[name],
            "low": min(times),
            "high": max(times),
            "baseline": "json alone",
            "ratio": None if wrong[name] else middle["json alone"] / middle[name],
            "error": wrong[name],
            "check": f"{wrong[name]} runs too few or too many" if wrong[name] else "pass",
        }
        for name, times in seconds.items()
    ]
    print(f"\n{count:,} runs")
    for row in rows:
        print(
            f"  {row['method']:<18}{row['seconds']:>6.2f} s ({row['low']:.2f}–{row['high']:.2f})  {row['check']}"
        )
    return rows


def _write(folder: Path, source: str) -> Path:
    new = nbformat.v4.new_notebook()
    new.cells = [nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, source, KEEP)]
    new.cells[0].metadata["tags"] = ["parameters"]
    path = folder / "case.ipynb"
    nbformat.write(new, path)
    return path


def _compare(case: str, path: Path, folder: Path, turns: int, count: int) -> list[dict[str, Any]]:
    import papermill

    start = time.perf_counter()
    with ClusterSpec(kind="local", num_workers=1).build() as cluster:

        def bare(out: str) -> None:
            for x in range(count):
                papermill.execute_notebook(
                    str(path), str(folder / "bare.ipynb"), {"x": x, "out": out}, kernel_name="python3", language="python",
                    progress_bar=False,
                )  # fmt: skip

        def in_a_run(out: str) -> None:
            for x in range(count):
                run_notebook(path, {"x": x, "out": out}, home=folder / "runs", progress=False)

        def swept(out: str) -> None:
            sweep(
                path, {"x": list(range(count))}, parameters={"out": out}, cluster=cluster.client,
                home=folder / "runs", progress=False,
            )  # fmt: skip

        methods: dict[str, Callable[[str], None]] = {
            "bare papermill": bare,
            "run_notebook": in_a_run,
            "sweep": swept,
        }
        swept(str(folder / "warm"))
        ready = time.perf_counter() - start
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in tqdm(range(turns), desc=case, leave=False):
            for name, method in methods.items():
                start = time.perf_counter()
                method(str(folder / name))
                seconds[name].append((time.perf_counter() - start) / count)
    middle = {name: median(times) for name, times in seconds.items()}
    answers = {name: [Path(f"{folder / name}{x}").read_text() for x in range(count)] for name in methods}
    rows = []
    for name in methods:
        wrong = sum(a != b for a, b in zip(answers[name], answers["bare papermill"], strict=True))
        rows.append(
            {
                "case": case,
                "method": name,
                "seconds": middle[name],
                "low": min(seconds[name]),
                "high": max(seconds[name]),
                "baseline": "bare papermill",
                "ratio": None if wrong else middle["bare papermill"] / middle[name],
                "overhead": middle[name] / middle["bare papermill"] - 1,
                "error": wrong,
                "check": f"{wrong} other answers" if wrong else "pass",
            }
        )
    print(f"\n{case}: {turns} turns of {count} notebooks each")
    print(f"  {'method':<18}{'s a notebook':>14}{'(low–high)':>16}{'overhead':>10}  check")
    for row in rows:
        span = f"({row['low']:.2f}–{row['high']:.2f})"
        print(
            f"  {row['method']:<18}{row['seconds']:>14.2f}{span:>16}{row['overhead']:>+10.1%}  {row['check']}"
        )
    print(f"  a cluster of one worker, with the first {count} notebooks: {ready:.1f} s")
    return rows
