"""`SampledKVCache`: keys and values for decoding, of which a query reads a small sketch and then few rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor

from ..checks import (
    check_count,
    check_finite,
    check_flags,
    check_generator,
    check_number,
    check_scale,
    check_sinks,
    check_softcap,
    check_tensors,
)
from ..errors import ArgumentError, DtypeError, ShapeError, unknown_name
from ..estimates import AttentionEstimate
from ..kernels.cpu_decode.reference import DrawRule
from ..streams import make_seed
from .attend import Call, attend, plain_mode, scores_by_place
from .attend_within import attend_within
from .debiased import attend_debiased
from .exact_pass import attend_exactly
from .guarantee import Promise
from .saving import CacheParts, read_cache, write_cache
from .sketches import PROPOSALS, ComponentSketch, Int8Sketch, QueryMoment, make_sketch
from .store import TokenStore
from .value_sketch import ValueSketch

ESTIMATORS = ("self-normalised", "debiased")

DEFAULT_DRAWS = 64
"""Draws of a row where neither a number nor a tolerance is given."""


class SampledKVCache:
    """Keys and values of the tokens so far: a query reads a sketch of all keys, and few keys and values.

    For a query x the sketch gives a score l~_j near scale x . k_j for every key, and a proposal

        q_j proportional to softmax_j(l~) + delta / n.

    Key j is drawn with probability pi_j = min(1, c q_j), c such that sum_j pi_j is S: the heaviest keys are
    drawn with certainty and none twice, as by `HeadTailSampler`, by systematic points along an order of the
    values (`ValueOrder`). delta is such that a share epsilon of the draws that are not certain is made
    uniformly from all keys (of all draws by Triton's kernel). The exact logits l_j of the drawn keys alone
    then weigh them, w_j proportional to exp(l_j) / pi_j (Hajek 1971): the self-normalised estimate of
    `LearnedImportanceSampler`, with its error bars. These assume keys in random order; in value order they
    err on the safe side. The estimate is biased by O(1 / S), and exact where every key is drawn.

    Proposals, the same on every device:

    - `exact`: the keys themselves. All of k is read, v only at the draws.
    - `low-rank`: the `rank` components of a key that matter most to the queries seen so far (all
      directions equally where none was seen), a byte each.
    - `int4`: all components of a key, 4 bits each.
    - `int8`: all components of a key, a byte each, with bounds of the rounding, and the values in a byte a
      feature. It is the only one that can keep a tolerance (`tolerance` of `attend`).
    - `mixed`: `rank` components, the first third in 4 bits each and the others in 2 (`MixedSketch`): a third
      of a byte a component. Not in Triton's kernel: on GPUs plain torch takes it, as `info.kernel` says.

    The keys that a sketch represents worst, one in 256 and at least 4, have exact scores; attention sinks are
    among them. A sketch is fitted again whenever the number of tokens has grown by a quarter. Tokens are
    appended, and the newest can be cropped: what was stored stays where it is. Of the order, which is an
    index, newly appended tokens take the last places until they are a sixteenth of all.

    Every query sees the whole cache: no masks, no gradients.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> k, v = (torch.randn(2, 500, 16, generator=g) for _ in range(2))
    >>> cache = SampledKVCache.build(k, v, proposal="low-rank", rank=8)
    >>> cache.append(k[:, :1], v[:, :1])
    >>> q = torch.randn(4, 1, 16, generator=g)  # two query heads a key head
    >>> est = cache.attend(q, num_samples=64, generator=g)
    >>> len(cache), est.output.shape, est.std_error.shape
    (501, torch.Size([4, 1, 16]), torch.Size([4, 1, 16]))
    """

    def __init__(self, parts: CacheParts):
        self._lead = parts.lead  # the leading dimensions of k and v, the last of them the key heads
        self._store, self._sketch, self._queries = parts.store, parts.sketch, parts.queries
        self._sequences = torch.arange(self._lead[:-1].numel(), device=parts.store.table.device)
        values = parts.store.values().to(parts.store.dtype)
        bounded = parts.sketch is not None and parts.sketch.bounded
        self._value_sketch = ValueSketch.of(values) if bounded else None
        self.defensive = parts.defensive
        """epsilon, the share of the draws, but for sure ones, that are made from all keys alike."""

    @classmethod
    def build(
        cls,
        k: Tensor,
        v: Tensor,
        proposal: str = "low-rank",
        rank: int | None = None,
        *,
        defensive: float = 0.02,
        queries: Tensor | None = None,
    ) -> SampledKVCache:
        """A cache of these tokens.

        Parameters
        ----------
        k : Tensor, (..., Hkv, n, E), n >= 1
        v : Tensor, (..., Hkv, n, Ev)
            float32, float64, float16 or bfloat16, as k; both are copied.
        proposal : {"exact", "low-rank", "int8", "int4", "mixed"}
        rank : int, optional
            r of the low-rank sketch, 32 where None, or of the mixed one, 24 (or E, if less).
        defensive : float
            epsilon, 0 < epsilon < 1: the share of the draws that are made uniformly from all keys, apart from
            those that are certain.
        queries : Tensor, (..., H, L, E), optional
            Queries that a sketch is fitted to, such as those of the prompt.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If shapes or dtypes do not fit, numbers are not finite, or an argument is not allowed.
        """
        if proposal not in PROPOSALS:
            raise unknown_name("proposal", proposal, PROPOSALS)
        _check_tokens(k, v)
        sketch = make_sketch(proposal, rank, k.shape[-1])
        defensive = check_number("defensive", defensive, above=0, below=1)
        lead = k.shape[:-2]
        with plain_mode(k.device):
            store = TokenStore.empty(*(x.detach().reshape(lead.numel(), *x.shape[-2:]) for x in (k, v)))
            seen = QueryMoment(lead.numel(), k.shape[-1], k.device)
            cache = cls(CacheParts(lead, store, sketch, seen, defensive))
            if queries is not None:
                rows = cache._rows("queries", queries)
                check_finite("queries", queries)
                seen.add(rows)
        cache.append(k, v)
        return cache

    def __len__(self) -> int:
        return self._store.length

    def __repr__(self) -> str:
        heads = self._lead.numel()
        return f"SampledKVCache({len(self)} tokens, {heads} heads, {self.proposal!r}, {self.nbytes:,} bytes)"

    @property
    def features(self) -> tuple[int, int]:
        """E and Ev, the sizes of a key and of a value."""
        return self._store.features, self._store.width

    @property
    def proposal(self) -> str:
        """What proposes keys: one of "exact", "low-rank", "int8", "int4" and "mixed"."""
        return "exact" if self._sketch is None else self._sketch.proposal

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, sketch, order and queries seen, and room to grow."""
        sketches = [x.nbytes for x in (self._sketch, self._value_sketch) if x is not None]
        return self._store.nbytes + sum(sketches) + self._queries.nbytes

    def sketch_nbytes(self) -> int:
        """Bytes of it that one query of each key head reads in full."""
        return self._store.keys().nbytes if self._sketch is None else self._sketch.scanned_nbytes

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys (..., Hkv, n, E) and values (..., Hkv, n, Ev), copied, in the order of arrival."""
        k, v = self._store.keys(), self._store.values()
        return k.clone().view(*self._lead, *k.shape[1:]), v.clone().view(*self._lead, *v.shape[1:])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens: k (..., Hkv, m, E) and v (..., Hkv, m, Ev), as those of `build`.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As `build`; the cache is then unchanged.
        """
        _check_tokens(k, v)
        store = self._store
        for name, x, width in (("k", k, store.features), ("v", v, store.width)):
            if x.dtype != store.table.dtype:
                raise DtypeError(f"{name} is {x.dtype}; the cache holds {store.table.dtype}.")
            if x.shape[:-2] != self._lead or x.shape[-1] != width:
                raise ShapeError(
                    f"{name} is {tuple(x.shape)} {x.dtype}; the cache holds (..., n, features) = "
                    f"{(*self._lead, store.length, width)} {store.table.dtype}."
                )
        with plain_mode(k.device):
            k, v = (x.detach().reshape(store.heads, *x.shape[-2:]) for x in (k, v))
            store.append(k, v)
            if self._value_sketch is not None:
                self._value_sketch.extend(v.to(store.dtype))
            sketch = self._sketch
            if sketch is not None and sketch.needs_fit(store.length):
                self._fit(sketch)
                return
            if sketch is not None:
                sketch.extend(k.to(store.dtype))
            if store.needs_sorting():
                index = store.sort_new()
                if sketch is not None:
                    sketch.reorder(index)

    def _fit(self, sketch: ComponentSketch) -> None:
        """Fit the sketch to all tokens held, and put them in its order."""
        keys = self._store.keys().to(self._store.dtype)
        sketch.place(self._store.arrange(sketch.fit(keys, self._queries.root())), keys)

    def crop(self, length: int) -> None:
        """Forget the newest tokens, all but the first `length`.

        Error bars of earlier estimates have to be read before the crop.

        Raises
        ------
        ArgumentError, DtypeError
            If there are not so many tokens, or if none would be left.
        """
        length = check_count("length", length)
        store, sketch = self._store, self._sketch
        if length > store.length:
            raise ArgumentError(f"length={length} is not allowed: the cache holds {store.length} tokens.")
        if length == store.length:
            return
        with plain_mode(store.table.device):
            index = store.crop(length)
            if self._value_sketch is not None:
                self._value_sketch.crop(length)
            if sketch is None:
                return
            if not (sketch.shorten(length) if index is None else sketch.crop(index)):
                self._fit(sketch)

    def select_sequences(self, index: Tensor) -> None:
        """Let sequence i be what sequence index_i was, with repetitions: for beams, or fewer sequences.

        Parameters
        ----------
        index : Tensor, int64, (B',)
            Numbers from 0 to B - 1, B the product of the dimensions before the heads, of which there must
            be one or more.

        Raises
        ------
        ShapeError, ArgumentError
            If keys have no such dimension, or a number is not allowed.
        """
        lead = self._lead
        if len(lead) != 2:
            raise ShapeError(
                f"Keys have the shape {(*lead, len(self))} + (E,): there are no sequences to select."
            )
        index = _check_index(index, lead[0]).to(self._store.table.device)
        if torch.equal(index, torch.arange(lead[0], device=index.device)):
            return
        with plain_mode(index.device):
            heads = (index[:, None] * lead[1] + torch.arange(lead[1], device=index.device)).flatten()
            self._store, self._queries = self._store.select(heads), self._queries.select(heads)
            self._sketch = None if self._sketch is None else self._sketch.select(heads)
            values = self._value_sketch
            self._value_sketch = None if values is None else values.select(heads)
            self._lead = torch.Size((len(index), lead[1]))
            self._sequences = torch.arange(len(index), device=index.device)

    def attend(
        self,
        q: Tensor,
        num_samples: int | None = None,
        *,
        tolerance: float | None = None,
        confidence: float = 0.95,
        estimator: str = "self-normalised",
        replicates: int = 1,
        adaptive: bool = False,
        share_keys: bool = False,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        sequences: Tensor | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> AttentionEstimate:
        """Estimate softmax(q k^T scale) v over all tokens held.

        Parameters
        ----------
        q : Tensor, (..., H, L, E)
            H a multiple of Hkv; query head h uses key head h // (H / Hkv). The heads of a group share
            their random numbers. Sketches remember its second moment for when they are fitted next.
        num_samples : int, optional
            S, the draws of a row and replicate; 64 where neither it nor a tolerance is given.
        tolerance : float, optional
            In place of a number of draws, for proposal="int8": each row reads as many keys as it takes for
            P(|o_hat - o| > tolerance |o|) <= 1 - confidence, a promise that holds for finite samples and for
            any keys, values and queries (`qtx_lab.cache.guarantee` has the theorem). First the heaviest
            keys are read, then others are drawn; many rows need no draws and are right for sure. A row that
            would read as many keys as there are is computed exactly, which `info.fallbacks` says.
        confidence : float
            Of the tolerance: from 1/2 to below 1.
        estimator : {"self-normalised", "debiased"}
            `debiased` has the exact output as its mean, for a random number of draws, 2.2 S in the mean, that
            are independent: see `qtx_lab.cache.debiased`. Standard errors need two replicates.
        replicates : int
            R independent repetitions, averaged.
        adaptive : bool
            `num_samples` is the most that a row draws: keys of a probability of 1 / S or more are drawn with
            certainty, and about 16 of the others at the least, so that a row whose probability lies on few
            keys draws few. At the same mean number of draws the worst rows err less and the best ones more.
            The columns of `draws` that a row does not use have weight 0. Not in Triton's kernel, as `mixed`.
        share_keys : bool
            The query heads of a key head draw the same S keys at each position, by the mean of their
            proposals: they read S keys in all, and not S each. On GPUs they always share their keys: S for
            each of them where this is False.
        scale : float, optional
            1 / sqrt(E) where None.
        generator : torch.Generator, optional
            Gives the seed; torch's default generator of the CPU where None. The draws of a row depend
            on the seed, its sequence, its head group, its position and the replicate. The last query is
            at position n - 1.
        sequences : Tensor, int64, (B,), optional
            Names of the sequences, B the product of the dimensions before the heads; 0, 1, … where None.
        sinks, softcap : optional
            As in `sampled_attention`. Sinks are in the sum by which each replicate's weights are divided.
            Keys are proposed by their logits without a cap.

        Returns
        -------
        AttentionEstimate
            Of a tolerance: `info.draws_per_row` is how many keys each row read, and
            `info.predicted_relative_error` the bound that was kept; `draws` are the keys read with their
            estimated probabilities, beside which the sketches count for the others; no `std_error`.
            Otherwise:
            `std_error` by the delta method, as for `LearnedImportanceSampler`; an estimated `log_sum_exp`;
            indices count tokens as they came. Draws that found no key of their
            own have weight 0. float32 and bfloat16 on the CPU are attended to by a pass that numba
            compiles at the first call of all (some twenty seconds; then it is kept on disk), others by
            Triton or plain torch: `info.kernel` says which and why.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Before any work.
        """
        if estimator not in ESTIMATORS:
            raise unknown_name("estimator", estimator, ESTIMATORS)
        replicates = check_count("replicates", replicates)
        check_flags(adaptive=adaptive, share_keys=share_keys)
        chosen = {
            "estimator": estimator != ESTIMATORS[0] and estimator,
            "adaptive": adaptive,
            "share_keys": share_keys,
            "replicates": replicates != 1 and replicates,
        }
        promise = self._promise(tolerance, confidence, num_samples, chosen)
        debiased = estimator == "debiased"
        if debiased and (adaptive or share_keys):
            name = "adaptive" if adaptive else "share_keys"
            raise ArgumentError(f"{name}=True is not allowed with estimator='debiased'.")
        num_samples = check_count("num_samples", DEFAULT_DRAWS if num_samples is None else num_samples)
        check_generator(generator)
        rows = self._rows("q", q)
        scale, softcap = check_scale(scale), check_softcap(softcap)
        sinks = self._sinks(sinks, q, rows)
        store = self._store
        names = self._sequences if sequences is None else sequences
        if sequences is not None:
            _check_sequences(sequences, len(self._sequences))
        with plain_mode(q.device):
            call = Call(
                q=q.detach(),
                rows=rows,
                rule=DrawRule(int(num_samples), int(replicates), self.defensive, adaptive, share_keys),
                scale=1 / math.sqrt(store.features) if scale is None else float(scale),
                seed=make_seed(generator),
                sequences=names.to(q.device),
                sinks=sinks,
                softcap=None if softcap is None else float(softcap),
            )
            if debiased:
                check_finite("q", q)
                estimate = attend_debiased(store, self._sketch, call)
            elif promise is None:
                estimate = attend(store, self._sketch, call)
            else:
                assert isinstance(self._sketch, Int8Sketch)
                assert self._value_sketch is not None
                check_finite("q", q)
                estimate = attend_within(store, self._sketch, self._value_sketch, call, promise)
                _check_logits(estimate.output)
                assert estimate.log_sum_exp is not None
                _check_logits(estimate.log_sum_exp)
            if self._sketch is not None:
                self._queries.add(rows)
        return estimate

    def _promise(
        self,
        tolerance: float | None,
        confidence: float,
        num_samples: int | None,
        chosen: Mapping[str, object],
    ) -> Promise | None:
        """What a tolerance promises; None where none is given. `chosen` holds what is not at its default."""
        confidence = check_number("confidence", confidence, least=0.5, below=1)
        if tolerance is None:
            return None
        least = torch.finfo(self._store.table.dtype).eps
        tolerance = check_number("tolerance", tolerance, above=least, below=1)
        if num_samples is not None:
            raise ArgumentError(
                f"num_samples={num_samples} and tolerance={tolerance} exclude each other: give one of them."
            )
        for name, given in chosen.items():
            if given is not False:
                raise ArgumentError(
                    f"{name}={given!r} is not allowed with a tolerance, which chooses the draws itself."
                )
        if self._value_sketch is None:
            raise ArgumentError(
                f"tolerance={tolerance} needs a cache built with proposal='int8', whose sketches have "
                f"bounds of their errors; proposal={self.proposal!r} promises nothing."
            )
        return Promise(tolerance, 1 - confidence)

    @overload
    def attend_exactly(
        self,
        q: Tensor,
        *,
        scale: float | None = ...,
        sinks: Tensor | None = ...,
        softcap: float | None = ...,
        return_log_sum_exp: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def attend_exactly(
        self,
        q: Tensor,
        *,
        scale: float | None = ...,
        sinks: Tensor | None = ...,
        softcap: float | None = ...,
        return_log_sum_exp: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def attend_exactly(
        self,
        q: Tensor,
        *,
        scale: float | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        return_log_sum_exp: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Exact causal attention of the newest tokens, which reads every key and value once for all of them.

        It is how drafted tokens are verified: their keys and values are appended, and their queries attend
        together. On a GPU a kernel computes it, which splits the keys of a head among its processors.

        Parameters
        ----------
        q : Tensor, (..., H, L, E)
            Queries of the newest L tokens, L from 1 to n: the first does not see the L - 1 tokens after it.
        scale : float, optional
            1 / sqrt(E) where None.
        sinks, softcap : optional
            As in `sampled_attention`.
        return_log_sum_exp : bool
            Whether to return the log-sum-exp of each row's logits too.

        Returns
        -------
        output : Tensor, (..., H, L, Ev)
            In the dtype of the cache.
        log_sum_exp : Tensor, float32, (..., H, L)
            With `return_log_sum_exp` only. Outputs over parts of a text merge with weights proportional to
            its exponential.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If queries do not fit, are not finite, or are of more tokens than are held.

        Examples
        --------
        >>> import torch
        >>> k, v, q = (torch.randn(2, 100, 16) for _ in range(3))
        >>> cache = SampledKVCache.build(k, v)
        >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, -5:]
        >>> torch.allclose(cache.attend_exactly(q[:, -5:]), exact, atol=1e-5)
        True
        """
        rows, store, scale, softcap = (
            self._rows("q", q),
            self._store,
            check_scale(scale),
            check_softcap(softcap),
        )
        check_finite("q", q)
        positions = q.shape[-2]
        if not 1 <= positions <= store.length:
            raise ShapeError(f"q has {positions} positions; there must be 1 to {store.length}.")
        if not isinstance(return_log_sum_exp, bool):
            raise ArgumentError(f"return_log_sum_exp={return_log_sum_exp!r} must be True or False.")
        with plain_mode(q.device):
            output, log_sum_exp = attend_exactly(
                store,
                rows,
                positions,
                1 / math.sqrt(store.features) if scale is None else float(scale),
                sinks=self._sinks(sinks, q, rows),
                softcap=None if softcap is None else float(softcap),
                with_log_sum_exp=return_log_sum_exp,
            )
            _check_logits(output)
            output = output.view(*q.shape[:-1], store.width)
            if not return_log_sum_exp:
                return output
            assert log_sum_exp is not None
            return output, log_sum_exp.view(q.shape[:-1])

    def scores(self, q: Tensor, scale: float | None = None) -> Tensor:
        """The logits of queries q (..., H, L, E) that keys are proposed by, up to a shift of each row.

        (..., H, L, n), tokens in the order of arrival. For plots and tests.
        """
        rows = self._rows("q", q)
        check_finite("q", q)
        scale = check_scale(scale)
        store = self._store
        with plain_mode(q.device):
            x = rows * (1 / math.sqrt(store.features) if scale is None else float(scale))
            scores = scores_by_place(store, self._sketch, x)
            _check_logits(scores)
            places = store.places()[:, None].expand_as(scores)
            by_token = torch.empty_like(scores).scatter_(-1, places, scores)
        return by_token.view(*q.shape[:-1], store.length)

    def _rows(self, name: str, q: Tensor) -> Tensor:
        """Queries (..., H, L, E), which may hold anything, as rows (N, G L, E), G = H / Hkv."""
        check_tensors(**{name: q})
        lead, store = self._lead, self._store
        heads = q.shape[-3] if q.ndim > 2 else 1
        key_heads = lead[-1] if lead else 1
        fits = q.ndim == len(lead) + 2 and q.shape[:-3] == lead[:-1] and heads and heads % key_heads == 0
        if not fits or q.shape[-1] != store.features:
            raise ShapeError(
                f"{name} has shape {tuple(q.shape)}; for keys {(*lead, store.length, store.features)} it "
                "must be (..., H, L, features), H a multiple of the keys' heads."
            )
        rows = heads // key_heads * q.shape[-2]
        return q.detach().to(store.dtype).reshape(store.heads, rows, store.features)

    def _sinks(self, sinks: Tensor | None, q: Tensor, rows: Tensor) -> Tensor | None:
        """The sink of each row (N, G L) of queries."""
        if sinks is None:
            return None
        check_sinks(sinks, q)
        sinks = sinks.detach().to(rows.dtype).expand(q.shape[:-2])[..., None]
        return sinks.expand(q.shape[:-1]).reshape(rows.shape[:2])

    def save(self, path: str | Path) -> None:
        """Write tokens, order and sketch as safetensors.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        write_cache(path, CacheParts(self._lead, self._store, self._sketch, self._queries, self.defensive))

    @classmethod
    def load(cls, path: str | Path) -> SampledKVCache:
        """The cache that `save` wrote, on the CPU: the same draws from the same generator.

        Raises
        ------
        ArgumentError
            If the file is missing or holds something else.
        """
        return cls(read_cache(path))


def _check_tokens(k: Tensor, v: Tensor) -> None:
    """Refuse what cannot be held."""
    check_tensors(k=k, v=v)
    if k.shape[:-1] != v.shape[:-1] or 0 in (*k.shape, v.shape[-1]):
        raise ShapeError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (..., n, features), equal but for their "
            "features, with at least one token and one feature."
        )
    for name, x in (("k", k), ("v", v)):
        check_finite(name, x)


def _check_logits(made_of_them: Tensor) -> None:
    """Refuse logits that were no numbers, by what was made of them and of finite keys and values."""
    if not bool(made_of_them.isfinite().all()):
        raise ArgumentError("logits of q and the keys held are no finite numbers: make q or scale smaller.")


def _check_index(index: Tensor, batch: int) -> Tensor:
    """Refuse what is not one or more numbers of sequences."""
    fits = isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1 and len(index) > 0
    if not fits or bool(((index < 0) | (index >= batch)).any()):
        raise ArgumentError(
            f"index={index!r} is not allowed: it must be int64 numbers from 0 to {batch - 1}."
        )
    return index


def _check_sequences(sequences: Tensor, batch: int) -> None:
    """Refuse names that are not one whole number for each sequence."""
    if not isinstance(sequences, Tensor) or sequences.dtype != torch.int64 or sequences.shape != (batch,):
        given = tuple(sequences.shape) if isinstance(sequences, Tensor) else type(sequences).__name__
        raise ArgumentError(f"sequences is {given}; it must be an int64 tensor of shape ({batch},).")
