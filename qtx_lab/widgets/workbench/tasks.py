"""What the workbench's workers do: each task takes specs as plain parameters and gives arrays, in a process of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import sampled_attention
from ...errors import ArgumentError
from ...experiments.listing import COLUMNS
from ...experiments.notebooks import notebook_path
from ...experiments.runs import Run, runs
from ...models.reference import encode, load_reference_model, read_text, reference_text
from ...specs.base import CircuitSpec, ClusterSpec, ControlSpec, MitigationSpec, SamplerSpec, TrainSpec
from ...storage import read_tensors
from .process import Report

RESAMPLES = 100
"""Of the bootstrap behind the error bars of a fidelity."""

CHUNKS = 16
"""Parts in which the shots of a row are measured, so that the picture fills in."""


MOST_LISTED = 200
"""Runs that are listed."""

MOST_SENT = 64 << 20
"""Bytes of the inputs up to which those of all layers are sent to the picture."""


@dataclass(frozen=True)
class Inputs:
    """What attention is computed from.

    Parameters
    ----------
    layers : tuple of (q, k, v)
        Of each layer: q (H, L, E), k (Hkv, n, E), v (Hkv, n, Ev).
    tokens : tuple of str
        What stands at each key; empty where unknown.
    is_causal : bool
    """

    layers: tuple[tuple[Tensor, Tensor, Tensor], ...]
    tokens: tuple[str, ...]
    is_causal: bool


@lru_cache(maxsize=2)
def load_inputs(model: str, text: str, num_tokens: int) -> Inputs:
    """The attention inputs of a text: "reference", a folder of a Hugging Face model, or a file of tensors q, k and v."""
    path = Path(model)
    if path.suffix == ".safetensors":
        return _from_tensors(path)
    words = reference_text() if text == "reference" else read_text(text)
    if model == "reference":
        tokens = encode(words)[:num_tokens]
        found = load_reference_model().attention_inputs(tokens[None])
        names = tuple(bytes([int(t)]).decode("latin-1") for t in tokens)
        return Inputs(tuple((q[0], k[0], v[0]) for q, k, v in found), names, True)
    if not (path / "config.json").is_file():
        raise ArgumentError(
            f"model={model!r} is not allowed: it must be 'reference', or the folder of a Hugging Face model."
        )
    return _from_huggingface(path, words, num_tokens)


def _from_tensors(path: Path) -> Inputs:
    try:
        tensors, about = read_tensors(path)
        layers = tuple(zip(tensors["q"], tensors["k"], tensors["v"], strict=True))
        return Inputs(layers, tuple(json.loads(about["tokens"])), json.loads(about["is_causal"]))
    except (KeyError, ValueError) as error:
        raise ArgumentError(f"model={str(path)!r} does not hold q, k and v: {error}") from error


def _from_huggingface(path: Path, words: str, num_tokens: int) -> Inputs:
    """What every attention layer of a model is given for a text, as its heads see it."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    causal: list[bool] = []

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        width = query.shape[-1]
        scale = more.get("scaling") or width**-0.5
        found.append((query[0] * (scale * width**0.5), key[0], value[0]))
        causal.append(bool(getattr(module, "is_causal", False)))
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register("qtx_recorded", record)
    AttentionMaskInterface.register("qtx_recorded", sdpa_mask)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(
        path, local_files_only=True, attn_implementation="qtx_recorded", dtype=torch.float32
    ).eval()
    ids = tokenizer(words, return_tensors="pt", truncation=True, max_length=num_tokens).input_ids
    with torch.no_grad():
        model(ids)
    if not found:
        raise ArgumentError(
            f"model={str(path)!r} has no attention that goes through transformers' interface."
        )
    return Inputs(tuple(found), tuple(tokenizer.convert_ids_to_tokens(ids[0])), causal[0])


def _head(inputs: Inputs, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one layer and, below its key head, one query head."""
    if layer >= len(inputs.layers):
        raise ArgumentError(f"layer={layer} is not allowed: there are {len(inputs.layers)}, counted from 0.")
    q, k, v = inputs.layers[layer]
    if head >= q.shape[0]:
        raise ArgumentError(f"head={head} is not allowed: there are {q.shape[0]}, counted from 0.")
    return q, k, v


def exact_weights(inputs: Inputs, layer: int, head: int) -> Tensor:
    """softmax of one head's logits, (L, n)."""
    q, k, _ = _head(inputs, layer, head)
    key = k[head * k.shape[0] // q.shape[0]]
    logits = q[head].double() @ key.double().mT / q.shape[-1] ** 0.5
    if inputs.is_causal:
        logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1)


def _exact_output(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=is_causal, enable_gqa=q.shape[0] != k.shape[0]
    )[0]


def sample(
    report: Report,
    source: Mapping[str, Any],
    layer: int,
    head: int,
    seed: int,
    sampler: Mapping[str, Any],
    control: Mapping[str, Any],
) -> dict[str, Any]:
    """Draw one layer's attention, and say how wrong a head is; with the inputs, for a picture of them.

    Returns
    -------
    dict
        `q`, `k`, `v` (layers, heads, positions, features), float32: of all layers, or of this one where those are large;
        `layers`, the numbers of those; `tokens`, `is_causal`; `error` and `std_error` of the head's output, relative to
        it, the latter None where unknown; `plain_error` without the controls; `draws` of the head; `fallbacks`; `seconds`.
    """
    report(0.05, "loading the model and text")
    inputs = load_inputs(**source)
    settings = SamplerSpec(**sampler).arguments()
    controls = ControlSpec(**control).build()
    q, k, v = _head(inputs, layer, head)
    report(0.5, f"drawing layer {layer}")
    truth = _exact_output(q, k, v, inputs.is_causal)[head].double()
    errors = []
    seconds = 0.0
    for corrected in [None, controls] if controls else [None]:
        started = time.perf_counter()
        estimate = sampled_attention(
            q, k, v, is_causal=inputs.is_causal, enable_gqa=q.shape[0] != k.shape[0],
            generator=torch.Generator().manual_seed(seed), control_variate=corrected, **settings,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        errors.append(float((estimate.output[head] - truth).norm() / truth.norm()))
    told = estimate.std_error
    spent = estimate.diagnostics["draws_per_row"]
    layers = range(len(inputs.layers)) if _size(inputs) <= MOST_SENT else [layer]
    stacked = [torch.stack([inputs.layers[i][part] for i in layers]).float().numpy() for part in range(3)]
    return {
        **dict(zip("qkv", stacked, strict=True)),
        "layers": list(layers),
        "tokens": list(inputs.tokens),
        "is_causal": inputs.is_causal,
        "error": errors[-1],
        "plain_error": errors[0],
        "std_error": None if told is None else float(told[head].double().norm() / truth.norm()),
        "draws": int(spent[head].sum()) if isinstance(spent, Tensor) else int(spent) * q.shape[1],
        "fallbacks": list(estimate.diagnostics["fallbacks"]),
        "seconds": seconds,
    }


def _size(inputs: Inputs) -> int:
    return sum(x.numel() * 4 for layer in inputs.layers for x in layer)


def measure(
    report: Report,
    source: Mapping[str, Any],
    layer: int,
    head: int,
    seed: int,
    rows: list[int],
    circuit: Mapping[str, Any],
    mitigation: Mapping[str, Any] | None = None,
    run_dir: str | None = None,
) -> dict[str, Any]:
    """Measure rows of a head's attention by circuits, part by part; `report.send` passes on the counts so far.

    Returns
    -------
    dict
        `rows` (R,), `p` (R, n) exact, `counts`, `classical` (R, n) of as many pseudo-random draws, `estimate` and `std_error`
        (R, n) where mitigated, `shots` so far, total variation from p of each row `error`, `classical_error` and
        `raw_error`; the Hellinger `fidelity` of each row with its `error`, and that of the `classical` draws, after each part, as
        `curve`; `facts` of the circuit and the device; `discarded` shots (R,); `fallbacks`.
    """
    from ...backends import CircuitSampler
    from ...circuits.fidelity import hellinger_fidelity
    from ...circuits.resources import resources

    report(0.01, "loading the model and text")
    inputs = load_inputs(**source)
    spec = CircuitSpec(**circuit)
    p, n = _rows(inputs, layer, head, rows)
    report(0.03, "transpiling the circuit")
    options = {"run_dir": run_dir} if spec.provider == "ibm" else {}
    backend = spec.build(**options)
    mitigate: Any = None if mitigation is None else MitigationSpec(**mitigation).build(num_keys=n)
    circuit_sampler = CircuitSampler(backend, mitigation=mitigate, hybrid_mode=spec.policy())
    transpiled = backend.transpiled(n)
    needs = resources(transpiled)
    facts = {
        "device": backend.engine.name,
        "loader": backend.loader.name,
        "keys": n,
        "qubits": needs.qubits,
        "depth": needs.depth,
        "two_qubit_gates": needs.two_qubit_gates,
        "mitigation": getattr(mitigate, "name", None),
    }
    result: dict[str, Any] = {
        "rows": np.array(rows),
        "p": p.numpy(),
        "shots": 0,
        "facts": facts,
        "curve": [],
    }
    parts = _parts(spec.shots, 1 if mitigate is not None or spec.provider == "ibm" else CHUNKS)
    generator = torch.Generator().manual_seed(seed)
    counts = classical = torch.zeros(p.shape, dtype=torch.int64)
    discarded = torch.zeros(len(p), dtype=torch.int64)
    fallbacks: dict[str, None] = {}
    for done, shots in enumerate(parts):
        report(0.1 + 0.9 * done / len(parts), f"{sum(parts[:done]):,} of {spec.shots:,} shots a row")
        measured = circuit_sampler.measure(p, shots, generator=generator)
        counts = counts + measured.counts
        classical = classical + (measured.classical.counts if measured.classical is not None else 0)
        discarded = discarded + measured.discarded
        fallbacks |= dict.fromkeys(measured.diagnostics.get("fallbacks", ()))
        facts |= {
            name: measured.diagnostics[name]
            for name in (
                "calibration",
                "noise",
                "not_modelled",
                "classical_rows",
                "shots_by_level",
            )
            if name in measured.diagnostics
        }
        result |= {
            "shots": sum(parts[: done + 1]),
            "discarded": discarded.numpy(),
            "counts": counts.numpy(),
            "classical": classical.numpy(),
            "estimate": None if measured.estimate is None else measured.estimate.numpy(),
            "std_error": None if measured.std_error is None else measured.std_error.numpy(),
            "fallbacks": list(fallbacks),
            "classical_error": _variation(_shares(classical), p),
            "raw_error": _variation(_shares(counts), p),
        }
        result["error"] = (
            result["raw_error"] if measured.estimate is None else _variation(measured.estimate, p)
        )
        facts = result["facts"] = {k: _plain(v) for k, v in facts.items()}
        found, baseline = (
            hellinger_fidelity(x, p, resamples=RESAMPLES, generator=torch.Generator().manual_seed(seed))
            for x in (counts, classical)
        )
        point = {"fidelity": found.value, "error": found.std_error, "classical": baseline.value}
        result["curve"] = [
            *result["curve"],
            {"shots": result["shots"], **{name: torch.as_tensor(x).tolist() for name, x in point.items()}},
        ]
        report.send(result)
    return result


def _rows(inputs: Inputs, layer: int, head: int, rows: list[int]) -> tuple[Tensor, int]:
    """Some rows of a head's attention, (R, n), cut to the keys that any of them sees."""
    p = exact_weights(inputs, layer, head)
    bad = [row for row in rows if not 0 <= row < len(p)]
    if bad or not rows:
        raise ArgumentError(f"rows={rows} is not allowed: it must be some of 0 to {len(p) - 1}.")
    p = p[rows]
    n = int(p.sum(0).nonzero().amax()) + 1
    return p[:, :n], n


def _parts(shots: int, most: int) -> list[int]:
    each, more = divmod(shots, min(most, shots))
    return [each + (i < more) for i in range(min(most, shots))]


def _shares(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp_min(1).double()


def _variation(found: Tensor, p: Tensor) -> list[float]:
    """Total variation of each row."""
    return (0.5 * (found - p).abs().sum(-1)).tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def submit(report: Report, home: str, **arguments: Any) -> dict[str, Any]:
    """Measure rows in a run of their own, as `measure`; a job on IBM's devices is written down there before it is sent."""
    with Run.create(CircuitSpec(**arguments["circuit"]), "hardware", home) as run:
        result = measure(report, run_dir=str(run.path), **arguments)
        run.log_many(
            {"row": int(row), "shots": result["shots"], "error": a, "raw_error": b, "classical_error": c}
            for row, a, b, c in zip(
                result["rows"], result["error"], result["raw_error"], result["classical_error"], strict=True
            )
        )
        run.update(results={"facts": result["facts"], "discarded": int(result["discarded"].sum())})
    return {**result, "run": run.path.name}


def list_runs(report: Report, home: str) -> dict[str, Any]:
    """The newest runs of a folder."""
    table = runs(home)
    shown = table.head(MOST_LISTED)[["run", "name", "status", "started", "seconds"]].copy()
    shown["started"] = shown["started"].dt.strftime("%Y-%m-%d %H:%M:%S")
    shown["seconds"] = [f"{seconds:.1f}" if seconds == seconds else "" for seconds in shown["seconds"]]
    return {"runs": shown.to_dict("records"), "all": len(table), "home": home}


def train(
    report: Report,
    home: str,
    training: Mapping[str, Any],
    cluster: Mapping[str, Any],
    distributed: bool,
) -> dict[str, Any]:
    """Train in a run of its own; `report.send` passes on the rows of metrics as they come.

    Returns
    -------
    dict
        `rows`, a list of the metrics of each step; `run`; `notes` and `faults` of the trainer; `seconds`.
    """
    spec = TrainSpec(**training)
    rows: list[dict[str, Any]] = []

    with Run.create(spec, "train", home) as run, ExitStack() as stack:
        report(0.01, "preparing")

        def take(new: list[dict[str, Any]]) -> None:
            rows.extend(new)
            run.log_many(new)
            report.send({"rows": new, "run": run.path.name})
            report(new[-1]["step"] / spec.steps, f"step {new[-1]['step']} of {spec.steps}")

        workers = stack.enter_context(ClusterSpec(**cluster).build()) if distributed else None
        trainer = spec.build(
            on_metrics=take,
            progress=False,
            folder=run.path / "checkpoints",
            distributed=distributed,
            cluster=workers,
        )
        result = trainer.train()
        run.update(results={"loss": result.loss, "ranks": result.ranks, "notes": result.notes})
    return {
        "rows": rows,
        "run": run.path.name,
        "notes": list(result.notes),
        "faults": list(result.faults),
        "seconds": result.seconds,
    }


def sweep(
    report: Report,
    home: str,
    plan: Mapping[str, Any],
    cluster: Mapping[str, Any],
) -> dict[str, Any]:
    """Run a notebook for every combination of values, each a run.

    Returns
    -------
    dict
        `run` of the sweep, its `status`, `columns` and `rows` of its table, those that differ, and its figures as PNG, `light` and `dark`,
        uint8, where it has one.
    """
    from ...experiments.sweeps import plan as planned
    from ...experiments.sweeps import sweep as run_sweep

    given = {name: plan[name] for name in ("parameters", "repeats", "seed")}
    _, cells = planned(notebook_path(plan["notebook"]), plan["grid"], **given)
    started, over = pd.Timestamp.now("UTC"), threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            table = runs(home)
            ours = table[table["sweep"].notna() & (table["started"] >= started)]
            done = int(ours["status"].isin(["done", "failed"]).sum())
            report(done / len(cells), f"{done} of {len(cells)} notebooks")

    report(0.0, f"starting the workers for {len(cells)} notebooks")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run = run_sweep(
            plan["notebook"], plan["grid"], **given, cluster=ClusterSpec(**cluster), home=home, progress=False
        )
    finally:
        over.set()
        watcher.join()
    table = run.metrics()
    known = ("run", "status", "seconds")
    plain = [name for name in table.columns if name not in (*known, *COLUMNS)]
    table = table[[*known, *(name for name in plain if table[name].astype(str).nunique() > 1)]]
    result: dict[str, Any] = {
        "run": run.path.name,
        "status": run.status,
        "columns": list(table.columns),
        "rows": json.loads(table.head(MOST_LISTED).to_json(orient="values")),
    }
    for figure in run.figures()[:1]:
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            content = (run.path / "figures" / f"{figure['name']}{suffix}.png").read_bytes()
            result[theme] = np.frombuffer(content, np.uint8)
        result["caption"] = str(figure["caption"])
    return result
