"""`qtx-lab bench tasks`: how well exact attention does at the tasks, which says what these can measure."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

from tqdm.auto import tqdm

from ..cache.policies import ExactPolicy
from ..models.base import LanguageModel
from ..models.generation import Decoding, Prefill
from ..models.language_model import load_language_model
from ..models.tasks import TASKS, make_task
from ..models.tasks.scoring import score_prompt
from ..models.tasks.statistics import MeanInterval, mean_interval
from .base import BenchRow

MODEL = "smollm2-135m"
PROMPTS = {1024: 16, 2048: 12, 4096: 8}
"""Prompts of each task, by their length in tokens."""
QUICK_PROMPTS = {1024: 4}


def bench_tasks(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """What a language model finds with exact attention, by task and length.

    `seconds` is the median time of a prompt. `error` is the share of the answers that were not found; for
    long text it is the loss, nats a token. A case fails where the model never gave an answer: the task is
    beyond it. Further details:

    - `settings`: of the task; `prompts`: their number, whose seeds count from 0;
    - `found`, `found low`, `found high`: the share of the answers that the generated text holds, with its
      bootstrap interval over prompts; None for long text;
    - `nats`, `nats low`, `nats high`: the log-probability of a token of the true answer.
    """
    del copy_bandwidth
    model = load_language_model(MODEL)
    lengths = QUICK_PROMPTS if quick else PROMPTS
    cases = [(task, length, count) for length, count in lengths.items() for task in TASKS]
    print(
        f"{'task':17} {'tokens':>6} {'prompts':>7} {'answers found':>20} {'nats a token':>22} {'seconds':>8}"
    )
    return [measure(model, *case) for case in tqdm(cases, desc="tasks", leave=False)]


def measure(model: LanguageModel, task: str, length: int, count: int) -> BenchRow:
    """The row of one task at one length, which is printed, too; count >= 2."""
    scores, seconds = [], []
    for seed in range(count):
        start = time.perf_counter()
        prompt = make_task(task, model, length=length, seed=seed)
        prefill = Prefill.of(model, prompt.tokens[None])
        scores.append(score_prompt(model, prompt, partial(Decoding.after, prefill, ExactPolicy())))
        seconds.append(time.perf_counter() - start)
    nats = mean_interval([score.log_probability / score.tokens for score in scores])
    matches = [score.matched for score in scores if score.matched is not None]
    answered = mean_interval(matches, bounds=(0, 1)) if matches else None
    check = "the model gave no answer" if answered is not None and answered.mean == 0 else "pass"
    print(
        f"{task:17} {length:6} {count:7} {_shown(answered):>20} {_shown(nats):>22} {median(seconds):8.1f}"
        + ("" if check == "pass" else f"  {check}")
    )
    return BenchRow(
        case=f"{task}, {length} tokens",
        method="exact",
        seconds=median(seconds),
        baseline="exact",
        ratio=1.0 if check == "pass" else None,
        error=-nats.mean if answered is None else 1 - answered.mean,
        check=check,
        low=min(seconds),
        high=max(seconds),
        details={
            "settings": dict(prompt.settings),
            "prompts": count,
            **_details("found", answered),
            **_details("nats", nats),
        },
    )


def _details(name: str, interval: MeanInterval | None) -> dict[str, Any]:
    """The mean and the ends of an interval, by the names that rows have for them."""
    if interval is None:
        return {name: None, f"{name} low": None, f"{name} high": None}
    return {name: interval.mean, f"{name} low": interval.low, f"{name} high": interval.high}


def _shown(interval: MeanInterval | None) -> str:
    """An interval as a table has it."""
    return "" if interval is None else f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"
