"""Specs: round trips change nothing, and what is not allowed is refused by name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtx_lab.errors import SpecError
from qtx_lab.experiments.spec import MAX_SEED, ExperimentSpec, NotebookSpec, SamplerSpec, Spec
from qtx_lab.samplers import SAMPLERS, SystematicSampler

names = st.sampled_from(sorted(SAMPLERS))
drawing = st.sampled_from(sorted(set(SAMPLERS) - {"exact"}))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
experiments = st.builds(
    ExperimentSpec,
    text=texts,
    layer=st.integers(0, 5),
    head=st.integers(0, 7),
    sampler=drawing,
    samplers=st.lists(drawing, min_size=1, unique=True),
    sample_counts=st.lists(st.integers(1, 65_536), min_size=1, max_size=8, unique=True),
    seed=st.integers(0, MAX_SEED),
    num_tokens=st.integers(16, 1024),
    num_windows=st.integers(1, 1024),
)
samplers = st.builds(
    SamplerSpec, name=names, num_samples=st.integers(1, 65_536), replicates=st.integers(1, 1024)
)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts | st.floats(allow_nan=False)
values = scalars | st.lists(scalars, max_size=3)
notebooks = st.builds(NotebookSpec, notebook=texts, parameters=st.dictionaries(texts, values, max_size=4))


@given(experiments | samplers | notebooks)
def test_round_trips_change_nothing(spec: Spec) -> None:
    parameters = spec.to_parameters()
    back = type(spec).from_parameters(json.loads(json.dumps(parameters)))
    read = type(spec).from_yaml(spec.to_yaml())
    assert back == read == spec
    assert back.to_parameters() == read.to_parameters() == parameters
    assert back.identity == read.identity == spec.identity


def test_yaml_file(tmp_path) -> None:
    path = tmp_path / "spec.yaml"
    spec = ExperimentSpec(text="grüße.txt", sample_counts=(64, 8))
    path.write_text(spec.to_yaml(), encoding="utf-8")
    assert ExperimentSpec.from_yaml(path) == ExperimentSpec.from_yaml(str(path)) == spec
    assert spec.sample_counts == (8, 64)


def test_identity_tells_specs_apart() -> None:
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
def test_refuses_by_name(fields, says) -> None:
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
    ],
)
def test_refuses_bad_yaml(text, says) -> None:
    with pytest.raises(SpecError, match=says):
        ExperimentSpec.from_yaml(text)


def test_missing_file_is_a_spec_error(tmp_path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        ExperimentSpec.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", [SamplerSpec, ExperimentSpec])
def test_every_field_explains_itself(kind) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert name == "name" or field.json_schema_extra["unit"], name


def test_bounds_are_those_of_the_reference_model() -> None:
    from qtx_lab.training.reference import ReferenceConfig

    config, schema = ReferenceConfig(), ExperimentSpec.model_json_schema()["properties"]
    assert schema["layer"]["maximum"] == config.layers - 1
    assert schema["head"]["maximum"] == config.heads - 1
    assert schema["num_tokens"]["maximum"] == config.context


def test_sampler_spec_builds_its_sampler() -> None:
    assert isinstance(SamplerSpec(name="systematic").build(), SystematicSampler)
    with pytest.raises(SpecError, match=r"'exakt' is unknown\. Did you mean 'exact'"):
        SamplerSpec(name="exakt")
