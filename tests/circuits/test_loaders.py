"""Every loader draws from the row, exactly if it says so and otherwise with the fidelity that it states."""

import numpy as np
import pytest
import torch
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.quantum_info import Statevector, partial_trace
from qiskit_aer import AerSimulator

import qtx_lab as qtx
from qtx_lab.backends.exact import Noise, compile_steps, outcome_probabilities
from qtx_lab.circuits import LOADERS, DynamicLoader, Loader, MpsLoader, TreeLoader, UnaryLoader, check_rows
from qtx_lab.circuits.base import num_bits, pack_values, unpack_values
from qtx_lab.circuits.resources import draw, resources

SOME_SIZES = [1, 2, 3, 4, 5, 7, 8, 16, 23, 37, 64, 65, 130]
ALL_SIZES = range(1, 131)


def rows(n, generator, count=3):
    """At least three rows of n keys: random ones, one with masked keys, and one with a single key."""
    p = (3 * torch.randn(count, n, generator=generator, dtype=torch.float64)).softmax(-1)
    p[1, torch.rand(n, generator=generator) < 0.4] = 0
    p[1, -1] += 1e-9
    p[2] = 0
    p[2, n // 2] = 1
    return check_rows(p / p.sum(-1, keepdim=True))


def amplitudes(loader, p):
    """The state vectors (R, 2^qubits) before the measurement, by qiskit."""
    circuit = loader.circuit(loader.size(p.shape[-1])).remove_final_measurements(inplace=False)
    return np.stack([Statevector(circuit.assign_parameters(a)).data for a in loader.angles(p)])


def distribution(loader, probabilities, n):
    """Sum probabilities of the register's values (R, 2^bits) to those of keys (R, n) and of no key (R,)."""
    bits = (probabilities.shape[-1] - 1).bit_length()
    keys = loader.keys(pack_values(np.arange(probabilities.shape[-1]), bits), n)
    out = np.zeros((len(probabilities), n + 1))
    for row, p in zip(out, probabilities, strict=True):
        np.add.at(row, keys, p)
    return out[:, :n], out[:, n]


def distribution_by_conditions(loader, p):
    """The distribution of a dynamic circuit's register, (R, 2^bits), by following its conditions."""
    circuit = loader.circuit(loader.size(p.shape[-1]))
    angles = loader.angles(p)
    index = {parameter: i for i, parameter in enumerate(circuit.parameters)}
    branches = {0: np.ones(len(p))}  # from the value of the register to its probability
    state = {}  # from (value, qubit) to the angle by which the qubit was rotated
    for instruction in circuit.data:
        operation = instruction.operation
        if operation.name == "ry":
            state[0, circuit.find_bit(instruction.qubits[0]).index] = angles[:, index[operation.params[0]]]
        elif operation.name == "if_else":
            _, value = operation.condition
            (rotation,) = operation.blocks[0].data
            column = index[rotation.operation.params[0]]
            state[value, circuit.find_bit(instruction.qubits[0]).index] = angles[:, column]
        else:
            bit = circuit.find_bit(instruction.clbits[0]).index
            after = {}
            for value, mass in branches.items():
                half = state[value, bit] / 2
                after[value], after[value | 1 << bit] = mass * np.cos(half) ** 2, mass * np.sin(half) ** 2
            branches = after
    return np.stack([branches[value] for value in sorted(branches)], -1)


def own_loader(change, base=DynamicLoader):
    """A loader whose circuits a user writes in another way."""

    class OwnLoader(base):
        name = "own"

        def circuit(self, size):
            return change(size, super().circuit(size))

    return OwnLoader()


def renamed(size, circuit):
    own = QuantumCircuit(QuantumRegister(size, "row"), ClassicalRegister(size, "key"), name="own")
    return own.compose(circuit, own.qubits, own.clbits)


def by_single_bits(size, circuit):
    """Two registers; conditions are on bits of both."""
    high = ClassicalRegister(1, "high")
    own = QuantumCircuit(QuantumRegister(2), ClassicalRegister(1, "low"), high, name="own")
    angle = sorted(circuit.parameters, key=lambda x: x.index)
    own.ry(angle[0], 1)
    own.measure(1, high[0])
    for bit in (0, 1):
        with own.if_test((high[0], bit)):
            own.ry(angle[1 + bit], 0)
    own.measure(0, 0)
    return own


def measured_at_the_end(size, circuit):
    own = QuantumCircuit(2, name="own")
    own.compose(circuit.remove_final_measurements(inplace=False), inplace=True)
    own.measure_all()
    return own


@pytest.mark.parametrize("change", [renamed, by_single_bits, measured_at_the_end])
@pytest.mark.parametrize(
    "options", [{}, {"noise_scale": 0, "backend_name": "fake_boston"}, {"method": "aer"}]
)
def test_a_loader_of_ones_own_may_name_its_registers_as_it_likes(change, options):
    """30,000 shots; the total variation of 4 keys has a mean of .004."""
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.0, 0.5]])
    loader = own_loader(change, TreeLoader if change is measured_at_the_end else DynamicLoader)
    backend = qtx.QiskitQuantumBackend("aer", loader=loader, optimization_level=1, **options)
    assert [(x.name, x.size) for x in backend.transpiled(4).cregs] == [("c", 2)]
    result = backend.sample_rows(p, 30_000, generator=torch.Generator().manual_seed(0))
    assert (result.probabilities() - p).abs().sum(-1).max() / 2 < 0.015


def test_circuits_that_no_device_can_return_bits_of_are_refused():
    def in_parts(size, circuit):
        own = QuantumCircuit(2)
        high, low = ClassicalRegister(1, "high"), ClassicalRegister(1, "low")
        own.add_register(high, low)
        own.measure(1, high[0])
        with own.if_test((high, 1)):
            own.x(0)
        own.measure(0, low[0])
        return own

    for change, error, message in (
        (in_parts, qtx.ArgumentError, "conditions on one of 2 registers"),
        (lambda size, circuit: QuantumCircuit(2, 2), qtx.ArgumentError, "measures nothing"),
        (lambda size, circuit: None, qtx.DtypeError, "NoneType"),
    ):
        backend = qtx.QiskitQuantumBackend("aer", loader=own_loader(change))
        with pytest.raises(error, match=message):
            backend.sample_rows(torch.full((1, 4), 0.25), 10)


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_keeps_the_interface(name, generator):
    """What `Loader` promises, for each entry of `LOADERS`; a new loader needs no test of its own for this."""
    loader = qtx.make_loader(name)
    assert isinstance(loader, Loader)
    assert loader.name == name
    assert isinstance(loader.exact, bool)
    assert loader == qtx.make_loader(name), "two loaders with the same settings must be equal"
    for n in (1, 2, 3, 5, 8):
        p = rows(n, generator, count=4)
        p[3] = 0  # such rows are not run, but must not fail
        circuit = loader.circuit(loader.size(n))
        assert [register.name for register in circuit.cregs] == ["c"]
        angles = loader.angles(p)
        assert angles.shape == (4, circuit.num_parameters)
        assert np.isfinite(angles).all()
        probabilities, values = outcome_probabilities(compile_steps(circuit, Noise({}, {})), angles)
        keys = loader.keys(pack_values(values, circuit.num_clbits), n)
        assert keys.dtype == np.int64
        assert ((keys >= -1) & (keys < n)).all()
        q = torch.zeros(4, n + 1, dtype=torch.float64).index_add(
            -1, torch.from_numpy(keys + 1), probabilities
        )
        if loader.exact:
            assert (q[:3, 1:] - p[:3]).abs().max() < 1e-9
            assert q[:3, 0].max() < 1e-9
        assert set(loader.signs(pack_values(values, circuit.num_clbits), n).tolist()) <= {1, -1}
        assert loader.angles(p[:0]).shape == (0, circuit.num_parameters)


@pytest.mark.parametrize("phase", [False, True])
def test_tree_prepares_the_row(phase, generator, soak):
    for n in ALL_SIZES if soak else SOME_SIZES:
        p = rows(n, generator)
        state = amplitudes(TreeLoader(phase), p)
        q, lost = distribution(TreeLoader(phase), np.abs(state) ** 2, n)
        assert np.abs(q - p.numpy()).max() < 1e-9
        assert lost.max() < 1e-9
        if phase:
            assert np.abs(state[:, :n] - p.sqrt().numpy()).max() < 1e-9


def test_dynamic_circuit_draws_from_the_row(generator, soak):
    for n in ALL_SIZES if soak else SOME_SIZES:
        p = rows(n, generator)
        q, lost = distribution(DynamicLoader(), distribution_by_conditions(DynamicLoader(), p), n)
        assert np.abs(q - p.numpy()).max() < 1e-9
        assert lost.max() < 1e-9


def test_unary_prepares_the_row(generator, soak):
    for n in range(1, 15) if soak else (1, 2, 3, 5, 8, 11):
        p = rows(n, generator)
        q, lost = distribution(UnaryLoader(), np.abs(amplitudes(UnaryLoader(), p)) ** 2, n)
        assert np.abs(q - p.numpy()).max() < 1e-9
        assert lost.max() < 1e-9


def test_unary_prepares_long_rows(generator, soak):
    """One-hot states have bond dimension 2, so Aer's matrix product states hold any number of qubits."""
    for n in range(15, 131) if soak else (40, 130):
        p = rows(n, generator)
        loader = UnaryLoader()
        circuit = loader.circuit(n).remove_final_measurements(inplace=False)
        for j in range(n):
            circuit.save_probabilities([j], label=f"{j}")
        binds = [{a: x.tolist() for a, x in zip(circuit.parameters, loader.angles(p).T, strict=True)}]
        result = (
            AerSimulator(method="matrix_product_state").run(circuit, parameter_binds=binds, shots=1).result()
        )
        q = np.array([[result.data(r)[f"{j}"][1] for j in range(n)] for r in range(len(p))])
        assert np.abs(q - p.numpy()).max() < 1e-9


def test_mps_has_the_fidelity_that_it_states(generator, soak):
    for n in ALL_SIZES if soak else SOME_SIZES:
        p = rows(n, generator)
        for layers in (1, 3):
            loader = MpsLoader(layers)
            state = amplitudes(loader, p)
            overlap = (state[:, :n] * p.sqrt().numpy()).sum(-1)
            fidelities = loader.fidelities(p)
            assert np.abs(np.abs(overlap) ** 2 - fidelities.numpy()).max() < 1e-9
            if n <= 4:
                assert fidelities.min() > 1 - 1e-9


def test_mps_reaches_a_target_on_smooth_rows():
    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    p = torch.stack([(-((x - 0.3) ** 2) * 20).exp(), x + 0.1, (3 * x).exp()])
    p /= p.sum(-1, keepdim=True)
    loader = MpsLoader.for_fidelity(p, 0.99)
    assert loader.fidelities(p).min() >= 0.99
    assert (
        resources(loader.circuit(7)).two_qubit_gates < resources(TreeLoader().circuit(7)).two_qubit_gates / 3
    )
    with pytest.raises(qtx.ArgumentError, match="max_layers=1 reach"):
        MpsLoader.for_fidelity(rows(64, torch.Generator().manual_seed(0)), 0.9999, max_layers=1)
    assert MpsLoader.for_fidelity(torch.zeros(0, 8), 0.99).layers == 1
    assert MpsLoader.for_fidelity(torch.cat((p, torch.zeros(1, 100))), 0.99).layers == loader.layers
    with pytest.raises(qtx.ArgumentError, match="fidelity='a'"):
        MpsLoader.for_fidelity(p, "a")


def test_more_layers_are_never_worse(generator):
    p = rows(64, generator, count=20)
    f = torch.stack([MpsLoader(k).fidelities(p) for k in (1, 2, 4, 8)])
    assert bool((f.diff(dim=0) > -1e-4).all())
    assert f[-1].mean() > f[0].mean()


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_two_qubit_gates_are_as_few_as_stated(m):
    gates = {
        name: resources(make().circuit(m if name != "unary" else 1 << m)).two_qubit_gates
        for name, make in LOADERS.items()
    }
    assert gates["tree"] == 2**m - m - 1
    assert resources(TreeLoader(phase=True).circuit(m)).two_qubit_gates == 2**m - 2
    assert gates["dynamic"] == 0
    assert gates["unary"] == 2 * (2**m - 1)
    assert gates["mps"] == 4 * (m - 1)
    assert resources(DynamicLoader().circuit(m)).conditions == 2**m - 2


@pytest.mark.parametrize("name", LOADERS)
def test_masked_keys_and_padding_have_no_probability(name, generator):
    """0 / 0 gives the angle 0, so that a bit of a node without probability is exactly 0."""
    loader = qtx.make_loader(name)
    p = torch.zeros(4, 6, dtype=torch.float64)
    p[0, 0] = p[1, 5] = p[2, 3] = 1
    p[3] = torch.tensor([0.5, 0, 0, 0, 0.5, 0])
    angles = loader.angles(p)
    assert np.isfinite(angles).all()
    q, lost = (
        distribution(loader, np.abs(amplitudes(loader, p)) ** 2, 6)
        if name != "dynamic"
        else (p.numpy(), np.zeros(4))
    )
    if loader.exact:
        assert q[p.numpy() == 0].max() < 1e-30
        assert lost.max() < 1e-30


@pytest.mark.parametrize("name", ["tree", "dynamic", "unary"])
def test_thousands_of_rows_at_once(name, generator):
    p = torch.rand(5000, 100, generator=generator, dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    loader = qtx.make_loader(name)
    together = loader.angles(p)
    assert together.shape == (5000, loader.circuit(loader.size(100)).num_parameters)
    assert np.abs(together[[7, 4321]] - loader.angles(p[[7, 4321]])).max() < 1e-12


def test_bits_are_packed_as_qiskit_packs_them():
    from qiskit.primitives import BitArray

    bits = BitArray.from_samples([0, 1, 300, 511], num_bits=9)
    assert np.array_equal(pack_values(np.array([0, 1, 300, 511]), 9), bits.array)
    assert unpack_values(bits.array).tolist() == [0, 1, 300, 511]


def test_keys_of_unary_need_exactly_one_bit():
    patterns = np.array([0b0, 0b1, 0b100, 0b101, 0b10000000000])
    assert UnaryLoader().keys(pack_values(patterns, 11), 11).tolist() == [-1, 0, 2, -1, 10]


def test_each_unary_qubit_has_the_probability_of_its_key(generator):
    p = rows(6, generator)
    state = amplitudes(UnaryLoader(), p)[0]
    for j in range(6):
        one = partial_trace(Statevector(state), [i for i in range(6) if i != j]).data[1, 1].real
        assert one == pytest.approx(float(p[0, j]), abs=1e-9)


@pytest.mark.parametrize(
    ("p", "error", "match"),
    [
        (torch.tensor([[0.5, 0.6]]), qtx.ArgumentError, r"p\[0\] sums to 1\.1"),
        (torch.tensor([[1.0, 0.0], [0.2, 0.2]]), qtx.ArgumentError, r"p\[1\] sums to 0\.4"),
        (torch.tensor([[1.5, -0.5]]), qtx.ArgumentError, "negative"),
        (torch.tensor([[torch.nan, 1.0]]), qtx.ArgumentError, "NaN"),
        (torch.tensor([[torch.inf, 1.0]]), qtx.ArgumentError, "infinity"),
        (torch.ones(3), qtx.ShapeError, r"\(R, n\)"),
        (torch.ones(2, 0), qtx.ShapeError, "n >= 1"),
        (torch.tensor([[1, 0]]), qtx.DtypeError, "floating"),
        ([[1.0]], qtx.DtypeError, "list"),
    ],
)
def test_bad_rows_are_refused(p, error, match):
    with pytest.raises(error, match=match):
        check_rows(p)


def test_half_precision_rows_and_masked_rows_are_accepted():
    p = torch.rand(5, 40).softmax(-1).half()
    assert torch.allclose(check_rows(p).sum(-1), torch.ones(5, dtype=torch.float64))
    assert check_rows(torch.zeros(2, 3)).eq(0).all()
    rounded = (4 * torch.randn(500, 40, generator=torch.Generator().manual_seed(0))).bfloat16().softmax(-1)
    assert (rounded.double().sum(-1) - 1).abs().max() > 1e-3
    assert torch.allclose(check_rows(rounded).sum(-1), torch.ones(500, dtype=torch.float64))
    with pytest.raises(qtx.ArgumentError, match="sums to"):
        check_rows(rounded * 0.98)
    with pytest.raises(qtx.ArgumentError, match="sums to"):
        check_rows(rounded.double() * 0.998)


def test_unknown_loaders_and_sizes_are_refused():
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'dynamic'"):
        qtx.make_loader("dinamic")
    with pytest.raises(qtx.DtypeError, match=r"loader=TreeLoader is a class; .* TreeLoader\(\)"):
        qtx.make_loader(TreeLoader)
    with pytest.raises(qtx.DtypeError, match=r"loader=3 is a int; .* subclass of qtx_lab\.Loader"):
        qtx.make_loader(3)
    for loader in (TreeLoader(), DynamicLoader(), UnaryLoader(), MpsLoader()):
        with pytest.raises(qtx.ArgumentError, match="size="):
            loader.circuit(5000)
    with pytest.raises(qtx.ArgumentError, match="layers=17"):
        MpsLoader(17)


def test_circuits_are_drawn():
    assert str(draw(TreeLoader().circuit(2)))
    assert "Ry" in str(draw(TreeLoader().circuit(2), output="text"))
    assert num_bits(1) == 1
