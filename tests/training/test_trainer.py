"""Training in one process: it learns, repeats itself, resumes, and refuses what it cannot do."""

import inspect
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qtx_lab as qtx
from qtx_lab.specs import TrainSpec
from qtx_lab.training import QuantumTrainer
from qtx_lab.training import checkpoints as checkpoint_files
from qtx_lab.training.checkpoints import CheckpointWriter, checkpoints, write_hashes
from qtx_lab.training.data import SequenceOrder, open_tokens, stream_seed
from qtx_lab.training.models import MODELS, make_model
from qtx_lab.training.rank import RankEnd, RankJob
from qtx_lab.training.sampling import Attention, NoisySampler
from qtx_lab.training.schedules import (
    NOISE_TO_SIGNAL,
    learning_rate_share,
    needed_draws,
    scheduled_draws,
    scheduled_noise,
)
from qtx_lab.training.supervisor import Supervisor

FAST = {"num_tokens": 32, "steps": 8, "batch_size": 4, "warmup_steps": 2, "num_samples": 4, "seed": 3}
FAST |= {"validate_every": 4, "checkpoint_every": 3, "progress": False}


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trained(model="small", **options):
    trainer = QuantumTrainer(model, **{**FAST, **options})
    return trainer, trainer.train()


# --- Data ---------------------------------------------------------------------------------------------


def test_an_epoch_reads_every_window_once_and_the_next_one_others():
    order = SequenceOrder(np.arange(107), 10, seed=0)
    assert order.windows == 9
    first, second = (order.sequences(range(start, start + 9)) for start in (0, 9))
    for epoch in (first, second):
        assert (epoch.diff(dim=1) == 1).all()
        starts = epoch[:, 0].sort().values
        assert (starts.diff() == 10).all()
    assert not torch.equal(first.sort(dim=0).values, second.sort(dim=0).values) or not torch.equal(
        first, second
    )
    everywhere = order.sequences(list(range(36)))
    for i in (20, 3, 35, 4):  # any number, in any order
        assert torch.equal(order.sequences([i])[0], everywhere[i])
    assert not torch.equal(SequenceOrder(np.arange(107), 10, seed=1).sequences(range(9)), first)


def test_streams_differ():
    seeds = {stream_seed(*path) for path in itertools.product(range(3), range(3), range(4), range(4))}
    assert len(seeds) == 144
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_texts_of_every_kind(tmp_path):
    tokens = np.arange(1000) % 50
    np.save(tmp_path / "tokens.npy", tokens)
    (tmp_path / "text.txt").write_text("Grüße " * 200)
    for text in (tokens, torch.as_tensor(tokens), tmp_path / "tokens.npy"):
        opened = open_tokens(text, 32)
        assert (len(opened.training), len(opened.held_out)) == (900, 100)
        assert (opened.vocab_size, opened.bytes) == (50, False)
    assert open_tokens(tmp_path / "text.txt", 32).bytes
    assert open_tokens(tokens, 32).digest != open_tokens(tokens[::-1], 32).digest
    reference = open_tokens("reference", 32)
    assert bytes(reference.held_out) == qtx.reference_text().encode()


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (np.arange(10), qtx.ArgumentError, "10 tokens"),
        (np.zeros((9, 9), dtype=int), qtx.ArgumentError, "one dimension"),
        (np.zeros(999), qtx.ArgumentError, "float64"),
        (-np.ones(999, dtype=int), qtx.ArgumentError, "from 0"),
        ("missing.txt", qtx.TextError, "cannot be read"),
    ],
)
def test_texts_that_cannot_be_used(text, error, match):
    with pytest.raises(error, match=match):
        trained(text=text)


# --- Schedules and settings -----------------------------------------------------------------------------


def test_schedules():
    spec = TrainSpec(
        steps=101,
        warmup_steps=10,
        num_samples=8,
        final_num_samples=64,
        draws_schedule="linear",
        noise=0.2,
        noise_schedule="linear",
    )
    rates = [learning_rate_share(spec, step) for step in range(101)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    draws = [scheduled_draws(spec, step, 8, 8) for step in range(101)]
    assert (draws[0], draws[50], draws[100]) == (8, 36, 64)
    assert [scheduled_noise(spec, step) for step in (0, 50, 100)] == [0, 0.1, 0.2]
    cosine = TrainSpec(steps=101, final_num_samples=64, draws_schedule="cosine")
    assert [scheduled_draws(cosine, step, 8, 8) for step in (0, 50, 100)] == [8, 36, 64]
    following = TrainSpec(draws_schedule="signal-to-noise", final_num_samples=100)
    ratios = [NOISE_TO_SIGNAL * x for x in (9, 1.5, 1, 0.6, 0)]
    assert [needed_draws(following, ratio, 8, 40) for ratio in ratios] == [80, 60, 40, 24, 20]
    assert needed_draws(following, math.inf, 8, 90) == 100
    assert needed_draws(following, 0, 8, 8) == 8


def test_the_signature_has_the_fields_and_defaults_of_the_spec():
    """`TrainSpec` alone has bounds; the signature repeats its defaults for readers and editors."""
    parameters = inspect.signature(QuantumTrainer).parameters
    fields = TrainSpec.model_fields
    assert {name: parameters[name].default for name in fields} == {n: f.default for n, f in fields.items()}
    own = (
        "distributed",
        "num_gpus",
        "mixed_precision",
        "cluster",
        "folder",
        "on_metrics",
        "progress",
        "retries",
    )
    assert set(parameters) == {*fields, *own}
    for name in parameters:
        assert re.search(rf"^    (\w+, )*{name}(, \w+)* : ", QuantumTrainer.__doc__, re.M), (
            f"{name} is not documented"
        )


def test_the_names_of_models_are_those_of_the_spec():
    assert TrainSpec.model_json_schema()["properties"]["model"]["enum"] == list(MODELS)


def test_a_trainer_of_a_specs_arguments_has_that_spec():
    spec = TrainSpec(model="small", sampler="head-tail", steps=7, noise=0.1)
    assert QuantumTrainer(**spec.arguments()).spec == spec
    given = QuantumTrainer(**{**spec.arguments(), "sampler": qtx.make_sampler("head-tail")})
    assert given.sampler.name == "head-tail"
    with pytest.raises(TypeError, match="stps"):
        QuantumTrainer("small", stps=1)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": 2, "accumulation": 3}, "batch_size=2"),
        ({"noise": math.nan}, "noise=nan"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"sampler": "sistematic"}, "Did you mean 'systematic'"),
        ({"sampler": "exact", "noise": 0.1}, "exact"),
        ({"sampler": qtx.ExactSampler(), "noise": 0.1}, "exact"),
        ({"precision": "bf61"}, "Did you mean 'bf16'"),
        ({"precision": "fp32", "mixed_precision": True}, "contradict"),
        ({"parallel": "fsdp", "precision": "fp16"}, "fsdp"),
        ({"model": "smal"}, "Did you mean 'small'"),
        ({"num_gpus": 4}, "distributed=True"),
        ({"num_gpus": 0, "distributed": True}, "num_gpus=0"),
        ({"num_tokens": 5000}, "context, 1024"),
        ({"seed": -1}, "seed=-1"),
        ({"retries": -1}, "retries=-1"),
        ({"control_variate": "top"}, "control_variate='top'.*Did you mean 'topk'"),
        ({"compile": "yes"}, "compile='yes'"),
        ({"drawn_heads": "0:x"}, "'0:x' names no heads"),
        ({"drawn_heads": "3-1"}, "3-1 is no range"),
        ({"drawn_heads": "0, 9:0"}, "names layer 9; the model has the layers 0 to"),
        ({"drawn_heads": "0:0-99"}, "names head 99 of layer 0, which has the heads 0 to"),
    ],
)
def test_bad_settings_are_refused_before_work(settings, match):
    with pytest.raises(qtx.ArgumentError, match=match):
        trained(**settings)


@pytest.mark.parametrize("name", ["model", "cluster", "folder", "on_metrics"])
def test_arguments_of_another_type_are_refused_by_name(name):
    with pytest.raises(qtx.DtypeError, match=f"{name}=5 is not allowed: it must be"):
        QuantumTrainer(**{name: 5}, distributed=True)


def test_models_that_do_not_fit():
    embedding = torch.nn.Embedding(256, 8)
    with pytest.raises(qtx.ShapeError, match="logits for 8"):
        trained(embedding, num_samples=None)
    with pytest.raises(qtx.ShapeError, match="must give logits"):
        trained(torch.nn.Sequential(embedding, torch.nn.Flatten()), num_samples=None)
    with pytest.raises(qtx.ArgumentError, match="no attention that could draw"):
        trained(torch.nn.Sequential(embedding, torch.nn.Linear(8, 256)), sampler="systematic")
    with pytest.raises(qtx.ArgumentError, match="no parameters"):
        trained(torch.nn.Sequential(embedding, torch.nn.Linear(8, 256)).requires_grad_(False))
    with pytest.raises(qtx.ShapeError, match="embedded all 256"):
        trained(torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 256)), num_samples=None)


# --- What draws -----------------------------------------------------------------------------------------


def encoder(cls=torch.nn.MultiheadAttention, **options):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(256, 16)
            self.attention = cls(16, 2, batch_first=True, **options)

        def forward(self, tokens):
            x = self.embedding(tokens)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            x = x + self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
            return F.linear(x, self.embedding.weight)

    torch.manual_seed(0)
    return Model()


def test_models_with_attention_of_torch_draw_while_training_and_are_restored_afterwards():
    trainer, result = trained(encoder())
    assert type(trainer.model.attention) is torch.nn.MultiheadAttention
    assert {row["draws"] for row in result.metrics} == {4}
    exact = trained(encoder(), sampler="exact")[1]
    assert "draws" not in exact.metrics[0]
    assert exact.loss == pytest.approx(result.loss, rel=0.05)
    assert exact.loss != result.loss


def test_only_the_heads_that_are_picked_draw(generator):
    model = make_model("small", 0)
    exact, every = (Attention(model, num_samples=4) for _ in range(2))
    picked = Attention(model, num_samples=4, drawn_heads="1:0, 2")
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    for layer, drawn in ((0, []), (1, [0]), (2, [0, 1, 2, 3])):
        outputs = []
        for attention, draws in ((exact, 0), (every, 4), (picked, 4)):
            with attention.drawing(draws, generator=torch.Generator().manual_seed(layer)):
                outputs.append(attention(layer, q, k, v))
        expected = outputs[0].clone()
        expected[:, drawn] = outputs[1][:, drawn]
        assert torch.equal(outputs[2], expected)
    losses = [
        trained(**kind)[1].metrics[0]["loss"] for kind in ({"sampler": "exact"}, {"drawn_heads": "0:0"}, {})
    ]
    assert len(set(losses)) == 3
    with pytest.raises(qtx.ArgumentError, match="each draws all of its heads or none"):
        trained(encoder(), drawn_heads="0:1")
    assert trained(encoder(), drawn_heads="0")[1].loss == trained(encoder())[1].loss


def test_modules_that_draw_already_keep_their_settings():
    model = encoder(qtx.QuantumMultiheadAttention, sampler="head-tail", num_samples=6)
    before = model.attention.settings
    _, result = trained(model, num_samples=None)
    assert {row["draws"] for row in result.metrics} == {6}
    assert model.attention.settings is before


def test_noise_is_the_uniform_distribution_over_visible_keys(generator):
    logits = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    logits[:, 6:] = -torch.inf
    logits[4] = -torch.inf
    p = logits.softmax(-1).nan_to_num()
    dense = (
        NoisySampler(qtx.make_sampler("systematic"), 0.25).draw(logits, 200_000, generator=generator).dense(8)
    )
    expected = 0.75 * p + 0.25 * (logits > -torch.inf) / 6
    assert torch.allclose(dense, expected, atol=1e-4)  # a comb misses a key's share by less than 1 / 200,000


def test_the_measured_variance_is_that_of_the_gradient():
    """Over 60 independent measurements its mean is that of ||g - E g||^2, to 5 standard errors."""
    variances, grads = [], []
    model = make_model("small", 0)
    batch = torch.arange(4 * 17).view(4, 17) % 256
    attention = Attention(model, qtx.make_sampler("monte-carlo"), 2)

    def gradient(seed):
        model.zero_grad()
        with attention.drawing(2, 0.0, torch.Generator().manual_seed(seed)):
            logits = attention.forward(model, batch[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        return [p.grad.clone() for p in model.parameters()]

    from qtx_lab.training.loop import squared_sums

    names = [name for name, _ in model.named_parameters()]
    for i in range(60):
        pair = gradient(2 * i), gradient(2 * i + 1)
        sums = squared_sums(names, *pair)
        assert set(sums) == {"embedding", "blocks.0", "blocks.1", "norm"}
        variances.append(sum(noise.item() for noise, _ in sums.values()))
        grads += [torch.cat([g.flatten() for g in one]) for one in pair]
    grads = torch.stack(grads).double()
    spread = (grads - grads.mean(0)).square().sum(-1) * len(grads) / (len(grads) - 1)
    error = torch.tensor(variances).std() / 60**0.5
    assert abs(sum(variances) / 60 - spread.mean().item()) < 5 * error


def test_draws_follow_the_signal_to_noise():
    _, result = trained(
        sampler="monte-carlo", num_samples=1, draws_schedule="signal-to-noise", validate_every=1, steps=6
    )
    for row, following in itertools.pairwise(result.metrics):
        spec = TrainSpec(num_samples=1, draws_schedule="signal-to-noise")
        assert following["draws"] == needed_draws(spec, row["noise_to_signal"], 1, row["draws"])
    names = [name for name in result.metrics[0] if name.startswith("sampling_variance ")]
    assert sum(result.metrics[0][name] for name in names) == pytest.approx(
        result.metrics[0]["sampling_variance"]
    )


# --- Numbers --------------------------------------------------------------------------------------------


def test_it_learns():
    _, result = trained(steps=40, learning_rate=1e-2, validate_every=0)
    bits = [row["bits_per_byte"] for row in result.metrics]
    assert bits[0] > 7.9
    assert result.metrics[-1]["held_out_bits_per_byte_exact"] < 6


def test_the_first_step_is_plain_adamw():
    """An independent loop: same batch, exact attention, bare AdamW."""
    trainer, _ = trained(sampler="exact", steps=1, clip_norm=0, weight_decay=0.1)
    model = make_model("small", FAST["seed"])
    tokens = open_tokens("reference", 32)
    batch = SequenceOrder(tokens.training, 32, stream_seed(FAST["seed"], 0)).sequences(range(4))
    rate = FAST.get("learning_rate", 1e-3) / FAST["warmup_steps"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
    )
    F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
    optimizer.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(weights(trainer), expected, atol=2e-6)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    (a, first), (b, second), (c, _) = trained(), trained(), trained(seed=4)
    assert torch.equal(weights(a), weights(b))
    assert [row["loss"] for row in first.metrics] == [row["loss"] for row in second.metrics]
    assert not torch.equal(weights(a), weights(c))


def test_accumulation_with_exact_attention_changes_nothing():
    one, two, three = (trained(sampler="exact", accumulation=n)[0] for n in (1, 2, 3))
    assert torch.allclose(weights(one), weights(two), atol=1e-5)
    assert torch.allclose(weights(one), weights(three), atol=1e-5)


@pytest.mark.parametrize("sampler", ["exact", "systematic"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision, sampler):
    _, mixed = trained(precision=precision, sampler=sampler)
    _, full = trained(precision="fp32", sampler=sampler)
    assert mixed.loss == pytest.approx(full.loss, rel=0.02)
    assert mixed.loss != full.loss


def test_the_random_numbers_of_torch_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    trained()
    assert torch.equal(torch.rand(1), expected)


# --- Faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"draws_schedule": "signal-to-noise", "num_samples": 1}, {"precision": "fp16"}]
)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path, settings):
    whole, _ = trained(**settings)

    def cancel_at_5(rows):
        if rows[-1]["step"] >= 5:
            trainer.cancel()

    trainer = QuantumTrainer("small", **{**FAST, **settings}, folder=tmp_path, on_metrics=cancel_at_5)
    from qtx_lab.training import rank

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank, "REPORT_INTERVAL_S", 0)
        stopped = trainer.train()
    assert stopped.stopped
    assert stopped.steps == checkpoints(tmp_path)[-1] == 6  # it stopped after one step
    resumed, result = trained(folder=tmp_path, **settings)
    assert [row["step"] for row in result.metrics] == [7, 8]
    assert torch.equal(weights(resumed), weights(whole))
    _, nothing = trained(folder=tmp_path, **settings)  # done already
    assert nothing.steps == 8
    assert nothing.metrics == ()


def test_a_folder_is_trained_into_by_one_at_a_time(tmp_path):
    errors = []

    def second(rows):
        with ThreadPoolExecutor(1) as pool:
            errors.append(pool.submit(trained, folder=tmp_path).exception())

    whole, _ = trained()
    first, _ = trained(folder=tmp_path, on_metrics=second)
    assert errors
    assert all(isinstance(error, qtx.StorageError) and "somebody else" in str(error) for error in errors)
    assert torch.equal(weights(first), weights(whole))


def test_another_training_is_not_resumed(tmp_path):
    trained(folder=tmp_path)
    with pytest.raises(qtx.ArgumentError, match=r"steps=9 \(there 8\)"):
        trained(folder=tmp_path, steps=9)
    with pytest.raises(qtx.ArgumentError, match="other text="):
        trained(folder=tmp_path, text=np.arange(999) % 256)


def test_a_broken_checkpoint_is_passed_over_and_reported(tmp_path):
    whole, _ = trained(folder=tmp_path)
    assert checkpoints(tmp_path) == [6, 8]
    for part in (tmp_path / "step-00000008").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    resumed, result = trained(folder=tmp_path)
    assert any("step-00000008" in note for note in result.notes)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_flipped_byte_is_found_and_the_checkpoint_before_it_is_taken(tmp_path, seed, capsys):
    """One byte of any file of a checkpoint: that of a shard, of torch's index, of our own two."""
    whole, _ = trained(folder=tmp_path)
    files = sorted((tmp_path / "step-00000008").iterdir())
    assert {path.suffix for path in files} == {"", ".json", ".distcp"}
    choose = random.Random(seed)
    for path in files:
        content = bytearray(path.read_bytes())
        content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        path.write_bytes(content)
        resumed, result = trained(folder=tmp_path)
        (note,) = (note for note in result.notes if "passed over" in note)
        assert "step-00000008" in note
        assert path.name in note or path.name == "SHA256SUMS"
        refused, taken = capsys.readouterr().err.splitlines()[-2:]
        assert refused == note
        assert taken == f"Training goes on from the checkpoint {tmp_path / 'step-00000006'}."
        assert [row["step"] for row in result.metrics] == [7, 8]
        assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_is_written_beside_the_training(tmp_path, monkeypatch):
    """The write after step 3 waits for step 5; what it writes is the state after step 3.

    That is copied while the gradient of step 4 is computed, and the optimizer waits. The memory for it is
    prepared before: no checkpoint, not even the first, makes the training wait for that.
    """
    whole, _ = trained(validate_every=0)
    write, seen = CheckpointWriter._write, threading.Event()
    copy, copied, forward = checkpoint_files._copy, [], threading.Event()

    def slow(pairs):
        if threading.current_thread() is not threading.main_thread() and pairs and not copied:
            copied.append(len(pairs))
            forward.clear()
            assert forward.wait(60)
            time.sleep(0.2)  # an optimizer that did not wait would have changed what is copied
        copy(pairs)

    def loss(*arguments, **options):
        forward.set()
        return cross_entropy(*arguments, **options)

    cross_entropy = F.cross_entropy

    def allocate(writer, pointers):
        allocated.append(threading.current_thread() is threading.main_thread())
        allocating(writer, pointers)

    allocated, allocating = [], CheckpointWriter._allocate
    monkeypatch.setattr(CheckpointWriter, "_allocate", allocate)
    monkeypatch.setattr(checkpoint_files, "_copy", slow)
    monkeypatch.setattr(F, "cross_entropy", loss)

    def late(writer, step, state, about):
        if step == 3:
            assert seen.wait(60)
        write(writer, step, state, about)

    def on_metrics(rows):
        if rows[-1]["step"] >= 5:
            assert checkpoints(tmp_path) == []
            seen.set()

    monkeypatch.setattr(CheckpointWriter, "_write", late)
    monkeypatch.setattr("qtx_lab.training.rank.REPORT_INTERVAL_S", 0)
    steps = {"validate_every": 0, "keep_checkpoints": 5}
    trained(folder=tmp_path, on_metrics=lambda rows: None if seen.is_set() else on_metrics(rows), **steps)
    assert copied
    assert allocated == [False]  # once, in the thread
    assert checkpoints(tmp_path) == [3, 6, 8]
    for after in (6, 3):  # also what a later checkpoint was copied to is its own state
        for later in (8, 6):
            if later > after:
                shutil.rmtree(tmp_path / f"step-{later:08d}", ignore_errors=True)
        resumed, result = trained(folder=tmp_path, **steps)
        assert result.metrics[0]["step"] == after + 1
        assert torch.equal(weights(resumed), weights(whole))


def test_checkpoints_of_which_none_is_whole_are_one_error(tmp_path):
    trained(folder=tmp_path)
    for path in tmp_path.glob("step-*/*.distcp"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(qtx.StorageError, match=r"no checkpoint that is whole.*step-00000008.*step-00000006"):
        trained(folder=tmp_path)
    assert checkpoints(tmp_path) == [6, 8]  # nothing was removed


def test_a_checkpoint_without_a_description_is_passed_over(tmp_path):
    whole, _ = trained(folder=tmp_path)
    (tmp_path / "step-²").mkdir()
    (tmp_path / "step-²" / "training.json").write_text("not ours")
    last = tmp_path / "step-00000008"
    for about in ("", "5", "{}", '{"recipe": 5}'):
        (last / "training.json").write_text(about)
        (last / "SHA256SUMS").unlink()
        write_hashes(last)  # as if it had been written so
        resumed, result = trained(folder=tmp_path)
        assert any("step-00000008" in note for note in result.notes), about
        assert torch.equal(weights(resumed), weights(whole))


def test_a_broken_checkpoint_does_not_outlive_a_whole_one(tmp_path):
    trained(folder=tmp_path, keep_checkpoints=3, checkpoint_every=2)
    for step in (6, 8):
        (tmp_path / f"step-{step:08d}" / "training.json").write_text("{}")
    recording = {"keep_checkpoints": 1, "checkpoint_every": 1}
    trainer = QuantumTrainer("small", **{**FAST, "folder": tmp_path, **recording})
    trainer.on_metrics = lambda rows: trainer.cancel()
    result = trainer.train()
    assert result.stopped
    assert checkpoints(tmp_path) == [result.steps]


def poisoned(step, times):
    """A small model whose loss is NaN on the batch of a step, `times` times."""
    model = make_model("small", FAST["seed"])
    order = SequenceOrder(open_tokens("reference", 32).training, 32, stream_seed(FAST["seed"], 0))
    batch = order.sequences(range(4 * step, 4 * step + 4))[:, :-1]
    left = [times]

    def poison(module, inputs, output):
        if torch.equal(inputs[0], batch) and left[0]:
            left[0] -= 1
            return output * math.nan
        return output

    model.register_forward_hook(poison)
    return model


@pytest.mark.parametrize("step", [1, 5])  # before and after the first checkpoint
def test_a_loss_that_is_not_finite_once_is_overcome(step):
    whole, _ = trained(sampler="exact")
    trainer, result = trained(poisoned(step, 1), sampler="exact")
    assert len(result.faults) == 1
    assert "the loss is nan" in result.faults[0]
    assert torch.equal(weights(trainer), weights(whole))


def test_a_loss_that_is_not_finite_again_ends_training(tmp_path):
    with pytest.raises(qtx.RunFailed, match=r"step 5: the loss is nan.*smaller learning_rate") as caught:
        trained(poisoned(5, 2), sampler="exact", folder=tmp_path)
    assert any("step-00000003" in note for note in caught.value.__notes__)
    assert checkpoints(tmp_path) == [3]


@pytest.mark.chaos
def test_a_full_disk_ends_training_with_the_last_checkpoint_whole(tmp_path):
    """A file may not be larger than 100 kB from step 4 on; the checkpoint at 6 is."""
    code = f"""
import resource, sys, time
from pathlib import Path
from qtx_lab import QuantumTrainer, StorageError
from qtx_lab.training import rank
from qtx_lab.training.checkpoints import checkpoints
rank.REPORT_INTERVAL_S = 0
def full(rows):
    if rows[-1]["step"] >= 4:
        while not checkpoints(Path({str(tmp_path)!r})):  # it is written beside the training
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    QuantumTrainer("small", on_metrics=full, folder={str(tmp_path)!r}, **{FAST!r}).train()
except StorageError as error:
    print(error, *error.__notes__)
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "Cannot write" in done.stdout
    assert "File too large" in done.stdout
    assert "step-00000003" in done.stdout
    assert checkpoints(tmp_path) == [3]
    assert not list(tmp_path.glob(".step-*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    whole, _ = trained()
    resumed, _ = trained(folder=tmp_path)
    assert torch.equal(weights(resumed), weights(whole))


def test_cancel_from_another_thread():
    trainer = QuantumTrainer("small", **{**FAST, "steps": 100_000})
    timer = threading.Timer(1.0, trainer.cancel)
    timer.start()
    result = trainer.train()
    assert result.stopped
    assert 0 < result.steps < 100_000
    assert checkpoints(result.folder)[-1] == result.steps


@pytest.mark.chaos
@pytest.mark.parametrize("step", [1, 5])  # before and after the first checkpoint, of 3 steps
@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("retries", [0, 3])
def test_what_stops_a_training_while_it_recovers_from_a_fault_is_no_failure(step, number, retries, tmp_path):
    """As a batch system stops the caller and, at the same time, the workers: the run is to go on later."""
    model = poisoned(step, 1)

    def stop(module, inputs, output):
        if output.isnan().any():
            trainer.cancel() if number is None else os.kill(os.getpid(), number)

    model.register_forward_hook(stop)
    start = weights(SimpleNamespace(model=model))
    trainer = QuantumTrainer(model, **{**FAST, "sampler": "exact", "retries": retries}, folder=tmp_path)
    where = "after step 3; checkpoint: .*3" if step == 5 else "before the first checkpoint"
    if number is not None:
        kind = KeyboardInterrupt if number == signal.SIGINT else qtx.StoppedBySignal
        with pytest.raises(kind, match=where):
            trainer.train()
    else:
        result = trainer.train()
        assert result.stopped
        assert len(result.faults) == 1
        assert [row["step"] for row in result.metrics] == [[], [1, 2, 3]][step == 5]
        assert result.steps == [0, 3][step == 5]
    assert checkpoints(tmp_path) == [[], [3]][step == 5]
    if step == 1:
        assert torch.equal(weights(trainer), start)
    whole, _ = trained(sampler="exact")
    resumed, _ = trained(sampler="exact", folder=tmp_path)
    assert torch.equal(weights(resumed), weights(whole))


def test_cancel_before_the_first_step_counts(monkeypatch):
    trainer = QuantumTrainer("small", **{**FAST, "steps": 100_000})
    check = trainer._check
    monkeypatch.setattr(trainer, "_check", lambda: [trainer.cancel(), check()][1])
    assert trainer.train().steps == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(qtx.StorageError, match="Cannot write"):
        trained(folder=tmp_path / "file" / "below")


def test_nothing_is_left_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QTX_LAB_HOME", str(tmp_path))
    assert trained()[1].folder is None
    assert list(tmp_path.iterdir()) == []


# --- Local updates --------------------------------------------------------------------------------------

LOCAL = {"accumulation": 2, "local_steps": 3, "checkpoint_every": 3, "validate_every": 0}


def test_local_updates_are_those_of_a_plain_loop():
    """An independent DiLoCo of two replicas with exact attention; the last round has two of three steps."""
    trainer, result = trained(sampler="exact", clip_norm=0, **LOCAL)
    tokens = open_tokens("reference", 32)
    order = SequenceOrder(tokens.training, 32, stream_seed(FAST["seed"], 0))
    common = make_model("small", FAST["seed"])
    replicas = [make_model("small", FAST["seed"]) for _ in range(2)]
    inner = [
        torch.optim.AdamW(
            [
                {"params": [p for p in r.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in r.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )
        for r in replicas
    ]
    momentum = [torch.zeros_like(p) for p in common.parameters()]
    losses = []
    for step in range(8):
        batch = order.sequences(range(4 * step, 4 * step + 4))
        loss_of_step = 0.0
        for model, optimizer, part in zip(replicas, inner, batch.split(2), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * learning_rate_share(trainer.spec, step)
            loss = F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_of_step += loss.item() / 2
        losses.append(loss_of_step)
        if step in (2, 5, 7):
            with torch.no_grad():
                for p, m, *ps in zip(
                    common.parameters(), momentum, *(r.parameters() for r in replicas), strict=True
                ):
                    change = p - sum(ps) / 2
                    m.mul_(0.5).add_(change)
                    p -= 0.7 * (change + 0.5 * m)
                    for x in ps:
                        x.copy_(p)
    expected = torch.cat([p.detach().flatten() for p in common.parameters()])
    assert torch.allclose(weights(trainer), expected, atol=2e-6)
    assert [row["loss"] for row in result.metrics] == pytest.approx(losses, abs=1e-5)


def test_local_updates_draw_and_are_resumed_after_an_exchange(tmp_path):
    whole, result = trained(**LOCAL)
    assert [row["draws"] for row in result.metrics] == [4] * 8
    trainer = QuantumTrainer("small", **{**FAST, **LOCAL}, folder=tmp_path)
    trainer.on_metrics = lambda rows: trainer.cancel()
    stopped = trainer.train()
    assert stopped.stopped
    assert stopped.steps in (3, 6)
    resumed, _ = trained(folder=tmp_path, **LOCAL)
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.allclose(weights(resumed), weights(trained(accumulation=2)[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"parallel": "fsdp"}, "parallel='fsdp' is not allowed with local_steps=3"),
        ({"draws_schedule": "signal-to-noise"}, "draws_schedule='signal-to-noise' is not allowed"),
        ({"precision": "fp16"}, "precision='fp16' is not allowed"),
        ({"validate_every": 4}, "validate_every=4 .* must be 0 or a multiple"),
        ({"checkpoint_every": 100}, "checkpoint_every=100 .* must be 0 or a multiple"),
    ],
)
def test_what_local_updates_cannot_do_is_refused(settings, match):
    with pytest.raises(qtx.SpecError, match=match):
        trained(**{**LOCAL, **settings})


def test_faults_between_which_training_came_further_do_not_end_it(tmp_path, monkeypatch):
    """Without checkpoints every fault begins at step 0 again: what counts is how far the attempts came."""
    reached = iter([5, 9, 14, 20, 20])

    def attempt(self, name, world):
        step = next(reached)
        self._take_rows([{"step": step, "loss": 1.0}])
        return RankEnd("lost", step, RuntimeError("gone"))

    monkeypatch.setattr(Supervisor, "_run_over_cluster", attempt)
    job = RankJob(None, None, "", TrainSpec(), None, 2, tmp_path, 1.0)
    supervisor = Supervisor(job, object(), retries=1, cancelled=threading.Event(), progress=False)
    with pytest.raises(qtx.RunFailed, match=r"given up after 2 fault\(s\) without a later step"):
        supervisor.run(2)
    assert len(supervisor.faults) == 5


def test_rows_that_a_leaving_worker_could_not_send_are_read_from_its_checkpoint(tmp_path, monkeypatch):
    """The scheduler drops what a worker sends before the worker itself knows that it is leaving."""
    take, add = Supervisor._take_rows, Supervisor._add_rows_of
    trainer = QuantumTrainer("small", **{**FAST, "validate_every": 0}, folder=tmp_path)
    of_checkpoint = []

    def take_rows(self, rows):
        if of_checkpoint:
            take(self, rows)
        else:
            take(self, [row for row in rows if row["step"] < 3])
            if any(row["step"] == 5 for row in rows):
                trainer.cancel()

    def add_rows_of(self, step):
        of_checkpoint.append(step)
        add(self, step)

    monkeypatch.setattr(Supervisor, "_take_rows", take_rows)
    monkeypatch.setattr(Supervisor, "_add_rows_of", add_rows_of)
    monkeypatch.setattr("qtx_lab.training.rank.REPORT_INTERVAL_S", 0)
    steps = [row["step"] for row in trainer.train().metrics]
    assert steps == list(range(1, of_checkpoint[0] + 1))
    assert 5 < of_checkpoint[0] < FAST["steps"]


def test_a_training_that_has_ended_is_found_at_its_end(tmp_path):
    """As after a kill between the last checkpoint and the end: the same loss, and no step again."""
    seen = []
    trainer, result = trained(folder=tmp_path, on_metrics=seen.extend)
    steps = len(seen)
    again, found = trained(folder=tmp_path, on_metrics=seen.extend)
    assert (found.steps, found.loss, found.stopped) == (result.steps, result.loss, False)
    assert len(seen) == steps
    assert torch.equal(weights(again), weights(trainer))
