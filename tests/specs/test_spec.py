"""Specs: round trips change nothing, and a value that is not allowed is refused by name."""

from __future__ import annotations

import itertools
import json
import os
from functools import cache

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator

from qtx_lab.attention import sampled_attention
from qtx_lab.backends import HybridPolicy
from qtx_lab.backends.qiskit import MAX_SHOTS_PER_ROW
from qtx_lab.circuits import LOADERS
from qtx_lab.cli import main
from qtx_lab.controls import CONTROLS
from qtx_lab.errors import ArgumentError, SpecError
from qtx_lab.mitigation import FOLDINGS, METHODS
from qtx_lab.samplers import BASELINES, SAMPLERS, SystematicSampler
from qtx_lab.specs import (
    SPECS,
    CircuitSpec,
    ClusterSpec,
    ControlSpec,
    ExperimentSpec,
    MitigationSpec,
    SamplerSpec,
    Spec,
    SweepSpec,
    TrainSpec,
)
from qtx_lab.training.cluster import open_cluster
from qtx_lab.widgets.workbench.tabs.code_parts import changed_fields

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts | st.floats(allow_nan=False)
values = scalars | st.lists(scalars, max_size=3)
identifiers = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


def of_schema(schema: dict) -> st.SearchStrategy:
    """Values of a field, from its JSON schema alone, which is all that a form knows."""
    if "anyOf" in schema:
        return st.one_of([of_schema(kind) for kind in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=True)
    kind = schema.get("type")
    if kind == "integer":
        return st.integers(schema["minimum"], schema["maximum"])
    if kind == "number":
        return st.floats(
            schema.get("minimum", schema.get("exclusiveMinimum")),
            schema.get("maximum", schema.get("exclusiveMaximum")),
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
        )
    if kind == "array":
        items = schema["items"]
        if "minimum" not in items and items.get("type") in ("integer", "number"):
            items = {**items, "minimum": 1, "maximum": 1000}  # of devices and noise levels
        return st.lists(of_schema(items), min_size=schema.get("minItems", 0), max_size=6, unique=True)
    return {
        "boolean": st.booleans(),
        "string": texts,
        "null": st.none(),
        "object": st.dictionaries(identifiers, values, max_size=3),
    }[str(kind)]


@cache
def fields_of(cls: type[Spec]) -> dict[str, st.SearchStrategy]:
    return {name: of_schema(schema) for name, schema in cls.model_json_schema()["properties"].items()}


@st.composite
def specs(draw) -> Spec:
    """Any spec; fields that exclude each other are drawn again until they fit."""
    cls = draw(st.sampled_from(list(SPECS.values())))
    fields = dict(fields_of(cls))
    if cls is SweepSpec:
        fields["grid"] = st.dictionaries(identifiers, st.lists(values, max_size=3), max_size=3)
    if cls is CircuitSpec:
        hardware = draw(st.booleans())
        fields["device"] = st.just("ibm_fez") if hardware else st.sampled_from([None, "fake_fez"])
        fields["provider"] = st.just("ibm" if hardware else "aer")
    drawn = {name: draw(strategy) for name, strategy in fields.items() if draw(st.booleans())}
    wrong = cls.problems(drawn)
    for _ in range(10):
        if not wrong:
            break
        drawn = {name: value for name, value in drawn.items() if name not in wrong}
        if "" in wrong:
            drawn = {}
        if "address" in wrong:
            drawn.pop("kind", None)
        if "device" in wrong:
            drawn.pop("provider", None)
        if "noise_levels" in wrong:  # the usual ones are too few for a polynomial of degree 3
            drawn.pop("extrapolation", None)
        if cls is CircuitSpec and "device" in fields and drawn.get("provider") == "ibm":
            drawn["device"] = "ibm_fez"
        if cls is TrainSpec and wrong:  # intervals that are no multiple of it, and other fields
            drawn.pop("local_steps", None)
        for name in ("notebook", "sha256"):
            if name in wrong:
                drawn[name] = draw(fields[name])
        wrong = cls.problems(drawn)
    return cls(**drawn)


@settings(max_examples=1000 if not SOAK else 10_000, suppress_health_check=[HealthCheck.too_slow])
@given(specs())
def test_round_trips_change_nothing(spec: Spec) -> None:
    parameters = spec.to_parameters()
    read = type(spec).from_yaml(spec.to_yaml())
    cell: dict[str, object] = {}
    exec(PythonTranslator.codify(read.to_parameters()), cell)  # the cell that papermill writes
    back = type(spec).from_parameters({name: cell[name] for name in parameters})
    assert back == read == spec
    assert back.to_parameters() == read.to_parameters() == parameters
    assert back.identity == read.identity == spec.identity
    assert type(spec).problems(parameters) == {}
    assert type(spec).from_parameters(json.loads(json.dumps(parameters))) == spec


def test_yaml_file(tmp_path) -> None:
    path = tmp_path / "spec.yaml"
    spec = ExperimentSpec(text="grüße.txt", sample_counts=(64, 8))
    path.write_text(spec.to_yaml(), encoding="utf-8")
    assert ExperimentSpec.from_yaml(path) == ExperimentSpec.from_yaml(str(path)) == spec
    assert spec.sample_counts == (8, 64)


def test_specs_have_equal_identities_exactly_where_they_are_equal() -> None:
    kinds = {ExperimentSpec().identity, ExperimentSpec(seed=1).identity, SamplerSpec().identity}
    assert len(kinds) == 3
    assert ExperimentSpec(sample_counts=(8, 4)).identity == ExperimentSpec(sample_counts=(4, 8)).identity


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer": 6}, r"layer=6 .* from 0 to 5"),
        ({"head": True}, r"head=True .* from 0 to 7"),
        ({"seed": 1.0}, r"seed=1.0 .* from 0 to 9223372036854775807"),
        ({"num_tokens": "64"}, r"num_tokens='64' .* from 16 to 1024"),
        ({"sample_counts": [8, 0]}, r"sample_counts\[1\]=0 .* from 1 to 65536"),
        ({"sample_counts": [8, 8]}, "8 is named more than once"),
        ({"sample_counts": []}, "a list of at least 1"),
        ({"sampler": "sistematic"}, "'sistematic' is unknown. Did you mean 'systematic'?"),
        ({"samplers": ["monte-carlo", "monte"]}, "samplers.*'monte' is unknown"),
        ({"sample_count": [8]}, "no field 'sample_count'. Did you mean 'sample_counts'?"),
        ({"text": ""}, "text='' .* at least 1 character"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, says) -> None:
    with pytest.raises(SpecError, match=says):
        ExperimentSpec.from_parameters(fields)


def test_one_error_names_all_problems() -> None:
    with pytest.raises(SpecError, match=r"layer=-1.*no field 'hed'. Did you mean 'head'") as caught:
        ExperimentSpec(layer=-1, hed=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1", "not valid YAML"),
        ("seed: 1\nseed: 2", "'seed' is named twice"),
        ("- a", "list"),
        ("1: 2", "names"),
        ("? [a, b]\n: 1", "unhashable key"),
        ("seed: !!int ''", "does not fit"),
        ("seed: !!bool maybe", "does not fit"),
        ("seed: !!python/object:os.system x", "tag"),
        ("!!map [1]", "expected a mapping"),
        ("[" * 5000, "recursion"),
    ],
)
def test_bad_yaml_is_refused(text, says) -> None:
    with pytest.raises(SpecError, match=says):
        ExperimentSpec.from_yaml(text)


def test_errors_show_only_the_ends_of_huge_values() -> None:
    names = "abcdefgh"
    lines = [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in itertools.pairwise(names)]
    bomb = "\n".join(["a: &a [x]", *lines, "samplers: [*h]"])
    with pytest.raises(SpecError, match="samplers") as caught:
        ExperimentSpec.from_yaml(bomb)
    assert len(str(caught.value)) < 100_000


def test_an_error_of_thousands_of_problems_names_the_first() -> None:
    with pytest.raises(SpecError) as caught:
        ExperimentSpec(samplers=list(range(5000)))
    assert "samplers[7]=7 is not allowed" in str(caught.value)
    assert str(caught.value).endswith(" And 4,992 more.")


def test_the_command_line_names_every_kind() -> None:
    said = CliRunner().invoke(main, ["spec", "--help"]).output
    assert all(kind in said for kind in SPECS)


def test_numbers_of_numpy_and_torch_are_numbers_and_switches_are_none() -> None:
    for number in (np.int64(3), np.array(3), torch.tensor(3)):
        assert type(SamplerSpec(replicates=number).replicates) is int
        assert SamplerSpec(replicates=number) == SamplerSpec(replicates=3)
    for number in (np.float32(0.5), torch.tensor(0.5), np.array(0.5)):
        assert SamplerSpec(tolerance=number).to_yaml() == SamplerSpec(tolerance=0.5).to_yaml()
    for other in (True, np.True_, torch.tensor(True), 10**400, "1", int, np.arange(3)):
        for field in ("replicates", "tolerance"):
            with pytest.raises(SpecError, match=f"{field}=.* is not allowed"):
                SamplerSpec(**{field: other})


def test_a_sampler_that_is_added_is_a_choice(monkeypatch) -> None:
    class Mine(SystematicSampler):
        name = "mine"

    assert SamplerSpec.problems({"name": "mine"})
    monkeypatch.setitem(SAMPLERS, "mine", Mine)
    assert isinstance(SamplerSpec(name="mine").build(), Mine)
    assert "mine" in SamplerSpec.model_json_schema()["properties"]["name"]["enum"]


def test_missing_file_is_a_spec_error(tmp_path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        ExperimentSpec.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", sorted(SPECS))
def test_every_field_explains_itself(kind) -> None:
    assert SPECS[kind].__doc__
    for name, schema in SPECS[kind].model_json_schema()["properties"].items():
        assert schema["description"].endswith("."), name
        assert schema["unit"], name
        assert schema["group"], name
        kinds = schema.get("anyOf", [schema])
        for bounded in (x for x in kinds if x.get("type") in ("integer", "number") and "enum" not in x):
            assert "minimum" in bounded or "exclusiveMinimum" in bounded, name
            assert "maximum" in bounded or "exclusiveMaximum" in bounded, name


def test_choices_are_the_names_that_exist() -> None:
    choices = {
        (kind, name): schema.get("enum") or schema.get("items", {}).get("enum")
        for kind, cls in SPECS.items()
        for name, schema in cls.model_json_schema()["properties"].items()
    }
    assert choices["sampler", "name"] == [*SAMPLERS, *BASELINES]
    assert choices["control", "names"] == list(CONTROLS)
    assert choices["circuit", "loader"] == list(LOADERS)
    assert set(choices["mitigation", "scaling"]) == {"model", *FOLDINGS}
    assert set(choices["mitigation", "extrapolation"]) == set(METHODS)
    shots = CircuitSpec.model_json_schema()["properties"]["shots"]
    assert shots["maximum"] == MAX_SHOTS_PER_ROW


def test_each_problem_names_its_field() -> None:
    problems = TrainSpec.problems({"learning_rate": 0, "steps": 10, "sed": 1, "compile": "yes"})
    assert set(problems) == {"learning_rate", "sed", "compile"}
    assert "Did you mean 'seed'" in problems["sed"]
    assert "above 0" in problems["learning_rate"]
    assert CircuitSpec.problems({"device": "fake_fes"})["device"].startswith(
        "device='fake_fes' is unknown. Did"
    )
    assert set(SamplerSpec.problems({"tolerance": 0.1, "num_samples": 8})) == {"tolerance"}


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (CircuitSpec, {"provider": "ibm"}, "device=None"),
        (CircuitSpec, {"mode": "batch"}, "mode='batch' .* for IBM's devices"),
        (CircuitSpec, {"device": "fake_fez", "readout": 0.1}, "readout=0.1 .* noise of its own"),
        (CircuitSpec, {"provider": "ibm", "device": "ibm_fez", "noise_scale": 2}, "noise_scale=2.0"),
        (CircuitSpec, {"loader": "tre"}, "Did you mean 'tree'"),
        (MitigationSpec, {"method": "zne", "noise_levels": [0, 1]}, r"noise_levels=\[0.0, 1.0\]"),
        (MitigationSpec, {"method": "zne", "noise_levels": [1]}, "noise_levels has 1"),
        (MitigationSpec, {"noise_levels": [1, 1]}, "named more than once"),
        (MitigationSpec, {"method": "pec", "instances": 8, "precision": 0.1}, "exclude each other"),
        (MitigationSpec, {"method": "pec", "precision": 1}, "precision"),
        (MitigationSpec, {"noise_levels": [float("inf")]}, "finite"),
        (MitigationSpec, {"method": "pec", "degree": 3}, "degree=3 .* method='pec': it is for zne"),
        (MitigationSpec, {"noise_levels": [1, 3]}, r"noise_levels=\[1.0, 3.0\] .* method='none': it is for"),
        (MitigationSpec, {"method": "zne", "precision": 0.1}, "precision=0.1 .* method='zne': .* pec"),
        (MitigationSpec, {"method": "zne", "degree": 3}, "degree=3 .* extrapolation='linear'"),
        (
            MitigationSpec,
            {"method": "distillation", "scaling": "model"},
            "scaling='model' .*'distillation': it is for",
        ),
        (MitigationSpec, {"method": "shared-decay", "extrapolation": "exponential"}, "it is for zne"),
        (MitigationSpec, {"method": "planner", "readout": True}, "readout=True .* decides about readout"),
        (MitigationSpec, {"method": "planner", "instances": 8, "degree": 3}, "degree=3.* instances=8"),
        (CircuitSpec, {"max_qubits": 3}, "max_qubits=3 .* hybrid_mode=False"),
        (CircuitSpec, {"hybrid_mode": False, "max_pending": 0}, "max_pending=0 .* limit of the hybrid mode"),
        (ClusterSpec, {"kind": "address"}, "address=None"),
        (ClusterSpec, {"kind": "local", "devices": [0]}, "devices"),
        (ControlSpec, {"names": ["topk", "perform"]}, "Did you mean 'performer'"),
        (SamplerSpec, {"num_samples": None}, "without a tolerance"),
        (SamplerSpec, {"tolerance": float("nan")}, "tolerance=nan"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(kind, fields, says) -> None:
    with pytest.raises(SpecError, match=says):
        kind(**fields)


@pytest.mark.parametrize("method", ["none", "planner", "pec", "distillation", "zne"])
def test_forms_may_hold_fields_of_what_is_not_chosen(method) -> None:
    """A form, YAML and a run's record have all fields, also those that were set for another method."""
    held = {"noise_levels": [1, 3], "degree": 3, "scaling": "model", "instances": 8, "readout": True}
    every = {**MitigationSpec().to_parameters(), **held, "method": method}
    spec = MitigationSpec(**every)
    assert MitigationSpec.from_yaml(spec.to_yaml()) == spec
    assert MitigationSpec.problems(every) == {}
    read = MitigationSpec(**changed_fields(spec))  # what a tab gives as Python to copy
    used = set(every) - set(spec.unused_fields())
    assert all(dict(read)[name] == dict(spec)[name] for name in used)
    assert type(read.build(4)) is type(spec.build(4))
    circuit = CircuitSpec(**{**CircuitSpec().to_parameters(), "max_qubits": 3})
    assert CircuitSpec.from_yaml(circuit.to_yaml()).max_qubits == 3
    assert changed_fields(circuit) == {}


def test_specs_build_what_they_describe() -> None:
    q, k, v = torch.randn(3, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    arguments = SamplerSpec(name="stratified", tolerance=0.5, replicates=2).arguments()
    assert set(arguments) == {"sampler", "tolerance", "confidence", "replicates"}
    estimate = sampled_attention(q, k, v, **arguments, control_variate=ControlSpec().build())
    assert estimate.output.shape == v.shape
    assert ControlSpec().build() is None
    assert [type(c).__name__ for c in ControlSpec(names=["topk", "performer"]).build()] == [
        "TopKControl",
        "PerformerControl",
    ]
    noisy = CircuitSpec(two_qubit=0.1, shots=7, loader="tree", noise_scale=0.5).build()
    assert (noisy.shots, noisy.loader.name, noisy.engine.noise.two_qubit) == (7, "tree", 0.1)
    assert CircuitSpec(provider="ibm-q", device="ibm_fez", twirling=True).build().provider == "ibm"
    policy = CircuitSpec(hybrid_mode=True, max_qubits=3).policy()
    assert isinstance(policy, HybridPolicy)
    assert policy.max_qubits == 3
    assert CircuitSpec().policy() is False
    built = {method: MitigationSpec(method=method).build() for method in ("none", "planner", "zne", "pec")}
    assert built["none"] is None
    assert built["zne"].levels == (1, 3, 5)
    assert (built["zne"].readout, built["zne"].zne.method, built["pec"].readout) == (True, "linear", True)
    assert MitigationSpec(readout=True).build().readout
    assert not MitigationSpec(method="zne", readout=False).build().readout
    assert MitigationSpec(method="pec", precision=0.01).build().precision == 0.01
    with pytest.raises(ArgumentError, match="num_keys"):
        MitigationSpec(method="zne", extrapolation="exponential").build()
    with open_cluster(**ClusterSpec(kind="local", num_workers=1).arguments()) as cluster:
        assert cluster.client.submit(sum, [1, 2]).result() == 3


def test_bounds_are_those_of_the_reference_model() -> None:
    from qtx_lab.models.reference import ReferenceConfig

    config, schema = ReferenceConfig(), ExperimentSpec.model_json_schema()["properties"]
    assert schema["layer"]["maximum"] == config.layers - 1
    assert schema["head"]["maximum"] == config.heads - 1
    assert schema["num_tokens"]["maximum"] == config.context


def test_sampler_spec_builds_its_sampler() -> None:
    assert isinstance(SamplerSpec(name="systematic").build(), SystematicSampler)
    with pytest.raises(SpecError, match=r"'exakt' is unknown\. Did you mean 'exact'"):
        SamplerSpec(name="exakt")
