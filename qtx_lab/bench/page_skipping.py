"""`python -m qtx_lab.bench.page_skipping [MODEL]`: what leaving pages of a sketch unread would save and cost.

A scan in two levels reads a little of every page first, and the sketch of those pages alone that may matter.
This computes, for the rows of a real model, the error of draws where some pages stay unread, in plain torch;
no kernel does it. Bytes are counted, no time is measured.

The keys of an unread page are drawn as if each had the page's mean mass, which its mean component and its
spread tell: so every key keeps a known probability, the estimate its weights and error bars, and nothing that
was not looked at is left out. The first page, which has the sink of many models, and the newest two are
always read. Pages are runs of tokens in the order of arrival: in the order of their values, in which
`SampledKVCache` keeps them, a page has keys of all kinds, and its bounds tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from ..kernels.sketch_decode.oracle import draw, inclusion, weigh
from ..models.language_model import load_language_model
from ..models.text import reference_text

PAGE = 64
SHARES = (1.0, 0.5, 0.25, 0.125)
RANK, DRAWS, SEEDS, QUERIES = 16, 128, 4, 8
MASS_BYTES = 2 + 4 / 8
"""Bytes that a scan writes for a key that it reads: its mass, and that of eight."""


@dataclass(frozen=True)
class SkippedPages:
    """The error of draws where a share of the pages is read.

    Parameters
    ----------
    share : float
        Of the pages.
    error : float
        The root mean square over rows of the error, relative to the exact output.
    bytes_per_key : float
        What the scan reads and writes, over all keys: the bounds of all pages, and the sketch of those read.
    """

    share: float
    error: float
    bytes_per_key: float


def bytes_per_key(share: float, rank: int = RANK) -> float:
    """What a scan reads and writes of a key in the mean, components of a byte each.

    A page's bounds are the least and the largest of each component; with all pages read none are needed.

    Examples
    --------
    >>> bytes_per_key(1.0), bytes_per_key(0.25)
    (18.5, 5.125)
    """
    return share * (rank + MASS_BYTES) + (0 if share == 1 else 2 * rank / PAGE)


def errors_of_shares(q: Tensor, k: Tensor, v: Tensor, draws: int = DRAWS) -> list[SkippedPages]:
    """The errors of the last queries of a key head, at each share of the pages.

    Parameters
    ----------
    q : Tensor, (G, n, E)
        The queries of the group at all positions; the last ones attend, the others say which components
        matter.
    k, v : Tensor, (n, E) and (n, Ev)
        n a multiple of `PAGE`.
    draws : int
        S, the draws of a row.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = 1 / math.sqrt(k.shape[-1])
    rows = q[:, -4 * QUERIES :: 4].flatten(0, 1)
    component, mine = components(q[:, : -4 * QUERIES].flatten(0, 1), k, rows)
    logits, guessed = rows @ k.mT * scale, mine @ component.mT * scale
    pages = component.unflatten(0, (-1, PAGE))
    variance = mine.square() @ pages.var(1).mT * scale**2
    mean = mine @ pages.mean(1).mT * scale + variance / 2  # of a page's masses, in logarithms
    bound = (mine.clamp_min(0) @ pages.amax(1).mT + mine.clamp_max(0) @ pages.amin(1).mT) * scale
    bound[:, 0] = bound[:, -2:] = math.inf
    exact = logits.softmax(-1) @ v
    skipped = []
    for share in SHARES:
        most = max(3, round(share * len(pages)))
        read = torch.zeros_like(bound, dtype=torch.bool).scatter_(1, bound.topk(most).indices, True)
        by_page = read.repeat_interleave(PAGE, 1)
        proposal = torch.where(by_page, guessed, mean.repeat_interleave(PAGE, 1))
        pi = inclusion(proposal[:, None], draws, 0.02)
        squares = torch.stack([squared_errors(logits, pi, v, exact, seed) for seed in range(SEEDS)])
        skipped.append(SkippedPages(share, float(squares.mean().sqrt()), bytes_per_key(share)))
    return skipped


def components(earlier: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The components of keys (n, RANK) that matter most to earlier queries (M, E), and those of rows."""
    moment = earlier.mT @ earlier / len(earlier)
    ridge = 1e-6 * moment.trace() / len(moment) * torch.eye(len(moment), dtype=moment.dtype)
    root = torch.linalg.cholesky(moment + ridge)
    weighed = (k - k.mean(0)) @ root
    axes = torch.linalg.svd(weighed, full_matrices=False).Vh[:RANK].mT
    return weighed @ axes, torch.linalg.solve(root, rows.mT).mT @ axes


def squared_errors(logits: Tensor, pi: Tensor, v: Tensor, exact: Tensor, seed: int) -> Tensor:
    """The squared error of one estimate of each row, over the square of the exact output."""
    offsets = torch.rand(len(pi), generator=torch.Generator().manual_seed(seed), dtype=pi.dtype)
    errors = []
    for row, indices in enumerate(draw(pi, offsets)):
        keys = indices.unique()
        output, _ = weigh(logits[row, keys], pi[row, keys], v[keys])
        errors.append((output - exact[row]).square().sum() / exact[row].square().sum())
    return torch.stack(errors)


def rows_of_model(name: str, num_tokens: int) -> Iterator[tuple[int, list[SkippedPages]]]:
    """The errors of the key heads of every sixth layer of a model, over the held-out text."""
    model = load_language_model(name)
    tokens = model.encode(reference_text())[:num_tokens]
    tokens = tokens[: len(tokens) // PAGE * PAGE]
    for layer, (q, k, v) in enumerate(model.attention_inputs(tokens[None])):
        if layer % 6 == 2:
            group = q.shape[1] // k.shape[1]
            for head in range(k.shape[1]):
                heads = slice(group * head, group * (head + 1))
                yield layer, errors_of_shares(q[0, heads], k[0, head], v[0, head])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", default="reference")
@click.option("--tokens", default=1024, show_default=True, help="Tokens of the held-out text.")
def main(model: str, tokens: int) -> None:
    """Errors and bytes of a scan that leaves pages unread."""
    layers: dict[int, list[list[SkippedPages]]] = {}
    for layer, of_head in rows_of_model(model, tokens):
        layers.setdefault(layer, []).append(of_head)
    click.echo(f"{model}, {tokens:,} tokens, rank {RANK}, S = {DRAWS}: error over that with all pages read")
    for layer, heads in layers.items():
        errors = torch.tensor([[x.error for x in of_head] for of_head in heads]).square().mean(0).sqrt()
        shares = ", ".join(f"{s:.1%}: {e:.2f} ×" for s, e in zip(SHARES, errors / errors[0], strict=True))
        click.echo(f"  layer {layer}: error {float(errors[0]):.3f}; {shares}")
    saved = ", ".join(f"{s:.1%}: {bytes_per_key(s):.1f}" for s in SHARES)
    click.echo(f"  bytes a key of the scan: {saved}")


if __name__ == "__main__":
    main()
