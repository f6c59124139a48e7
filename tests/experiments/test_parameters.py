"""Parameters cells are read as Python itself runs them, and words are what the cells declare."""

from __future__ import annotations

import ast
import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import papermill_translators

from qtx_lab.cli.options import read_grid, read_parameters
from qtx_lab.errors import ArgumentError, SpecError
from qtx_lab.experiments.notebook_execution import LANGUAGE, _register_translator
from qtx_lab.experiments.notebooks import (
    declared_parameters,
    notebook_spec,
    parameter_words,
)
from qtx_lab.experiments.parameters import UNKNOWN, parameters_of
from qtx_lab.experiments.sweep_plan import plan, sweep_command
from qtx_lab.specs import TrainSpec, Word, listed_word, read_yaml, split_words, value_of, word_of, write_yaml

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")

names = st.sampled_from(["a", "b", "c", "lr", "name", "grid_size", "größe"])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "x = 1",
        "a=b",
        "#ff0000",
        "u?v=w",
        "no",
        "0042",
        "2024-01-01",
        "1e-3",
        '"""',
        "'",
        "; b = 2",
        "\\",
        "{a}",
    ]
)
texts |= st.text("'\"\\[]{},:?!-#& ab\n\x85", max_size=8)  # what YAML gives a meaning to
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
literals = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts, inner, max_size=2)
    ),
    max_leaves=5,
)
hints = st.sampled_from(["int", "float | None", "dict[str, int]", '"list[str]"', "Optional[str]", "object"])
comments = st.sampled_from(["", "  # a note: x = 1", "  # type: ignore", '  # """'])


@st.composite
def statements(draw) -> str:
    """One statement of a parameters cell, as people write them."""
    name, other = draw(names), draw(names)
    value = draw(literals)
    kinds: list[Callable[[], str]] = [
        lambda: f"{name} = {value!r}",
        lambda: f"{name}={value!r}",
        lambda: f"{name} : {draw(hints)} = {value!r}",
        lambda: f"{name} = {other} = {value!r}",
        lambda: f"{name}, {other} = {value!r}, {draw(literals)!r}",
        lambda: f"({name}, [{other}, *rest]) = {value!r}, {[draw(scalars) for _ in range(3)]!r}",
        lambda: f"{name} = (  # in brackets\n    {value!r}\n)",
        lambda: f"{name} = dict(a={value!r}, b=1)",
        lambda: f"{name} = {draw(st.integers(0, 99))} * 60 + {draw(st.floats(0, 9))!r}",
        lambda: f"{name} = list(({value!r}, 2))",
        lambda: f"{name} = 'x = 1' \\\n    'b = 2'",
        lambda: f"'''\n{name} = 7\n'''",
        lambda: f"# {name} = 7",
        lambda: f"{name} = {draw(st.integers(0, 9))}\n{name} += 2",
        lambda: f"{name} = {value!r}; {other} = {draw(literals)!r}",
        lambda: f"{name} = [1]; {other} = {name}; {name}.append({value!r})",
    ]
    return draw(st.sampled_from(kinds))()  # only what this kind needs is drawn


cells = st.lists(st.tuples(statements(), comments), max_size=5).map(
    lambda parts: "\n".join(
        text + ("" if "\n" in text or text.startswith("'") else end) for text, end in parts
    )
)


@settings(max_examples=2000 if SOAK else 200)
@given(cells)
def test_a_cell_declares_what_python_gives(cell: str) -> None:
    space: dict[str, Any] = {}
    exec(f"from typing import Optional\n{cell}", space)
    expected = {key: value for key, value in space.items() if not key.startswith("__") and key != "Optional"}
    declared = parameters_of(cell)
    assert set(declared) == set(expected)
    for name, parameter in declared.items():
        if parameter.default is UNKNOWN:
            assert ".append(" in cell  # a literal, a call of a built-in type or a sum is always known
        else:
            assert repr(parameter.default) == repr(expected[name])
        default = parameter.default
        fits = parameter.problem(default) is None
        assert fits or default is UNKNOWN or parameter.hinted


@settings(max_examples=2000 if SOAK else 200)
@given(literals | st.sampled_from([math.inf, -math.inf]), st.sampled_from(["declared", "nothing declared"]))
def test_what_is_recorded_gives_the_same_value_when_it_is_typed(value: Any, declares: str) -> None:
    value = list(value) if isinstance(value, tuple) else value
    declared = parameters_of(f"x = {value!r}" if declares == "declared" else "x = None")["x"]
    value = declared.taken(value)
    word = word_of(value, declared.schema)
    if word is None:
        assert isinstance(value, str)  # -r NAME TEXT gives it
    else:
        assert repr(declared.taken(Word(word))) == repr(value)
    listed = split_words(",".join([listed_word(value, declared.schema)] * 2))
    assert [repr(declared.taken(part)) for part in listed] == [repr(value)] * 2
    assert repr(read_yaml(write_yaml({"x": value}))) == repr({"x": value})


CELL = """
text, none_yet = "a", None
lr = 0.01; n = 8; flag = False
words = ["a"]; rates = (0.1, 0.2)
maybe: float | None = None
name: str | None = None
table: dict[str, float] = {}
nested: dict[str, list[float]] = {}
pairs: list[tuple[int, str]] = []
whole: set[int] | None = None
"""


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("text", "0042", "0042"),
        ("text", "no", "no"),
        ("text", "2024-01-01", "2024-01-01"),
        ("text", " #ff0000: [", " #ff0000: ["),
        ("text", "none", "none"),
        ("lr", "1e-3", 1e-3),
        ("lr", "1", 1.0),
        ("lr", "inf", math.inf),
        ("lr", "-.inf", -math.inf),
        ("lr", "1_000", 1000.0),
        ("n", "1e3", 1000),
        ("n", "0x10", 16),
        ("n", "0.5", 0.5),
        ("flag", "yes", True),
        ("flag", "off", False),
        ("words", "[no, 0042, 'x, y']", ["no", "0042", "x, y"]),
        ("rates", "[1, 1e-3]", [1.0, 1e-3]),
        ("maybe", "1e-3", 1e-3),
        ("maybe", "none", None),
        ("name", "0042", "0042"),
        ("name", "None", None),
        ("table", "{no: 1, b: 1e-3}", {"no": 1.0, "b": 1e-3}),
        ("none_yet", "no", "no"),
        ("none_yet", "0042", "0042"),
        ("none_yet", "2024-01-01", "2024-01-01"),
        ("none_yet", "1e-3", 1e-3),
        ("none_yet", "-1", -1),
        ("none_yet", "true", True),
        ("none_yet", "[1, a, 'no']", [1, "a", "no"]),
        ("none_yet", "{a: 2}", {"a": 2}),
        ("none_yet", "1e400", "1e400"),  # no float holds it
        ("nested", "{a: [1, 2]}", {"a": [1.0, 2.0]}),
        ("maybe", "-0.0", -0.0),
    ],
)
def test_words_are_what_the_cell_declares(name: str, typed: str, value: object) -> None:
    taken = parameters_of(CELL)[name].taken(Word(typed))
    assert taken == value
    assert type(taken) is type(value)
    assert not isinstance(taken, Word)


@pytest.mark.parametrize(
    ("name", "typed", "given"),
    [
        ("rates", "[1, 2]", "(1.0, 2.0,)"),
        ("rates", "[]", "()"),
        ("pairs", "[[1, a], [2, b]]", "[(1, 'a'), (2, 'b')]"),
        ("whole", "[2, 1]", "{1, 2}"),
        ("words", "[a]", "['a']"),
    ],
)
def test_tuples_and_sets_are_given_as_such(name: str, typed: str, given: str) -> None:
    declared = parameters_of(CELL)[name]
    value = declared.taken(Word(typed))
    assert isinstance(value, list)  # as a spec records it
    assert repr(declared.injected(value)) == repr(ast.literal_eval(given))
    _register_translator()
    text = papermill_translators.find_translator("", LANGUAGE).translate(declared.injected(value))
    assert repr(eval(text)) == repr(ast.literal_eval(given))


def test_nan_is_a_number() -> None:
    for cell in ("x = 0.5", "x = None"):
        for typed in ("nan", "NaN", ".nan"):
            taken = parameters_of(cell)["x"].taken(Word(typed))
            assert isinstance(taken, float)
            assert math.isnan(taken)


def write(path: Path, cell: str, spec: str | None = None) -> Path:
    new = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell, metadata={"tags": ["parameters"]})],
        metadata={} if spec is None else {"qtx_lab": {"spec": spec}},
    )
    nbformat.write(new, path)
    return path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"lrr": 1, "nn": 2},
            "no parameters 'lrr', 'nn'. Did you mean 'lr'.* Allowed: text, none_yet, lr",
        ),
        ({"lr": Word("fast")}, r"lr='fast' .* declares a number, lr = 0\.01"),
        ({"flag": Word("3")}, "flag='3' .* declares yes or no"),
        ({"maybe": Word("x")}, "maybe='x' .* declares a number or None"),
        ({"text": 3}, "text=3 .* declares a text"),
        ({"table": Word("3")}, "table='3' .* declares a mapping whose values are numbers, table = {}"),
        ({"table": Word("{a: x}")}, "table={'a': 'x'} .* declares a mapping whose values are numbers"),
        (
            {"nested": Word("{a: 1}")},
            r"nested={'a': '1'} .* declares a mapping whose values are lists of numbers",
        ),
        ({"nested": {"a": [1, None]}}, r"nested={'a': \[1.0, None\]} .* whose values are lists of numbers"),
        ({"words": [1]}, r"words=\[1\] .* declares a list of texts, words = \['a'\]"),
        ({"rates": Word("[1, x]")}, r"rates=\[1.0, 'x'\] .* declares a list of numbers"),
        ({"whole": Word("[1, 0.5]")}, r"whole=\[1, 0.5\] .* a list of whole numbers or None"),
        ({"lr": Word("1e400")}, "lr='1e400' .* declares a number"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, says, tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", CELL)
    with pytest.raises(SpecError, match=says):
        notebook_spec(path, declared_parameters(path), given)


def test_a_name_with_a_hint_alone_must_be_given(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", "n: int\nlr = 1.0")
    declared = declared_parameters(path)
    with pytest.raises(SpecError, match="declares 'n' without a value"):
        notebook_spec(path, declared, {"lr": 2})
    with pytest.raises(SpecError, match=r"n=2\.5 .* declares a whole number"):
        notebook_spec(path, declared, {"n": 2.5})
    assert notebook_spec(path, declared, {"n": Word("3")}).to_parameters()["parameters"] == {"n": 3}


def test_a_field_of_a_spec_that_is_computed_is_refused(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", "import os\nlayer = len(os.sep)\nhead = 1 + 1", spec="experiment")
    declared = declared_parameters(path)
    with pytest.raises(SpecError, match=r"layer = len\(os.sep\), whose value is known only when it runs"):
        notebook_spec(path, declared, {})
    spec = notebook_spec(path, declared, {"layer": Word("3")})
    assert (spec.layer, spec.head) == (3, 2)


def test_a_cell_that_is_not_python_is_told_by_its_line(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", "x = 1\ny = = 2")
    with pytest.raises(ArgumentError, match=r"a.ipynb.*`parameters` is not Python: .* in line 2"):
        declared_parameters(path)


@pytest.mark.parametrize(
    ("metadata", "fits"),
    [
        ({"name": "conda-env-lab-py", "display_name": "lab"}, True),
        ({"name": "conda-root-py"}, True),
        ({"name": "venv", "display_name": "Python 3.12 (venv)"}, True),
        ({"name": "conda-env-stats-r", "display_name": "R [conda env:stats]"}, False),
        ({"name": "conda-env-py311-r", "display_name": ""}, False),
        ({"name": "conda-env-python-tools-julia"}, False),
        ({"name": "conda-base-py"}, True),
        ({"name": "julia-1.11", "display_name": "Julia 1.11"}, False),
    ],
)
def test_kernels_of_conda_are_known_by_their_names(metadata, fits, tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", "n = 1")
    content = nbformat.read(path, as_version=4)
    content.metadata["kernelspec"] = {"display_name": "", **metadata}
    nbformat.write(content, path)
    if fits:
        assert list(declared_parameters(path)) == ["n"]
    else:
        with pytest.raises(ArgumentError, match="only Python notebooks are run"):
            declared_parameters(path)


def test_a_recorded_command_gives_the_same_parameters(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", CELL)
    declared = declared_parameters(path)
    given = {
        "text": "no 'quotes' #1",
        "none_yet": "1e-3",
        "lr": math.inf,
        "n": 0.5,
        "maybe": -1e-300,
        "name": "none",
        "table": {"a: b": 2.0},
        "flag": True,
        "words": ["no", "a, b", "ü\u2028"],
    }
    spec = notebook_spec(path, declared, given)
    words = iter(shlex.split(shlex.join(parameter_words(path, declared, spec.to_parameters()["parameters"]))))
    typed: dict[str, list] = {"-p": [], "-r": []}
    for option in words:
        typed[option].append((next(words), next(words)))
    assert [name for name, _ in typed["-r"]] == ["none_yet", "name"]
    again = notebook_spec(path, declared, read_parameters(tuple(typed["-p"]), tuple(typed["-r"]), ()))
    assert again == spec


def test_a_recorded_sweep_gives_the_same_combinations(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", CELL)
    grid = {"text": ["a,b", "0042", "[x", '"q"', ""], "lr": [1e-5, math.inf, 2], "none_yet": ["1", 1, None]}
    planned = plan(path, grid, parameters={"words": ["no"]})
    assert planned.spec.grid["lr"] == (1e-5, math.inf, 2.0)
    words = shlex.split(sweep_command(path, path, planned.spec))
    given = [words[i + 1] for i, word in enumerate(words) if word == "-g"]
    fixed = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "-p"]
    again = plan(path, read_grid(tuple(given)), parameters=read_parameters(tuple(fixed), (), ()))
    assert again == planned


def test_files_of_parameters_hold_words_and_options_override_them(tmp_path) -> None:
    path = write(tmp_path / "a.ipynb", CELL)
    file = tmp_path / "given.yaml"
    file.write_text("text: 0042\nlr: 1e-3\nnone_yet: 2024-01-01\nwords: [no, 1]\nn: 3\n")
    given = read_parameters((("n", "4"),), (("none_yet", "12"),), (file,))
    spec = notebook_spec(path, declared_parameters(path), given)
    assert spec.to_parameters()["parameters"] == {
        "text": "0042", "lr": 1e-3, "none_yet": "12", "words": ["no", "1"], "n": 4,
    }  # fmt: skip
    file.write_text("- 1")
    for bad in (file, tmp_path / "none.yaml"):
        with pytest.raises(ArgumentError, match=f"-f '{bad}'"):
            read_parameters((), (), (bad,))


def test_files_of_specs_hold_words_too() -> None:
    spec = TrainSpec.from_yaml("learning_rate: 1e-4\ntext: 0042\ncompile: yes\nsampler: none\nsteps: 1e3\n")
    assert (spec.learning_rate, spec.text, spec.compile, spec.sampler, spec.steps) == (
        1e-4,
        "0042",
        True,
        None,
        1000,
    )
    with pytest.raises(SpecError, match="text=None"):
        TrainSpec.from_yaml("text: !!null ''")
    assert value_of(read_yaml("a: [no, 1e-3, 0o17, .inf]"), {}) == {"a": ["no", 1e-3, 15, math.inf]}
