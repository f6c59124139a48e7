"""`bench decode`: the fastest exact form is the baseline, and a sketch that errs too much gets no ratio."""

import math
import time

import pytest
import torch

from qtx_lab.bench import base as bench
from qtx_lab.bench import decode as bench_decode


@pytest.fixture(scope="module")
def rows():
    return bench_decode.bench_decode(True, 1e10)


def test_the_rows_hold_the_promised_details(rows):
    assert len({row.case for row in rows}) == 2
    for case in {row.case for row in rows}:
        part = {row.method: row for row in rows if row.case == case}
        assert {*bench_decode.EXACT_FORMS, "exact logits", "int4"} < set(part)
        fastest = min(bench_decode.EXACT_FORMS, key=lambda name: part[name].seconds)
        assert {row.baseline for row in part.values()} == {fastest}
        assert part[fastest].ratio == 1
        for name, row in part.items():
            assert row.details["bytes"] > 0
            if name not in bench_decode.EXACT_FORMS:
                assert (row.ratio is None) == (row.details["error ratio"] > bench_decode.ALLOWED)
                assert row.details["longest append"] >= row.details["median append"] > 0
                assert 0 < row.error < 2 * row.details["error of i.i.d. draws"]
            else:
                assert row.check == "pass"
        assert part["exact logits"].details["error ratio"] == 1
        assert part["int4"].details["bytes"] < part["exact logits"].details["bytes"]
        if "mixed 36" in part:
            assert part["mixed 36"].details["bytes"] < part["int4"].details["bytes"]
    assert sum(row.method == "mixed 36" for row in rows) == 1  # the other case's keys have 32 features


def test_the_fastest_of_several_is_the_baseline():
    def slow() -> torch.Tensor:
        time.sleep(0.01)
        return torch.ones(3)

    methods = [bench.Method("slow", slow, 1, 1e-6), bench.Method("quick", lambda: torch.ones(3), 1, 1e-6)]
    rows = bench.compare("case", methods, torch.ones(3, dtype=torch.float64), ("slow/quick",), 3, 1e9)
    assert [row.baseline for row in rows] == ["quick", "quick"]
    assert rows[1].ratio == 1


def test_synthetic_logits_have_the_variance_and_spectrum_they_should():
    layer = bench_decode.synthetic(2, 4000, 32, 0)
    logits = layer.q @ layer.k.mT / math.sqrt(32)
    assert float(logits.std()) == pytest.approx(2, rel=0.15)
    variances = torch.linalg.svdvals(layer.k - layer.k.mean(1, keepdim=True)).square()
    assert float((variances[:, 0] / variances[:, 7]).mean()) == pytest.approx(8, rel=0.3)
