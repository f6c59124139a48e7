"""The quickstart on real text, with the results that a user of `qtx-lab demo` gets."""

import re
from html.parser import HTMLParser

import pytest

import qtx_lab as qtx

pytestmark = pytest.mark.notebooks

FIGURES = {
    "attention-maps",
    "error-against-draws",
    "variance-by-head",
    "bits-against-draws",
    "time-per-token",
}
SMALL = {"sample_counts": [8, 16, 32], "num_tokens": 256, "num_windows": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    spec = qtx.ExperimentSpec(**SMALL)
    return qtx.run_notebook("00_quickstart", spec, home=tmp_path_factory.mktemp("home"), progress=False)


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_run_records_everything(run):
    assert run.status == "done"
    assert {figure["name"] for figure in run.figures()} == FIGURES
    for name in FIGURES:
        for ending in (".png", "-dark.png", ".svg", ".parquet"):
            assert (run.path / "figures" / f"{name}{ending}").stat().st_size > 0
    metrics = run.metrics()
    assert {"monte-carlo", "stratified", "systematic"} <= set(metrics["sampler"])
    results = run.manifest["results"]
    assert 0.93 <= results["coverage"] <= 0.97
    assert len(results["summary"]) >= 3
    executed = (run.path / "00_quickstart.ipynb").read_text()
    assert executed.count('"image/png": "') == len(FIGURES)
    assert "widget-state" not in executed
    assert len(executed) < 1_000_000


def test_the_report_needs_neither_network_nor_javascript(run):
    page = (run.path / "report.html").read_text()
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object", "embed")]
    for _, attributes in tags:
        for name in ("src", "srcset", "href", "poster", "data"):
            target = attributes.get(name) or "data:"
            assert target.startswith(("data:", "#")) or not re.match(r"[a-z]+:|//", target), target
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == len(FIGURES)
    assert all(image["alt"] for image in images)
    for sentence in run.manifest["results"]["summary"]:
        assert sentence.split(";")[0] in page


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    again = qtx.run_notebook("00_quickstart", qtx.ExperimentSpec(**SMALL), home=tmp_path, progress=False)
    assert (again.path / "metrics.parquet").read_bytes() == (run.path / "metrics.parquet").read_bytes()


def test_a_text_of_the_user(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("Attention is a weighted mean, and a mean can be sampled. Größe: 3 µm. " * 40)
    spec = qtx.ExperimentSpec(**SMALL, text=str(text), sampler="stratified", samplers=["stratified"])
    assert qtx.run_notebook("00_quickstart", spec, home=tmp_path, progress=False).status == "done"


def test_a_text_too_short_is_refused_before_any_run(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with pytest.raises(qtx.TextError, match="9 bytes"):
        qtx.run_notebook("00_quickstart", qtx.ExperimentSpec(text=str(text)), home=tmp_path / "home")
    assert not (tmp_path / "home").exists()
