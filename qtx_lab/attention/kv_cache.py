"""`SampledKVCache`: keys and values kept for decoding, attended to by reading a small sketch and then few of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError, unknown_name
from ..estimates import AttentionEstimate, Draws, rounding_variance
from ..samplers import SystematicSampler
from ..samplers.base import Uniform, check_count, check_generator, invert, row_masses
from ..samplers.learned_proposal import best_low_rank, log_inclusion
from ..samplers.rows import blocks
from ..samplers.value_order import value_order
from ..storage import read_tensors, write_tensors

PROPOSALS = ("exact", "low-rank", "int4")
REBUILD = 1.5
"""The cache is laid out anew when it has grown by this factor: O(log n) work a token, amortised, though all at once."""
FITTED_KEYS = 8192
"""A low-rank sketch is fitted to no more keys than that, evenly spread."""
OUTLIER = 1 / 256
"""The share of a channel's largest keys that int4 keeps as they are."""
BLOCK_ELEMENTS = 1 << 24
"""Size of a block of queries: keys, or draws times features, whichever is more, over its rows."""


class SampledKVCache:
    """Keys and values of the tokens so far, of which a query reads all of a sketch and few rows.

    For a query x the sketch gives a score l~_j near scale x . k_j for every key, and a proposal

        q_j = (1 - epsilon) softmax_j(l~) + epsilon / n,

    from which S keys are drawn by systematic points along the values' order (`value_order`). The exact logits of the
    drawn keys alone, l_j, then weigh them: w_j proportional to exp(l_j) / min(1, S q_j) over the distinct keys drawn
    (Hajek 1971), which is the self-normalised estimate of `LearnedImportanceSampler`, with its error bars, which take
    keys to be in random order: in value order they err on the safe side. Biased by O(1 / S); exact where every key is
    drawn. Tokens appended stand behind the others until the cache has grown by half and is laid out anew.

    Sketches:

    - `exact`: the keys. All of k is read, v only at the draws.
    - `low-rank`: `rank` numbers a key, by `best_low_rank` of the keys and of the queries seen so far (all directions
      alike where none was seen); refitted when the cache is laid out anew.
    - `int4`: 4 bits a number, in steps of its channel's; the `OUTLIER` largest of a channel, and what is appended out
      of its range, are kept beside.

    Every query sees the whole cache: no masks, no gradients.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> k, v = (torch.randn(2, 300, 16, generator=g) for _ in range(2))
    >>> cache = SampledKVCache.build(k, v, proposal="low-rank", rank=8)
    >>> cache.append(k[:, :1], v[:, :1])
    >>> est = cache.attend(torch.randn(4, 1, 16, generator=g), num_samples=64, generator=g)  # two queries a key head
    >>> len(cache), est.output.shape, est.std_error.shape
    (301, torch.Size([4, 1, 16]), torch.Size([4, 1, 16]))
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        *,
        proposal: str = "low-rank",
        rank: int | None = None,
        defensive: float = 0.02,
        queries: Tensor | None = None,
    ):
        if proposal not in PROPOSALS:
            raise unknown_name("proposal", proposal, PROPOSALS)
        _check(k, v)
        features = k.shape[-1]
        if proposal != "low-rank" and rank is not None:
            raise ArgumentError(f"rank={rank} is for proposal='low-rank' only; given {proposal!r}.")
        rank = min(16, features) if rank is None else rank
        check_count("rank", rank)
        if rank > features:
            raise ArgumentError(f"rank={rank} is not allowed: it must be at most E={features}.")
        if not isinstance(defensive, int | float) or not 0 < defensive < 1:
            raise ArgumentError(f"defensive={defensive!r} is not allowed: it must be between 0 and 1.")
        self.proposal, self.rank, self.defensive = proposal, int(rank), float(defensive)
        self.lead, self.heads, self.length = k.shape[:-2], k.shape[:-2].numel(), 0
        self.dtype = torch.promote_types(k.dtype, torch.float32)
        self.moment = torch.zeros(self.heads, features, features, dtype=torch.float64, device=k.device)
        self.seen = 0  # queries in `moment`, a head
        self._asked: list[Tensor] = []  # those that are not in it yet
        self._k, self._v = (x.detach().reshape(self.heads, *x.shape[-2:])[:, :0] for x in (k, v))
        self._order = torch.empty(self.heads, 0, dtype=torch.int64, device=k.device)
        self._sketch: dict[str, Tensor] = {}
        self._sums = torch.zeros(2, self.heads, 1, v.shape[-1], dtype=torch.float64, device=v.device)
        if queries is not None:
            self._see(self._rows(queries)[0])
        self._laid_out = 0
        self.append(k, v)

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
        proposal : {"exact", "low-rank", "int4"}
        rank : int, optional
            r of the low-rank sketch, 16 where None (or E, if less).
        defensive : float
            epsilon, 0 < epsilon < 1, the weight of the proposal's uniform part.
        queries : Tensor, (..., H, L, E), optional
            Queries that a low-rank sketch is fitted to, as those of the prompt.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If shapes or dtypes do not fit, numbers are not finite, or an argument is not allowed.
        """
        return cls(k, v, proposal=proposal, rank=rank, defensive=defensive, queries=queries)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"SampledKVCache({self.length} tokens, {self.heads} heads, {self.proposal!r}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, sketch, order, and room to grow."""
        held = (self._k, self._v, self._order, self.moment, self._sums, *self._sketch.values())
        return sum(x.nbytes for x in held)

    def sketch_nbytes(self) -> int:
        """Bytes of it that a query reads in full: the sketch's, of the tokens held."""
        if self.proposal == "exact":
            return self._k[:, : self.length].nbytes
        return sum(
            (x[..., : self.length] if name in ("low", "packed") else x).nbytes
            for name, x in self._sketch.items()
        )

    # --- Growing ------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens: k (..., Hkv, m, E) and v (..., Hkv, m, Ev), as those of `build`.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As `build`; the cache is then as it was.
        """
        _check(k, v)
        for name, x, held in (("k", k, self._k), ("v", v, self._v)):
            if x.shape[:-2] != self.lead or x.shape[-1] != held.shape[-1] or x.dtype != held.dtype:
                raise ShapeError(
                    f"{name} is {tuple(x.shape)} {x.dtype}; the cache holds (..., n, features) = "
                    f"{(*self.lead, self.length, held.shape[-1])} {held.dtype}."
                )
        k, v = (x.detach().reshape(self.heads, *x.shape[-2:]) for x in (k, v))
        start, end = self.length, self.length + k.shape[1]
        self._k, self._v = _grown(self._k, start, end, 1), _grown(self._v, start, end, 1)
        self._order = _grown(self._order, start, end, 1)
        self._k[:, start:end], self._v[:, start:end] = k, v
        self._order[:, start:end] = torch.arange(start, end, device=k.device)
        wide = v.double()
        self._sums += torch.stack((wide, wide.square())).sum(2, keepdim=True)
        self.length = end
        if end >= REBUILD * self._laid_out:
            self._lay_out()
        else:
            self._add_to_sketch(start)

    def _lay_out(self) -> None:
        """Put all tokens in value order, and make the sketch anew."""
        n = self.length
        order = value_order(self._v[:, :n])
        for x in (self._k, self._v, self._order):
            index = order if x.ndim == 2 else order[..., None].expand(-1, -1, x.shape[-1])
            x[:, :n] = x[:, :n].gather(1, index)
        self._laid_out, self._sketch = n, {}
        k = self._k[:, :n].to(self.dtype)
        if self.proposal == "low-rank":
            some = k[:, :: -(-n // FITTED_KEYS)]
            a, b = best_low_rank(self._queries(), some, self.rank)
            self._sketch = {"a": a, "b": b, "low": k.new_empty(self.heads, self.rank, 0)}
        elif self.proposal == "int4":
            kept = max(1, round(OUTLIER * n)) if n > 1 else 0
            centre = k.mean(1, keepdim=True)
            range_ = (
                (k - centre).abs().topk(kept + 1, 1).values[:, -1:]
            )  # the largest that is not kept beside
            step = (range_ / 7).clamp_min(torch.finfo(self.dtype).tiny)
            byte = torch.empty(self.heads, -(-k.shape[-1] // 2), 0, dtype=torch.uint8, device=k.device)
            self._sketch = {"centre": centre, "step": step, "packed": byte}
            self._sketch["head"], self._sketch["key"], self._sketch["channel"] = order.new_empty(3, 0)
            self._sketch["rest"] = k.new_empty(0)
        self._add_to_sketch(0)

    def _add_to_sketch(self, start: int) -> None:
        """Sketch the tokens from `start` on, by the sketch's own maps or steps."""
        s, k = self._sketch, self._k[:, start : self.length].to(self.dtype)
        if self.proposal == "low-rank":
            s["low"] = _grown(s["low"], start, self.length, 2)
            s["low"][..., start : self.length] = (k @ s["b"]).mT
        elif self.proposal == "int4":
            scaled = (k - s["centre"]) / s["step"]
            level = scaled.round().clamp(-7, 7)
            head, key, channel = (scaled.abs() > 7.5).nonzero(as_tuple=True)
            rest = ((scaled - level) * s["step"])[head, key, channel]
            new = {"head": head, "key": key + start, "channel": channel, "rest": rest}
            s.update({name: torch.cat((s[name], x)) for name, x in new.items()})
            nibbles = F.pad((level + 8).to(torch.uint8), (0, k.shape[-1] % 2)).mT  # [N, E, m]
            s["packed"] = _grown(s["packed"], start, self.length, 2)
            s["packed"][..., start : self.length] = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

    def _see(self, q: Tensor) -> None:
        """Remember queries (N, M, E): by their second moment, but for the latest, which cost less together."""
        self._asked.append(q)
        if sum(x.shape[1] for x in self._asked) >= q.shape[-1]:
            self._sum_up()

    def _sum_up(self) -> None:
        if self._asked:
            q = torch.cat(self._asked, 1).double()
            self.moment += q.mT @ q
            self.seen, self._asked = self.seen + q.shape[1], []

    def _queries(self) -> Tensor:
        """E queries a head that have the second moment of those seen, (N, E, E)."""
        self._sum_up()
        size = self.moment.shape[-1]
        eye = torch.eye(size, dtype=torch.float64, device=self.moment.device)
        if not self.seen:
            return eye.expand_as(self.moment).to(self.dtype)
        values, vectors = torch.linalg.eigh(self.moment * (size / self.seen))
        return (values.clamp_min(0).sqrt()[..., None] * vectors.mT).to(self.dtype)

    # --- Attending ------------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        num_samples: int = 64,
        *,
        replicates: int = 1,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> AttentionEstimate:
        """Estimate softmax(q k^T scale) v over all tokens held.

        Parameters
        ----------
        q : Tensor, (..., H, L, E)
            H a multiple of Hkv; query head h uses key head h // (H / Hkv). The heads of a group share their random
            numbers. Low-rank sketches remember its second moment for when they are fitted next.
        num_samples : int
            S, the draws of a row and replicate.
        replicates : int
            R independent repetitions, averaged.
        scale : float, optional
            1 / sqrt(E) where None.
        generator : torch.Generator, optional
            The only source of randomness; torch's default generator of the device where None.

        Returns
        -------
        AttentionEstimate
            `std_error` by the delta method, as for `LearnedImportanceSampler`; indices count tokens as they came.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Before any work.
        """
        check_count("num_samples", num_samples)
        check_count("replicates", replicates)
        check_generator(generator)
        rows, group = self._rows(q)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            if self.proposal == "low-rank":
                self._see(rows)
            shape, length, total = rows.shape[:2], q.shape[-2], num_samples * replicates
            uniform = Uniform(generator, q.device)
            points = (
                SystematicSampler().points((self.heads, length), num_samples, replicates, uniform).flatten(-2)
            )
            points = points.repeat(1, group, 1)
            place = torch.empty(*shape, total, dtype=torch.int64, device=q.device)
            weights, proposed = rows.new_empty(*shape, total), rows.new_empty(*shape, total)
            drawn = rows.new_empty(*shape, total, self._v.shape[-1])
            step = BLOCK_ELEMENTS // max(self.length, total * max(rows.shape[-1], drawn.shape[-1]))
            for heads, part in blocks((shape[0], shape[1]), step):
                block = rows[heads, part] * scale
                found, chance = self._propose(block, points[heads, part], heads)
                first = (torch.arange(heads.start, heads.stop, device=q.device) * self._k.shape[1])[
                    :, None, None
                ]
                k = F.embedding(found + first, self._k.flatten(0, 1)).to(self.dtype)  # [N, M, T, E]
                logits = torch.einsum("nmte,nme->nmt", k, block)
                apart = found.unflatten(-1, (replicates, num_samples))
                times = Draws(apart, apart).multiplicity().flatten(-2)
                log_w = (
                    logits - log_inclusion(chance.log(), num_samples, False) - times.to(logits.dtype).log()
                )
                w = log_w.unflatten(-1, apart.shape[-2:]).softmax(-1).flatten(-2) / replicates
                place[heads, part], weights[heads, part], proposed[heads, part] = found, w, chance
                drawn[heads, part] = F.embedding(found + first, self._v.flatten(0, 1)).to(self.dtype)
            output = torch.einsum("nmtd,nmt->nmd", drawn, weights)
            indices = self._order[:, None].expand(-1, shape[1], -1).gather(-1, place)
        flat = Draws(indices, weights, None, replicates)
        row_shape, dtype = q.shape[:-1], self._v.dtype
        moments = (self._sums / self.length).to(torch.float64)
        draws = flat.view(row_shape)
        return AttentionEstimate(
            output=output.view(*row_shape, -1).to(dtype),
            num_keys=self.length,
            degrees_of_freedom=math.inf,
            make_draws=lambda: draws,
            make_std_error=lambda: _std_error(flat, proposed, drawn, output, moments, dtype).view(
                *row_shape, -1
            ),
            group=group,
            diagnostics={
                "sampler": f"cache, {self.proposal}",
                "unbiased": False,
                "num_samples": num_samples,
                "replicates": replicates,
                "draws_per_row": total,
                "effective_sample_size": draws.effective_sample_size(),
                "fallbacks": (),
            },
        )

    def scores(self, q: Tensor, scale: float | None = None) -> Tensor:
        """What the sketch takes the logits of queries q (..., H, L, E) to be, but for a shift of each row:
        (..., H, L, n), tokens as they came. For plots and tests."""
        rows, _ = self._rows(q)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        found = self._scores(rows * scale, slice(0, self.heads))
        order = self._order[:, None, : self.length].expand_as(found)
        return torch.empty_like(found).scatter_(-1, order, found).view(*q.shape[:-1], self.length)

    def _propose(self, q: Tensor, points: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """Places and probabilities under the proposal, each (heads, M, T), of the tokens at points (heads, M, T)."""
        mass, n = row_masses(self._scores(q, heads)), self.length
        mass[..., :n] += mass.sum(-1, keepdim=True) * (self.defensive / (1 - self.defensive) / n)
        found, total = invert(mass, points)
        return found, mass.gather(-1, found) / total.to(mass.dtype)

    def _scores(self, q: Tensor, heads: slice) -> Tensor:
        """Logits of queries (heads, M, E), scaled, by the sketch, in the order of the places: (heads, M, n)."""
        n, s = self.length, self._sketch
        if self.proposal == "low-rank":
            return torch.bmm(torch.bmm(q, s["a"][heads]), s["low"][heads, :, :n])
        if self.proposal == "exact":
            return torch.bmm(q, self._k[heads, :n].to(self.dtype).mT)
        packed = s["packed"][heads, :, :n]
        q_step = F.pad(q * s["step"][heads], (0, q.shape[-1] % 2))
        logits = torch.bmm(q_step[..., ::2], (packed & 15).to(self.dtype))
        logits.baddbmm_(q_step[..., 1::2], (packed >> 4).to(self.dtype))  # levels + 8: a shift of the row
        mine = (s["head"] >= heads.start) & (s["head"] < heads.stop)
        head, key, channel, rest = (s[name][mine] for name in ("head", "key", "channel", "rest"))
        head = head - heads.start
        added = q[head, :, channel] * rest[:, None]  # [outliers, M]
        return (
            logits.transpose(1, 2).index_put((head, key), added, accumulate=True).transpose(1, 2).contiguous()
        )

    def _rows(self, q: Tensor) -> tuple[Tensor, int]:
        """q (..., H, L, E) as rows (N, G L, E), and G."""
        if not isinstance(q, Tensor) or not q.is_floating_point():
            raise DtypeError(
                f"q is {getattr(q, 'dtype', type(q).__name__)}; it must be a floating-point tensor."
            )
        lead, features = self.lead, self._k.shape[-1]
        heads = q.shape[-3] if q.ndim > 2 else 1
        each = lead[-1] if lead else 1
        if q.ndim != len(lead) + 2 or q.shape[-1] != features or q.shape[:-3] != lead[:-1] or heads % each:
            raise ShapeError(
                f"q has shape {tuple(q.shape)}; to keys {(*lead, self.length, features)} it must be "
                "(..., H, L, features), H a multiple of the keys' heads."
            )
        if not bool(q.isfinite().all()):
            raise ArgumentError("q holds NaN or infinity; only finite numbers are allowed.")
        group = heads // each
        return q.detach().to(self.dtype).reshape(self.heads, group * q.shape[-2], features), group

    # --- On disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write tokens, order and sketch as safetensors.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        self._sum_up()
        n = self.length
        tensors = {"k": self._k[:, :n], "v": self._v[:, :n], "order": self._order[:, :n]}
        tensors |= {"moment": self.moment, "sums": self._sums}
        for name, x in self._sketch.items():
            tensors[f"sketch.{name}"] = x[..., :n] if name in ("low", "packed") else x
        about = {"lead": list(self.lead), "seen": self.seen, "laid_out": self._laid_out}
        about |= {name: getattr(self, name) for name in ("proposal", "rank", "defensive")}
        write_tensors(path, tensors, {"sampled_kv_cache": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> SampledKVCache:
        """The cache that `save` wrote, on the CPU: the same draws from the same generator.

        Raises
        ------
        ArgumentError
            If the file is missing or holds something else.
        """
        try:
            tensors, metadata = read_tensors(path)
            about: Mapping[str, Any] = json.loads(metadata["sampled_kv_cache"])
            cache = cls.__new__(cls)
            cache.proposal, cache.rank, cache.defensive = (
                about[name] for name in ("proposal", "rank", "defensive")
            )
            cache.lead, cache.seen, cache._laid_out = (
                torch.Size(about["lead"]),
                about["seen"],
                about["laid_out"],
            )
            cache._k, cache._v, cache._order = (tensors[name] for name in ("k", "v", "order"))
            cache.moment, cache._sums = tensors["moment"], tensors["sums"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"path={str(path)!r} does not hold a cache: {error}") from error
        cache.heads, cache.length = cache._k.shape[:2]
        cache._asked = []
        cache.dtype = torch.promote_types(cache._k.dtype, torch.float32)
        cache._sketch = {
            name.removeprefix("sketch."): x for name, x in tensors.items() if name.startswith("sketch.")
        }
        return cache


def _std_error(
    draws: Draws, proposed: Tensor, drawn: Tensor, output: Tensor, moments: Tensor, dtype: torch.dtype
) -> Tensor:
    """Standard errors (N, M, d): `learned_estimators.Spread`, from the values drawn (N, M, T, d) and the mean of v and
    of v^2 over all keys."""
    r = draws.replicates
    size = draws.indices.shape[-1] // r
    apart = draws.indices.unflatten(-1, (r, size))
    times = Draws(apart, apart).multiplicity().flatten(-2).to(proposed.dtype)
    once = 1 / draws.multiplicity().to(proposed.dtype)
    pi = (proposed * size).clamp_max(1)
    weight = draws.weights * r * times  # w_j
    a = (1 - pi) * pi * weight.square() * once
    unseen = (1 - (proposed * once).sum(-1, keepdim=True)).clamp_min(0) / size
    chi = (draws.weights * weight * pi / proposed.clamp_min(torch.finfo(pi.dtype).tiny)).sum(-1, keepdim=True)
    unseen = unseen * chi.clamp_min(1)
    mean, square = moments  # [N, 1, d]
    spread = (square - mean.square()).clamp_min(0) + (mean - output).square()
    variance = torch.einsum("nmt,nmtd->nmd", a, (drawn - output[..., None, :]).square())
    variance = (variance + (unseen * spread).to(variance.dtype)) / r
    rounding = rounding_variance(output, square.sqrt().to(output.dtype), draws.indices.shape[-1], dtype)
    return (variance + rounding).sqrt()


def _grown(x: Tensor, used: int, needed: int, dim: int) -> Tensor:
    """x with room for `needed` along `dim`, of which the first `used` hold something: twice as much where it grows."""
    if x.shape[dim] >= needed:
        return x
    shape = list(x.shape)
    shape[dim] = needed if used == 0 else max(needed, 2 * used)
    larger = x.new_zeros(shape)
    larger.narrow(dim, 0, used).copy_(x.narrow(dim, 0, used))
    return larger


def _check(k: Tensor, v: Tensor) -> None:
    """Refuse what cannot be kept."""
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in (
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
        ):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"{name} is {given}; it must be a float32, float64, float16 or bfloat16 tensor.")
        if x.dtype != k.dtype or x.device != k.device:
            raise DtypeError(f"v is {v.dtype} on {v.device}, k is {k.dtype} on {k.device}; they must agree.")
    if k.ndim < 2 or k.shape[:-1] != v.shape[:-1] or 0 in (*k.shape, v.shape[-1]):
        raise ShapeError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (..., n, features), alike but for their features, with "
            "at least one token and one feature."
        )
    for name, x in (("k", k), ("v", v)):
        if not bool(x.isfinite().all()):
            raise ArgumentError(f"{name} holds NaN or infinity; only finite numbers are allowed.")
