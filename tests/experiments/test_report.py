"""The report is one self-contained page, however the run ended."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from qtx_lab.experiments.report import write_report
from qtx_lab.experiments.runs import Run
from qtx_lab.specs import ExperimentSpec, NotebookSpec


def draw(data: pd.DataFrame, theme: str):
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(2, 1))


class Page(HTMLParser):
    """What a page loads and shows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_self_contained(tmp_path) -> None:
    data = pd.DataFrame({"draws": [8, 16], "error": [0.5, 0.25]})
    with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
        run.update(
            title="A <b>finding</b>",
            command="qtx-lab demo --seed 0",
            results={
                "summary": ["It works & is safe."],
                "table": [{"n": 8, "error": 0.123456}, {"n": 12345}],
            },
        )
        run.save_figure("later", draw, data, "its caption")
        run.save_figure("earlier", draw, data.loc[data.index.repeat(100_000)], "a large one", title="Large")
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "A &lt;b&gt;finding&lt;/b&gt;" in text
    assert "It works &amp; is safe." in text
    assert "0.1235" in text
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    loaded = [attrs.get(key) for _, attrs in page.tags for key in ("src", "srcset") if attrs.get(key)]
    assert len(loaded) == 4
    assert all(address.startswith("data:image/png;base64,") for address in loaded)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    downloads = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "download" in attrs]
    assert [link.startswith("data:text/csv;base64,") for link in downloads] == [True]
    assert "figures/earlier.parquet" in text
    assert text.index("its caption") < text.index("a large one")
    assert "qtx-lab demo --seed 0" in text
    assert "This run" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError("off by <1>"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_the_page_begins_with_the_error_of_a_run(tmp_path, raised, status) -> None:
    with pytest.raises(type(raised)), Run.create(NotebookSpec(notebook="x"), "trial", tmp_path) as run:
        raise raised
    (run.path / "spec.yaml").write_text("]")
    (run.path / "figures" / "cut.json").write_text("{")
    text = write_report(run).read_text(encoding="utf-8")
    assert f"This run {'was ' if status == 'interrupted' else ''}{status}" in text
    assert ("off by &lt;1&gt;" in text) == (status == "failed")
    assert "spec.yaml cannot be read" in text


def test_a_run_in_which_somebody_works_is_not_called_unfinished(tmp_path) -> None:
    run = Run.create(ExperimentSpec(), "workbench", tmp_path)
    assert "This run is not finished" in write_report(run).read_text(encoding="utf-8")
    assert "This run" not in write_report(run, stays_open=True).read_text(encoding="utf-8")
    run.finish("cancelled")
    assert "This run was cancelled" in write_report(run, stays_open=True).read_text(encoding="utf-8")


def test_a_figure_is_replaced_by_html_that_redraws_it_where_scripts_run(tmp_path) -> None:
    data, live = pd.DataFrame({"x": [1]}), '<div class="qtx-page"><script>1 &lt; 2</script></div>'
    with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
        run.save_figure("maps", draw, data, "its caption", live=live)
    text = write_report(run).read_text(encoding="utf-8")
    assert live in text
    assert text.index("<img") < text.index(live) < text.index("<figcaption>its caption")
    assert "runs no script" not in text
    run.save_figure("maps", draw, data, "its caption")
    text = write_report(run).read_text(encoding="utf-8")
    assert live not in text
    assert "runs no script" in text


def draw_noise(data: pd.DataFrame, theme: str):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    axes.imshow(np.random.default_rng(0).random((300, 450)), cmap="cividis", interpolation="nearest")
    return figure


def pictures_of(text: str) -> list[tuple[str, Image.Image]]:
    """The kind of each picture of a page, and the picture."""
    addresses = re.findall(r'(?:src|srcset)="data:image/(\w+);base64,([^"]+)"', text)
    return [(kind, Image.open(io.BytesIO(base64.b64decode(content)))) for kind, content in addresses]


@pytest.mark.parametrize(("noisy", "live"), [(1, 2_700_000), (8, 0), (1, 2_990_000)])
def test_a_page_is_below_three_megabytes_whatever_is_drawn(tmp_path, noisy: int, live: int) -> None:
    data = pd.DataFrame({"x": range(3)})
    with Run.create(ExperimentSpec(), "trial", tmp_path) as run:
        run.save_figure("plain", draw, data, "a plain one", live="é" * (live // 2) or None)
        run.save_figure("noise-0", draw_noise, data, "a large one")
        for i in range(1, noisy):
            for file in (run.path / "figures").glob("noise-0*"):
                text = file.read_text().replace("noise-0", f"noise-{i}") if file.suffix == ".json" else ""
                new = file.with_name(file.name.replace("noise-0", f"noise-{i}"))
                new.write_text(text) if text else shutil.copy(file, new)
        (run.path / "figures" / "noise-0-dark.png").write_bytes(b"\x89PNG" + bytes(3_000_000))  # broken
    path = write_report(run)
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    assert Page(text).open == []
    pictures = pictures_of(text)
    assert len(pictures) == 2 + 2 * noisy - 1
    assert [kind for kind, _ in pictures[:2]] == ["png", "png"]  # what is small stays as it is
    whole = Image.open(run.path / "figures" / "noise-0.png").convert("RGB")
    for kind, picture in pictures[2:]:
        assert kind in ("png", "webp")
        small = whole.resize(picture.size, Image.Resampling.LANCZOS)
        assert picture.size[0] * 16 >= whole.size[0]
        shift = np.subtract(
            picture.convert("L").resize((24, 16)),
            np.asarray(small.convert("L").resize((24, 16))),
            dtype=float,
        )
        assert np.abs(shift).max() < 8  # of 255
    assert ("ééé" in text) == (0 < live < 2_900_000)
    assert "Data (CSV, 3 rows)" in text
