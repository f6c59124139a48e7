"""`bench softmax_circuit`: circuits without noise pass, and theory stands beside what was measured."""

from qtx_lab.bench import softmax_circuit


def test_circuits_stand_beside_the_classical_draw(capsys):
    problem = softmax_circuit.SoftmaxProblem.random(4, 1, 3, seed=0)
    rows = [
        softmax_circuit.classical_row(problem, 4000),
        softmax_circuit.circuit_row(problem, 4, 4000, rounds=1),
        softmax_circuit.circuit_row(problem, 4, 4000, device="fake_boston"),
    ]
    softmax_circuit.print_table(problem.case, rows)
    assert all(row.passed for row in rows)
    amplified, noisy = rows[1].details, rows[2].details
    assert abs(amplified["success"] - amplified["success_by_theory"]) < 5 * amplified["success_std_error"]
    assert amplified["key_loads_a_draw"] > 12
    assert 0.85 < noisy["error_free_probability"] < 1
    assert noisy["device_seconds"] > 0
    assert "degree 4, fake_boston" in capsys.readouterr().out
