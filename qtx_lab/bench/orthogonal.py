"""`qtx-lab bench orthogonal`: attention by orthogonal layers and by a quantum kernel, and classical controls.

Each kind is trained beside its control, which has as many parameters in the same places, on the same data, by
the same optimiser, from the same seeds. What is compared is how well they learn: circuits are simulated
exactly, which is cheap at any size of a unary state, and no method here is faster for being quantum.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from ..attention import QuantumMultiheadAttention
from ..attention.quantum_layers import AttentionKind, OrthogonalKind, QuantumKernelKind
from ..models.text import reference_text
from .base import BenchRow

SEEDS = 8
EMBED_DIM, NUM_HEADS = 8, 2
STEPS, BATCH = 250, 64
LEARNING_RATE = 0.01
TEST_SEQUENCES = 2048
LENGTH = 8
"""Tokens of a sequence."""

KINDS: tuple[AttentionKind, ...] = (
    OrthogonalKind("pyramid"),
    OrthogonalKind("butterfly"),
    QuantumKernelKind(layers=2),
)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Tokens (B, LENGTH, 2), each of two numbers that are embedded and added, and classes (B,)."""

    tokens: Tensor
    target: Tensor


@dataclass(frozen=True)
class LearningTask:
    """A task with training and test sequences.

    Parameters
    ----------
    name : str
    vocabulary : int
        Numbers of which a token is made.
    classes : int
    """

    name: str
    vocabulary: int
    classes: int

    def sequences(self, count: int, generator: torch.Generator, test: bool = False) -> Sequences:
        """Draw sequences of the task."""
        if self.name == "lookup":
            return _lookup(count, generator)
        return _text(count, generator, test)


LOOKUP_KEYS, LOOKUP_VALUES = 24, 8
TASKS = (
    LearningTask("lookup", LOOKUP_KEYS + LOOKUP_VALUES + 1, LOOKUP_VALUES),
    LearningTask("text", 27 + LENGTH, 27),
)
"""`lookup`: seven pairs of a key (of 24) and a value (of eight), then a key; the class is its value.
`text`: the next letter of the shipped text after eight letters, of 27 with what is no letter."""


def _lookup(count: int, generator: torch.Generator) -> Sequences:
    keys = torch.rand(count, LOOKUP_KEYS, generator=generator).argsort(-1)[:, : LENGTH - 1]
    values = torch.randint(LOOKUP_VALUES, (count, LENGTH - 1), generator=generator)
    place = torch.randint(LENGTH - 1, (count, 1), generator=generator)
    query = torch.cat((keys.gather(1, place), torch.full_like(place, LOOKUP_KEYS + LOOKUP_VALUES)), -1)
    pairs = torch.stack((keys, values + LOOKUP_KEYS), -1)
    return Sequences(torch.cat((pairs, query[:, None]), 1), values.gather(1, place).squeeze(-1))


@cache
def _letters() -> Tensor:
    """The letters of the shipped text, 1 to 26, and 0 for everything else."""
    return torch.tensor([ord(c) - 96 if "a" <= c <= "z" else 0 for c in reference_text().lower()])


def _text(count: int, generator: torch.Generator, test: bool) -> Sequences:
    text = _letters()
    split = len(text) * 9 // 10  # the last tenth is for the test
    first, last = (split, len(text)) if test else (0, split)
    start = torch.randint(first, last - LENGTH, (count, 1), generator=generator)
    letters = text[start + torch.arange(LENGTH + 1)]
    place = torch.arange(27, 27 + LENGTH).expand(count, LENGTH)
    return Sequences(torch.stack((letters[:, :-1], place), -1), letters[:, -1])


class SmallModel(nn.Module):
    """Embeddings, one attention layer that the last token asks, and a linear classifier."""

    def __init__(self, task: LearningTask, kind: AttentionKind):
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, EMBED_DIM)
        self.classifier = nn.Linear(EMBED_DIM, task.classes)
        self.attention = QuantumMultiheadAttention(
            EMBED_DIM, NUM_HEADS, batch_first=True, sampler="exact", kind=kind
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the classes, (B, classes), from tokens (B, L, 2)."""
        x = self.embedding(tokens).sum(-2)
        last = x[:, -1:]
        attended = self.attention(last, x, x, need_weights=False)[0]
        logits: Tensor = self.classifier((last + attended).squeeze(1))
        return logits


@dataclass(frozen=True)
class Trained:
    """What one training came to: test loss (nats), test accuracy, parameters of the heads, CPU seconds."""

    loss: float
    accuracy: float
    parameters: int
    seconds: float


def train(task: LearningTask, kind: AttentionKind, seed: int, steps: int) -> Trained:
    """Train a small model, and test it on sequences that it has not seen.

    Embeddings, classifier, output projection and batches of a seed are the same for all kinds.
    """
    start = time.process_time()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SmallModel(task, kind)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        batch = task.sequences(BATCH, generator)
        loss = F.cross_entropy(model(batch.tokens), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = task.sequences(TEST_SEQUENCES, torch.Generator().manual_seed(10_000 + seed), test=True)
    with torch.no_grad():
        logits = model(held_out.tokens)
    heads = model.attention.heads
    assert heads is not None
    return Trained(
        float(F.cross_entropy(logits, held_out.target)),
        float((logits.argmax(-1) == held_out.target).double().mean()),
        sum(p.numel() for p in heads.parameters()),
        time.process_time() - start,
    )


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, with its interval by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float], level: float = 0.95) -> Interval:
        """The interval of independent values, at least two."""
        x = torch.tensor(values, dtype=torch.float64)
        mean, half = (
            float(x.mean()),
            float(x.std() / math.sqrt(len(x)) * student.ppf((1 + level) / 2, len(x) - 1)),
        )
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def bench_orthogonal(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Train models of one attention layer, eight features and two heads, from eight seeds, on two tasks.

    `error` is the mean over seeds of the test loss, in nats. The check passes where all losses are finite: a
    tie with the control, or a loss to it, is a result. Seconds are CPU seconds of one training, and the
    baseline is the control of the same kind.

    Details: `seeds`, `parameters` (of the layer that makes queries, keys and values; of both the same),
    `loss_low`, `loss_high`, `accuracy`, `accuracy_low`, `accuracy_high`: 95 % intervals over seeds; of a
    quantum kind `difference`, `difference_low`, `difference_high`: its loss less that of its control on the
    same seed, with an interval that allows for the six comparisons (Bonferroni), and `verdict`.
    """
    rows = []
    for task in TASKS[:1] if quick else TASKS:
        here = []
        for kind in KINDS[1:2] if quick else KINDS:
            here += compare_with_control(task, kind, 3 if quick else SEEDS, 60 if quick else STEPS)
        print_table(task, here)
        rows += here
    return rows


def compare_with_control(
    task: LearningTask, kind: AttentionKind, seeds: int, steps: int, comparisons: int = 6
) -> list[BenchRow]:
    """Train a kind and its control from the same seeds, in turns: two rows.

    The interval of their difference has the level 1 - .05 / `comparisons`: of so many comparisons of equal
    methods, one says that they differ with a probability of at most 5 %.
    """
    results: tuple[list[Trained], list[Trained]] = ([], [])
    for seed in range(seeds):
        for trained, which in zip(results, (kind, kind.classical), strict=True):
            trained.append(train(task, which, seed, steps))
    pairs = zip(*results, strict=True)
    losses = [quantum.loss - control.loss for quantum, control in pairs]
    difference = Interval.of(losses, level=1 - 0.05 / comparisons)
    verdict = "tie"
    if difference.high < 0:
        verdict = "better than its control"
    elif difference.low > 0:
        verdict = "worse than its control"
    compared = {
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "verdict": verdict,
    }
    setting = kind.layout if isinstance(kind, OrthogonalKind) else "2 layers"
    case = f"{task.name}, {steps} steps of {BATCH}"
    name = f"{kind.name} {setting}"
    seconds = [sum(x.seconds for x in trained) / seeds for trained in results]
    rows = []
    for method, trained, second, more in zip(
        (name, f"{name}, control"), results, seconds, (compared, {}), strict=True
    ):
        loss, accuracy = Interval.of([x.loss for x in trained]), Interval.of([x.accuracy for x in trained])
        finite = all(math.isfinite(x.loss) for x in trained)
        details = {
            "seeds": seeds,
            "parameters": trained[0].parameters,
            "loss_low": loss.low,
            "loss_high": loss.high,
            "accuracy": accuracy.mean,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            **more,
        }
        check = "pass" if finite else "a loss is not finite"
        ratio = seconds[1] / second if finite else None
        rows.append(
            BenchRow(case, method, second, f"{name}, control", ratio, loss.mean, check, details=details)
        )
    return rows


def print_table(task: LearningTask, rows: list[BenchRow]) -> None:
    """Print the rows of a task."""
    print(f"\n{rows[0].case}, {rows[0].details['seeds']} seeds")
    print(f"  {'method':<36}{'parameters':>11}{'test loss, nats':>26}{'accuracy':>26}{'CPU s':>7}")
    for row in rows:
        x = row.details
        loss = Interval(row.error, x["loss_low"], x["loss_high"])
        accuracy = Interval(x["accuracy"], x["accuracy_low"], x["accuracy_high"])
        print(f"  {row.method:<36}{x['parameters']:>11}{loss!s:>26}{accuracy!s:>26}{row.seconds:>7.1f}")
        if "verdict" in x:
            difference = Interval(x["difference"], x["difference_low"], x["difference_high"])
            print(f"    loss less that of its control: {difference}: {x['verdict']}")
    print(
        f"  Guessing: {math.log(task.classes):.3f} nats. Intervals: 95 % over seeds, by Student's t; those "
        "of differences hold for six comparisons together."
    )
