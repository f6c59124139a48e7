"""Clusters: what is opened and why, training over one, and what happens when workers or a scheduler go."""

import gc
import inspect
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.specs import ClusterSpec
from qtx_lab.storage import write_atomic
from qtx_lab.training import QuantumTrainer
from qtx_lab.training import cluster as clusters
from qtx_lab.training.checkpoints import checkpoints
from qtx_lab.training.cluster import find_gpus, open_cluster
from qtx_lab.training.models import make_model

FAST = {"num_tokens": 32, "steps": 12, "batch_size": 4, "warmup_steps": 2, "num_samples": 4, "seed": 3}
FAST |= {"validate_every": 0, "checkpoint_every": 3, "progress": False}
SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")


@pytest.fixture(scope="module")
def cluster():
    kind = "local" if find_gpus()[0] else "auto"  # which then takes "local"
    with open_cluster(kind, num_workers=2, timeout=30) as opened:
        yield opened


def press_ctrl_c_while_it_waits(steps):
    """A Ctrl-C, as a terminal sends it, while a process is started; the process, which goes on."""
    command = [sys.executable, "-c", "print(1, flush=True); input()"]
    with clusters._ctrl_c_waits():
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        steps.append(child)
        assert child.stdout.readline() == b"1\n"
        for process in (child.pid, os.getpid()):
            os.kill(process, signal.SIGINT)
        time.sleep(0.1)
        steps.append("the block has ended")
    steps.append("not reached")


def test_ctrl_c_waits_until_the_workers_leave_it_to_the_caller() -> None:
    steps: list = []
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c_while_it_waits(steps)
    child, *rest = steps
    assert rest == ["the block has ended"]
    child.communicate(b"\n")
    assert child.returncode == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture(scope="module")
def whole():
    """One rank that works off two parts of a batch, as two ranks do one each."""
    trainer = QuantumTrainer("small", accumulation=2, **FAST)
    return weights(trainer.train() and trainer), trainer.train


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def over(cluster, model="small", **options):
    trainer = QuantumTrainer(model, distributed=True, cluster=cluster, **{**FAST, **options})
    return trainer, trainer.train()


# --- Opening --------------------------------------------------------------------------------------------


def test_a_local_cluster_runs_tasks_and_says_why_it_was_chosen(cluster):
    assert cluster.kind == "local"
    assert len(cluster.workers) == 2
    assert "2 worker(s)" in cluster.chosen
    assert cluster.dashboard_link.startswith("http://127.0.0.1")
    assert cluster.client.submit(lambda x: x + 1, 1).result() == 2


@pytest.mark.skipif(find_gpus()[0] > 0, reason="this machine has GPUs")
def test_no_callback_of_dasks_swallows_a_ctrl_c(cluster):
    """A Ctrl-C that comes while garbage is collected is raised in the first Python code that follows."""
    assert not [f for f in gc.callbacks if f.__module__.startswith("distributed")]


def test_without_a_gpu(cluster):
    _, why = find_gpus()
    assert "NVML" in why
    for num_workers in (None, 2):
        with (
            pytest.raises(qtx.BackendUnavailable, match=r"kind='cuda'.*NVML.*kind='local'"),
            open_cluster("cuda", num_workers=num_workers, rmm_pool_bytes=1 << 30, devices=[0, 1]),
        ):
            pass
    assert cluster.kind == "local"
    assert "auto took 'local': NVML finds no GPU" in cluster.chosen


def test_with_gpus_that_nvml_reports(monkeypatch):
    """What can be tested without a GPU: what is chosen, and the arguments of dask-cuda."""
    import dask_cuda
    import pynvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    if torch.version.cuda is None:
        assert "built without CUDA" in find_gpus()[1]
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert find_gpus() == (4, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert find_gpus() == (2, "")
    assert find_gpus([1]) == (1, "")
    with pytest.raises(qtx.ArgumentError, match=r"devices=\[2\]"):
        find_gpus([2])
    for hides_all in ("-1", "", "4", "no,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hides_all)
        assert find_gpus()[0] == 0, hides_all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    with pytest.raises(qtx.ArgumentError, match="num_gpus=4 is not allowed: there are 2"):
        QuantumTrainer("small", distributed=True, num_gpus=4, **FAST).train()
    monkeypatch.undo()
    monkeypatch.setattr("qtx_lab.training.cluster.find_gpus", lambda devices=(): (1, ""))
    options = {}

    def local_cuda_cluster(**given):
        options.update(given)
        raise qtx.BackendUnavailable("far enough")

    monkeypatch.setattr(dask_cuda, "LocalCUDACluster", local_cuda_cluster)
    with (
        pytest.raises(qtx.BackendUnavailable, match="far enough"),
        open_cluster("auto", rmm_pool_bytes=1 << 30, devices=[1]),
    ):
        pass
    assert options["n_workers"] == 1
    assert options["CUDA_VISIBLE_DEVICES"] == [1]
    assert options["rmm_pool_size"] == 1 << 30


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"kind": "locl"}, qtx.ArgumentError, "Did you mean 'local'"),
        ({"kind": "address"}, qtx.ArgumentError, "address=None"),
        ({"kind": "local", "address": "tcp://127.0.0.1:1"}, qtx.ArgumentError, "kind='local'"),
        ({"kind": "local", "devices": [0]}, qtx.ArgumentError, "only 'cuda'"),
        ({"kind": "local", "num_workers": 0}, qtx.ArgumentError, "num_workers=0"),
        ({"kind": "local", "timeout": 0}, qtx.ArgumentError, "timeout=0"),
        (
            {"kind": "address", "address": "tcp://127.0.0.1:1", "timeout": 1},
            qtx.BackendUnavailable,
            "no Dask scheduler",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match), open_cluster(**arguments):
        pass


def test_the_signature_has_the_fields_and_defaults_of_the_spec():
    """`ClusterSpec` alone has bounds; the signature repeats its defaults for readers and editors."""
    parameters = inspect.signature(open_cluster).parameters
    fields = ClusterSpec.model_fields
    assert {n: p.default for n, p in parameters.items()} == {n: f.default for n, f in fields.items()}


def test_too_few_workers_at_an_address(cluster):
    address = cluster.client.scheduler.address
    with (
        pytest.raises(qtx.BackendUnavailable, match=r"num_workers=3: .* has 2 workers"),
        open_cluster("address", address=address, num_workers=3, timeout=1),
    ):
        pass
    with open_cluster("address", address=address) as opened:
        assert opened.workers == cluster.workers
    assert len(cluster.workers) == 2  # closing only left it


# --- Training -------------------------------------------------------------------------------------------


def test_two_ranks_are_one_rank_with_twice_the_parts(cluster, whole):
    """The same draws, so the same losses but for the order of sums; and bit for bit the same again."""
    first, result = over(cluster)
    assert result.ranks == 2
    assert (weights(first) - whole[0]).abs().max() < 1e-5
    again, _ = over(cluster)
    assert torch.equal(weights(first), weights(again))
    assert [row["step"] for row in result.metrics] == list(range(1, 13))
    assert result.dashboard_link == cluster.dashboard_link


def test_replicas_of_two_ranks_are_those_of_one_rank(cluster):
    """Local updates: one rank trains both replicas in turn, and a checkpoint of two ranks is read by one."""
    local = {"local_steps": 4, "checkpoint_every": 4}
    alone = QuantumTrainer("small", accumulation=2, **{**FAST, **local})
    losses = [row["loss"] for row in alone.train().metrics]
    two, result = over(cluster, **local)
    assert (weights(two) - weights(alone)).abs().max() < 1e-6
    assert [row["loss"] for row in result.metrics] == pytest.approx(losses, abs=1e-6)


def test_exact_attention_over_two_ranks_reaches_the_loss_of_one(cluster):
    one = QuantumTrainer("small", **{**FAST, "sampler": "exact"}).train()
    two = over(cluster, sampler="exact")[1]
    assert two.loss == pytest.approx(one.loss, abs=1e-4)


def test_fsdp_gives_the_numbers_of_ddp(cluster, whole):
    sharded, result = over(cluster, parallel="fsdp", validate_every=4)
    assert (weights(sharded) - whole[0]).abs().max() < 1e-4
    ddp = over(cluster, validate_every=4)[1]
    for name in ("sampling_variance", "held_out_bits_per_byte_exact", "held_out_bits_per_byte_sampled"):
        assert result.metrics[3][name] == pytest.approx(ddp.metrics[3][name], rel=1e-3)


def test_a_folder_of_two_ranks_is_resumed_by_one(cluster, whole, tmp_path):
    trainer = QuantumTrainer("small", distributed=True, cluster=cluster, folder=tmp_path, **FAST)
    trainer.on_metrics = lambda rows: trainer.cancel()
    stopped = trainer.train()
    assert stopped.stopped
    assert not (tmp_path / "job.pickle").exists()
    assert stopped.steps == checkpoints(tmp_path)[-1] < 12
    alone = QuantumTrainer("small", folder=tmp_path, **FAST)
    alone.train()
    assert (weights(alone) - whole[0]).abs().max() < 1e-5


def test_the_benchmark_trains_what_it_is_compared_with(cluster, monkeypatch, capsys):
    from qtx_lab.bench import training as bench_training

    monkeypatch.setattr(bench_training, "open_cluster", lambda *args, **options: nullcontext(cluster))
    monkeypatch.setattr(bench_training, "MODEL", "small")
    short = {"num_tokens": 32, "batch_size": 4}
    monkeypatch.setattr(bench_training, "SETTINGS", bench_training.SETTINGS | short)
    monkeypatch.setattr(bench_training, "LOCAL_SETTINGS", bench_training.LOCAL_SETTINGS | short)
    bench_local_updates, printed = bench_training.bench_local_updates, []

    def shorter(steps):
        printed.append(capsys.readouterr().out)  # of the cases before, each of which takes minutes
        return bench_local_updates(20)

    monkeypatch.setattr(bench_training, "bench_local_updates", shorter)
    rows = bench_training.bench_training(True, 1e9)
    assert [(row.case, row.method) for row in rows] == [
        ("overhead", "bare DDP loop"), ("overhead", "trainer, 2 ranks"),
        ("ranks", "trainer, 1 rank"), ("ranks", "trainer, 2 ranks"),
        ("checkpoints", "no checkpoints"), ("checkpoints", "every 10 steps"),
        ("local updates", "every step"), ("local updates", "every 5 steps"),
        ("local updates", "every 20 steps"),
    ]  # fmt: skip
    assert all(row.error <= 1e-4 for row in rows if row.case != "local updates")
    sent = [row.details["bytes_sent"] for row in rows if row.case == "local updates"]
    assert [sent[0] / x for x in sent] == pytest.approx([1, 5, 20], rel=1e-3)
    assert all(row.seconds > 0 for row in rows)
    assert {"stall", "first_stall"} <= set(rows[5].details)
    assert "tokens/s" in printed[0]
    assert "training waits for a checkpoint" in printed[0]
    assert capsys.readouterr().out.count("local updates") == 3


@pytest.mark.skipif(find_gpus()[0] > 0, reason="this machine has GPUs")
def test_the_code_of_the_first_document_runs_as_a_script_without_gpus(tmp_path):
    """The script has no `if __name__ == "__main__"`: its workers must not train again."""
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "from qtx_lab import QuantumMultiheadAttention, QuantumTrainer\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embedding = torch.nn.Embedding(256, 16)\n"
        "        self.attention = QuantumMultiheadAttention(16, 2, batch_first=True, num_samples=4)\n"
        "    def forward(self, tokens):\n"
        "        x = self.embedding(tokens)\n"
        "        return (x + self.attention(x, x, x)[0]) @ self.embedding.weight.T\n"
        "quantum_model = Model()\n"
        "before = quantum_model.embedding.weight.detach().clone()\n"
        "trainer = QuantumTrainer(model=quantum_model, distributed=True, num_gpus=4, mixed_precision=True,\n"
        "                         steps=3, num_tokens=16)\n"
        "result = trainer.train()\n"
        "print(result.steps, result.ranks, result.notes)\n"
        "assert not torch.equal(before, quantum_model.embedding.weight)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 4 ('num_gpus=4: NVML finds no GPU")
    assert done.stdout.count("num_gpus=4") == 1
    assert "bf16" in done.stdout
    assert "FallbackWarning: num_gpus=4" in done.stderr


# --- Faults ---------------------------------------------------------------------------------------------


def settle(cluster):
    """Let the cluster have two workers again, and wait until none is still coming or leaving."""
    local = cluster.client.cluster
    local.scale(2)
    end = time.monotonic() + 600  # on a busy machine a process may need minutes
    while True:
        addresses = {nanny.worker_address for nanny in local.workers.values()}
        settled = set(local.workers) == set(local.worker_spec) and addresses == set(cluster.ready_workers)
        if settled and len(addresses) == 2:
            return
        assert time.monotonic() < end, (local.workers, cluster.ready_workers)
        time.sleep(0.1)


def hitting(cluster, how, when, which=1):
    """An `on_metrics` that sends a signal to a rank's worker at a step, and the list of processes it hit."""
    hit = []

    def on_metrics(rows):
        if rows[-1]["step"] >= when and not hit:
            worker = cluster.workers[which]
            hit.append(cluster.client.run(os.getpid, workers=[worker])[worker])
            os.kill(hit[0], how)

    return on_metrics, hit


@pytest.mark.chaos
def test_killed_workers_change_nothing_but_the_time(cluster, whole, seed, soak, monkeypatch):
    """A random rank is killed at a random step; twenty times in a soak."""
    choose = random.Random(seed)
    for _ in range(20 if soak else 1):
        when, which = choose.randrange(1, 12), choose.randrange(2)
        on_metrics, hit = hitting(cluster, signal.SIGKILL, when, which)
        trainer, result = over(cluster, slowed(), on_metrics=on_metrics)
        assert len(hit) == 1, (when, which)
        assert "gone" in result.faults[0] or "went" in result.faults[0]
        assert result.ranks == 2, result.faults
        assert (weights(trainer) - whole[0]).abs().max() < 1e-5, (when, which)


def slowed(pace=None):
    """The small model with forward passes 50 ms longer, or as much as a file says, seconds.

    So a signal comes before the end.
    """
    model = make_model("small", FAST["seed"])

    def wait(module, inputs):
        import time

        time.sleep(0.05 if pace is None else float(pace.read_text()))

    model.register_forward_pre_hook(wait)
    return model


@pytest.mark.chaos
def test_a_hung_rank_is_reported_and_replaced(cluster, whole):
    on_metrics, hit = hitting(cluster, signal.SIGSTOP, 4)
    trainer, result = over(replace(cluster, timeout=15), slowed(), on_metrics=on_metrics)
    assert len(hit) == 1
    assert "hung" in result.faults[0]
    assert "rank 1 at" in result.faults[0]
    assert "does not answer" in result.faults[0]
    assert (weights(trainer) - whole[0]).abs().max() < 1e-5


@pytest.mark.chaos
def test_training_goes_on_without_a_worker_that_stays_away(cluster, whole):
    """It is killed, and not replaced."""
    local = cluster.client.cluster

    def on_metrics(rows):
        if rows[-1]["step"] >= 4 and len(local.workers) == 2:
            os.kill(local.workers[list(local.worker_spec)[-1]].pid, signal.SIGKILL)
            local.scale(1)

    try:
        trainer, result = over(replace(cluster, timeout=5), slowed(), on_metrics=on_metrics)
    finally:
        settle(cluster)
    assert result.ranks == 1
    assert any("stayed away" in fault for fault in result.faults)
    assert (weights(trainer) - whole[0]).abs().max() < 1e-5


class Schedule:
    """An `on_metrics` that lets workers leave, come or die at steps of a schedule."""

    def __init__(self, cluster, events, choose, pace):
        self.local, self.choose, self.pace = cluster.client.cluster, choose, pace
        self.due = [(choose.randrange(1, 6) + 6 * i, event) for i, event in enumerate(events)]
        self.done = []

    def __call__(self, rows):
        step, ranks = rows[-1]["step"], rows[-1]["ranks"]
        # Slow while a rank is missing: the process that comes back needs seconds to start, on a busy machine
        # minutes, for which the last steps wait.
        comes_back = bool(self.done) and self.done[-1][1] != "leave"
        write_atomic(self.pace, b"0.02" if ranks == 2 else b"4" if comes_back and step >= 40 else b"0.4")
        if not self.due or step < self.due[0][0] or (self.due[0][1] == "leave" and ranks < 2):
            return
        event = self.due.pop(0)[1]
        self.done.append((step, event))
        if event == "kill":
            os.kill(self.local.workers[self.choose.choice(list(self.local.worker_spec))].pid, signal.SIGKILL)
        else:
            self.local.scale(1 if event == "leave" else 2)


ELASTIC = {"steps": 60, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def uninterrupted():
    """The losses of 60 steps of one rank with two parts."""
    return [
        row["loss"] for row in QuantumTrainer("small", accumulation=2, **{**FAST, **ELASTIC}).train().metrics
    ]


@pytest.mark.chaos
@pytest.mark.parametrize("number", range(31 if SOAK else 1))
def test_ranks_leave_and_come_back(cluster, uninterrupted, seed, number, tmp_path, capsys):
    """One schedule (2, 1, 2 ranks); in a soak thirty random ones more, in which workers also die.

    No step is lost, and every loss is that of an uninterrupted training to 1e-6. In a soak each schedule is
    a test of its own with a cluster of its own, so that one that fails does not hide the others: a nanny of
    Dask that is closed while its process starts, which then dies, closes for ever.
    """
    choose, pace = random.Random(f"{seed} {number}"), tmp_path / "pace"
    events = choose.choices(["leave", "come", "kill"], weights=[2, 2, 1], k=choose.randrange(1, 5))
    if number == 0:
        events = ["leave", "come"]
    pace.write_text("0.02")
    with open_cluster("local", num_workers=2, timeout=600) if SOAK else nullcontext(cluster) as changing:
        schedule = Schedule(changing, events, choose, pace)
        try:
            _, result = over(replace(changing, timeout=30), slowed(pace), on_metrics=schedule, **ELASTIC)
        finally:
            if not SOAK:
                settle(cluster)
    losses, ranks = ([row[name] for row in result.metrics] for name in ("loss", "ranks"))
    if SOAK:
        off = max(abs(a - b) for a, b in zip(losses, uninterrupted, strict=False))
        done = ", ".join(f"{event} at {step}" for step, event in schedule.done) or "no event"
        with capsys.disabled():
            print(f"\nschedule {number}: {done}; {len(losses)} steps, losses differ by {off:.1g}")
    assert [row["step"] for row in result.metrics] == list(range(1, 61)), schedule.done
    assert losses == pytest.approx(uninterrupted, rel=0, abs=1e-6), schedule.done
    assert len(result.faults) <= 2 * events.count("kill"), (schedule.done, result.faults)
    if number == 0:
        assert [ranks[0], min(ranks), ranks[-1]] == [2, 1, 2]
        assert any("with 1 rank(s) instead of 2" in note for note in result.notes)


@pytest.mark.chaos
def test_a_batch_system_stops_all_processes_in_order(cluster, tmp_path):
    """It signals the caller and its workers alike: the ranks finish their step, and the workers live on."""
    pids = cluster.client.run(os.getpid)
    before = signal.getsignal(signal.SIGTERM)

    def on_metrics(rows):
        if rows[-1]["step"] >= 4:
            for pid in pids.values():
                os.kill(pid, signal.SIGUSR1)
                os.kill(pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(qtx.StoppedBySignal, match=r"SIGTERM after step \d+; checkpoint") as caught:
        over(cluster, slowed(), on_metrics=on_metrics, folder=tmp_path, checkpoint_every=0)
    assert caught.value.exit_code == 143
    (step,) = checkpoints(tmp_path)
    assert 4 <= step < FAST["steps"]
    assert cluster.client.run(os.getpid) == pids
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.chaos
def test_endless_faults_end_training(cluster, tmp_path):
    model = slowed()
    model.register_forward_pre_hook(lambda module, inputs: os._exit(9) if module.training else None)
    with pytest.raises(qtx.RunFailed, match=r"given up after 1 fault.*gone"):
        over(cluster, model, retries=0, folder=tmp_path)
    assert checkpoints(tmp_path) == []


@pytest.mark.chaos
def test_a_worker_that_cannot_begin_says_why(cluster, monkeypatch):
    """Before, the error was a worker's address and nothing else."""
    monkeypatch.setattr("qtx_lab.training.supervisor.open_store", refuse_to_open)
    with pytest.raises(qtx.RunFailed, match=r"Rank 0 at tcp://.* \(OSError: no port is left\)"):
        over(cluster, retries=0)


def refuse_to_open(*arguments):
    raise OSError("no port is left")


def test_an_error_of_the_model_comes_back_as_it_is(cluster):
    class Odd(Exception):
        pass

    model = make_model("small", 0)

    def fail(module, inputs):
        if module.training:
            raise ZeroDivisionError("of the model")

    model.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="of the model"):
        over(cluster, model)
    assert cluster.client.submit(sum, [1]).result() == 1


@pytest.mark.chaos
def test_three_workers_of_which_one_is_slow_and_one_has_no_memory():
    """The slow one is waited for, and changes no loss; the error says which one had too little memory."""
    alone = QuantumTrainer("small", accumulation=3, **{**FAST, "batch_size": 6}).train()

    def odd(module, inputs):
        import os
        import time

        from distributed import get_worker

        if not module.training:  # where the caller checks the model
            return
        time.sleep(0.3 if get_worker().name == 0 else 0.01)
        if "POOR" in os.environ:
            torch.empty(1 << 50)  # more than any machine has

    model = make_model("small", FAST["seed"])
    model.register_forward_pre_hook(odd)
    with open_cluster("local", num_workers=3, timeout=60) as three:
        _, result = over(three, model, batch_size=6)
        assert result.ranks == 3
        assert result.faults == ()
        assert [row["loss"] for row in result.metrics] == pytest.approx(
            [row["loss"] for row in alone.metrics], abs=1e-6
        )
        names = three.client.run(lambda dask_worker: dask_worker.name)
        poor = next(address for address, name in names.items() if name == 2)
        three.client.run(lambda: os.environ.update(POOR="1"), workers=[poor])
        with pytest.raises(RuntimeError, match="memory") as caught:
            over(three, model, batch_size=6)
    assert f"rank {sorted(names).index(poor)} at {poor}" in " ".join(caught.value.__notes__)


@pytest.mark.chaos
def test_a_full_disk_on_a_worker_ends_training(cluster, tmp_path):
    import resource

    def limit(size):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def full(rows):
        if rows[-1]["step"] >= 4 and checkpoints(tmp_path):
            cluster.client.run(limit, 100_000)

    try:
        with pytest.raises(qtx.StorageError, match=r"Cannot write .*step-") as caught:
            over(cluster, slowed(), on_metrics=full, folder=tmp_path)
    finally:
        cluster.client.run(limit, resource.RLIM_INFINITY)
    steps = checkpoints(tmp_path)
    assert steps
    notes = " ".join(caught.value.__notes__)
    assert f"step-{steps[-1]:08d}" in notes
    assert "rank 0 at tcp://" in notes
    assert not list(tmp_path.glob(".step-*"))


def test_cancel_stops_within_a_step(cluster):
    trainer = QuantumTrainer(slowed(), distributed=True, cluster=cluster, **{**FAST, "steps": 100_000})
    steps = []

    def on_metrics(rows):
        if not steps:
            threading.Timer(0.2, trainer.cancel).start()
        steps.extend(row["step"] for row in rows)

    trainer.on_metrics = on_metrics
    result = trainer.train()
    assert result.stopped
    assert steps[0] <= result.steps < 1000
    assert checkpoints(result.folder)[-1] == result.steps == result.metrics[-1]["step"]


@pytest.mark.chaos
def test_a_scheduler_that_is_restarted(whole, soak):
    """Its workers end with it, by Dask's design; both are started again at the same address."""
    if not soak:
        pytest.skip("starts six processes: make soak")
    port = 20_000 + os.getpid() % 20_000
    dask = [sys.executable, "-m", "distributed.cli"]
    address = f"tcp://127.0.0.1:{port}"
    processes = []

    def start():
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        ends = [["127.0.0.1", "--port", str(port)], *[["127.0.0.1", "--nthreads", "1"]] * 2]
        commands = [
            [
                f"{dask[2]}.{'dask_worker' if i else 'dask_scheduler'}",
                *([address] if i else []),
                "--host",
                *rest,
                "--no-dashboard",
            ]
            for i, rest in enumerate(ends)
        ]
        processes.extend(subprocess.Popen([*dask[:2], *command], **quiet) for command in commands)

    def restart():
        for process in processes[:3]:
            process.kill()
            process.wait()
        start()

    killed = threading.Event()

    def on_metrics(rows):
        if rows[-1]["step"] >= 4 and not killed.is_set():
            killed.set()
            threading.Thread(target=restart).start()

    start()
    try:
        with open_cluster("address", address=address, num_workers=2, timeout=40) as opened:
            trainer, result = over(opened, slowed(), on_metrics=on_metrics)
        assert killed.is_set()
        assert len(result.faults) >= 1
        assert (weights(trainer) - whole[0]).abs().max() < 1e-5
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.chaos
def test_ctrl_c_leaves_a_checkpoint_and_no_process(tmp_path):
    flags = "--model small --steps 100000 --num-tokens 32 --num-samples 4 --cluster local --num-workers 2"
    command = [sys.executable, "-m", "qtx_lab.cli", "train", *flags.split(), "--home", tmp_path]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        end = time.monotonic() + 240
        while (
            not list(tmp_path.glob("*/metrics.parquet")) and process.poll() is None and time.monotonic() < end
        ):
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the workers too
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (folder,) = tmp_path.glob("*-*")
    assert qtx.Run.open(folder).status == "interrupted"
    assert checkpoints(folder / "checkpoints")
