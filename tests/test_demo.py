"""The quickstart on real text, with the results that a user of `qtx-lab demo` gets."""

import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

import qtx_lab as qtx
from qtx_lab.experiments.figures import variance_map

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
    assert "the shipped model (1.4 M parameters, reads bytes) needs" in results["summary"][0]
    assert re.search(
        r"draws a row, and by [\d.]+ times as much with independent ones\.$", results["summary"][1]
    )
    executed = (run.path / "00_quickstart.ipynb").read_text()
    assert executed.count('"image/png": "') == len(FIGURES)
    assert "widget-state" not in executed
    assert len(executed) < 1_000_000


def test_numbers_in_a_map_have_two_digits_each():
    data = pd.DataFrame({"layer": 0, "head": range(4), "variance": [0.01, 0.07, 0.0043, 12.0]})
    figure = variance_map(data, "light", title="heads")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.010", "0.070", "0.0043", "12"]


def test_the_report_needs_neither_network_nor_javascript(run):
    page = (run.path / "report.html").read_text()
    assert len(page) < 3_000_000
    tags = Tags(page).tags
    assert not [tag for tag, _ in tags if tag in ("iframe", "object", "embed")]
    scripts = [attributes for tag, attributes in tags if tag == "script"]
    assert [script["type"] for script in scripts] == ["application/json", "module"]  # of the attention maps
    assert not any("src" in script for script in scripts)
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


FILLED = """samplers => {
  const isSeen = (name) => [...document.querySelectorAll(name)].every((token) => {
    const [box, at] = [token.parentElement, token].map((x) => x.getBoundingClientRect());
    return at.top >= box.top && at.bottom <= box.bottom;
  });
  const heads = [...document.querySelectorAll(".qtx-heads button")];
  const strip = document.querySelector(".qtx-strip");
  const names = new Set([...strip.querySelectorAll("svg text")].map((text) => text.textContent));
  const options = [...document.querySelectorAll(".qtx-toolbar select option")];
  return heads.length > 1 && heads.every((head) => head.title.includes("relative variance"))
    && !document.querySelector(".qtx-heads[data-stale]")
    && isSeen(".qtx-text [data-query]")
    && !strip.hidden && !strip.innerText.includes("Still to come")
    && options.filter((x) => names.has(x.value)).length === samplers;
}"""
"""Whether a report shows the heads, the strip and the query in the text, though nobody has touched it."""


@pytest.mark.ui
def test_the_report_draws_anew_in_a_browser_without_a_network(run):
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("No Chromium: `apt-get install chromium` (Debian).")
    from playwright.sync_api import sync_playwright

    spec = qtx.ExperimentSpec(**SMALL)
    tokens = qtx.encode(qtx.reference_text())[None, : spec.num_tokens]
    q, k, v = (x[0] for x in qtx.load_reference_model().attention_inputs(tokens)[spec.layer])
    report, errors = (run.path / "report.html").as_uri(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        plain = browser.new_context(java_script_enabled=False, offline=True).new_page()
        plain.goto(report)
        assert plain.locator("picture").first.is_visible()
        assert plain.locator(".qtx").count() == 0

        page = browser.new_context(offline=True).new_page()
        page.set_default_timeout(120_000)  # the page draws for all samplers, on a machine that may be busy
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(report)
        view, heading = page.locator(".qtx"), page.locator(".qtx h2")
        page.wait_for_selector(".qtx[data-draws='16']")
        assert not page.locator("picture").first.is_visible()
        page.wait_for_function(FILLED, arg=len(qtx.AttentionLens.live_samplers))
        assert page.evaluate("scrollY") == 0

        draw = "([h, s, n]) => {const d = document.querySelector('.qtx-page').page.head(3, h).draw(s, n);"
        for sampler in qtx.AttentionLens.live_samplers:
            seen = heading.inner_text()
            page.get_by_label("Sampler").select_option(sampler)
            if sampler != spec.sampler:
                expect_another(page, heading, seen)
            estimate = qtx.sampled_attention(
                q, k, v, sampler=sampler, num_samples=24, generator=torch.Generator().manual_seed(0),
                is_causal=True, enable_gqa=True,
            )  # fmt: skip
            drawn = page.evaluate(
                draw + "return [[...d.indices], [...d.weights], d.error]}", [1, sampler, 24]
            )
            indices, weights = (torch.tensor(x).view(spec.num_tokens, 24) for x in drawn[:2])
            expected = estimate.draws.weights[1]
            differ = (indices != estimate.draws.indices[1]) & (expected > 0)
            assert differ.double().mean() < 1e-3  # the page's logits are rounded in another order
            assert torch.allclose(weights[~differ], expected[~differ], rtol=1e-3)

        for act in (
            lambda: page.get_by_label("draws per row").press("ArrowRight"),
            lambda: page.get_by_label("layer 3, head 2", exact=False).click(),
        ):
            seen = heading.inner_text()
            act()
            expect_another(page, heading, seen)
        page.locator(".qtx-map").first.focus()
        for key in ("ArrowDown", "Shift+ArrowDown", "Shift+ArrowDown"):
            page.keyboard.press(key)
        page.get_by_text("3 rows selected").wait_for()
        page.get_by_label("layer 0, head 0", exact=False).click()
        view.get_by_text(re.compile("does not hold layer 0, head 0|Layer 0, head 0:")).first.wait_for()
        browser.close()
    assert errors == []


def expect_another(page, heading, text):
    """Wait until a heading has another text."""
    page.wait_for_function("([e, t]) => e.innerText !== t", arg=[heading.element_handle(), text])


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
