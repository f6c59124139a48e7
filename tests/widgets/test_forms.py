"""Forms: what is typed, saved, run with and shown again stays the same; errors are shown."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import nbformat
import papermill.parameterize
import pytest
import traitlets
from hypothesis import given, settings
from hypothesis import strategies as st

from qtx_lab.errors import ArgumentError, DtypeError, SpecError
from qtx_lab.specs import SPECS, CircuitSpec, ExperimentSpec, NotebookSpec, SamplerSpec, Spec, SweepSpec
from qtx_lab.widgets.forms import SpecForm, _written, described_fields

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def typed(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a person might leave a field at, by what the form knows of it."""
    kind = field["kind"]
    low, high = field.get("low"), field.get("high")
    if kind == "choice":
        given: st.SearchStrategy[Any] = st.sampled_from(field["choices"])
    elif kind == "switch":
        given = st.booleans()
    elif kind == "whole":
        given = st.integers(low or 0, 2**63 - 1 if high is None else high).map(str)
    elif kind == "number":
        given = st.floats(low or 0, 1000 if high is None else high, allow_nan=False).map(repr)
    elif kind == "list":
        given = st.lists(typed(field["item"]), min_size=field["min_items"], max_size=5, unique=True)
    elif kind == "pairs":
        value = st.integers() | texts | st.booleans() | st.none() | st.lists(texts)
        values = st.lists(value, max_size=3) if field["listed"] else value
        given = st.dictionaries(texts, values, max_size=3).map(lambda x: _written(field, x))
    else:
        given = texts
    return given | st.just("") if field.get("optional") else given


def entries(kind: type[Spec]) -> st.SearchStrategy[dict[str, Any]]:
    """What is typed into some fields of a form."""
    return st.fixed_dictionaries(
        {}, optional={name: typed(field) for name, field in described_fields(kind).items()}
    )


def say(form: SpecForm, **entered: Any) -> None:
    """Edits of a form as a browser sends them."""
    count = 1 + max((edit[0] for edit in form._edits.values()), default=0)
    edits = {**form._edits, **{name: [count, value] for name, value in entered.items()}}
    form.set_state({"_edits": json.loads(json.dumps(edits))})


def through_papermill(spec: Spec) -> dict[str, Any]:
    """The parameters as a notebook's injected cell has them."""
    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"},
            "papermill": {},
        }
    )
    logging.getLogger("papermill").setLevel(logging.ERROR)  # the notebook has no cell of defaults
    notebook = papermill.parameterize.parameterize_notebook(notebook, spec.to_parameters())
    space: dict[str, Any] = {}
    exec(notebook.cells[0].source, space)
    return {name: space[name] for name in spec.to_parameters()}


def written(kind: type[Spec], spec: Spec, name: str) -> Any:
    """A field as it stands in a form."""
    return _written(described_fields(kind)[name], spec.to_parameters()[name])


def start(kind: type[Spec]) -> Spec:
    if issubclass(kind, SweepSpec):
        return kind(notebook="00_quickstart", sha256="0" * 64)
    return NotebookSpec(notebook="00_quickstart") if kind is NotebookSpec else kind()


# 9 kinds of spec: more than a thousand in all.
@pytest.mark.parametrize("kind", SPECS.values(), ids=SPECS.keys())
def test_what_is_typed_comes_back_unchanged(kind: type[Spec]) -> None:
    form, again, plain = SpecForm(start(kind)), SpecForm(start(kind)), start(kind)
    changed = set()

    # A circuit's checks take as long as those of all others together.
    @settings(max_examples=60 if kind is CircuitSpec else 125)
    @given(entries(kind), st.booleans())
    def there_and_back(entered: dict[str, Any], at_once: bool) -> None:
        form.spec = plain
        for part in [entered] if at_once else [{name: value} for name, value in entered.items()]:
            say(form, **part)
        while not form.valid:  # what does not go together is taken back, as the form says
            wrong = [name for name in form.problems if name in entered] or list(entered)[:1]
            assert wrong, form.problems
            assert all(form.problems.values())
            say(form, **{name: written(kind, plain, name) for name in wrong})
            for name in wrong:
                del entered[name]
        parameters = through_papermill(kind.from_yaml(form.spec.to_yaml()))
        again.spec = kind.from_parameters(parameters)
        assert again.spec == form.spec
        form._publish()
        again._publish()
        same = [
            json.dumps({**x._shown, "known_edits": None}) for x in (again, form)
        ]  # only one was typed into
        assert same[0] == same[1]
        changed.add(form.spec.identity)

    there_and_back()
    assert len(changed) >= 25  # what is drawn depends on the modules that are loaded


@pytest.mark.parametrize("kind", SPECS.values(), ids=SPECS.keys())
def test_nothing_typed_breaks_a_form(kind: type[Spec]) -> None:
    form = SpecForm(start(kind))

    @settings(max_examples=60)
    @given(st.dictionaries(st.sampled_from(list(kind.model_fields)), texts | st.lists(texts, max_size=3)))
    def garbage(entered: dict[str, Any]) -> None:
        say(form, **entered)
        assert form.valid == (not form.problems)
        assert kind.problems(form.spec.to_parameters()) == {}
        form._publish()
        json.dumps(form._shown)

    garbage()


def test_every_field_is_described() -> None:
    for kind in SPECS.values():
        for field in described_fields(kind).values():
            assert field["help"], field["name"]
            json.dumps(field)


def test_problems_stand_beside_their_fields() -> None:
    form = SpecForm(SamplerSpec)
    form.enter(num_samples="many", name="sistematic")
    assert not form.valid
    assert form.problems["num_samples"].startswith("num_samples='many' is not allowed: it must be ")
    assert "Did you mean 'systematic'?" in form.problems["name"]
    assert form.spec == SamplerSpec()
    form.enter(num_samples="", tolerance="0.1")
    form.enter(name="sobol")
    assert form.valid
    assert form.spec == SamplerSpec(name="sobol", tolerance=0.1)


def test_setting_the_spec_clears_what_was_typed_wrongly() -> None:
    form = SpecForm(SamplerSpec)
    form.enter(replicates="0")
    form.spec = SamplerSpec()  # equal to the last valid one
    assert form.valid
    assert form._entered["replicates"] == "1"


def test_what_cannot_be_set_is_refused() -> None:
    form = SpecForm(SamplerSpec)
    with pytest.raises(DtypeError, match="this form is for SamplerSpec"):
        form.spec = ExperimentSpec()
    with pytest.raises(SpecError, match="replicates=0"):
        form.change(replicates=0)
    with pytest.raises(DtypeError, match="must be a Spec"):
        SpecForm("sampler")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="Did you mean 'name'"):
        SpecForm(SamplerSpec, fields=["nam"])
    assert form.spec == SamplerSpec()


def test_yaml_files(tmp_path: Any) -> None:
    form, path = SpecForm(CircuitSpec(device="fake_fez", shots=99)), tmp_path / "circuit.yaml"
    form.save(path)
    other = SpecForm(CircuitSpec)
    other.load(path)
    assert other.spec == form.spec
    say(other, yaml="shots: 0")
    assert "shots=0 is not allowed" in other.problems["yaml"]
    assert other.spec == form.spec
    say(other, yaml="shots: 5")
    assert other.spec == CircuitSpec(shots=5)
    assert other.valid


def test_names_and_values_are_read_as_yaml_and_wrong_ones_refused() -> None:
    form = SpecForm(SweepSpec(notebook="00_quickstart", sha256="0" * 64))
    form.enter(grid=[["x", "1, 2.5, [3, 4]"], ["", ""]], parameters=[["name", "a, b"], ["on", "true"]])
    assert form.valid
    values = form.spec.to_parameters()
    assert values["grid"] == {"x": [1, 2.5, [3, 4]]}  # a line that is still empty is none
    assert values["parameters"] == {"name": "a, b", "on": True}
    for wrong in ([["x", "[1"]], [["x", "1"], ["x", "2"]], [["", "1"]]):
        form.enter(grid=wrong)
        assert "grid=" in form.problems["grid"]
    form.suggest("grid", ["x", "y"])
    assert next(f for f in form._fields if f["name"] == "grid")["suggestions"] == ["x", "y"]
    with pytest.raises(ArgumentError, match="kind"):
        form.arrange("row")


def test_a_form_shows_chosen_fields_and_leaves_the_others() -> None:
    form = SpecForm(ExperimentSpec(seed=7), fields=["head", "layer"])
    assert [field["name"] for field in form._fields] == ["head", "layer"]
    form.enter(head="3")
    assert form.spec == ExperimentSpec(seed=7, head=3)


def test_linked_forms_stay_in_step_under_three_threads() -> None:
    a, b = SpecForm(SamplerSpec), SpecForm(SamplerSpec)
    traitlets.link((a, "spec"), (b, "spec"))
    values: list[int] = []
    a.observe(lambda change: values.append(change.new.num_samples), "spec")

    def from_code(form: SpecForm) -> Callable[[], None]:
        return lambda: [form.change(num_samples=n) for n in range(1, 300)] and None

    def from_browser() -> None:
        for n in range(1, 300):
            a.set_state({"_edits": {"replicates": [n, str(n)]}})

    threads = [threading.Thread(target=x) for x in (from_code(a), from_code(b), from_browser)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    a._publish(), b._publish()
    assert a.spec == b.spec == SamplerSpec(num_samples=299, replicates=299)
    assert a._shown["values"] == b._shown["values"]
    assert values[-1] == 299


def test_few_messages_leave_the_kernel() -> None:
    form, sent = SpecForm(SamplerSpec), []
    form.observe(sent.append, "_shown")
    for n in range(1, 2001):
        form.change(num_samples=n)
    form._publish_call.flush()
    assert len(sent) < 200
    assert form._shown["values"]["num_samples"] == "2000"


SLOW_FORM = """
import time, ipywidgets, qtx_lab as qtx
from qtx_lab.widgets.comms import hear_while_busy
from qtx_lab.widgets.forms import SpecForm
form, button, label = SpecForm(qtx.SamplerSpec), ipywidgets.Button(description="Start"), ipywidgets.Label()
form.observe(lambda _: time.sleep(2), "spec")
def start(_):
    label.value = f"started with {form.spec.num_samples} draws"
button.on_click(start)
hear_while_busy(button)
ipywidgets.VBox([form, button, label])
"""


@pytest.mark.ui
def test_a_button_that_is_pressed_after_an_edit_finds_it_though_the_kernel_is_at_an_earlier_one(
    page: Any, open_notebook: Callable[..., Any], run_all: Callable[..., None]
) -> None:
    open_notebook(page, [SLOW_FORM])
    run_all(page)
    draws = page.locator("[data-field=num_samples] input")
    for number in ("100", "200", "300"):
        draws.fill(number)
        draws.press("Tab")
    page.get_by_role("button", name="Start", exact=True).click()
    started = page.get_by_text(re.compile("^started with"))
    started.wait_for()
    assert started.inner_text() == "started with 300 draws"
