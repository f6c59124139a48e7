"""The task `sample`: the attention of one layer by draws, and how wrong a head of it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....attention import sampled_attention
from ....specs import ControlSpec, SamplerSpec
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
) -> dict[str, Any]:
    """Draw one layer's attention, and say how wrong a head is; with the inputs, for a picture of them.

    Returns
    -------
    dict
        `q`, `k`, `v` (layers, heads, positions, features), float32: of all layers, or of this one where those
        are large; `layers`, the numbers of those; `tokens`, `is_causal`; `error` and `std_error` of the
        head's output, relative to it, the latter None where unknown; `plain_error` without the controls;
        `draws` of the head; `fallbacks`; `seconds`.
    """
    report(0.05, "loading the model and text")
    inputs = load_inputs(**source)
    settings = SamplerSpec(**sampler).arguments()
    controls = ControlSpec(**control).build()
    q, k, v = inputs.layer_of(layer, head)
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
    std_error = estimate.std_error
    draws = estimate.diagnostics["draws_per_row"]
    layers = range(len(inputs.layers)) if inputs.nbytes <= MAX_INPUT_BYTES else [layer]
    stacked = [torch.stack([inputs.layers[i][part] for i in layers]).float().numpy() for part in range(3)]
    return {
        **dict(zip("qkv", stacked, strict=True)),
        "layers": list(layers),
        "tokens": list(inputs.tokens),
        "is_causal": inputs.is_causal,
        "error": errors[-1],
        "plain_error": errors[0],
        "std_error": None if std_error is None else float(std_error[head].double().norm() / exact.norm()),
        "draws": int(draws[head].sum()) if isinstance(draws, Tensor) else int(draws) * q.shape[1],
        "fallbacks": list(estimate.diagnostics["fallbacks"]),
        "seconds": seconds,
    }


def _exact_output(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=is_causal, enable_gqa=q.shape[0] != k.shape[0]
    )[0]
