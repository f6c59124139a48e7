"""`bench orthogonal`: a kind and its control are trained alike, and compared with intervals."""

import torch

from qtx_lab.attention.quantum_layers import OrthogonalKind
from qtx_lab.bench import orthogonal


def test_a_kind_stands_beside_its_control(capsys):
    task = orthogonal.TASKS[0]
    rows = orthogonal.compare_with_control(task, OrthogonalKind("butterfly"), seeds=2, steps=3)
    orthogonal.print_table(task, rows)
    kind, control = (row.details for row in rows)
    assert kind["parameters"] == control["parameters"] == 36
    assert kind["difference_low"] <= kind["difference"] <= kind["difference_high"]
    assert abs(rows[0].error - rows[1].error - kind["difference"]) < 1e-9
    assert kind["verdict"] in capsys.readouterr().out


def test_sequences_are_those_of_the_tasks():
    generator = torch.Generator().manual_seed(0)
    lookup = orthogonal.TASKS[0].sequences(50, generator)
    asked = lookup.tokens[:, -1, :1]
    place = (lookup.tokens[:, :-1, 0] == asked).int().argmax(-1, keepdim=True)
    assert torch.equal(lookup.tokens[:, :, 1].gather(1, place).squeeze(-1) - 24, lookup.target)
    text = orthogonal.TASKS[1]
    for test in (False, True):
        some = text.sequences(50, generator, test=test)
        assert int(some.tokens.max()) < text.vocabulary
        assert int(some.target.max()) < text.classes


def test_an_interval_holds_the_mean():
    interval = orthogonal.Interval.of([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert abs(interval.high - interval.mean - 4.302653 / 3**0.5) < 1e-5
