"""A cache on disk: one safetensors file with its tokens, its order and its sketch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..samplers.value_order import ValueOrder
from ..storage import read_tensors, write_tensors
from .sketches import ComponentSketch, QueryMoment, make_sketch
from .store import TokenStore

METADATA_KEY = "sampled_kv_cache"
"""Under which the file's metadata holds what is not a tensor, as JSON."""


@dataclass(frozen=True)
class CacheParts:
    """What a `SampledKVCache` is made of.

    Parameters
    ----------
    lead : torch.Size
        The leading dimensions of keys and values, the last of them the key heads.
    store : TokenStore
    sketch : ComponentSketch, optional
        None: keys are proposed by their exact logits.
    queries : QueryMoment
        The queries seen.
    defensive : float
        epsilon, the weight of the proposal's uniform part.
    """

    lead: torch.Size
    store: TokenStore
    sketch: ComponentSketch | None
    queries: QueryMoment
    defensive: float


def write_cache(path: str | Path, parts: CacheParts) -> None:
    """Write a cache without its room to grow.

    Raises
    ------
    StorageError
        If the file cannot be written.
    """
    store, sketch, queries = parts.store, parts.sketch, parts.queries
    queries.sum_up()
    n = store.length
    tensors = {
        "table": store.table[:, :n],
        "order": store.order[:, :n],
        "order_keys": store.order_keys[:, :n],
        "value_sums": store.value_sums,
        "queries": queries.total,
    }
    if store.value_order is not None:
        tensors |= {"value_centre": store.value_order.centre, "value_axes": store.value_order.axes}
    about: dict[str, Any] = {
        "lead": list(parts.lead),
        "features": store.features,
        "sorted_length": store.sorted_length,
        "queries_seen": queries.count,
        "defensive": parts.defensive,
        "proposal": "exact",
    }
    if sketch is not None:
        tensors |= {name: vars(sketch)[name] for name in sketch.saved_tensors} | {"lines": sketch.lines}
        about |= {"proposal": sketch.proposal, "rank": sketch.rank, "fitted_length": sketch.fitted_length}
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(about)})


def read_cache(path: str | Path) -> CacheParts:
    """The cache that `write_cache` wrote, on the CPU.

    Raises
    ------
    ArgumentError
        If the file is missing or holds something else.
    """
    try:
        tensors, metadata = read_tensors(path)
        return _parts(tensors, json.loads(metadata[METADATA_KEY]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"path={str(path)!r} does not hold a cache: {error}") from error


def _parts(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> CacheParts:
    table = tensors["table"]
    store = TokenStore(
        table,
        about["features"],
        tensors["order"],
        tensors["order_keys"],
        tensors["value_sums"],
        length=table.shape[1],
        sorted_length=about["sorted_length"],
    )
    if "value_axes" in tensors:
        store.value_order = ValueOrder(tensors["value_centre"], tensors["value_axes"])
    queries = QueryMoment(table.shape[0], about["features"], table.device)
    queries.total, queries.count = tensors["queries"], about["queries_seen"]
    sketch = None
    if about["proposal"] != "exact":
        rank = None if about["proposal"] in ("int4", "int8") else about["rank"]
        sketch = make_sketch(about["proposal"], rank, store.features)
        assert sketch is not None
        sketch.restore(
            {name: tensors[name] for name in sketch.saved_tensors}, tensors["lines"], about["fitted_length"]
        )
    return CacheParts(torch.Size(about["lead"]), store, sketch, queries, about["defensive"])
