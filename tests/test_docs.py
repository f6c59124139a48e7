"""The documentation: links hold, every public name has a page, and the code of the pages runs."""

import ast
import doctest
import inspect
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

import qtx_lab
from qtx_lab.bench.base import NAMES
from qtx_lab.cli import main
from qtx_lab.samplers import BASELINES, SAMPLERS, unregister_sampler
from qtx_lab.stability import EXPERIMENTAL, STABLE
from tests.widgets.conftest import chromium

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "notebooks"
WRITTEN = sorted(path for path in PAGES.rglob("*.md") if "api" not in path.parts)
CODE = re.compile(r"^( *)```python\n(.*?)^\1```", flags=re.M | re.S)


def code_of(page: Path) -> list[str]:
    """The Python blocks of a page, without their indentation."""
    return [inspect.cleandoc("\n" + code) for _, code in CODE.findall(page.read_text(encoding="utf-8"))]


SET_BY_CONF = ("QTX_LAB_HOME", "IPYTHONDIR")
"""Variables of the environment that conf.py sets, and that a test takes back."""

CODED = [
    page for page in (ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *WRITTEN) if code_of(page)
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages, built with every warning as an error and without running a notebook."""
    from sphinx.application import Sphinx

    out = tmp_path_factory.mktemp("docs")
    messages = out / "warnings.txt"
    with messages.open("w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as environment:
        for name in SET_BY_CONF:
            environment.setenv(name, "")
        overrides = {"nb_execution_mode": "off"}
        app = Sphinx(PAGES, PAGES, out, out / "doctrees", "html", overrides, status=None, warning=stream)
        app.build()
    assert messages.read_text(encoding="utf-8") == ""
    return out


def test_the_pages_are_read_without_a_warning(built: Path) -> None:
    # A link inside that leads nowhere is a warning, and so is a page that no other page names.
    assert (built / "doctrees" / "environment.pickle").exists()


def test_every_public_name_has_a_page_with_types_and_an_example(built: Path) -> None:
    pages = {path.stem for path in (PAGES / "reference" / "api").glob("*.rst")}
    names = set(qtx_lab.__all__) - {"__version__"}
    assert names <= pages
    read = doctest.DocTestParser().get_examples
    without = [
        name
        for name in names
        if not any(example.want for example in read(inspect.getdoc(getattr(qtx_lab, name)) or ""))
    ]
    assert sorted(without) == []  # an example that only defines a function shows nothing


def test_examples_stand_under_their_heading() -> None:
    # Elsewhere a page shows them as a part of the arguments or errors before them.
    without = []
    for path in sorted((ROOT / "qtx_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                above = (ast.get_docstring(node) or "").partition("\n>>>")[0::2]
                headings = re.findall(r"^(\w[\w ]*)\n-{3,}$", above[0], flags=re.M)
                if above[1] and headings and headings[-1] != "Examples":
                    without.append(f"{path.name}: {node.name}")
    assert without == []


def test_every_sampler_has_a_page_and_a_row_in_their_table(built: Path) -> None:
    folder = PAGES / "reference" / "api"
    table = (folder / "samplers.rst").read_text(encoding="utf-8")
    for name, make in {**SAMPLERS, **BASELINES}.items():
        page = type(make()).__name__
        assert f"``{name}``" in table
        assert f":doc:`{page}`" in table
        assert (folder / f"{page}.rst").is_file()


def test_every_public_name_is_stable_or_experimental_and_marked(built: Path) -> None:
    assert sorted([*STABLE, *EXPERIMENTAL]) == qtx_lab.__all__  # each on one of the lists in stability.py
    folder = PAGES / "reference" / "api"
    marked = {path.stem for path in folder.glob("*.rst") if "admonition:: Experimental" in path.read_text()}
    assert marked == set(EXPERIMENTAL)


@pytest.mark.parametrize("page", CODED, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    known = set(SAMPLERS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for block in code_of(page):
                exec(compile(block, str(page), "exec"), names)
    finally:
        for name in set(SAMPLERS) - known:
            unregister_sampler(name)


def test_the_tables_name_every_command_and_benchmark() -> None:
    commands = (PAGES / "reference" / "command_line.md").read_text(encoding="utf-8")
    assert [name for name in main.commands if f"| `qtx-lab {name}" not in commands] == []
    benchmarks = (PAGES / "benchmarks.md").read_text(encoding="utf-8").partition("## ")[0]
    assert [name for name in NAMES if f"`{name}`" not in benchmarks] == []


def test_the_first_page_answers_ten_questions_and_readme_is_short() -> None:
    questions = (PAGES / "index.md").read_text(encoding="utf-8").partition("## Questions")[2]
    assert len(re.findall(r"^\| .+\? \| \[.+\]\(.+\) \|$", questions, flags=re.M)) >= 10
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)", readme) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


CUT_OFF = """() => {
  const article = document.querySelector("article"), edge = article.getBoundingClientRect().right + 2;
  const scrolls = e =>
    e && e !== article && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  const wide = [...article.querySelectorAll("*:not(.headerlink)")].filter(
    e => e.getClientRects().length && e.getBoundingClientRect().right > edge && !scrolls(e.parentElement));
  const side = document.querySelector(".bd-sidebar-secondary");
  return [...wide.slice(0, 3).map(e => e.textContent.trim().slice(0, 60)),
    ...(side && side.scrollWidth > side.clientWidth ? ["the contents at the side"] : [])];
}"""
"""What of a page is wider than its place and cannot be scrolled."""


@pytest.mark.ui
def test_no_page_of_the_reference_is_cut_off_at_1280_pixels(built: Path) -> None:
    path = chromium()
    from playwright.sync_api import sync_playwright

    cut = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        for file in sorted((built / "reference" / "api").glob("*.html")):
            page.goto(file.as_uri())
            if found := page.evaluate(CUT_OFF):
                cut[file.stem] = found
        browser.close()
    assert cut == {}


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("biased by O(S^-5)", r"biased by O(S\ :sup:`-5`\ )"),
        ("keys U_i, 2^32 of them", r"keys \ *U*\ :sub:`i`\ , 2\ :sup:`32`\  of them"),
        ("|v_j - c|^2", r"\|\ *v*\ :sub:`j`\  - c\|\ :sup:`2`\ "),
        ("sum_l w_l² var_l", r"\ *Σ*\ :sub:`l`\  \ *w*\ :sub:`l`\ ² \ *var*\ :sub:`l`\ "),
        ("|o_hat|", "\\|o\u0302\\|"),
        ("``U_i`` and `x_i` and num_samples", "``U_i`` and `x_i` and num_samples"),
    ],
)
def test_formulae_in_docstrings_are_set_as_mathematics(
    written: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SET_BY_CONF:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert runpy.run_path(str(PAGES / "conf.py"))["escaped"](written) == shown


def test_no_page_fetches_from_a_network() -> None:
    settings = (PAGES / "conf.py").read_text(encoding="utf-8")
    assert "https://" not in settings
    assert "intersphinx" not in settings
