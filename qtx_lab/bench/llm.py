"""`qtx-lab bench llm`: what methods of sparse decoding lose on a real language model, and what they read.

A prompt is computed exactly, once; every method then decodes from it, side by side with the others, with
budgets of keys that are the same for all. `python -m qtx_lab.bench.llm` measures a part of it, and goes on
where an earlier run was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import sampled_attention
from ..cache.policies import CachePolicy, ExactPolicy, make_policy
from ..experiments.provenance import machine
from ..models.base import LanguageModel, causal_sdpa
from ..models.generation import Decoding, Prefill
from ..models.language_model import load_language_model
from ..models.tasks import TaskPrompt, make_task
from ..models.tasks.scoring import TaskScore
from ..models.tasks.side_by_side import score_methods
from ..models.tasks.statistics import mean_interval, paired_difference
from ..models.text import reference_text
from ..storage import json_bytes, write_atomic
from .base import BenchRow, Timing, shown

MODEL = "smollm2-135m"

Budget = float | int
"""How many keys a query head reads: a share of all (float), or their number (int)."""

METHODS: dict[str, dict[str, Any]] = {
    "head-tail": {"name": "sampler", "sampler": "head-tail"},
    "cache, int4": {"name": "sampled", "proposal": "int4"},
    "cache, low-rank 16": {"name": "sampled", "proposal": "low-rank", "rank": 16},
    "cache, mixed": {"name": "sampled", "proposal": "mixed"},
    "cache, int4, shared": {"name": "sampled", "proposal": "int4", "shared": True},
    "cache, mixed, shared": {"name": "sampled", "proposal": "mixed", "shared": True},
    "oracle top-k": {"name": "oracle-top-k"},
    "sink + window": {"name": "sink-window"},
    "Quest": {"name": "quest"},
    "Quest's pages, drawn": {"name": "quest", "draw": True},
    "PQCache": {"name": "pqcache"},
    "PQCache's codes, drawn": {"name": "pqcache", "draw": True},
    "MagicPIG": {"name": "magicpig"},
    "vAttention": {"name": "vattention"},
    "S²ANTA-Prop": {"name": "santa", "rule": "proportional"},
    "S²ANTA-Flash": {"name": "santa", "rule": "fixed"},
    "H2O": {"name": "h2o"},
    "SnapKV": {"name": "snapkv"},
}
"""The settings of each method for `make_policy`, by the names that tables have."""

SIDE_BY_SIDE = 8
"""Methods that decode at once. Each holds keys and values of its own: 190 MB at 4,096 tokens."""

DRAWS_OF_NEEDLE = 32
"""Draws with which a single hidden number is to be found as often as by exact attention."""


@dataclass(frozen=True)
class TaskPlan:
    """Prompts of one kind, and the budgets at which all methods answer them."""

    task: str
    length: int
    prompts: int
    budgets: tuple[Budget, ...] = (0.05,)
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def case(self) -> str:
        """What tables call it."""
        return f"{self.task}, {self.length:,} tokens"


CACHES = ("cache, int4", "cache, low-rank 16")

QUICK_PLANS = (
    TaskPlan("single-needle", 768, 3, (DRAWS_OF_NEEDLE,), CACHES),
    TaskPlan("many-keys", 768, 3),
)

PLANS = (
    TaskPlan("many-keys", 2048, 10, (0.02, 0.05, 0.1)),
    *(TaskPlan("single-needle", length, 10, (DRAWS_OF_NEEDLE,), CACHES) for length in (1024, 2048, 4096)),
    TaskPlan("many-values", 2048, 8),
    TaskPlan("many-queries", 2048, 8),
    TaskPlan("variable-tracking", 2048, 8),
    TaskPlan("common-words", 2048, 8),
    TaskPlan("frequent-words", 2048, 8),
    TaskPlan("long-text", 2048, 4),
)


@dataclass(frozen=True)
class Outcome:
    """How one method did on one prompt."""

    task: str
    length: int
    seed: int
    method: str
    budget: Budget
    digest: str
    """Digest of the prompt, by which two machines can compare their prompts."""
    matched: float | None
    log_probability: float
    tokens: int
    divergence: float | None
    agreement: float | None
    keys: float
    values: float
    bytes: float
    generated: str
    """What the method answered."""
    seconds: float
    """Seconds of the group of methods that decoded side by side, divided by their number."""

    @property
    def score(self) -> float:
        """What a task is scored by: the share of answers found, or else the log-probability a token, nats."""
        return self.log_probability / self.tokens if self.matched is None else self.matched


def bench_llm(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Tasks that a language model can fail, its loss on text, and the time of a token.

    Rows of tasks: `error` is the exact model's mean score less the method's, `seconds` those of a prompt; no
    ratio is given, as the policies are made to count what is read and not for speed. Further details:

    - `policy` and `budget`: the method, and the keys that a query head reads;
    - `score`, `score low`, `score high`: the mean over prompts with its bootstrap interval: the share of the
      answers that were found, or the log-probability of a token of the text, nats;
    - `difference`, `difference low`, `difference high`, `p`: paired with the exact model's; the sign test;
    - `KL` and `top-1`: divergence from the exact model's next token, nats, and how often they agree;
    - `keys`, `values`, `bytes`: what a token reads, as shares of what exact attention reads;
    - `front`: whether no other method of the case has a higher score (or, on text, a smaller KL) for at most
      as many bytes.

    Rows of text: `error` is the relative difference of the loss over all tokens, each drawn. Rows of time:
    one token of the whole model, `error` that of its logits.
    """
    del copy_bandwidth
    model = load_language_model(MODEL)
    rows = []
    for plan in QUICK_PLANS if quick else PLANS:
        rows += task_rows(plan, list(measure(model, plan)))
    rows += text_rows(model, 512 if quick else 2048, 1 if quick else 3)
    rows += speed_rows(model, ((1024, 1),) if quick else ((2048, 1), (2048, 8), (8192, 1), (8192, 8)))
    return rows


# --- Tasks ------------------------------------------------------------------------------------


def measure(
    model: LanguageModel, plan: TaskPlan, known: Iterable[Outcome] = (), seed: int = 0
) -> Iterator[Outcome]:
    """The outcomes of all methods on the prompts of a plan, but for those that are known.

    Exact attention comes first. Prompt i has the seed `seed + i`, and so have the draws of all methods.
    """
    finished = {(x.task, x.length, x.seed, x.method, x.budget) for x in known}
    progress = tqdm(range(seed, seed + plan.prompts), desc=plan.case, leave=False)
    for number in progress:
        missing = [
            (method, budget, policy)
            for method, budget, policy in competitors(plan, number)
            if (plan.task, plan.length, number, method, budget) not in finished
        ]
        if not missing:
            continue
        prompt = make_task(plan.task, model, length=plan.length, seed=number)
        prefill = Prefill.of(model, prompt.tokens[None])
        exact, outcome = _measure_group(prefill, prompt, [("exact", 1.0, ExactPolicy())], None)[0]
        if ("exact", 1.0) in [(method, budget) for method, budget, _ in missing]:
            yield outcome
        others = [x for x in missing if x[0] != "exact"]
        for first in range(0, len(others), SIDE_BY_SIDE):
            group = others[first : first + SIDE_BY_SIDE]
            for _, outcome in _measure_group(prefill, prompt, group, exact):
                yield outcome


def competitors(plan: TaskPlan, seed: int) -> list[tuple[str, Budget, CachePolicy]]:
    """Exact attention, and every method at every budget of a plan."""
    policies: list[tuple[str, Budget, CachePolicy]] = [("exact", 1.0, ExactPolicy())]
    for budget in plan.budgets:
        for method in plan.methods:
            policy = make_policy(**METHODS[method], budget=budget, seed=seed)
            policies.append((method, budget, policy))
    return policies


def _measure_group(
    prefill: Prefill,
    prompt: TaskPrompt,
    group: Sequence[tuple[str, Budget, CachePolicy]],
    exact: TaskScore | None,
) -> list[tuple[TaskScore, Outcome]]:
    """The scores and outcomes of methods that decode side by side."""
    start = time.perf_counter()
    policies = [policy for _, _, policy in group]
    scores = score_methods(prefill, prompt, policies, exact)
    seconds = (time.perf_counter() - start) / len(group)
    return [
        (
            score,
            Outcome(
                task=prompt.task,
                length=prompt.length,
                seed=prompt.seed,
                method=method,
                budget=budget,
                digest=prompt.digest,
                matched=score.matched,
                log_probability=score.log_probability,
                tokens=score.tokens,
                divergence=score.divergence,
                agreement=score.agreement,
                keys=reads.keys,
                values=reads.values,
                bytes=reads.bytes,
                generated=score.generated,
                seconds=seconds,
            ),
        )
        for (method, budget, _), (score, reads) in zip(group, scores, strict=True)
    ]


def task_rows(plan: TaskPlan, outcomes: Sequence[Outcome]) -> list[BenchRow]:
    """Print and return the rows of a plan's outcomes; the exact model is the first."""
    groups: dict[tuple[str, Budget], list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda x: x.seed):
        groups.setdefault((outcome.method, outcome.budget), []).append(outcome)
    exact = groups[("exact", 1.0)]
    front = pareto_front({key: _point(group) for key, group in groups.items()})
    rows = [
        _task_row(plan, method, budget, group, exact, (method, budget) in front)
        for (method, budget), group in groups.items()
    ]
    _print_tasks(plan, rows)
    return rows


def _point(group: Sequence[Outcome]) -> tuple[float, float]:
    """Mean bytes, and mean score or, where nothing is asked, minus the divergence from exact attention."""
    by_answers = group[0].matched is not None
    quality = _mean(x.score if by_answers else -(x.divergence or 0.0) for x in group)
    return _mean(x.bytes for x in group), quality


def _mean(numbers: Iterable[float]) -> float:
    x = list(numbers)
    return sum(x) / len(x)


def pareto_front(points: Mapping[Any, tuple[float, float]]) -> set[Any]:
    """The names of the points (cost, score) that none beats: none has a higher score for at most the cost.

    >>> sorted(pareto_front({"a": (1, 0.5), "b": (2, 0.5), "c": (3, 0.9), "d": (4, 0.8)}))
    ['a', 'c']
    """
    return {
        name
        for name, (cost, score) in points.items()
        if not any(
            (c <= cost and s > score) or (c < cost and s >= score)
            for other, (c, s) in points.items()
            if other != name
        )
    }


def _task_row(
    plan: TaskPlan,
    method: str,
    budget: Budget,
    group: Sequence[Outcome],
    exact: Sequence[Outcome],
    on_front: bool,
) -> BenchRow:
    by_seed = {x.seed: x.score for x in exact}
    scores = [x.score for x in group]
    bounds = None if group[0].matched is None else (0.0, 1.0)
    mean = mean_interval(scores, bounds=bounds)
    paired = paired_difference(scores, [by_seed[x.seed] for x in group], bounds=bounds)
    needle = plan.task == "single-needle" and method.startswith("cache")
    return BenchRow(
        case=plan.case,
        method=method if method == "exact" else f"{method}, {budget_label(budget)}",
        seconds=_mean(x.seconds for x in group),
        baseline="exact",
        ratio=None,
        error=-paired.mean,
        check="pass" if not needle or paired.high >= 0 else "finds less than exact attention",
        details={
            "policy": method,
            "budget": budget,
            "score": mean.mean,
            "score low": mean.low,
            "score high": mean.high,
            "difference": paired.mean,
            "difference low": paired.low,
            "difference high": paired.high,
            "p": paired.p_value,
            "KL": None if method == "exact" else _mean(x.divergence or 0.0 for x in group),
            "top-1": None if method == "exact" else _mean(x.agreement or 0.0 for x in group),
            "keys": _mean(x.keys for x in group),
            "values": _mean(x.values for x in group),
            "bytes": _mean(x.bytes for x in group),
            "front": on_front,
            "prompts": len(group),
        },
    )


def budget_label(budget: Budget) -> str:
    """A budget in words.

    >>> budget_label(0.05), budget_label(32)
    ('5 % of keys', '32 keys')
    """
    return f"{100 * budget:g} % of keys" if isinstance(budget, float) else f"{budget} keys"


def _print_tasks(plan: TaskPlan, rows: Sequence[BenchRow]) -> None:
    print(f"\n{plan.case}, {rows[0].details['prompts']} prompts")
    print(
        f"  {'method':<34}{'score':>8}{'95 %':>16}{'less exact':>12}{'95 %':>18}"
        f"{'KL':>9}{'keys':>7}{'bytes':>7}"
    )
    for row in rows:
        d = row.details
        interval = f"({d['score low']:.3f}–{d['score high']:.3f})"
        difference = f"({d['difference low']:+z.3f}–{d['difference high']:+z.3f})"
        print(
            f"  {row.method:<34}{d['score']:>8.3f}{interval:>16}{d['difference']:>+12.3f}{difference:>18}"
            f"{shown(d['KL'], '.4f'):>9}{d['keys']:>7.1%}{d['bytes']:>7.1%}{'  *' if d['front'] else ''}"
        )
    better = "smaller KL" if rows[0].details["score"] < 0 else "higher score"
    print(f"  * no other method of this table has a {better} for at most as many bytes")


# --- Text and time ----------------------------------------------------------------------------


def text_rows(model: LanguageModel, length: int, windows: int) -> list[BenchRow]:
    """The loss over windows of text in which all tokens attend by draws, `length / 32` a row."""
    tokens = model.encode(reference_text())[: windows * length + 1].unfold(0, length + 1, length)
    draws = length // 32

    def loss(sampler: str | None) -> tuple[float, float]:
        """Nats a token, and seconds."""
        start, total = time.perf_counter(), 0.0

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if sampler is None:
                return causal_sdpa(layer, q, k, v)
            g = torch.Generator().manual_seed(layer)
            options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "generator": g}
            return sampled_attention(q, k, v, sampler=sampler, num_samples=draws, **options).output

        for window in tqdm(tokens, desc=f"loss, {sampler or 'exact'}", leave=False):
            with torch.no_grad():
                logits = model(window[None, :-1], attend)[0]
            total += F.cross_entropy(logits, window[1:]).item() / len(tokens)
        return total, (time.perf_counter() - start) / len(tokens)

    case = f"loss on {windows} × {length:,} tokens of text, all drawn, {draws} draws"
    exact, exact_seconds = loss(None)
    rows = [BenchRow(case, "exact", exact_seconds, "exact", 1.0, 0.0, "pass", details={"loss": exact})]
    for sampler in ("monte-carlo", "systematic", "head-tail"):
        nats, seconds = loss(sampler)
        error = nats / exact - 1
        passed = sampler != "head-tail" or length < LENGTH_OF_ALLOWED_LOSS or error <= ALLOWED_LOSS
        check = "pass" if passed else f"loses {error:.2%}, more than {ALLOWED_LOSS:.1%}"
        ratio = exact_seconds / seconds if passed else None
        rows.append(BenchRow(case, sampler, seconds, "exact", ratio, error, check, details={"loss": nats}))
    print(f"\n{case}")
    for row in rows:
        print(f"  {row.method:<14}{row.details['loss']:>9.4f} nats  {row.error:>+9.3%}  {row.check}")
    return rows


ALLOWED_LOSS = 0.001
"""The share of the exact loss that head-tail may lose with n / 32 draws."""

LENGTH_OF_ALLOWED_LOSS = 2048
"""Tokens of a text from which on that holds: in shorter ones n / 32 draws are too few."""

SPEED_METHODS: dict[str, dict[str, Any]] = {
    "exact": {"name": "exact"},
    "cache, low-rank 16": {"name": "sampled", "proposal": "low-rank", "rank": 16, "budget": 128},
    "cache, int4": {"name": "sampled", "proposal": "int4", "budget": 128},
    "cache, mixed": {"name": "sampled", "proposal": "mixed", "budget": 128},
}
TURNS = 7


def speed_rows(model: LanguageModel, cases: Sequence[tuple[int, int]]) -> list[BenchRow]:
    """The time of one token of the whole model after prompts of each (length, batch)."""
    rows = []
    for length, batch in cases:
        text = model.encode(reference_text())
        tokens = text.repeat(1 + length // len(text))[: length - TURNS - 1]
        prefill = Prefill.of(model, tokens[None]).repeated(batch)
        states = {name: Decoding.after(prefill, make_policy(**x)) for name, x in SPEED_METHODS.items()}
        del prefill
        logits: dict[str, Tensor] = {}
        seconds: dict[str, list[float]] = {name: [] for name in states}
        for turn in range(TURNS + 1):
            token = text[turn].expand(batch)
            for name, state in states.items():
                start = time.perf_counter()
                step = state.step(token)
                if turn:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
                else:
                    logits[name] = step
        rows += _speed_rows(f"one token after {length:,} tokens, batch {batch}", logits, seconds)
    return rows


def _speed_rows(case: str, logits: dict[str, Tensor], seconds: dict[str, list[float]]) -> list[BenchRow]:
    exact = logits["exact"]
    rows = []
    print(f"\n{case}")
    for name in logits:
        timing = Timing.of(seconds[name])
        error = float((logits[name] - exact).norm() / exact.norm())
        passed = error <= ALLOWED_LOGITS
        check = "pass" if passed else f"error {error:.2g} is above {ALLOWED_LOGITS}"
        ratio = Timing.of(seconds["exact"]).median / timing.median if passed else None
        rows.append(
            BenchRow(case, name, timing.median, "exact", ratio, error, check, timing.low, timing.high)
        )
        print(
            f"  {name:<20}{1e3 * timing.median:>8.1f} ms ({1e3 * timing.low:.1f}–{1e3 * timing.high:.1f})"
            f"{shown(ratio):>8} × exact, error of logits {error:.2g}"
        )
    return rows


ALLOWED_LOGITS = 0.1
"""The relative error of the logits above which a time does not count."""


# --- In parts ---------------------------------------------------------------------------------


@click.command()
@click.option(
    "--outcomes", type=click.Path(path_type=Path), required=True, help="File of outcomes, a line each."
)
@click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="File for the rows of all of them."
)
@click.option("--only", multiple=True, metavar="TASK", help="Task to measure [default: all].")
@click.option("--quick", is_flag=True, help="Measure fewer and shorter prompts.")
def main(outcomes: Path, json_path: Path | None, only: tuple[str, ...], quick: bool) -> None:
    """Measure the tasks, writing each outcome as it comes; go on where an earlier run was stopped."""
    model = load_language_model(MODEL)
    rows = []
    for plan in QUICK_PLANS if quick else PLANS:
        if not only or plan.task in only:
            with outcomes.open("a", encoding="utf-8") as file:
                for outcome in measure(model, plan, read_outcomes(outcomes)):
                    file.write(json.dumps(asdict(outcome)) + "\n")
                    file.flush()
        known = [x for x in read_outcomes(outcomes) if (x.task, x.length) == (plan.task, plan.length)]
        if len({x.seed for x in known}) > 1:
            rows += task_rows(plan, known)
    if json_path is not None:
        facts = {**machine(), "threads": torch.get_num_threads()}
        result = {"bench": "llm", "machine": facts, "rows": [row.to_json() for row in rows]}
        write_atomic(json_path, json_bytes(result))


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes in a file; none where it is missing."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
