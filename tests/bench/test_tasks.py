"""`bench tasks`: its rows tell what exact attention finds, and name tasks that are beyond the model."""

import pytest

from qtx_lab.bench import tasks as bench_tasks
from qtx_lab.models.reference import load_reference_model


def test_rows_tell_what_was_found_and_which_tasks_are_beyond_the_model(monkeypatch, capsys):
    monkeypatch.setattr(bench_tasks, "load_language_model", lambda name: load_reference_model())
    monkeypatch.setattr(bench_tasks, "QUICK_PROMPTS", {300: 2})
    monkeypatch.setattr(bench_tasks, "TASKS", ("single-needle", "long-text"))
    needle, text = bench_tasks.bench_tasks(True, 1e10)
    assert needle.case == "single-needle, 300 tokens"
    assert (needle.check, needle.ratio, needle.error) == ("the model gave no answer", None, 1)
    assert (needle.details["found"], needle.details["prompts"]) == (0, 2)
    assert needle.details["settings"] == {"digits": 7}
    assert needle.details["found low"] == 0 < needle.details["found high"]
    assert text.passed
    assert text.details["found"] is None
    assert text.details["nats low"] <= text.details["nats"] <= text.details["nats high"]
    assert text.error == pytest.approx(-text.details["nats"])
    assert 0.5 < text.error < 2
    assert "single-needle" in capsys.readouterr().out
