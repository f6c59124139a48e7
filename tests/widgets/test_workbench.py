"""The workbench: work that can be killed at any time, state that survives, and all in a real browser."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from playwright.sync_api import expect

import qtx_lab
from qtx_lab.cli import main
from qtx_lab.errors import ArgumentError, DtypeError, JobTimeout, RunFailed, ShapeError, SpecError, TextError
from qtx_lab.experiments.runs import Run
from qtx_lab.models.text import reference_text
from qtx_lab.specs import value_of
from qtx_lab.widgets.throttle import ThrottledCall
from qtx_lab.widgets.workbench.process import ProcessWorker
from qtx_lab.widgets.workbench.tasks import registry as tasks
from qtx_lab.widgets.workbench.workbench import Workbench

TASKS = """
import os, time, warnings
import numpy as np
from qtx_lab.errors import ArgumentError, FallbackWarning

def count(report, n):
    for i in range(n):
        report.send(i)
        report((i + 1) / n, f"step {i}")
    return n

def stuck(report, how):
    report(0.25, "stuck")
    report.send("stuck")
    if how == "native":
        np.linalg.svd(np.random.default_rng(0).normal(size=(4000, 4000)))
    else:
        while True:
            pass

def die(report): os._exit(7)
def refuse(report): raise ArgumentError("x=1 is not allowed: it must be 2.")
def surprise(report): 1 / 0
def shout(report):
    print("a task may print")
    warnings.warn("drawn classically", FallbackWarning)
    return "done"
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessWorker]:
    (tmp_path / "qtx_tasks_for_tests.py").write_text(TASKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    worker = ProcessWorker("qtx_tasks_for_tests")
    yield worker
    worker.close()


class SharedWorker(ProcessWorker):
    """A worker that outlives the workbench that has it, because its process has imported much by then."""

    lent = True

    def close(self) -> None:
        """Give the worker back; its work, if any, is cancelled."""
        if self.busy:
            super().close()
        self.lent = False


@pytest.fixture(scope="module", autouse=True)
def worker_pool() -> Iterator[None]:
    """The workbenches of this module have their workers from one pool, one after the other."""
    pool: list[SharedWorker] = []

    def lend() -> SharedWorker:
        worker = next((worker for worker in pool if not worker.lent), None)
        if worker is None:
            worker = SharedWorker()
            pool.append(worker)
        worker.lent = True
        return worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtx_lab.widgets.workbench.workbench.ProcessWorker", lend)
        yield
    for worker in pool:
        ProcessWorker.close(worker)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(home=tmp_path, num_tokens=64)
    yield bench
    bench.close()


def test_work_reports_its_progress_and_all_that_the_task_sends(worker: ProcessWorker) -> None:
    sent: list[int] = []
    states: list[tuple[str, float]] = []
    work = worker.start(
        "count",
        n=500,
        on_data=sent.append,
        on_change=lambda work: states.append((work.state, work.fraction)),
    )
    with pytest.raises(ArgumentError, match="busy"):
        worker.start("count", n=1)
    assert work.wait(60) == 500
    assert sent == list(range(500))
    assert states[-1] == ("done", 1.0)
    assert states == sorted(states, key=lambda state: state[1])
    work.state, work.fraction = "running", 0.01
    assert work.seconds_left is None  # preparations say nothing of the rest
    work.fraction = 0.5
    assert work.seconds_left == pytest.approx(work.seconds)
    work.state = "done"
    process = worker._process
    assert worker.start("count", n=1).wait(60) == 1
    assert worker._process is process  # what it has loaded stays


@pytest.mark.parametrize("how", ["native", "python"])
def test_cancel_kills_work_whatever_it_is_in(worker: ProcessWorker, how: str) -> None:
    began = threading.Event()
    work = worker.start("stuck", how=how, on_data=lambda _: began.set())
    assert began.wait(60)
    time.sleep(0.3)
    with pytest.raises(JobTimeout, match="25%"):
        work.wait(0.01)
    process = worker._process
    started = time.perf_counter()
    work.cancel()
    print(f"cancel of a {how} loop: {1000 * (time.perf_counter() - started):.1f} ms")
    assert work.state == "cancelled"
    with pytest.raises(RunFailed, match="cancelled"):
        work.wait(0)
    assert process is not None
    assert process.wait(5) == -signal.SIGKILL
    assert worker.start("count", n=3).wait(60) == 3


def test_errors_of_tasks_are_reported(worker: ProcessWorker) -> None:
    with pytest.raises(ArgumentError, match="x=1 is not allowed"):
        worker.start("refuse").wait(60)
    with pytest.raises(RunFailed, match="ZeroDivisionError: division by zero"):
        worker.start("surprise").wait(60)
    with pytest.raises(RunFailed, match="died of exit code 7"):
        worker.start("die").wait(60)
    work = worker.start("shout")
    assert work.wait(60) == "done"
    assert work.warnings == ["drawn classically"]


@pytest.mark.chaos
def test_a_worker_does_not_outlive_its_parent(worker: ProcessWorker, tmp_path: Path) -> None:
    code = (
        "import time; from qtx_lab.widgets.workbench.process import ProcessWorker\n"
        "w = ProcessWorker('qtx_tasks_for_tests')\n"
        "x = w.start('stuck', how='python', on_data=lambda _: print(w._process.pid, flush=True))\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=30)
    with suppress(psutil.NoSuchProcess):
        assert child.status() == psutil.STATUS_ZOMBIE


def test_a_throttled_call_is_made_after_the_last_request() -> None:
    seen, value = [], [0]
    throttled = ThrottledCall(lambda: seen.append(value[0]), 0.01)

    def ask(start: int) -> None:
        for i in range(start, start + 500):
            value[0] = i
            throttled.request()

    threads = [threading.Thread(target=ask, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    throttled.flush()
    assert value[0] in seen  # the calls of two threads may end in another order than they began


def test_what_is_flushed_is_done_even_if_a_timer_is_just_at_it() -> None:
    began, go_on, saved = threading.Event(), threading.Event(), []

    def save() -> None:
        if not began.is_set():
            began.set()
            assert go_on.wait(60)
        saved.append(threading.get_ident())

    throttled = ThrottledCall(save, 0.01)
    slow = threading.Thread(target=throttled.request)
    slow.start()
    assert began.wait(60)
    throttled.flush()
    assert saved == [threading.get_ident()]
    go_on.set()
    slow.join()
    throttled.flush()
    assert len(saved) == 2  # nothing is left to be done


def test_from_code_and_restored(bench: Workbench, tmp_path: Path) -> None:
    bench.sample.form.change(name="monte-carlo", num_samples=32, replicates=2)
    bench.sample.forms["control variates"].change(names=["topk"])
    bench.sample.forms["source"].change(layer=1, head=5)
    result = bench.sample.start().wait(120)
    source = bench.sample.source
    inputs = tasks.load_inputs(**source.inputs())
    q, k, v = inputs.layers[1]
    torch.testing.assert_close(torch.from_numpy(result["q"][1]), q)
    p = inputs.weights(1, 5)
    torch.testing.assert_close(
        (p @ v[1].double()).float(),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[5],
    )
    assert 0 < result["error"] < result["plain_error"] < 1
    lens = bench.sample.lens
    assert lens is not None
    assert (lens.layer, lens.head, lens.num_samples) == (1, 5, 32)
    lens.num_samples = 16
    lens.head = 2
    assert bench.sample.form.spec.to_parameters()["num_samples"] == 16
    assert bench.sample.source.head == 2

    lens.selected_rows = list(range(20, 40))
    assert set(bench.circuit.rows) <= set(range(20, 40))  # without the button, too
    assert "Circuit measures 16 of the 20 selected rows: 20" in bench.sample._sent.value
    lens.selected_rows = [3, 7]
    bench.sample.send_rows()
    bench.circuit.form.change(shots=200)
    parts: list[int] = []
    bench.circuit._table.observe(lambda change: parts.append(1), "value")
    measured = bench.circuit.start().wait(120)
    assert len(parts) > 3  # it fills in
    assert measured["rows"].tolist() == [3, 7]
    assert (measured["counts"].sum(-1) + measured["discarded"]).tolist() == [200, 200]
    np.testing.assert_allclose(measured["p"].sum(-1), 1)
    share = measured["counts"] / measured["counts"].sum(-1, keepdims=True)
    np.testing.assert_allclose(measured["raw_error"], 0.5 * np.abs(share - measured["p"]).sum(-1))
    assert "no advantage" in bench.circuit._table.value

    view = bench.circuit.view
    assert view is not None
    assert view.result.counts[0].tolist() == measured["counts"][0].tolist()
    assert view.names == ["query 3", "query 7"]
    assert b"PNG" in (bench.circuit.picture() or b"")
    bench.circuit.form.change(shots=100)
    measured = bench.circuit.start().wait(120)
    assert (bench.circuit.view, view.shots) == (view, 100)  # the fit is at these shots, too
    view.row = 1
    assert view.result.counts[0].tolist() == measured["counts"][1].tolist()
    view.noise_levels = [1.0, 2.0, 4.0]
    assert bench.mitigate.form.spec.to_parameters()["noise_levels"] == [1, 2, 4]
    bench.mitigate.form.change(noise_levels=[1, 3], extrapolation="linear")
    assert (view.noise_levels, view.method) == ([1, 3], "linear")
    assert bench.mitigate.form.spec.to_parameters()["method"] == "planner"
    planned = bench.mitigate.start().wait(120)
    assert planned["estimate"] is None  # the dynamic loader leaves little to mitigate
    assert "Nothing was mitigated" in bench.mitigate._verdict.value
    assert planned["counts"].tolist() == measured["counts"].tolist()  # the Circuit tab's own numbers
    assert run_code(bench.mitigate.python_code())["raw_error"].tolist() == planned["raw_error"]
    bench.mitigate.form.change(method="zne")
    mitigated = bench.mitigate.start().wait(120)
    assert mitigated["estimate"].shape == measured["p"].shape
    assert mitigated["counts"].tolist() == measured["counts"].tolist()
    copied = run_code(bench.mitigate.python_code())
    np.testing.assert_allclose(copied["error"], mitigated["error"])
    assert copied["raw_error"].tolist() == mitigated["raw_error"]
    assert len(mitigated["warnings"]) == 1
    assert html.escape(mitigated["warnings"][0]) in bench.mitigate._verdict.value
    assert bench.mitigate.view.frame().query("kind == 'measured'")["way"].tolist() == [
        "mitigated", "measured", "classical"
    ]  # fmt: skip
    submitted = bench.hardware.start().wait(120)
    assert (tmp_path / submitted["run"] / "metrics.parquet").exists()
    listed = bench.runs.start().wait(60)
    assert sorted(row["name"] for row in listed["runs"]) == [
        *["circuit"] * 2, "hardware", *["mitigate"] * 2, "workbench"
    ]  # fmt: skip
    logged = Run.open(tmp_path / submitted["run"]).metrics()
    assert logged["distance"].tolist() == submitted["raw_error"]
    for tab in (bench.circuit, bench.hardware):
        copied = run_code(tab.python_code())
        assert copied["error"].tolist() == tab.result["raw_error"]
        assert copied["classical_error"].tolist() == tab.result["classical_error"]
    assert (logged["half_width"] > 0).all()
    assert set(logged["device"]) == {"fake_boston"}

    bench.circuit.forms["output"].change(gives="output", coordinate=2, loads=1024, keys=4)
    assert bench.circuit._start_button.description == "Estimate outputs"
    assert "2 rows × 1\u2009024 loads" in bench.circuit.cost()
    estimated = bench.circuit.start().wait(120)
    np.testing.assert_allclose(estimated["exact"], (inputs.weights(1, 2)[[3, 7]] @ v[0].double())[:, 2])
    assert "Amplitude estimation ±" in bench.circuit._headline.value
    assert bench.circuit.shown_views() == [bench.circuit.outputs_view]
    assert b"PNG" in (bench.circuit.picture() or b"")
    copied = run_code(bench.circuit.python_code())
    for method in estimated["methods"]:
        assert copied["result"].methods[method["name"]].value.tolist() == method["value"]
    assert "output" not in bench.mitigate.arguments()

    lens.selected_rows = list(range(20, 40))  # after the measurement of two others
    lens.drawn_heads = [[1, 5], [1, 2]]
    bench.circuit.forms["rows"].change(rows=[20, 22, 39])
    state = {name: page.state() for name, page in bench.tabs.items()}
    shown = bench.circuit._table.value
    bench.close()
    again = Workbench.restore(home=tmp_path)
    assert again.run.path == bench.run.path
    assert {name: page.state() for name, page in again.tabs.items()} == state
    assert again.circuit._table.value == shown
    assert again.sample.lens is not None
    assert again.sample.lens.selected_rows == list(range(20, 40))
    assert again.sample.lens.drawn_heads == [[1, 2], [1, 5]]
    assert again.circuit.rows == (20, 22, 39)
    assert "3 of 20 selected rows are measured: 20, 22, 39." in again.circuit._rows_note.value
    assert again.open_tab_name == "circuit"
    assert Workbench.restore(home=tmp_path) is again
    again.close()


def run_code(code: str) -> dict[str, Any]:
    """What is left by code that a tab gave to copy."""
    space: dict[str, Any] = {}
    exec(code, space)
    return space


class Recorder:
    """Stands for a function that takes long, and remembers how it was called."""

    def __init__(self, **result: Any) -> None:
        self.calls: list[tuple[Any, Any]] = []
        self._result = result

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls.append((given, named))
        return SimpleNamespace(**self._result, metrics=lambda: None)


@pytest.mark.parametrize("effort", [{"num_samples": 16, "replicates": 3}, {"tolerance": 0.3}])
def test_the_code_of_sample_gives_the_numbers_that_are_shown(
    bench: Workbench, effort: dict[str, Any]
) -> None:
    bench.sample.form.change(name="head-tail", **{"num_samples": None, **effort})
    if "tolerance" not in effort:
        bench.sample.forms["control variates"].change(names=["topk"])
    bench.source.change(prompt="To be, or not to be, that is the question", text=None, layer=1, head=3)
    result = bench.sample.start().wait(120)
    lens = bench.sample.lens
    assert lens is not None
    assert lens.finding().error == pytest.approx(result["error"], rel=1e-5)
    assert (lens.finding().std_error is None) == ("tolerance" in effort)
    assert not lens.own_draws
    shown = lens.frame()
    assert bench.sample.forms["heads"].spec.drawn_heads is None
    lens.drawn_heads = [[1, 3], [1, 4], [0, 0]]  # picked in the lens
    assert bench.sample.forms["heads"].spec.drawn_heads == "0:0, 1:3-4"
    assert bench.sample.start().wait(120)["error"] == result["error"]
    bench.sample.forms["heads"].change(drawn_heads="0, 2:1")  # or typed
    assert lens.drawn_heads == [[0, head] for head in range(8)] + [[2, 1]]
    assert bench.sample.start().wait(120)["error"] < 1e-6
    assert "This head is exact: of layers and heads, only 0, 2:1 draw." in bench.sample._summary.value
    assert run_code(bench.sample.python_code())["error"] < 1e-6
    bench.sample.forms["heads"].change(drawn_heads=None)
    assert lens.drawn_heads is None
    bench.sample.start().wait(120)
    bench.source.change(head=4)  # the code is that of the picture, not that of the forms
    copied = run_code(bench.sample.python_code())
    assert copied["error"] == result["error"]
    # The maps are of this estimate, too.
    drawn = copied["estimate"].attention_weights()[3]
    expected = drawn[shown["query"].to_numpy(), shown["key"].to_numpy()].numpy()
    np.testing.assert_allclose(shown["sampled"], expected, rtol=1e-5, atol=1e-7)


def random_inputs() -> list[torch.Tensor]:
    """q, k and v of as many heads as the shipped model has; pictures of such maps are the largest."""
    return list(torch.randn(3, 6, 8, 512, 32, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("inputs", "looked_at"),
    [(list, "Model reference on 512 tokens of the shipped text, seed 0"),
     (random_inputs, "Own q, k and v of 512 keys")],
)  # fmt: skip
def test_a_report_with_many_heads_is_small_enough_to_be_sent(
    tmp_path: Path, inputs: Callable[[], list[torch.Tensor]], looked_at: str
) -> None:
    with closing(Workbench(*inputs(), home=tmp_path)) as bench:
        bench.sample.start().wait(120)
        report = bench.sample.report()
        manifest = Run.open(report.parent).manifest
        text = report.read_text(encoding="utf-8")
    assert "qtx-page" in text
    assert 1_000_000 < report.stat().st_size < 3_000_000
    assert manifest["title"].startswith("Attention lens: Layer 3, head 0: off by ")
    assert manifest["results"]["summary"] == [f"{looked_at}: systematic, 64 draws a row."]


def test_a_saved_notebook_has_a_picture(bench: Workbench) -> None:
    data = bench._repr_mimebundle_()
    assert "image/png" not in data
    assert "tab Sample: nothing was drawn there yet" in data["text/plain"]
    bench.sample.start().wait(120)
    data = bench._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "widget-view" in " ".join(data)


def test_parts_are_shown_while_the_first_work_runs(bench: Workbench) -> None:
    shown: list[tuple[str, str | None]] = []
    page = bench.circuit
    page._table.observe(lambda _: shown.append((page.work.state, page.views.layout.display)), "value")
    page.start()
    assert "comes here" in page._message.value
    page.work.wait(120)
    assert ("running", None) in shown


def test_own_inputs_are_saved_with_the_run(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4 if i == 0 else 2, 12, 8, generator=g) for i in range(3))
    bench = Workbench(q, k, v, tokens=list("twelve words"), is_causal=True, home=tmp_path)
    bench.flush()
    assert (bench.run.path / "workbench.json").exists()  # it can be restored before anything was changed
    bench.sample.forms["source"].change(layer=1, head=3)
    result = bench.sample.start().wait(120)
    assert result["q"].shape == (2, 4, 12, 8)
    assert result["tokens"] == list("twelve words")
    bench.sample.forms["source"].change(layer=2)
    with pytest.raises(ArgumentError, match="layer=2 is not allowed: there are 2"):
        bench.sample.start().wait(60)
    assert run_code(bench.sample.python_code())["error"] == result["error"]
    assert "layer=2 is not allowed" in bench.sample._message.value
    assert "last picture is kept" in bench.sample._message.value
    bench.close()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda q: Workbench(q), ArgumentError, "give all three, or none"),
        (lambda q: Workbench(q, q, q, model="x"), ArgumentError, "give all three, or none"),
        (lambda q: Workbench(q, q[..., :3], q), ShapeError, "k"),
        (lambda q: Workbench(q, q, [1]), DtypeError, "v is a list"),
        (lambda q: Workbench(q * torch.nan, q, q), ArgumentError, "NaN"),
        (lambda q: Workbench(q, q, q, tokens=["a"]), ShapeError, "tokens has 1 entries"),
        (lambda q: Workbench(num_tokens=1), SpecError, "num_tokens=1"),
        (lambda q: Workbench.restore(), ArgumentError, "no workbench to restore"),
    ],
)
def test_what_does_not_fit_is_refused(
    make: Callable[..., Any],
    error: type[Exception],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path / "none"))
    with pytest.raises(error, match=says):
        make(torch.ones(2, 4, 4))


def test_a_form_that_is_wrong_is_not_started(bench: Workbench) -> None:
    bench.sample.form.enter(replicates="0")
    with pytest.raises(SpecError, match="replicates=0"):
        bench.sample.start()
    bench.sample._start_or_explain()  # the button
    assert "replicates=0" in bench.sample._message.value


def test_a_huggingface_model_by_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "again", "and", "again"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(sorted(set(words)))}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(words))
    inputs = tasks.load_inputs(str(tmp_path / "model"), str(text), 8)
    assert inputs.tokens == tuple(words[:8])
    model.set_attn_implementation("eager")
    ids = torch.tensor([[sorted(set(words)).index(word) for word in words[:8]]])
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    for layer in range(2):
        for head in range(4):
            torch.testing.assert_close(
                inputs.weights(layer, head).float(),
                expected[layer][0, head],
                atol=1e-5,
                rtol=1e-4,
            )
    with pytest.raises(ArgumentError, match="folder of a Hugging Face model"):
        tasks.load_inputs(str(tmp_path), str(text), 8)


def test_ten_thousand_updates_from_three_threads_end_in_the_files(bench: Workbench) -> None:
    forms = [bench.sample.form, bench.circuit.form, bench.mitigate.form]
    fields = [["num_samples", "replicates"], ["shots", "optimization_level"], ["instances", "degree"]]

    def code() -> None:
        for n in range(1, 3401):
            forms[n % 2].change(**{fields[n % 2][0]: 1 + n % 4000})

    def browser() -> None:
        for n in range(1, 3301):
            form, name = forms[n % 3], fields[n % 3][1]
            form.set_state({"_edits": {**form._edits, name: [n, str(1 + n % (3 if n % 3 else 9))]}})

    def thread() -> None:
        for n in range(1, 3301):
            forms[2].enter(instances=str(1 + n % 4000))

    threads = [threading.Thread(target=target) for target in (browser, thread)]
    for each in threads:
        each.start()
    code()
    for each in threads:
        each.join()
    bench.flush()
    for _ in range(500):  # what follows the last change, as a redrawn sample, is written by itself soon after
        written = json.loads((bench.run.path / "workbench.json").read_bytes())
        shown = {name: json.loads(json.dumps(page.state())) for name, page in bench.tabs.items()}
        if written["forms"] == shown:
            break
        time.sleep(0.2)
    assert written["forms"] == shown
    assert bench.sample.form.spec.to_parameters()["num_samples"] == 1 + 3400
    assert bench.circuit.form.spec.to_parameters()["shots"] == 1 + 3399
    assert bench.mitigate.form.spec.to_parameters()["instances"] == 1 + 3300


@pytest.mark.notebooks
def test_a_sweep_and_a_training_from_code(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("x = 1\nseed = 0\nrun_dir = None", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(
                "import time\nimport qtx_lab as qtx\n"
                "time.sleep(3600 if x == 60 else 0)  # until it is cancelled\n"
                "qtx.Run.open(run_dir).update(results={'square': x**2})"
            ),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "squares.ipynb")
    bench.sweep.form.change(notebook=str(tmp_path / "squares.ipynb"), grid={"x": [2, 3]}, parameters={})
    bench.sweep.forms["cluster"].change(num_workers=1)
    swept = bench.sweep.start()
    bench.train.form.change(model="small", num_tokens=32, steps=3, num_samples=4, batch_size=2)
    trained = bench.train.start().wait(200)  # beside it
    assert [row["step"] for row in trained["rows"]] == [1, 2, 3]
    curves = bench.train.curves.frame()
    assert curves[curves["series"] == "training"]["x"].tolist() == [1, 2, 3]
    assert curves[curves["series"] == "training, exact attention"]["x"].tolist() == [1, 2, 3]
    assert "sampled attention needs" in bench.train._headline.value
    copied = run_code(bench.train.python_code())
    for name, rows in (("result", "rows"), ("exact", "exact_rows")):
        assert [row["loss"] for row in copied[name].metrics] == [row["loss"] for row in trained[rows]]
    asked = Recorder()
    monkeypatch.setattr("qtx_lab.experiments.training_run.train_run", asked)
    CliRunner().invoke(main, shlex.split(bench.train.command().splitlines()[-1])[1:])
    assert "sampler exact" in bench.train.command().splitlines()[0]
    assert asked.calls[0][0] == (bench.train.form.spec,)
    bench.train.form.change(steps=100_000)
    rows = threading.Event()
    bench.train._summary.observe(lambda _: rows.set(), "value")
    bench.train.start()
    assert rows.wait(60)
    name = bench.train.result["run"]
    bench.train.cancel()
    end = time.monotonic() + 20
    while Run.open(tmp_path / name).status != "cancelled" and time.monotonic() < end:
        time.sleep(0.05)
    assert Run.open(tmp_path / name).status == "cancelled"  # not interrupted, as after a crash
    result = swept.wait(200)
    assert result["status"] == "done"
    assert result["measured"] == [{"x": "2", "square": "4"}, {"x": "3", "square": "9"}]
    assert "Square is smallest at x 2: 4" in bench.sweep._table.value
    assert bench.sweep.report() == tmp_path / result["run"] / "report.html"
    # A sweep takes long: it is seen that the copied code asks for the same one.
    asked = Recorder()
    monkeypatch.setattr("qtx_lab.experiments.sweeps.sweep", asked)
    monkeypatch.setattr(qtx_lab, "sweep", asked, raising=False)
    run_code(bench.sweep.python_code())
    CliRunner().invoke(main, shlex.split(bench.sweep.command())[1:])
    (by_python, python_options), (by_command, command_options) = asked.calls
    assert by_python == (str(tmp_path / "squares.ipynb"), {"x": [2, 3]})
    assert by_command[0] == by_python[0]
    assert {name: value_of(x, {}) for name, x in by_command[1].items()} == {"x": [2, 3]}
    assert python_options["cluster"] == bench.sweep.forms["cluster"].spec
    assert command_options["workers"] == 1
    for name in ("parameters", "repeats", "seed"):
        assert python_options[name] == command_options[name]
    again = bench.sweep.start().wait(200)  # nothing of it is run again, and the tab says so
    assert (again["taken"], again["measured"]) == (2, result["measured"])
    assert "2 of them had been run before" in bench.sweep._table.value
    bench.sweep.form.change(grid={"x": [2, 3, 60]})
    seen: list[str] = []
    bench.sweep._table.observe(lambda change: seen.append(change.new), "value")
    bench.sweep.start()
    end = time.monotonic() + 200
    while not any("<td>60</td><td>running" in text for text in seen) and time.monotonic() < end:
        time.sleep(0.05)
    assert "2 of 3 notebooks are done" in seen[-1]
    bench.sweep.cancel()
    assert "2 of 3 notebooks are done and kept" in bench.sweep._message.value
    assert "<td>60</td><td>cancelled" in bench.sweep._table.value


def test_a_calibration_says_what_it_found_and_whether_it_holds(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.calibrate.form.change(max_loss=0.3, length=64, windows=4)
    before = bench.calibrate.state()
    result = bench.calibrate.start().wait(200)
    assert {"layers", "num_samples"} <= result["qtx_sampled"].keys()
    verdict = "verified" if result["verified"] else "NOT verified"
    assert f"reference: {verdict} on other text" in bench.calibrate._answer.value
    # A calibration takes long: it is seen that the copied code asks for the same one.
    asked = Recorder(settings={}, verified=True)
    monkeypatch.setattr("qtx_lab.models.calibration.calibrate", asked)
    monkeypatch.setattr(qtx_lab, "calibrate", asked, raising=False)
    run_code(bench.calibrate.python_code())
    CliRunner().invoke(main, shlex.split(bench.calibrate.command())[1:])
    (by_python, python_options), (by_command, command_options) = asked.calls
    assert by_python[1:] == (reference_text(), 0.3)
    assert by_command[1:] == ([reference_text()],)
    assert command_options["max_loss"] == 0.3
    for name, value in {"length": 64, "windows": 4, "seed": 0}.items():
        assert python_options[name] == command_options[name] == value
    bench.sample.forms["source"].change(text="/no/such/text")
    assert bench.calibrate.state() != before  # another text makes the answer stale
    with pytest.raises(TextError, match="no/such/text"):
        bench.calibrate.start().wait(200)


def test_a_full_disk_is_reported_and_stops_nothing(bench: Workbench) -> None:
    bench.sample.form.change(num_samples=8)
    bench.flush()
    folder = bench.run.path
    folder.rename(folder.with_name("moved"))
    bench.sample.form.change(num_samples=9)
    bench.flush()
    assert "not saved" in bench.storage_note()
    assert bench.sample.form.spec.to_parameters()["num_samples"] == 9
    folder.with_name("moved").rename(folder)
    bench.sample.form.change(num_samples=10)
    bench.flush()
    assert "saved in" in bench.storage_note()


# --- In a real browser -------------------------------------------------------------------------------------

CELL = "import qtx_lab as qtx\nwb = qtx.Workbench(num_tokens=128)\nwb"


def bar(page: Any, says: str) -> Any:
    """The line at the bottom of the open tab, once it says so."""
    line = page.locator(".qtx-wb-bar:visible").filter(has_text=says)
    line.wait_for()
    return line


def press(page: Any, button: str) -> None:
    page.locator(".qtx-workbench").get_by_role("button", name=button, exact=True).click()


def complete(page: Any, button: str) -> None:
    """Press a button of the open tab, and wait until its work is done, and not only the work before it."""
    page.evaluate("""() => {
      const open = [...document.querySelectorAll(".qtx-wb-page")].find((e) => e.checkVisibility());
      const isDone = () => open.querySelector(".qtx-wb-bar").innerText.includes("done");
      window.qtxWork = { began: !isDone(), isDone };
      const follow = () => { window.qtxWork.began ||= !isDone(); };
      new MutationObserver(follow).observe(open, { subtree: true, childList: true, characterData: true });
    }""")
    press(page, button)
    page.wait_for_function("() => window.qtxWork.began && window.qtxWork.isDone()", timeout=300_000)


def open_tab(page: Any, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True)
    tab.click()
    expect(tab).to_have_attribute("aria-selected", "true")
    page.locator(".qtx-wb-page:visible").wait_for()


def field(page: Any, name: str) -> Any:
    return page.locator(f".qtx-wb-page:visible [data-field={name}]")


def unfold(page: Any, name: str) -> None:
    """Open the group of fields that a field stands in."""
    group = page.locator(".qtx-wb-page:visible details").filter(has=page.locator(f"[data-field={name}]"))
    if group.get_attribute("open") is None:
        group.locator("summary").click()


def cut_off(page: Any) -> list[str]:
    """What of the workbench needs scrolling sideways, or lies over something else, once all has its place."""
    for _ in range(100):
        problems: list[str] = page.evaluate(CUT_OFF)
        if not problems:
            break
        page.wait_for_timeout(300)
    return problems


CUT_OFF = """() => {
      const root = document.querySelector(".qtx-workbench"), problems = [];
      const named = (e) => `${e.tagName}.${e.className} ${(e.innerText ?? "").slice(0, 40)}`;
      for (const e of [root, ...root.querySelectorAll("*")]) {
        if (!e.checkVisibility() || e.closest("[tabindex='0'][role=region]")) continue;
        const style = getComputedStyle(e);
        const scrolls = ["auto", "scroll", "hidden"].includes(style.overflowX);
        const typed = ["INPUT", "SELECT"].includes(e.tagName);
        if (e.scrollWidth > e.clientWidth + 1 && scrolls && e.clientWidth > 1 && !typed)
          problems.push(`wider: ${named(e)}`);
      }
      const edge = root.getBoundingClientRect();
      const boxes = [...root.querySelectorAll("button, input:not([type=file]), select, label, summary")]
        .filter((e) => e.checkVisibility()).map((e) => [e, e.getBoundingClientRect()])
        .filter(([, b]) => b.width);
      for (const [e, b] of boxes)
        if (b.left < edge.left - 1 || b.right > edge.right + 1) problems.push(`outside: ${named(e)}`);
      for (const [e, a] of boxes) for (const [f, b] of boxes) {
        if (e === f || e.contains(f) || f.contains(e)) continue;
        if (e.closest(".qtx-wb-act") || f.closest(".qtx-wb-act")) continue;
        // The status line stays in view, over what has to be scrolled to.
        if (e.closest(".qtx-wb-bar") !== f.closest(".qtx-wb-bar")) continue;
        const over = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const up = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (over > 2 && up > 2) problems.push(`over each other: ${named(e)} | ${named(f)}`);
      }
      return problems;
    }"""


@pytest.mark.ui
def test_the_whole_work_in_a_browser(
    page: Any,
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    set_theme: Callable[..., None],
    shoot: Callable[..., Path],
    axe: Callable[..., list[str]],
) -> None:
    open_notebook(page, [CELL])
    run_all(page)
    page.locator(".qtx-form:visible").first.wait_for()
    shoot(page, "workbench-empty")
    assert cut_off(page) == []

    complete(page, "Draw")
    lens = page.locator(".qtx-wb-views:visible")
    said = lens.inner_text()
    slider = lens.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("([old]) => document.querySelector('.qtx-wb-views').innerText !== old", arg=[said])
    page.wait_for_function("""() => {  // the field follows, and the summary follows it
      const fields = [...document.querySelectorAll("[data-field=num_samples] input")];
      const value = fields.find((e) => e.checkVisibility())?.value;
      const views = document.querySelector(".qtx-wb-views").innerText;
      return value !== "64" && views.includes(`${value} draws a row`);
    }""")

    # What is wrong stands beside its field; Cancel and the other fields go on.
    replicates = field(page, "replicates")
    replicates.locator("input").fill("0")
    replicates.locator("input").press("Enter")
    replicates.locator("[role=alert]").filter(has_text="replicates=0 is not allowed").wait_for()
    replicates.locator("input").fill("2")
    replicates.locator("input").press("Tab")
    expect(replicates).not_to_have_class(re.compile("qtx-form-wrong"))

    # Rows are brushed, and sent to the circuit.
    canvas = lens.locator(".qtx-maps canvas:visible").last
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.33, steps=4)
    page.mouse.up()
    send = page.get_by_role("button", name="Send").filter(has_text=re.compile(r"\d rows to Circuit"))
    number = int(re.search(r"\d+", send.inner_text())[0])
    send.click()
    page.locator(".qtx-wb-page:visible").get_by_role("button", name="Measure rows").wait_for()
    expect(field(page, "rows").locator("input")).to_have_count(number)
    sent = [int(x.input_value()) for x in field(page, "rows").locator("input").all()]
    assert len(sent) >= 2
    assert sent == list(range(sent[0], sent[0] + len(sent)))
    unfold(page, "rows")
    # A list's items are moved by the keyboard, and by dragging.
    rows = field(page, "rows")
    swapped = [str(x) for x in (sent[1], sent[0], *sent[2:])]
    first, second = rows.locator("li").nth(0), rows.locator("li").nth(1)
    first.locator(".qtx-form-handle").focus()
    page.keyboard.press("ArrowDown")
    assert [x.input_value() for x in rows.locator("input").all()] == swapped
    rows.locator("li").nth(1).scroll_into_view_if_needed()
    box, below = first.locator(".qtx-form-handle").bounding_box(), second.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 5, below["y"] + below["height"] - 2, steps=4)
    page.mouse.up()
    assert [x.input_value() for x in rows.locator("input").all()] == [str(x) for x in sent]
    complete(page, "Measure rows")
    expect(page.locator(".qtx-wb-table:visible tbody tr")).to_have_count(len(sent))

    # A coordinate of their outputs is estimated, beside as many shots and classical draws.
    unfold(page, "gives")
    field(page, "gives").locator("select").select_option("output")
    complete(page, "Estimate outputs")
    page.locator(".qtx-wb-headline:visible").filter(has_text="Amplitude estimation ±").wait_for()
    estimates = page.locator(".qtx-wb-views:visible svg[aria-label^='estimated outputs']")
    expect(estimates.locator("circle")).to_have_count(3 * len(sent))
    expect(page.locator(".qtx-wb-headline:visible")).to_contain_text("as many shots ±")
    shoot(page, "workbench-outputs")
    field(page, "gives").locator("select").select_option("rows")

    # A softmax circuit computes rows of few keys from their logits: two of four and of five keys.
    unfold(page, "loader")
    loaders = field(page, "loader").locator("select")
    loaders.select_option("softmax")
    unfold(page, "rows")
    for _ in sent[2:]:
        rows.get_by_role("button", name=re.compile("^Remove rows")).last.click()
    rows.locator("li").nth(2).wait_for(state="detached")
    for i in range(2):
        rows.locator("input").nth(i).fill(str(3 + i))
        rows.locator("input").nth(i).press("Tab")
    complete(page, "Measure rows")
    page.locator(".qtx-wb-page:visible").get_by_text(re.compile("^Circuit: softmax loader")).wait_for()
    expect(page.locator(".qtx-wb-table:visible tbody tr")).to_have_count(2)
    expect(page.locator(".qtx-wb-views:visible")).to_contain_text("loader softmax")
    shoot(page, "workbench-softmax")
    unfold(page, "loader")
    loaders.select_option("dynamic")
    open_tab(page, "Hardware")
    complete(page, "Submit rows")

    # A noise level is added, changed and removed.
    open_tab(page, "Mitigate")
    unfold(page, "noise_levels")
    levels = field(page, "noise_levels")
    levels.get_by_role("button", name="Add").click()
    levels.locator("input").nth(2).wait_for()
    assert [x.input_value() for x in levels.locator("input").all()] == ["1", "3", "5"]
    levels.locator("input").last.fill("4")
    levels.locator("input").last.press("Enter")
    levels.get_by_role("button", name="Remove noise levels 2").click()
    levels.locator("input").nth(2).wait_for(state="detached")
    assert [x.input_value() for x in levels.locator("input").all()] == ["1", "4"]
    assert field(page, "method").locator("select").input_value() == "planner"
    unfold(page, "method")
    field(page, "method").locator("select").select_option("zne")
    complete(page, "Mitigate rows")
    verdict = page.locator(".qtx-wb-headline:visible").inner_text()
    assert verdict.startswith(("Mitigation h", "No difference that these shots can show")), verdict
    expect(page.locator(".qtx-mitigation:visible svg[role=img]")).to_have_count(1)
    expect(page.locator(".qtx-wb-table:visible")).to_contain_text("mitigated")
    open_tab(page, "Runs")
    press(page, "Refresh")
    bar(page, "done")

    # A small model is trained for a moment.
    open_tab(page, "Train")
    unfold(page, "model")
    field(page, "model").locator("select").select_option("small")
    for name, number in (("num_tokens", "64"), ("num_samples", "8"), ("steps", "40")):
        unfold(page, name)
        field(page, name).locator("input").fill(number)
        field(page, name).locator("input").press("Tab")
    complete(page, "Train")

    for theme in ("light", "dark"):
        set_theme(page, theme)
        for name in ("Sample", "Circuit", "Mitigate", "Hardware", "Calibrate", "Train", "Sweep", "Runs"):
            open_tab(page, name)
            if name == "Sweep":
                unfold(page, "grid")
            page.wait_for_timeout(300)
            assert cut_off(page) == [], name
            shoot(page, f"workbench-{name.lower()}-{theme}")
            if theme == "dark" or name == "Sample":
                assert axe(page, ".qtx-workbench") == [], name
    set_theme(page, "light")

    # By keyboard alone: the tabs, the button, the fields.
    page.get_by_role("tab", name="Runs").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator(".qtx-wb-page:visible").get_by_role("button", name="Measure rows").wait_for()
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.matches('details:not([open]) > summary')"):
            page.keyboard.press("Enter")  # unfolds the group
        reached.append(
            page.evaluate(
                "() => { const e = document.activeElement;"
                "        return e.labels?.[0]?.innerText || e.ariaLabel || e.innerText; }"
            )
        )
    assert "Measure rows" in reached
    assert "device" in reached
    assert "shots" in reached

    # Half a window: one column.
    page.set_viewport_size({"width": 700, "height": 800})
    page.wait_for_timeout(500)
    assert cut_off(page) == []
    shoot(page, "workbench-narrow")


@pytest.mark.ui
def test_cancel_restart_and_thousands_of_updates_in_a_browser(
    page: Any,
    open_notebook: Callable[..., Any],
    run_all: Callable[..., None],
    run_python: Callable[..., None],
    soak: bool,
) -> None:
    updates = 3400 if soak else 500  # from each of three sides
    wait = "import pathlib, time\nwhile not pathlib.Path('go-on').exists(): time.sleep(0.05)"
    path = open_notebook(page, [CELL, wait])
    page.evaluate("() => window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0")
    run_all(page, wait=False)  # the second cell keeps the kernel busy
    page.locator(".qtx-form:visible").first.wait_for()
    open_tab(page, "Train")
    prompt = page.locator(".jp-InputPrompt").nth(1)
    for busy in (True, False):
        if not busy:
            path.with_name("go-on").touch()
            prompt.filter(has_text="[2]:").wait_for()
        press(page, "Train")
        page.locator(".qtx-wb-page:visible progress").wait_for()
        if busy:
            assert prompt.inner_text() == "[*]:"  # the cell is still at work
        took = page.evaluate("""async () => {
          const open = [...document.querySelectorAll(".qtx-wb-page")].find((e) => e.checkVisibility());
          const cancel = [...open.querySelectorAll("button")].find((e) => e.innerText === "Cancel");
          const started = performance.now();
          cancel.click();
          while (!open.querySelector(".qtx-wb-bar").innerText.includes("cancelled")) {
            if (performance.now() - started > 20000) return Infinity;
            await new Promise((done) => setTimeout(done, 5));
          }
          return performance.now() - started;
        }""")
        print(f"cancel, {'a cell busy' if busy else 'no cell busy'}: {took:.0f} ms from click to picture")
        assert took < 20_000

    # The main thread, another thread and a subshell at once.
    open_tab(page, "Circuit")
    unfold(page, "shots")
    run_python(
        page,
        "import threading\n"
        f"def many(): [wb.mitigate.form.change(instances=n) for n in range(2, {updates + 1})]\n"
        "aside = threading.Thread(target=many); aside.start()\n"
        f"[wb.sample.form.change(num_samples=n) for n in range(1, {updates + 1})]; aside.join()",
        wait=False,
    )
    page.evaluate(
        """async (updates) => {
      const inputs = [...document.querySelectorAll("[data-field=shots] input")];
      const shots = inputs.find((e) => e.checkVisibility());
      for (let n = 1; n <= updates; n++) {
        shots.value = String(n);
        shots.dispatchEvent(new Event("change", { bubbles: true }));
        if (n % 20 === 0) await new Promise((done) => setTimeout(done));
      }
    }""",
        updates,
    )
    run_python(
        page,
        "import json, time\n"
        "end = time.monotonic() + 300\n"
        f"while wb.circuit.form.spec.shots != {updates} and time.monotonic() < end: time.sleep(0.1)\n"
        "wb.flush()\n"
        "for _ in range(500):  # what follows the last change, as a redrawn sample, is written soon after\n"
        "    saved = json.loads((wb.run.path / 'workbench.json').read_bytes())['forms']\n"
        "    shown = json.loads(json.dumps({name: page.state() for name, page in wb.tabs.items()}))\n"
        "    if saved == shown: break\n"
        "    time.sleep(0.2)\n"
        "assert saved == shown\n"
        f"assert saved['circuit']['circuit']['shots'] == {updates}, saved['circuit']\n"
        f"assert saved['sample']['sampler']['num_samples'] == {updates}, saved['sample']\n"
        f"assert saved['mitigate']['mitigation']['instances'] == {updates}, saved['mitigate']",
    )
    open_tab(page, "Sample")
    complete(page, "Draw")

    run_python(page, "wb.flush()")  # the state is written soon, but not at once
    page.evaluate("async () => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_function(
        """() => { const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                   return kernel.connectionStatus === 'connected' && kernel.status === 'idle'; }"""
    )
    page.locator(".qtx-lens input[type=range]:visible").first.press("ArrowLeft")
    page.locator(".qtx-lens").get_by_text("The kernel behind this view is gone").wait_for()
    assert cut_off(page) == []  # ipywidgets marks all its parts as cut off, with a sign before each
    before = "(e) => getComputedStyle(e, '::before').content"
    assert "kernel of this workbench is gone" in page.locator(".qtx-workbench").evaluate(before)
    assert page.locator(".qtx-wb-body:visible").evaluate(before) == "none"
    page.evaluate(
        """([first]) => {
          const cells = window.jupyterapp.shell.currentWidget.content.widgets;
          cells[0].model.sharedModel.setSource(first);
          cells[1].model.sharedModel.setSource("");
        }""",
        ["import qtx_lab as qtx\nwb = qtx.Workbench.restore()\nwb"],
    )
    run_all(page)
    page.locator(".qtx-wb-views:visible canvas").first.wait_for()
    assert field(page, "num_samples").locator("input").input_value() == str(updates)
    open_tab(page, "Circuit")
    assert field(page, "shots").locator("input").input_value() == str(updates)

    # Saved, and opened where no kernel knows its widgets, it shows its picture, and no error. The picture is
    # made when the views have come to rest.
    page.locator(".jp-RenderedImage img").first.wait_for(state="attached")
    page.evaluate("""async () => {
      await window.jupyterapp.commands.execute("docmanager:save");
      await window.jupyterapp.shell.currentWidget.sessionContext.shutdown();
    }""")
    page.goto(page.url.split("?")[0])
    page.locator(".jp-RenderedImage img").first.wait_for()
    page.get_by_text("model not found").first.wait_for(state="attached")
    assert page.locator(".jp-RenderedImage img").first.is_visible()
    assert not page.get_by_text("model not found").first.is_visible()
    ours = [error for error in page.watch.errors if "widget model not found" not in error]
    page.watch.errors[:] = ours  # JupyterLab says so itself
