"""The pass that numba compiles for the CPU: plain torch's draws, for any rows, threads and processes."""

import multiprocessing
import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import qtx_lab as qtx
from qtx_lab.cache import attend as room
from qtx_lab.cache.sketches import PROPOSALS
from qtx_lab.kernels import choice
from qtx_lab.kernels.cpu_decode import launch, rows
from qtx_lab.kernels.cpu_decode.reference import DrawRule
from qtx_lab.streams import Stream, philox, sequence_keys


def tokens(generator, *, heads=2, n=700, features=16, width=12):
    """Keys (heads, n, features) and values (heads, n, width)."""
    return (
        torch.randn(heads, n, features, generator=generator),
        torch.randn(heads, n, width, generator=generator),
    )


def compiled_scores(store, sketch, x, heads=slice(None)):
    """The pass's scores of scaled queries x of some heads, as of `attend.scores_by_place`."""
    scanned = launch.Scanned(store.length, store.table, store.order)
    if sketch is not None:
        scanned = launch.Scanned(
            store.length,
            store.table,
            store.order,
            sketch.storage,
            sketch.weight,
            sketch.exact_keys,
            sketch.mixed,
        )
    every, x = x.new_zeros(store.heads, *x.shape[1:]), x.contiguous()
    drawn = launch._empty_rows(every, 1, store.width)
    names = launch.RowNames(0, torch.zeros(1, dtype=torch.int64), 1, 0)
    task = np.frombuffer(launch.make_task(every, 1.0, scanned, names, DrawRule(1, 1, 0.02), drawn), rows.TASK)
    whole = -(-store.length // rows.BLOCK) * rows.BLOCK
    out = np.empty((*x.shape[:2], whole), np.float32)
    for i, head in enumerate(range(store.heads)[heads]):
        rows.score_rows(out[i], head, x[i].numpy(), task[0])
    return torch.from_numpy(out[..., : store.length].copy())


def both(cache, monkeypatch, q, num_samples, seed, **options):
    """The pass's estimate, and plain torch's with the same scores, so that draws agree."""

    def attend():
        return cache.attend(q, num_samples, generator=torch.Generator().manual_seed(seed), **options)

    compiled = attend()
    assert compiled.info.kernel.path == "cpu"
    with monkeypatch.context() as patch:
        patch.setenv("QTX_LAB_KERNELS", "reference")
        patch.setattr(room, "scores_by_place", compiled_scores)
        plain = attend()
    assert (plain.info.kernel.path, plain.info.kernel.reason) == ("torch", "QTX_LAB_KERNELS=reference")
    return compiled, plain


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize(
    ("n", "features", "width", "rows", "draws", "replicates"),
    [
        (3000, 16, 12, 3, 64, 1),
        (777, 33, 7, 2, 50, 3),
        (65, 1, 1, 1, 3, 2),
        (1, 5, 3, 1, 4, 1),
        (40, 8, 8, 9, 64, 1),
    ],
)
def test_compiled_draws_are_the_references(
    proposal, n, features, width, rows, draws, replicates, monkeypatch, generator, seed
):
    """The same scores and points give the same keys, weights, outputs and standard errors.

    The keys may differ where a point is a rounding away from two.
    """
    k, v = tokens(generator, n=n, features=features, width=width)
    q = 3 * torch.randn(4, rows, features, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    actual, expected = both(cache, monkeypatch, q, draws, seed, replicates=replicates)
    same = actual.draws.indices == expected.draws.indices
    assert same.float().mean() > 0.995
    rows_alike = same.all(-1)
    assert rows_alike.float().mean() > 0.85
    weights = (est.draws.weights[rows_alike] for est in (actual, expected))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)
    for name in ("output", "std_error"):
        one, other = (getattr(est, name)[rows_alike] for est in (actual, expected))
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
    sizes = (est.diagnostics["effective_sample_size"][rows_alike] for est in (actual, expected))
    torch.testing.assert_close(*sizes, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"adaptive": True}, {"share_keys": True}, {"adaptive": True, "share_keys": True}]
)
@pytest.mark.parametrize(("proposal", "n"), [("exact", 900), ("int4", 900), ("low-rank", 40)])
def test_adaptive_and_shared_draws_are_the_references(proposal, n, options, monkeypatch, generator, seed):
    k, v = tokens(generator, n=n)
    q = 2 * torch.randn(6, 5, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    for replicates in (1, 2):
        actual, expected = both(cache, monkeypatch, q, 48, seed, replicates=replicates, **options)
        same = actual.draws.indices == expected.draws.indices
        rows_alike = same.all(-1)
        assert rows_alike.float().mean() > 0.9
        pairs = ((x.draws.weights, x.output, x.std_error) for x in (actual, expected))
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one[rows_alike], other[rows_alike], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_bfloat16_is_read_as_it_is(proposal, monkeypatch, generator, seed):
    """Half the bytes, and the draws and weights of a float32 cache of the same numbers."""
    k, v = (x.bfloat16() for x in tokens(generator, heads=6, n=900, features=33))
    q = 2 * torch.randn(3, 4, 2, 33, generator=generator).bfloat16()
    k, v = (x.unflatten(0, (3, 2)) for x in (k, v))
    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
    actual, expected = both(cache, monkeypatch, q, 48, seed, replicates=2)
    assert actual.output.dtype == expected.output.dtype == torch.bfloat16
    assert (actual.draws.indices == expected.draws.indices).float().mean() > 0.995
    single = qtx.SampledKVCache.build(k.float(), v.float(), proposal=proposal)
    whole, _ = both(single, monkeypatch, q.float(), 48, seed, replicates=2)
    torch.testing.assert_close(actual.draws.indices, whole.draws.indices)
    torch.testing.assert_close(actual.draws.weights, whole.draws.weights)
    torch.testing.assert_close(actual.output, whole.output.bfloat16())
    torch.testing.assert_close(actual.output, expected.output, rtol=1e-2, atol=1e-2)
    assert cache._store.table.nbytes * 2 == single._store.table.nbytes


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize(("features", "rank"), [(24, None), (33, 13), (130, 65), (130, 130), (1, 1)])
def test_compiled_scores_are_the_references(proposal, features, rank, generator):
    """Over sorted, outlying and new tokens: to rounding, which is that of 16 bits a weight for sketches."""
    k, v = tokens(generator, n=7000, features=features)
    k[:, ::500] *= 9
    rank = rank if proposal in ("low-rank", "mixed") else None
    cache = qtx.SampledKVCache.build(k[:, :-500], v[:, :-500], proposal=proposal, rank=rank)
    for part in (slice(-500, -200), slice(-200, None)):
        cache.append(k[:, part], v[:, part])
    x = torch.randn(2, 10, features, generator=generator)
    store, sketch = cache._store, cache._sketch
    compiled, plain = compiled_scores(store, sketch, x), room.scores_by_place(store, sketch, x)
    off = 1e-5 if proposal == "exact" else 5e-5
    assert (compiled - plain).std() < off * plain.std()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_compiled_draws_of_hard_rows(proposal, monkeypatch, generator, seed):
    """Equal keys, one key that has all the mass, logits of 1e4, and keys too large for single precision."""
    k, v = tokens(generator, n=600)
    q = torch.randn(2, 4, 16, generator=generator)
    for keys, queries in (
        (torch.ones_like(k), q),
        (k, 5e3 * q),
        (torch.zeros_like(k), q),
        (1e3 * k, 1e6 * q),
    ):
        cache = qtx.SampledKVCache.build(keys, v, proposal=proposal)
        actual, expected = both(cache, monkeypatch, queries, 32, seed)
        assert actual.output.isfinite().all()
        assert actual.std_error.isfinite().all()
        assert (actual.draws.indices == expected.draws.indices).float().mean() > 0.99
    cache = qtx.SampledKVCache.build(1e30 * k, v, proposal=proposal)
    with pytest.raises(qtx.ArgumentError, match="NaN or"):
        cache.attend(1e30 * q, 32)


def test_what_is_not_compiled_takes_torch_and_says_so(generator, monkeypatch):
    k, v = tokens(generator, n=90)
    q = torch.randn(2, 3, 16, generator=generator)
    for cache, x, reason in (
        (qtx.SampledKVCache.build(k.double(), v.double()), q[:, :1].double(), "takes float32"),
        (qtx.SampledKVCache.build(k.half(), v.half()), q[:, :1].half(), "takes float32"),
        (qtx.SampledKVCache.build(k, v), q[:, :0], "nothing to do"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            est = cache.attend(x, 8)
        assert est.info.kernel.path == "torch"
        assert reason in est.info.kernel.reason
        assert est.info.fallbacks == ()
    monkeypatch.setattr(choice, "_compiler_obstacle", lambda: "numba cannot compile it: no")
    with pytest.warns(qtx.FallbackWarning, match="numba cannot compile it"):
        est = cache.attend(q[:, :1], 8)
    assert est.info.fallbacks == (
        "The plain-torch reference ran, not the kernel: numba cannot compile it: no.",
    )
    monkeypatch.setenv("QTX_LAB_KERNELS", "numba")
    with pytest.raises(qtx.ArgumentError, match="QTX_LAB_KERNELS"):
        cache.attend(q[:, :1], 8)


def test_without_numba_or_a_place_for_its_code(monkeypatch):
    code = (
        "import sys; sys.modules['numba'] = None; import torch, qtx_lab as qtx; x = torch.ones(1, 9, 4); "
        "print(qtx.SampledKVCache.build(x, x).attend(x[:, :1]).diagnostics['fallbacks'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numba cannot compile it: ModuleNotFoundError" in done.stdout
    assert "FallbackWarning" in done.stderr
    asked = []

    def cfunc(signature, cache, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'attend_task': no locator available")
        return lambda function: function

    monkeypatch.setattr(launch, "cfunc", cfunc)
    assert launch.compiled.__wrapped__() is rows.attend_task
    assert asked == [True, False]


def attended(cache, q, seed):
    return cache.attend(q, 64, generator=torch.Generator().manual_seed(seed)).output


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_many_at_once(generator, monkeypatch):
    """Threads that attend at the same time, and a forked process, get the same numbers."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    k, v = tokens(generator, n=20_000)
    q = torch.randn(2, 1, 16, generator=generator)
    cache = qtx.SampledKVCache.build(k, v, proposal="int4")
    expected = [attended(cache, q, seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda seed: attended(cache, q, seed), range(20)))
    assert all(map(torch.equal, actual, expected))
    torch.set_num_threads(1)  # OpenMP's own threads are not copied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        context = multiprocessing.get_context("fork")
        ends = context.Pipe(duplex=False)
        child = context.Process(target=lambda: ends[1].send(attended(cache, q, 3).tolist()))
        child.start()
    assert ends[0].poll(60)
    assert ends[0].recv() == expected[3].tolist()
    child.join(60)
    monkeypatch.undo()
    assert child.exitcode == 0


def test_a_processor_without_avx512_computes_the_same(soak, tmp_path, generator):
    """Compiled for AVX2 in a process of its own, which takes half a minute."""
    if not soak:
        pytest.skip("a long schedule: QTX_LAB_SOAK=1")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX2 is for x86")
    k, v = tokens(generator, n=900)
    q = torch.randn(4, 3, 16, generator=generator)
    torch.save((k, v, q), tmp_path / "inputs.pt")
    code = (
        "import sys, torch, qtx_lab as qtx\n"
        "from qtx_lab.kernels.cpu_decode import launch\n"
        "k, v, q = torch.load(sys.argv[1])\n"
        "def attend(proposal):\n"
        "    cache = qtx.SampledKVCache.build(k, v, proposal=proposal)\n"
        "    est = cache.attend(q, 24, generator=torch.Generator().manual_seed(3))\n"
        "    assert est.info.kernel.path == 'cpu'\n"
        "    return est.draws.indices, est.output\n"
        "torch.save([attend(x) for x in ('exact', 'low-rank', 'int4')], sys.argv[2])\n"
        "print(' '.join(x for x in ('zmm', 'ymm') if x in launch.compiled()._library.get_asm_str()))\n"
    )
    results = {}
    for name, processor in {
        "here": {},
        "AVX2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
    }.items():
        environment = {**os.environ, **processor, "NUMBA_CACHE_DIR": str(tmp_path / name)}
        command = [sys.executable, "-c", code, str(tmp_path / "inputs.pt"), str(tmp_path / f"{name}.pt")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if processor:
            assert done.stdout.split() == ["ymm"]
        results[name] = torch.load(tmp_path / f"{name}.pt")
    for (indices, output), (wanted_indices, expected) in zip(results["AVX2"], results["here"], strict=True):
        alike = (indices == wanted_indices).all(-1)
        assert alike.float().mean() > 0.8
        torch.testing.assert_close(output[alike], expected[alike], rtol=2e-4, atol=2e-5)


ARM_CODE = """
import re, sys
import llvmlite.binding as llvm
from numba import cfunc, types
from qtx_lab.kernels.cpu_decode import rows
compiled = cfunc(types.void(types.int64), error_model="numpy")(rows.attend_task)
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
processor = target.create_target_machine(cpu="neoverse-n1", opt=3)
text = re.sub(r'target (triple|datalayout) = ".*"', "", str(compiled._library._final_module))
module = llvm.parse_assembly(text)
module.triple, module.data_layout = "aarch64-unknown-linux-gnu", str(processor.target_data)
options = llvm.create_pipeline_tuning_options(speed_level=3)
options.loop_vectorization = True
passes = llvm.create_pass_builder(processor, options)
passes.getModulePassManager().run(module, passes)
names = re.findall(r"^\\s+(\\w+)\\s+v\\d+\\.(?:16b|8h|4s)", processor.emit_assembly(module), re.M)
print(" ".join(sorted(set(names))))
"""
"""Compiles the pass for another kind of processor, and prints which instructions on vectors it has."""


def test_the_pass_is_vectorised_for_processors_of_arm(soak, tmp_path):
    """NEON's products and sums of float32 and of whole numbers: the code itself is for no processor."""
    if not soak:
        pytest.skip("a long schedule: QTX_LAB_SOAK=1")
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}  # no instructions of this processor's own
    environment = {**os.environ, **plain, "NUMBA_OPT": "0", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ARM_CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Bytes of four components are put beside each other and multiplied as numbers of 32 bits.
    assert {"fmla", "scvtf", "mla", "zip1", "fcvtzs"} <= set(done.stdout.split())


def test_few_rows_are_spread_evenly_over_threads():
    assert [launch.tile_rows(1, 1, threads) for threads in (1, 2, 64)] == [1, 1, 1]
    assert launch.tile_rows(3, 3, 2) == 2  # whole heads would leave a thread idle for a third of the time
    assert launch.tile_rows(8, 4, 4) == 4
    assert launch.tile_rows(2, 64, 2) == rows.TILE
    assert launch.tile_rows(1000, 1, 2) == 1


# --- Random numbers -----------------------------------------------------------------------------


def test_random_numbers_are_those_of_streams():
    """The compiled twin of Philox, the keys of sequences and the numbers of rows: bit by bit."""
    random = np.random.default_rng(0)
    counters = random.integers(0, 1 << 32, (50, 4))
    for key, counter in zip(random.integers(-(1 << 63), 1 << 63, 50), counters, strict=True):
        expected = [int(x) for x in philox(int(key), *map(int, counter))]
        assert [int(x) for x in rows.philox(key, *counter)] == expected
    names = torch.tensor([0, 1, -1, 1 << 40])
    for seed in (0, 5, (1 << 63) - 1, -3):
        keys = sequence_keys(seed, names)
        found = [rows.sequence_key(seed, int(name)) for name in names]
        assert np.array(found, np.uint64).view(np.int64).tolist() == keys.tolist()
    numbers = Stream.of(7, names, 3, 4, first_position=2**31).uniform(2, 1)
    for i, name in enumerate(names.tolist()):
        key = np.uint64(rows.sequence_key(7, name))
        for group, position, replicate in ((0, 0, 0), (2, 3, 1)):
            found = rows.row_offset(key, 2**31 + position, group, replicate)
            assert found == float(numbers[3 * i + group, position, replicate, 0])


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_draws_depend_on_nothing_beside_them(proposal, path, monkeypatch, generator):
    """A row draws the same alone, in a batch, beside other rows, on one thread and two, and in blocks."""
    if path == "reference":
        monkeypatch.setenv("QTX_LAB_KERNELS", "reference")
    k, v = (x.unflatten(0, (3, 2)) for x in tokens(generator, heads=6, n=900))
    q = torch.randn(3, 4, 5, 16, generator=generator)

    def drawn(k, v, q, sequences, **options):
        cache = qtx.SampledKVCache.build(k, v, proposal=proposal)
        est = cache.attend(
            q, 24, generator=torch.Generator().manual_seed(3), sequences=torch.tensor(sequences), **options
        )
        return est.draws.indices

    whole = drawn(k, v, q, [4, 8, -2])
    assert torch.equal(drawn(k[1:2], v[1:2], q[1:2], [8]), whole[1:2])
    assert torch.equal(drawn(k, v, q[..., -2:, :], [4, 8, -2]), whole[..., -2:, :])  # the last positions
    assert torch.equal(drawn(k, v, q, [4, 8, -2], replicates=3)[..., :24], whole)
    monkeypatch.setattr(room, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(launch, "ALONE", 0)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(drawn(k, v, q, [4, 8, -2]), whole)
    assert not torch.equal(drawn(k, v, q, [4, 9, -2])[1], whole[1])
    assert torch.equal(drawn(k, v, q, [4, 9, -2])[::2], whole[::2])
    assert torch.equal(drawn(k, v, q, [0, 1, 2]), qtx.SampledKVCache.build(k, v, proposal=proposal).attend(
        q, 24, generator=torch.Generator().manual_seed(3)).draws.indices)  # fmt: skip
