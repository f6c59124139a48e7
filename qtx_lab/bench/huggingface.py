"""`python -m qtx_lab.bench.huggingface`: in which of transformers' models sampled attention works.

Every causal, masked and encoder-decoder model class of the installed transformers is made from a small
config, with attn_implementation="qtx_sampled". With `exact` layers it must give eager attention's logits, and
so it must with drawn ones, which here draw more keys than there are, so that `head-tail` leaves out none. Or
else it must be refused.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import QtxError
from ..models import huggingface
from ..storage import write_atomic
from .small_models import KINDS, MAX_PARAMETERS, config_of, model_classes

TABLE = Path(__file__).parents[1] / "models" / "assets" / "huggingface_models.md"
"""The results for the version of transformers that it names."""

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"sampler": "exact"},
    "drawn": {"sampler": "head-tail", "num_samples": 64, "seed": 0},
}
LENGTH, PADDING, NEW = 24, 5, 4
"""Tokens of a prompt, those of them that are padding in the first sequence, and those that follow it."""

ALLOWED = 1e-4
"""The largest relative error of logits."""

TABLE_SAYS = """\
Written by `python -m qtx_lab.bench.huggingface --table`, with transformers {version}: for every causal,
masked and encoder-decoder model class, made small, whether its logits are those of eager attention (to a
relative error of {allowed:.0e}), with `exact` layers and with layers that draw more keys than there are.
Tried are whole and padded sequences, sequences in parts, generation with dynamic and static caches, and
`logits_to_keep`, as far as eager attention does them. Models whose attention does not go through
transformers' attention interface draw by their softmax: see `qtx_lab.models.huggingface_softmax`.
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a model with one of the `SETTINGS`.

    Parameters
    ----------
    verdict : {"right", "wrong", "refused", "error"}
    reason : str
        Why it was refused, what went wrong, or by which means it is right.
    errors : dict
        The relative error of the logits in each case.
    """

    verdict: str
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelReport:
    """What came of one model class.

    Parameters
    ----------
    model, kind : str
        The name of the class, and a key of `KINDS`.
    outcomes : dict
        An `Outcome` for each of the `SETTINGS`; empty where transformers makes no small model of the class,
        or the model does not run on tokens alone.
    note : str
        Why there are none.
    """

    model: str
    kind: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    note: str = ""


def try_model(cls: type[PreTrainedModel], kind: str) -> ModelReport:
    """Compare a small model of a class with eager attention, in every case that eager attention can do."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in cls._from_config(config_of(cls)).parameters())
        if size > MAX_PARAMETERS:
            return ModelReport(cls.__name__, kind, note=f"{size:,} parameters")
        eager = make_model(cls, "eager")
        logits = _all_logits(eager, kind)
    # Whatever transformers raises, the class is not one to compare with.
    except Exception as error:
        return ModelReport(cls.__name__, kind, note=_first_line(error))
    outcomes = {name: _compare(cls, kind, settings, eager, logits) for name, settings in SETTINGS.items()}
    return ModelReport(cls.__name__, kind, outcomes)


def _all_logits(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """The logits in each case that the model can do, the first of which it must."""
    by_case = {}
    for name, case in cases(model, kind).items():
        try:
            with torch.no_grad():
                logits = case()
            if bool(logits.isfinite().all()):
                by_case[name] = logits
        except Exception:
            if not by_case:
                raise
    return by_case


def _compare(
    cls: type[PreTrainedModel],
    kind: str,
    settings: dict[str, Any],
    eager: PreTrainedModel,
    expected: dict[str, Tensor],
) -> Outcome:
    errors = {}
    try:
        model = make_model(cls, huggingface.IMPLEMENTATION, settings)
        model.load_state_dict(eager.state_dict())
        run = cases(model, kind)
        for name, logits in expected.items():
            with torch.no_grad():
                given = run[name]()
            errors[name] = _relative_error(given, logits)
    except QtxError as error:
        return Outcome("refused", str(error), errors)
    except Exception as error:
        return Outcome("error", _first_line(error), errors)
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= ALLOWED]
    if wrong:
        return Outcome("wrong", ", ".join(wrong), errors)
    samplers = set(huggingface.samplers_of(model).values())
    if settings["sampler"] != "exact" and settings["sampler"] not in samplers:
        return Outcome("wrong", "no layer drew", errors)
    own = settings["sampler"] != "exact" and model.config._attn_implementation == "eager"
    return Outcome("right", "by its softmax" if own else "", errors)


def _relative_error(given: Tensor, expected: Tensor) -> float:
    if given.shape != expected.shape:
        return torch.inf
    return ((given - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def cases(model: PreTrainedModel, kind: str) -> dict[str, Any]:
    """What a model is asked: for each case a function that gives logits."""
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 60, (2, LENGTH), generator=g)
    mask = torch.ones_like(tokens)
    generator: Any = model
    is_decoder = kind == "causal" or not model.config.is_encoder_decoder
    if kind == "masked":
        mask[0, -PADDING:] = 0
        return {
            "plain": lambda: model(tokens).logits,
            "padded": lambda: model(tokens, attention_mask=mask).logits[mask.bool()],
        }

    def generate(cache: str) -> Tensor:
        options: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "output_logits": True,
        }
        options |= {"cache_implementation": cache, "return_dict_in_generate": True, "pad_token_id": 0}
        if not is_decoder:
            options["decoder_start_token_id"] = 2
        return torch.stack(generator.generate(tokens, attention_mask=mask, **options).logits)

    generations = {f"{cache} cache": lambda cache=cache: generate(cache) for cache in ("dynamic", "static")}
    if not is_decoder:
        mask[0, -PADDING:] = 0
        targets = {"decoder_input_ids": torch.randint(3, 60, (2, LENGTH - 5), generator=g)}
        return {
            "plain": lambda: model(tokens, **targets).logits,
            "padded": lambda: model(tokens, attention_mask=mask, **targets).logits,
            **generations,
        }
    mask[0, :PADDING] = 0

    def in_parts() -> Tensor:
        first = model(tokens[:, :-NEW], use_cache=True)
        second = model(tokens[:, -NEW : 1 - NEW], past_key_values=first.past_key_values, use_cache=True)
        third = model(tokens[:, 1 - NEW :], past_key_values=second.past_key_values, use_cache=True)
        return torch.cat((second.logits, third.logits), 1)

    calls = {
        "plain": lambda: model(tokens, use_cache=False).logits,
        "padded": lambda: model(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()],
        "in parts": in_parts,
        **generations,
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        calls["logits_to_keep"] = lambda: model(tokens, logits_to_keep=NEW, use_cache=False).logits
    return calls


def make_model(cls: type[PreTrainedModel], attention: str, settings: Any = None) -> PreTrainedModel:
    """A small model of a class, with the settings wherever its configs have a place for them.

    Its weights are so large that its attention is far from uniform, and the same for each `attention`.
    """
    config = config_of(cls)
    if settings is not None:
        for part in _configs(config):
            part.qtx_sampled = settings
    torch.manual_seed(0)
    return _liven(cls._from_config(config, attn_implementation=attention).eval())


def _configs(config: Any) -> Iterator[Any]:
    """A config and its parts, those that attention layers read."""
    parts = [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    if huggingface.has_own_layers(config):
        yield config
    for part in parts:
        yield from _configs(part)


def _liven(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights so large that its attention is far from uniform."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=g) * min(1.0, 1.5 / p.shape[-1] ** 0.5))
            elif "sink" in name:
                p.copy_(torch.randn(p.shape, generator=g) + 1)
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:200]


def count_verdicts(reports: Sequence[ModelReport]) -> dict[str, Counter[str]]:
    """How many models came to which verdict: for each kind, by "exact right", "drawn refused", …"""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for report in reports:
        for name, outcome in report.outcomes.items():
            counts[report.kind][f"{name} {outcome.verdict}"] += 1
        if not report.outcomes:
            counts[report.kind]["not made"] += 1
    return counts


def as_table(reports: Sequence[ModelReport]) -> str:
    """Reports as Markdown."""
    lines = [
        "# Hugging Face models with sampled attention",
        "",
        *TABLE_SAYS.format(version=transformers.__version__, allowed=ALLOWED).splitlines(),
        "",
    ]
    for kind, counts in count_verdicts(reports).items():
        rows = sorted((r for r in reports if r.kind == kind), key=lambda r: r.model)
        compared = [r for r in rows if r.outcomes]
        verdicts = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        lines += [f"## {kind}: {len(rows)} classes", "", f"{verdicts}.", ""]
        lines += ["| model | exact | drawn |", "|---|---|---|"]
        lines += [
            f"| {r.model} | {_cell(r.outcomes['exact'])} | {_cell(r.outcomes['drawn'])} |" for r in compared
        ]
        others = [f"- {r.model}: {r.note}" for r in rows if not r.outcomes]
        if others:
            lines += ["", "Not made small, or not run on tokens alone, by transformers:", "", *others]
        lines.append("")
    return "\n".join(lines)


def _cell(outcome: Outcome) -> str:
    verdict = "yes" if outcome.verdict == "right" else outcome.verdict
    return f"{verdict}: {outcome.reason.replace('|', '/')}" if outcome.reason else verdict


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1)
@click.option("--table", is_flag=True, help=f"Write {TABLE.name}, for all classes.")
def main(names: tuple[str, ...], table: bool) -> None:
    """Try transformers' model classes, or those with some NAMES, and print what came of them."""
    transformers.logging.set_verbosity_error()
    huggingface.register()
    classes = [(cls, kind) for kind in KINDS for cls in model_classes(kind)]
    chosen = [(cls, kind) for cls, kind in classes if not names or cls.__name__ in names]
    reports = []
    for cls, kind in tqdm(chosen, unit="model"):
        reports.append(try_model(cls, kind))
        for name, outcome in reports[-1].outcomes.items():
            if outcome.verdict != "right" or names:
                tqdm.write(
                    f"{kind} {cls.__name__} {name}: {_cell(outcome)} {outcome.errors if names else ''}"
                )
        if not reports[-1].outcomes:
            tqdm.write(f"{kind} {cls.__name__}: {reports[-1].note}")
    for kind, counts in count_verdicts(reports).items():
        print(kind, dict(sorted(counts.items())))
    if table:
        write_atomic(TABLE, as_table(reports).encode())


if __name__ == "__main__":
    main()
