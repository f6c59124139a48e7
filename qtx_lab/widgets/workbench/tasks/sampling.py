"""The task `sample`: the attention of one layer by draws, and how wrong a head of it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....attention import sampled_attention
from ....estimates import AttentionEstimate, ControlReport, Draws, EstimateInfo
from ....specs import ControlSpec, SamplerSpec, places_of
from ...views.lens_estimates import estimate_of_head
from ..process_server import TaskReport
from .inputs import load_inputs

MAX_INPUT_BYTES = 64 << 20
"""Bytes of the inputs up to which those of all layers are sent to the picture."""


def sample(
    report: TaskReport,
    source: Mapping[str, Any],
    layer: int,
    head: int,
    seed: int,
    sampler: Mapping[str, Any],
    control: Mapping[str, Any],
    drawn_heads: str | None = None,
) -> dict[str, Any]:
    """Draw one layer's attention, and say how wrong a head is; with the inputs, for a picture of them.

    Of `drawn_heads`, as `places_of` takes them, a head that is not named is exact.

    Returns
    -------
    dict
        `q`, `k`, `v` (layers, heads, positions, features), float32: of all layers, or of this one where those
        are large; `layers`, the numbers of those; `tokens`, `is_causal`; the estimate of the head, as
        `head_estimate` reads it; `error` of the head's output relative to the exact one, and `plain_error`
        without the controls; `draws` of the head; `seconds`.
    """
    report(0.05, "loading the model and text")
    inputs = load_inputs(**source)
    settings = SamplerSpec(**sampler).arguments()
    controls = ControlSpec(**control).build()
    q, k, v = inputs.layer_of(layer, head)
    if drawn_heads is not None and (layer, head) not in places_of(drawn_heads, len(inputs.layers), len(q)):
        settings, controls = {"sampler": "exact"}, None
    report(0.5, f"drawing layer {layer}")
    exact = _exact_output(q, k, v, inputs.is_causal)[head].double()
    errors = []
    seconds = 0.0
    for correction in [None, controls] if controls else [None]:
        started = time.perf_counter()
        estimate = sampled_attention(
            q, k, v, is_causal=inputs.is_causal, enable_gqa=q.shape[0] != k.shape[0],
            generator=torch.Generator().manual_seed(seed), control_variate=correction, **settings,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        errors.append(float((estimate.output[head] - exact).norm() / exact.norm()))
    draws = estimate.diagnostics["draws_per_row"]
    layers = range(len(inputs.layers)) if inputs.nbytes <= MAX_INPUT_BYTES else [layer]
    stacked = [torch.stack([inputs.layers[i][part] for i in layers]).float().numpy() for part in range(3)]
    return {
        **dict(zip("qkv", stacked, strict=True)),
        **_estimate_parts(estimate_of_head(estimate, (head,))),
        "layers": list(layers),
        "tokens": list(inputs.tokens),
        "is_causal": inputs.is_causal,
        "error": errors[-1],
        "plain_error": errors[0],
        "draws": int(draws[head].sum()) if isinstance(draws, Tensor) else int(draws) * q.shape[1],
        "seconds": seconds,
    }


def head_estimate(result: Mapping[str, Any]) -> AttentionEstimate:
    """The estimate of the head in a result of `sample`, output (L, Ev), as the worker made it."""
    draws = Draws(
        torch.from_numpy(result["draw_indices"]).long(), torch.from_numpy(result["draw_weights"]), None,
        result["info"]["replicates"],
    )  # fmt: skip
    sigma = result["std_error"]
    info, costs = dict(result["info"]), result["control_costs"]
    info["fallbacks"] = tuple(info["fallbacks"])
    if costs:
        info["control_variate"] = ControlReport({}, costs, result["exact_cost"], None, None)
    if isinstance(result["draws_per_row"], np.ndarray):
        info["draws_per_row"] = torch.from_numpy(result["draws_per_row"])
    else:
        info["draws_per_row"] = result["draws_per_row"]
    return AttentionEstimate(
        torch.from_numpy(result["output"]), result["k"].shape[-2], result["degrees_of_freedom"],
        lambda: draws, None if sigma is None else lambda: torch.from_numpy(sigma), EstimateInfo(**info),
    )  # fmt: skip


def _estimate_parts(estimate: AttentionEstimate) -> dict[str, Any]:
    """The estimate of a head as arrays and plain values; see `head_estimate`."""
    info, draws, sigma = estimate.info, estimate.draws, estimate.std_error
    per_row, control = info.draws_per_row, info.control_variate
    named = ("sampler", "unbiased", "num_samples", "replicates", "fallbacks", "tolerance", "confidence")
    stated = info.as_dict()
    return {
        "output": estimate.output.float().numpy(),
        "std_error": None if sigma is None else sigma.float().numpy(),
        "degrees_of_freedom": float(estimate.degrees_of_freedom),
        "draw_indices": draws.indices.int().numpy(),
        "draw_weights": draws.weights.numpy(),
        "draws_per_row": per_row.numpy() if isinstance(per_row, Tensor) else per_row,
        "info": {name: stated[name] for name in named if name in stated},
        "control_costs": {} if control is None else dict(control.costs),
        "exact_cost": 0.0 if control is None else control.exact_cost,
    }


def _exact_output(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=is_causal, enable_gqa=q.shape[0] != k.shape[0]
    )[0]
