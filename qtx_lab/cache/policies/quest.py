"""`QuestPolicy`: pages of keys, chosen by bounds on their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_count
from ...errors import ArgumentError
from .base import HALF_BYTES, CachePolicy, LayerCache, LayerPrompt
from .chosen_keys import ChosenKeysCache, DecodeStep, KeyChoice, KeyChooser
from .guessed_keys import GuessedKeys, Guesses


@dataclass(frozen=True, kw_only=True)
class QuestPolicy(CachePolicy):
    """Reads the pages of keys whose bound on a logit is largest, and the newest page.

    Source: Tang and others, Quest: query-aware sparsity for efficient long-context LLM inference
    (2406.10774), algorithm 1. A page holds `page` successive tokens and the least and the largest number
    m_i, M_i of each channel i of its keys, in half precision; no logit of the page exceeds
    sum_i max(q_i m_i, q_i M_i). Each query head chooses its own pages.

    Parameters
    ----------
    budget, seed
        As in `CachePolicy`; whole pages that fit in it, at least one. The newest page is one of them, however
        many tokens it holds.
    page : int
        16 in the paper.
    draw : bool
        Not the paper's: whether keys are drawn, each by the logit of its page's centre, and weighed by exact
        logits.
    shared : bool
        Whether the query heads of a key head draw the same keys.
    """

    name: ClassVar[str] = "quest"
    page: int = 16
    draw: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.store(page=check_count("page", self.page))
        if self.shared and not self.draw:
            raise ArgumentError("shared=True is not allowed: pages that are not drawn are each head's own.")

    @property
    def label(self) -> str:
        """What it is called in tables and figures."""
        return f"Quest, pages of {self.page}{', drawn' if self.draw else ''}"

    def make_cache(self, prompt: LayerPrompt) -> LayerCache:
        """The cache of a layer: see `CachePolicy.make_cache`."""
        pages = PageBounds(self.page)
        if self.draw:
            chooser: KeyChooser = GuessedKeys(self, _PageCentres(pages), draw=True, shared=self.shared)
        else:
            chooser = _BestPages(self, pages)
        return ChosenKeysCache(prompt, chooser, self.layer_seed(prompt.layer))


class PageBounds:
    """The least and the largest number of every channel of the keys, for each page of successive keys.

    Parameters
    ----------
    page : int
        Keys in a page.
    """

    def __init__(self, page: int):
        self.page = page
        self.least = self.largest = torch.empty(0)
        """(N, P, E) each, the last page as far as there are keys."""
        self._keys = 0  # that the bounds are of

    def extend(self, keys: Tensor) -> None:
        """Let the bounds be of all keys (N, n, E), of which earlier ones have not changed."""
        if keys.shape[1] == self._keys:
            return
        complete = self._keys // self.page
        rest = keys[:, complete * self.page :].float()
        missing = -rest.shape[1] % self.page
        shape = (rest.shape[0], -1, self.page, rest.shape[-1])
        least = F.pad(rest, (0, 0, 0, missing), value=torch.inf).view(shape).amin(2)
        largest = F.pad(rest, (0, 0, 0, missing), value=-torch.inf).view(shape).amax(2)
        if complete:
            least = torch.cat((self.least[:, :complete], least), 1)
            largest = torch.cat((self.largest[:, :complete], largest), 1)
        self.least, self.largest, self._keys = least, largest, keys.shape[1]

    def bounds(self, queries: Tensor) -> Tensor:
        """Upper bounds on the logits of scaled queries (N, G, E) in each page, (N, G, P)."""
        positive, negative = queries.clamp_min(0), queries.clamp_max(0)
        least, largest = (x.to(queries.dtype).mT for x in (self.least, self.largest))
        return torch.bmm(positive, largest) + torch.bmm(negative, least)

    @property
    def nbytes(self) -> int:
        """The bytes of all bounds, in half precision."""
        return 2 * self.least.numel() * HALF_BYTES

    def of_keys(self, pages: Tensor, length: int) -> Tensor:
        """What is known of the pages (N, G, P), for each of the keys: (N, G, length)."""
        return pages.repeat_interleave(self.page, -1)[..., :length]


class _BestPages:
    def __init__(self, policy: QuestPolicy, pages: PageBounds):
        self.policy, self.pages = policy, pages

    def choose(self, step: DecodeStep) -> KeyChoice:
        self.pages.extend(step.keys)
        budget = self.policy.budget_at(step.length)
        bounds = self.pages.bounds(step.queries)
        # The newest page is read in any case: new tokens attend to one another.
        bounds[..., -1] = torch.inf
        count = bounds.shape[-1] if budget == step.length else max(1, budget // self.pages.page)
        best = bounds.topk(count, -1).indices
        factors = self.pages.of_keys(torch.zeros_like(bounds).scatter_(-1, best, 1), step.length)
        return KeyChoice(factors, other_bytes=self.pages.nbytes)


class _PageCentres:
    def __init__(self, pages: PageBounds):
        self.pages = pages

    def guess(self, step: DecodeStep) -> Guesses:
        self.pages.extend(step.keys)
        centres = (self.pages.least + self.pages.largest).to(step.queries.dtype) / 2
        logits = torch.bmm(step.queries, centres.mT)
        return Guesses(self.pages.of_keys(logits, step.length), self.pages.nbytes)
