"""The benchmark of lossless generation measures greedy texts that are the exact model's, and exact passes."""

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.bench import lossless
from qtx_lab.models.speculative import LosslessReport


def test_rows_hold_what_was_read_and_whether_the_text_is_exact(monkeypatch, capsys):
    monkeypatch.setattr(lossless, "PROPOSALS", {"mixed 24": lossless.PROPOSALS["mixed 24"]})
    monkeypatch.setattr(lossless, "EXACT_STEPS", 1)
    rows, reports = lossless.model_rows(qtx.load_reference_model(), 200, 10)
    greedy, drawn = rows
    assert greedy.error == drawn.error == 0
    assert greedy.details["attention_bytes"] == reports["mixed 24"].attention_bytes
    assert greedy.details["least_margin"] > 0
    assert "tokens a pass" in capsys.readouterr().out


def test_greedy_texts_at_several_prompts_are_the_exact_models(monkeypatch, capsys):
    monkeypatch.setattr(lossless, "EXACT_STEPS", 1)
    rows = lossless.greedy_rows(qtx.load_reference_model(), prompts=2, length=100, count=8)
    assert [row.error for row in rows] == [0, 0]
    assert rows[0].details["least_margin"] != rows[1].details["least_margin"]
    assert "greedy text 2 of 2" in capsys.readouterr().out


def test_the_attention_of_a_pass_is_timed_with_its_drafts(monkeypatch, capsys):
    monkeypatch.setattr(lossless, "LAYERS_BYTES", 1)
    torch.manual_seed(0)
    report = LosslessReport(8, 2, (), (), 6, 0.2, 1.0, 1.0)
    (row,) = lossless.attention_rows(300, {"low-rank 32": report}, turns=1)
    assert row.error < 1e-5
    assert row.details["drafts"] == 3
    assert row.details["tokens_per_pass"] == 4
    assert row.seconds * 4 == row.low * 4 == row.high * 4
    assert row.check == "pass"  # its time counts from 32,768 keys on
    assert "low-rank 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("length", "share", "check"), [(7936, 0.3, "pass"), (400, 0.5, "pass"), (7936, 0.5, "above 0.4")]
)
def test_bytes_are_checked_where_the_prompt_is_long(length, share, check):
    report = LosslessReport(8, 2, (), (), 6, share, 1.0, 1.0)
    row = lossless.model_row("a text", "mixed 24", length, lossless.Continuation((1,), report, 1.0, 0), 0.1)
    assert row.check.endswith(check)
    assert row.ratio == pytest.approx(0.1 / 0.25)
