"""Draws from a learned low-rank proposal: exact logits only at the drawn keys."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import ArgumentError, DtypeError, ShapeError, StorageError, unknown_name
from ..estimates import AttentionEstimate, Draws
from .base import InversionSampler, Uniform, check_count, invert, row_masses
from .monte_carlo import MonteCarloSampler
from .systematic import SystematicSampler

log = logging.getLogger(__name__)

ESTIMATORS = ("self-normalised", "plain", "debiased")
POINTS: dict[str, type[InversionSampler]] = {cls.name: cls for cls in (MonteCarloSampler, SystematicSampler)}

BLOCK_ELEMENTS = 1 << 20
"""Size of a block of rows: keys, or draws times features of k, whichever is more, over its rows."""

LEVEL_RATIO = 2**-1.5
"""P(level + 1) / P(level) of the debiased estimator. A level doubles the draws and divides the variance of its
correction by 4: any ratio between 1/4 and 1/2 has finite variance and cost, the geometric mean is the best."""

MOST_DRAWS = 4
"""`forward` gives no row more than this many times the mean number of draws."""

Cancel = threading.Event | Callable[[], bool]


@dataclass(frozen=True)
class FitHistory:
    """What `LearnedImportanceSampler.fit` did.

    Parameters
    ----------
    steps : tuple of int
        Steps of the optimiser done at each evaluation.
    objective : tuple of float
        The mean over the evaluated rows of what is minimised, in nats.
    chi_square : tuple of float
        The mean over the same rows of log(1 + chi^2(p || q)), in nats, whatever is minimised.
    best_step : int
        The step whose parameters were kept: the one of the smallest objective.
    cancelled : bool
        Whether `cancel` ended it.
    """

    steps: tuple[int, ...]
    objective: tuple[float, ...]
    chi_square: tuple[float, ...]
    best_step: int
    cancelled: bool


class LearnedImportanceSampler(nn.Module):
    """A proposal q(j | query) from a learned low-rank projection, corrected by the exact logits of the draws.

    For a query x and keys k_j, with the probabilities p_j proportional to exp(scale x . k_j),

        q_j = (1 - epsilon) softmax_j(scale <A x + a, B k_j>) + epsilon / n,        A, B of rank r <= E / 2,

    so that a query costs O(n r) for the proposal and O(S E) for the exact logits of S drawn keys. The uniform
    part is a defensive mixture (Owen and Zhou 2000, sec. 4): every importance weight is at most
    p_j n / epsilon, and the variance at most 1 / (1 - epsilon) times the one without it.

    **Estimators** (`estimate`). Let D be the distinct keys among S draws and pi_j the probability that key j is
    among them: 1 - (1 - q_j)^S for independent points, min(1, S q_j) for systematic ones.

    - `self-normalised`: o_hat = sum_{j in D} w_j v_j with w_j proportional to exp(scale x . k_j) / pi_j (Hajek
      1971), so that a key drawn twice counts no more than one drawn once, and one sure to be drawn has no
      noise. Needs no normaliser. Biased, to leading order and for pi_j << 1 the classical term,
      E[o_hat] - o = -sum_j ((1 - pi_j) / pi_j) p_j^2 (v_j - o)  ->  -(1/S) sum_j (p_j^2 / q_j) (v_j - o),
      which is O(1/S); its variance is sum_j ((1 - pi_j) / pi_j) p_j^2 (v_j - o)^2, also O(1/S) (Owen,
      Monte Carlo theory, methods and examples (2013), sec. 9.2).
    - `plain`: o_hat = sum_{j in D} (p_j / pi_j) v_j with the exact normaliser of p (Horvitz and Thompson 1952).
      Unbiased; its weights need not sum to 1. The normaliser costs O(n E) where it is not given.
    - `debiased`: classical self-normalised estimates (weights p_j / q_j of independent draws) at S 2^l draws,
      telescoped up to a random level l of probability P(l),

          Z = mean of the 2^l estimates at S + [l > 0] (o_hat(all) - (o_hat(half) + o_hat(other half)) / 2) / P(l),

      unbiased with finite variance and 2.2 S draws on average (Rhee and Glynn, Unbiased estimation with square
      root convergence (2015); with antithetic halves for ratios Blanchet and Glynn (2015)).

    **Training** (`fit`) minimises the variance itself. What the variances above exceed those of draws from p by
    is the variance of the importance weights, chi^2(p || q) = sum_j p_j^2 / q_j - 1. Its direction matters:
    it punishes q_j << p_j, where weights explode, which KL(q || p) forgives. Minimised is the mean over rows of
    log(1 + chi^2), Renyi's divergence of order 2, so that no single row dominates; with values V given, the
    logarithm of the summed variance of the rows, sum_j (p_j^2 / q_j) |v_j - o|^2, over that of draws from p, which
    is the squared error of the output itself. The start is the best
    rank-r map in the least-squares sense (`best_low_rank`). A sampler that was not fitted uses that map of
    each call's own queries and keys, and says so in `diagnostics["fallbacks"]`.

    As a `Sampler`, `draw` is given exact logits and draws from them: unbiased.

    Parameters
    ----------
    embed_dim : int
        E >= 2, features of a query and of a key.
    rank : int, optional
        r, 1 <= r <= E / 2; E / 4 (rounded down, at least 1) where None.
    num_heads : int
        1: one projection for all heads. More: one for each key head, the third dimension of k from the end.
    points : {"monte-carlo", "systematic"}
        Where the proposal is inverted. Systematic points give smaller errors.
    defensive : float
        epsilon, 0 < epsilon < 1, the weight of the uniform part.

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (torch.randn(4, 64, 16, generator=g) for _ in range(3))
    >>> sampler = LearnedImportanceSampler(embed_dim=16, rank=8)
    >>> history = sampler.fit(q, k, steps=10, seed=0, progress=False)
    >>> sampler.estimate(q, k, v, num_samples=8, generator=g).output.shape
    torch.Size([4, 64, 16])
    """

    name = "learned"
    unbiased = True
    fitted: Tensor

    def __init__(
        self,
        embed_dim: int,
        rank: int | None = None,
        num_heads: int = 1,
        *,
        points: str = "systematic",
        defensive: float = 0.02,
    ):
        super().__init__()
        check_count("embed_dim", embed_dim)
        check_count("num_heads", num_heads)
        if embed_dim < 2:
            raise ArgumentError(f"embed_dim={embed_dim} is not allowed: it must be at least 2.")
        rank = max(1, embed_dim // 4) if rank is None else rank
        check_count("rank", rank)
        if rank > embed_dim // 2:
            raise ArgumentError(
                f"rank={rank} is not allowed: it must be in 1..{embed_dim // 2}, half of embed_dim."
            )
        if points not in POINTS:
            raise unknown_name("points", points, POINTS)
        if not isinstance(defensive, int | float) or not 0 < defensive < 1:
            raise ArgumentError(f"defensive={defensive!r} is not allowed: it must be between 0 and 1.")
        self.embed_dim, self.rank, self.num_heads = embed_dim, rank, num_heads
        self.points, self.defensive = points, float(defensive)
        self.independent = POINTS[points].independent
        self.history: FitHistory | None = None
        self.query_map = nn.Parameter(torch.zeros(num_heads, embed_dim, rank))  # A^T
        self.query_bias = nn.Parameter(torch.zeros(num_heads, 1, rank))  # a
        self.key_map = nn.Parameter(torch.zeros(num_heads, embed_dim, rank))  # B^T
        self.register_buffer("fitted", torch.tensor(False))

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, rank={self.rank}, num_heads={self.num_heads}, "
            f"points={self.points!r}, defensive={self.defensive}"
        )

    # --- Drawing ------------------------------------------------------------------------------

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draws from softmax(logits) itself: where exact logits are given, a proposal saves nothing.

        See `Sampler.draw`. The proposal is used by `estimate` and `forward`.
        """
        exact = POINTS[self.points]()
        return exact.draw(logits, num_samples, values=values, generator=generator, replicates=replicates)

    def estimate(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        num_samples: int = 32,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        replicates: int = 1,
        estimator: str = "self-normalised",
        log_normaliser: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AttentionEstimate:
        """Estimate softmax(Q K^T scale) V from draws of the proposal; no gradients.

        Parameters
        ----------
        Q : Tensor, (..., H, L, E)
            E = embed_dim; the leading dimensions are free and may be absent.
        K : Tensor, (..., Hkv, n, E)
        V : Tensor, (..., Hkv, n, Ev)
        num_samples : int
            S, the draws of a row and replicate; of the debiased estimator, of its first level.
        is_causal, scale, enable_gqa
            As in `torch.nn.functional.scaled_dot_product_attention`.
        replicates : int
            R independent repetitions, averaged. The bias stays that of S draws.
        estimator : {"self-normalised", "plain", "debiased"}
            See the class.
        log_normaliser : Tensor, (..., H, L), optional
            log sum_j exp(scale q . k_j), for the plain estimator; computed in O(n E) where None.
        generator : torch.Generator, optional
            The only source of randomness; torch's default generator of the device where None.

        Returns
        -------
        AttentionEstimate
            `draws` hold a weight for each draw (w_j shared by the draws of a key; negative ones, and rows padded by
            weight 0, in the debiased estimator); probabilities only in the plain one, which knows them.
            `std_error` of the self-normalised estimator: the variance above by the delta method, from the draws
            (see `_spread`); of the others: from the replicates, None for one.
            `diagnostics["effective_sample_size"]` is (sum w)^2 / sum w^2.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Before any work: shapes that do not fit, mixed dtypes, NaN or infinities, counts below 1, an unknown
            estimator, a log_normaliser for another estimator, an input that requires a gradient.
        """
        check_count("num_samples", num_samples)
        check_count("replicates", replicates)
        if estimator not in ESTIMATORS:
            raise unknown_name("estimator", estimator, ESTIMATORS)
        _check_generator(generator)
        rows = self._rows(Q, K, V, is_causal, scale, enable_gqa)
        with torch.no_grad():
            if log_normaliser is not None:
                _check_normaliser(log_normaliser, rows.row_shape, estimator)
                log_normaliser = log_normaliser.to(rows.q).reshape(rows.shape)
            if estimator == "debiased":
                return self._debiased(rows, num_samples, replicates, generator)
            return self._importance(rows, num_samples, replicates, estimator, log_normaliser, generator)

    def forward(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        base_num_samples: int = 32,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The self-normalised estimate of `estimate`, with more draws in the rows that need them.

        Row i gets S_i draws, S_i proportional to sqrt(1 - sum_j q_ij^2): the spread of values under q if all
        values are equally far apart, and the allocation that minimises the sum of the rows' variances
        (Neyman 1934). At least 2, at most `MOST_DRAWS` times the mean; the mean over all rows of the call is at
        most base_num_samples. The counts depend on the proposal and not on the draws, so that they add no bias;
        where the proposal is far from p on peaked rows, they are too low there.

        Parameters
        ----------
        Q, K, V, is_causal, scale, enable_gqa, generator
            As in `estimate`.
        base_num_samples : int
            The mean number of draws of a row.

        Returns
        -------
        Tensor, (..., H, L, Ev), V's dtype

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As in `estimate`.
        """
        check_count("base_num_samples", base_num_samples)
        _check_generator(generator)
        rows = self._rows(Q, K, V, is_causal, scale, enable_gqa)
        with torch.no_grad():
            counts = self._allocate(rows, base_num_samples)  # [N, M]
            output = rows.v.new_empty(*rows.shape, rows.v.shape[-1])
            most = int(counts.max()) if counts.numel() else 1
            uniform = Uniform(generator, rows.q.device)
            for heads, part in rows.blocks(most):
                count = counts[heads, part, None]
                slot = torch.arange(most, device=count.device)
                u = uniform(*count.shape[:2], most if self.independent else 1)
                points = u if self.independent else ((slot + u) / count).clamp_max(1 - 2**-53)
                indices, exact, log_q = rows.draw(heads, part, points)
                spare = slot >= count
                # Slots past a row's count get keys of their own, which no drawn key is counted with.
                apart = torch.where(spare, rows.num_keys + slot, indices)
                log_pi = _log_inclusion(log_q, count, self.independent)
                weights = exact - log_pi - Draws(apart, exact).multiplicity().log()
                weights = weights.masked_fill(spare, -torch.inf).softmax(-1)
                output[heads, part] = Draws(indices, weights).average(rows.v[heads])
            return output.view(*rows.row_shape, rows.v.shape[-1]).to(V.dtype)

    def proposal(
        self,
        Q: Tensor,
        K: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """q(j | query) of every row, (..., H, L, n), memory L * n: for plots and tests; errors as `estimate`."""
        rows = self._rows(Q, K, None, is_causal, scale, enable_gqa)
        with torch.no_grad():
            return (
                rows.log_proposal(slice(None), slice(0, rows.shape[1]), whole=True)
                .exp()
                .view(*rows.row_shape, rows.num_keys)
            )

    def chi_square(
        self,
        Q: Tensor,
        K: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """chi^2(p || q) of every row, (..., H, L), from all exact logits: O(n E) a row; errors as `estimate`."""
        rows = self._rows(Q, K, None, is_causal, scale, enable_gqa)
        with torch.no_grad():
            result = rows.q.new_empty(rows.shape)
            for heads, part in rows.blocks(1):
                log_q = rows.log_proposal(heads, part)
                result[heads, part] = _renyi(rows.log_target(heads, part), log_q).expm1()
            return result.view(rows.row_shape)

    # --- Training -----------------------------------------------------------------------------

    def fit(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor | None = None,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        steps: int = 300,
        lr: float = 1e-2,
        batch_rows: int = 128,
        initialise: str = "low-rank",
        seed: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool = True,
        cancel: Cancel | None = None,
    ) -> FitHistory:
        """Fit the projections to training rows, by Adam on the objective of the class from exact logits.

        Every tenth step (and the last) evaluates the objective on a fixed set of rows that no step trains
        on; the parameters of the smallest are kept, also when cancelled.

        Parameters
        ----------
        Q, K, V, is_causal, scale, enable_gqa
            As in `estimate`; the leading dimensions are the training set. V is optional.
        steps : int
            Steps of the optimiser, 0 or more; 0 only initialises.
        lr : float
            Rate at the start, relative to the root mean square of each projection; it falls to 0 as a cosine.
        batch_rows : int
            Rows of each key head in a step.
        initialise : {"low-rank", "random", "current"}
            Start from `best_low_rank`, from a random orthogonal projection (the usual baseline), or
            from the parameters as they are.
        seed : int, optional
            Makes the generator; not together with `generator`.
        progress : bool
            Show a bar with the time left.
        cancel : threading.Event or callable, optional
            Asked before each step; set or true ends the training.

        Returns
        -------
        FitHistory
            Also kept as `history`.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Before any work, as `estimate`; if there are no rows.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ArgumentError(f"steps={steps!r} is not allowed: it must be a whole number of at least 0.")
        check_count("batch_rows", batch_rows)
        if not isinstance(lr, int | float) or not 0 < lr < math.inf:
            raise ArgumentError(f"lr={lr!r} is not allowed: it must be a positive number.")
        starts = ("low-rank", "random", "current")
        if initialise not in starts:
            raise unknown_name("initialise", initialise, starts)
        if seed is not None and generator is not None:
            raise ArgumentError(f"seed={seed} and generator exclude each other: give one of them.")
        _check_generator(generator)
        cancelled = _asker(cancel)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        rows = self._rows(Q, K, V, is_causal, scale, enable_gqa, mapped=False)
        if rows.shape[0] * rows.shape[1] == 0:
            raise ShapeError(f"Q has shape {tuple(Q.shape)}: there must be at least one row to fit to.")
        with torch.no_grad():
            self._initialise(rows, initialise, generator)
            self.fitted.fill_(True)
        with torch.enable_grad():
            self.history = self._train(
                rows, V is not None, steps, lr, batch_rows, generator, progress, cancelled
            )
        return self.history

    def _initialise(self, rows: _Rows, start: str, generator: torch.Generator | None) -> None:
        h, e, r = self.query_map.shape
        if start == "low-rank":
            q, k = (x.unflatten(0, (-1, h)).transpose(0, 1).flatten(1, 2) for x in (rows.q, rows.k))
            a, b = best_low_rank(q, k, self.rank)
        elif start == "random":
            device = "cpu" if generator is None else generator.device
            gauss = torch.randn(h, e, r, generator=generator, device=device, dtype=torch.float64)
            a = b = torch.linalg.qr(gauss).Q * (e / r) ** 0.5  # E[<A q, B k>] = q . k
        else:
            return
        self.query_map.copy_(a)
        self.key_map.copy_(b)
        self.query_bias.zero_()

    def _train(
        self,
        rows: _Rows,
        use_values: bool,
        steps: int,
        lr: float,
        batch_rows: int,
        generator: torch.Generator | None,
        progress: bool,
        cancelled: Callable[[], bool],
    ) -> FitHistory:
        device = "cpu" if generator is None else generator.device
        problems, length = rows.shape
        windows = problems // self.num_heads
        order = torch.randperm(windows * length, generator=generator, device=device).to(rows.q.device)
        held = order[: min(8 * batch_rows, max(1, len(order) // 5))]
        pool = order[len(held) :] if len(order) > len(held) else order

        def by_window(rows: Tensor) -> list[tuple[int, Tensor]]:
            """(window, its rows) of each window that has some: a step takes one, to project its keys once."""
            rows = rows.sort().values
            counts = torch.bincount(rows // length, minlength=windows).tolist()
            return [(w, x) for w, x in enumerate((rows % length).split(counts)) if len(x)]

        train, test = by_window(pool), by_window(held)
        parameters = [self.query_map, self.query_bias, self.key_map]
        size = [
            float(p.detach().square().mean().sqrt()) for p in (self.query_map, self.query_map, self.key_map)
        ]
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": lr * max(s, 1e-3)} for p, s in zip(parameters, size, strict=True)],
            betas=(0.9, 0.99),
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))

        def objective(window: int, some: Tensor) -> tuple[Tensor, Tensor]:
            heads = slice(window * self.num_heads, (window + 1) * self.num_heads)
            log_p = rows.log_target(heads, some)
            q, k = self._map(rows.q[heads, some], rows.k[heads])
            log_q = rows.mix(rows.mask(torch.bmm(q * rows.scale, k.mT), some), some)
            chi = _renyi(log_p, log_q)
            if not use_values:
                return chi, chi
            distance = rows.log_distance(heads, log_p)
            ours, best = (_renyi(log_p, x, distance).logsumexp(-1) for x in (log_q, log_p))
            return ours - best, chi

        def evaluate() -> tuple[float, float]:
            with torch.no_grad():
                parts = [objective(window, some) for window, some in test]
                total = [torch.cat([part[i].flatten() for part in parts]).mean() for i in (0, 1)]
            return float(total[0]), float(total[1])

        done, history, best, kept = 0, [], math.inf, 0
        state: list[Tensor] = []

        def record() -> None:
            nonlocal best, kept, state
            loss, chi = evaluate()
            history.append((done, loss, chi))
            if not state or loss < best:
                best, kept, state = loss, done, [p.detach().clone() for p in parameters]

        record()
        stopped = False
        with tqdm(total=steps, desc="fitting the proposal", unit="step", disable=not progress) as bar:
            try:
                while done < steps and not (stopped := cancelled()):
                    pick = int(torch.randint(len(train), (), generator=generator, device=device))
                    window, here = train[pick]
                    some = torch.randint(
                        len(here), (min(batch_rows, len(here)),), generator=generator, device=device
                    )
                    loss, _ = objective(window, here[some.to(here.device)])
                    optimizer.zero_grad()
                    loss.mean().backward()
                    optimizer.step()
                    schedule.step()
                    done += 1
                    bar.update()
                    if done % 10 == 0 or done == steps:
                        record()
                        bar.set_postfix(objective=f"{history[-1][1]:.4f}", refresh=False)
            finally:  # also where the user interrupts the kernel
                with torch.no_grad():
                    for p, saved in zip(parameters, state, strict=True):
                        p.copy_(saved)
                        p.grad = None
        at, losses, chis = zip(*history, strict=True)
        return FitHistory(at, losses, chis, kept, stopped)

    # --- On disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the parameters as safetensors, the settings and the history as JSON in its metadata.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        settings = {name: getattr(self, name) for name in _SETTINGS}
        metadata = {
            "learned_importance_sampler": json.dumps(settings),
            "history": json.dumps(None if self.history is None else asdict(self.history)),
        }
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        try:
            save_file(tensors, path, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"path={str(path)!r} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> LearnedImportanceSampler:
        """The sampler that `save` wrote, on the CPU.

        Raises
        ------
        ArgumentError
            If the file is missing or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                settings = json.loads(metadata["learned_importance_sampler"])
                history: dict[str, Any] | None = json.loads(metadata["history"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sampler = cls(**settings)
            sampler.load_state_dict(state)
            if history is not None:
                found: dict[str, Any] = {
                    name: tuple(x) if isinstance(x, list) else x for name, x in history.items()
                }
                sampler.history = FitHistory(**found)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"path={str(path)!r} does not hold a learned sampler: {error}") from error
        return sampler

    # --- Inside -------------------------------------------------------------------------------

    def _map(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A q + a and B k of each problem: (N, M, E), (N, n, E) -> (N, M, r), (N, n, r)."""
        times = q.shape[0] // self.num_heads
        a, bias, b = (
            p.to(q.dtype).repeat(times, 1, 1) for p in (self.query_map, self.query_bias, self.key_map)
        )
        return torch.baddbmm(bias, q, a), torch.bmm(k, b)

    def _rows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        mapped: bool = True,
    ) -> _Rows:
        group = _check_inputs(q, k, v, scale, enable_gqa, self.embed_dim, self.num_heads)
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
        with torch.no_grad():
            rows = _Rows(q, k, v, is_causal, scale, group, self.defensive)
            if mapped and bool(self.fitted):
                rows.query, rows.key = self._map(rows.q, rows.k)
            elif mapped:
                log.info(_NOT_FITTED)
                a, b = best_low_rank(rows.q, rows.k, self.rank)
                rows.query, rows.key = torch.bmm(rows.q, a), torch.bmm(rows.k, b)
        return rows

    def _importance(
        self,
        rows: _Rows,
        num_samples: int,
        replicates: int,
        estimator: str,
        log_normaliser: Tensor | None,
        generator: torch.Generator | None,
    ) -> AttentionEstimate:
        """The self-normalised and the plain estimator, block by block."""
        total = replicates * num_samples
        output = rows.v.new_empty(*rows.shape, rows.v.shape[-1])
        indices = torch.empty(*rows.shape, total, dtype=torch.int64, device=rows.q.device)
        weights, proposal = rows.q.new_empty(*rows.shape, total), rows.q.new_empty(*rows.shape, total)
        p = torch.empty_like(weights) if estimator == "plain" else None
        points, uniform = POINTS[self.points](), Uniform(generator, rows.q.device)
        for heads, part in rows.blocks(total):
            shape = tuple(rows.q[heads, part].shape[:2])
            u = points.points(shape, num_samples, replicates, uniform)
            drawn, exact, log_q = rows.draw(heads, part, u.flatten(-2))
            log_w = exact - _log_inclusion(log_q, num_samples, self.independent)
            by_replicate = drawn.unflatten(-1, (replicates, num_samples))
            multiplicity = Draws(by_replicate, by_replicate).multiplicity().flatten(-2)
            log_w -= multiplicity.to(log_w.dtype).log()
            if p is None:
                w = log_w.unflatten(-1, by_replicate.shape[-2:]).softmax(-1).flatten(-2)
            else:
                z = log_normaliser[heads, part] if log_normaliser is not None else rows.log_z(heads, part)
                w, p[heads, part] = (log_w - z[..., None]).exp(), (exact - z[..., None]).exp()
            w /= replicates
            indices[heads, part], weights[heads, part], proposal[heads, part] = drawn, w, log_q.exp()
            output[heads, part] = Draws(drawn, w, None, replicates).average(rows.v[heads])
        flat = Draws(indices, weights, p, replicates)

        rows.v = rows.v.clone()  # the error bars are made later, from the values as they are now
        make_std_error, degrees = None, math.inf
        if p is None:

            def make_std_error() -> Tensor:
                std_error = torch.empty_like(output)
                with torch.no_grad():
                    for heads, part in rows.blocks(total):
                        block = flat[heads, part], output[heads, part], proposal[heads, part]
                        variance = _spread(rows, heads, part, *block, self.independent)
                        std_error[heads, part] = variance.sqrt()
                return std_error.view(*rows.row_shape, rows.v.shape[-1])

        elif replicates > 1:
            degrees = replicates - 1.0

            def make_std_error() -> Tensor:
                with torch.no_grad():
                    means = flat.average_by_replicate(rows.v) * replicates  # [N, M, R, d]
                    return _standard_error(means).view(*rows.row_shape, rows.v.shape[-1])

        draws = flat.view(rows.row_shape)
        return AttentionEstimate(
            output=output.view(*rows.row_shape, rows.v.shape[-1]).to(rows.value_dtype),
            num_keys=rows.num_keys,
            degrees_of_freedom=degrees,
            make_draws=lambda: draws,
            make_std_error=make_std_error,
            diagnostics=self._diagnostics(
                estimator, num_samples, replicates, total, draws.effective_sample_size()
            ),
        )

    def _debiased(
        self, rows: _Rows, num_samples: int, replicates: int, generator: torch.Generator | None
    ) -> AttentionEstimate:
        """Randomised truncation: each row and replicate has a level of its own; rows of one level go together."""
        n, m = rows.shape
        uniform = Uniform(generator, rows.q.device)
        u = uniform(n * m * replicates)
        level = ((1 - u).log() / math.log(LEVEL_RATIO)).long()  # P(level >= l) = ratio^l
        chunks: list[tuple[Tensor, Tensor, Tensor]] = []  # pairs (row, replicate), indices, weights of each
        means = rows.v.new_zeros(n * m * replicates, rows.v.shape[-1])
        for heads, part in rows.blocks(num_samples):
            log_q = rows.log_proposal(heads, part).flatten(0, 1)
            row = (torch.arange(n)[heads, None] * m + torch.arange(m)[part]).flatten().to(level.device)
            pair = (row[:, None] * replicates + torch.arange(replicates, device=row.device)).flatten()
            for depth in level[pair].unique().tolist():
                size, mass = num_samples << depth, (1 - LEVEL_RATIO) * LEVEL_RATIO**depth
                found = (level[pair] == depth).nonzero().squeeze(1)
                step = max(1, BLOCK_ELEMENTS // max(log_q.shape[-1], size * rows.k.shape[-1]))
                for some in found.split(step):
                    logits = log_q[some // replicates]
                    points = uniform(len(some), size)
                    indices, _ = invert(row_masses(logits), points)
                    which = pair[some] // replicates  # row of (N * M)
                    log_w = rows.exact(which, indices) - logits.gather(-1, indices)
                    w = log_w.view(-1, 1 << depth, num_samples).softmax(-1).flatten(1) / (1 << depth)
                    if depth:
                        halves = log_w.view(-1, 2, size // 2).softmax(-1).flatten(1)
                        w += (log_w.softmax(-1) - halves / 2) / mass
                    chunks.append((pair[some], indices, w))
                    means[pair[some]] = rows.average(which, indices, w)
        means = means.view(n, m, replicates, means.shape[-1])
        spent = (num_samples << level).view(n, m, replicates).sum(-1)  # [N, M]
        square, sums = rows.q.new_zeros(n * m), rows.q.new_zeros(n * m)
        for pair, _, w in chunks:
            square.index_add_(0, pair // replicates, w.square().sum(-1))
            sums.index_add_(0, pair // replicates, w.sum(-1))
        effective = (sums.square() / square.clamp_min(torch.finfo(square.dtype).tiny)).view(rows.row_shape)

        def make_draws() -> Draws:
            most = num_samples << int(level.max()) if len(level) else num_samples
            indices = torch.zeros(n * m * replicates, most, dtype=torch.int64, device=rows.q.device)
            weights = rows.q.new_zeros(indices.shape)
            for pair, drawn, w in chunks:
                indices[pair, : drawn.shape[1]], weights[pair, : w.shape[1]] = drawn, w / replicates
            shape = (*rows.row_shape, replicates * most)
            return Draws(indices.view(shape), weights.view(shape), None, replicates)

        def make_std_error() -> Tensor:
            return _standard_error(means).view(*rows.row_shape, rows.v.shape[-1])

        diagnostics = self._diagnostics(
            "debiased", num_samples, replicates, float(spent.double().mean()) if n * m else 0.0, effective
        )
        diagnostics["draws_of_each_row"] = spent.view(rows.row_shape)
        return AttentionEstimate(
            output=means.mean(-2).view(*rows.row_shape, rows.v.shape[-1]).to(rows.value_dtype),
            num_keys=rows.num_keys,
            degrees_of_freedom=max(1.0, replicates - 1.0),
            make_draws=make_draws,
            make_std_error=make_std_error if replicates > 1 else None,
            diagnostics=diagnostics,
        )

    def _diagnostics(
        self, estimator: str, num_samples: int, replicates: int, spent: float, effective: Tensor
    ) -> dict[str, Any]:
        fallbacks = () if bool(self.fitted) else (_NOT_FITTED,)
        return {
            "sampler": self.name,
            "estimator": estimator,
            "num_samples": num_samples,
            "replicates": replicates,
            "draws_per_row": spent,
            "effective_sample_size": effective,
            "fallbacks": fallbacks,
        }

    def _allocate(self, rows: _Rows, mean: int) -> Tensor:
        """The number of draws of each row, (N, M), int64, of mean at most `mean` (see `forward`)."""
        need = rows.q.new_empty(rows.shape)
        for heads, part in rows.blocks(1):
            collision = (2 * rows.log_proposal(heads, part)).exp().sum(-1)
            need[heads, part] = (1 - collision).clamp_min(0).sqrt()
        low, high = min(2, mean), MOST_DRAWS * mean
        few, many = 0.0, float(high / need.clamp_min(1e-6).amin()) if need.numel() else 0.0
        for _ in range(40):  # bisection: the mean grows with the factor
            middle = (few + many) / 2
            fits = bool((need * middle).clamp(low, high).mean(dtype=torch.float64) <= mean)
            few, many = (middle, many) if fits else (few, middle)
        return (need * few).clamp(low, high).long()


_NOT_FITTED = "The proposal was not fitted: it is the best low-rank map of this call's own queries and keys."
_SETTINGS = ("embed_dim", "rank", "num_heads", "points", "defensive")


class _Rows:
    """The rows of a call as (N, M): N problems, each with its keys, M = G * L rows that share them."""

    query: Tensor
    key: Tensor

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        is_causal: bool,
        scale: float,
        group: int,
        defensive: float,
    ):
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.row_shape = q.shape[:-1]  # (..., H, L)
        self.length, self.num_keys = q.shape[-2], k.shape[-2]
        count = k.shape[:-2].numel()
        self.shape = (count, group * self.length)
        self.k = k.to(dtype).reshape(count, self.num_keys, k.shape[-1])
        self.q = q.to(dtype).reshape(*self.shape, q.shape[-1])
        self.v = k.new_empty(count, self.num_keys, 0) if v is None else v
        self.value_dtype = self.v.dtype
        self.v = self.v.to(dtype).reshape(count, self.num_keys, self.v.shape[-1])
        self.is_causal, self.scale, self.defensive = is_causal, scale, defensive

    def blocks(self, draws: int) -> Iterator[tuple[slice, slice]]:
        """(heads, rows) of blocks whose workspace is bounded, in memory order."""
        count, rows = self.shape
        features = max(self.k.shape[-1], self.v.shape[-1])
        step = max(1, BLOCK_ELEMENTS // max(self.num_keys, draws * features))
        heads = max(1, step // max(1, rows))
        for head in range(0, count, heads):
            for row in range(0, rows, step):
                yield slice(head, min(head + heads, count)), slice(row, min(row + step, rows))

    def positions(self, rows: slice | Tensor) -> Tensor:
        """The last key that each row sees, (rows,), if causal."""
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.q.device)
        return (rows % self.length).clamp_max(self.num_keys - 1)

    def keys(self, rows: slice | Tensor, whole: bool = False) -> int:
        """How many keys a block needs: up to the last that one of its rows sees."""
        if whole or not self.is_causal:
            return self.num_keys
        return int(self.positions(rows).max()) + 1

    def mask(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """Logits (heads, rows, keys) with -inf at the keys that a row does not see."""
        if not self.is_causal:
            return logits
        key = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(key > self.positions(rows)[:, None], -torch.inf)

    def logits(self, heads: slice, rows: slice | Tensor) -> Tensor:
        """All exact logits of a block."""
        keys = self.num_keys if isinstance(rows, Tensor) else self.keys(rows)
        return self.mask(torch.bmm(self.q[heads, rows] * self.scale, self.k[heads, :keys].mT), rows)

    def log_target(self, heads: slice, rows: slice | Tensor) -> Tensor:
        """log p of a block, from all exact logits."""
        return self.logits(heads, rows).log_softmax(-1)

    def mix(self, logits: Tensor, rows: slice | Tensor) -> Tensor:
        """log q: (1 - epsilon) softmax(logits) + epsilon / (number of keys seen), -inf where masked."""
        if self.is_causal:
            seen = (self.positions(rows) + 1).to(logits.dtype)[:, None]
            uniform_part = torch.where(logits == -torch.inf, 0.0, self.defensive / seen)
            # The logarithm of a masked 0 has no gradient: 1 stands in for it.
            q = (1 - self.defensive) * logits.softmax(-1) + uniform_part
            masked = uniform_part == 0
            return q.masked_fill(masked, 1).log().masked_fill(masked, -torch.inf)
        return ((1 - self.defensive) * logits.softmax(-1) + self.defensive / logits.shape[-1]).log()

    def log_proposal(self, heads: slice, rows: slice, whole: bool = False) -> Tensor:
        """log q of a block, (heads, rows, keys)."""
        keys = self.keys(rows, whole)
        logits = torch.bmm(self.query[heads, rows] * self.scale, self.key[heads, :keys].mT)
        return self.mix(self.mask(logits, rows), rows)

    def draw(self, heads: slice, rows: slice, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(indices, exact logits, log q) of the keys at points (heads, rows, T), each (heads, rows, T)."""
        log_q = self.log_proposal(heads, rows)
        indices, _ = invert(row_masses(log_q), points)
        count, m = self.shape
        row = torch.arange(count, device=indices.device)[heads, None] * m
        row = (row + torch.arange(m, device=indices.device)[rows]).flatten()
        exact = self.exact(row, indices.flatten(0, 1)).view(indices.shape)
        return indices, exact, log_q.gather(-1, indices)

    def exact(self, row: Tensor, indices: Tensor) -> Tensor:
        """Exact logits of rows (B,) of the N * M at keys (B, T), and at no other: O(T E) each."""
        m, n = self.shape[1], self.num_keys
        if indices.shape[-1] > n:  # more draws than keys: each key's logit once is cheaper
            every = torch.arange(n, device=indices.device).expand(len(row), n)
            return self.exact(row, every).gather(-1, indices)
        k = F.embedding(indices + (row // m * n)[:, None], self.k.flatten(0, 1))  # [B, T, E]
        q = self.q.flatten(0, 1)[row] * self.scale
        return torch.bmm(k, q[..., None]).squeeze(-1)

    def average(self, row: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """sum_t weights_t v_{j_t} of rows (B,) at keys (B, T), (B, Ev)."""
        first = (row // self.shape[1] * self.num_keys)[:, None]
        return F.embedding_bag(indices + first, self.v.flatten(0, 1), per_sample_weights=weights, mode="sum")

    def log_z(self, heads: slice, rows: slice) -> Tensor:
        """The exact log-normaliser of a block, (heads, rows)."""
        return self.logits(heads, rows).logsumexp(-1)

    def log_distance(self, heads: slice, log_p: Tensor) -> Tensor:
        """log |v_j - o|^2, (heads, rows, keys), floored at 1e-9 of the values' mean square."""
        p, v = log_p.exp(), self.v[heads, : log_p.shape[-1]]
        o = torch.bmm(p, v)
        distance = v.square().sum(-1)[:, None] - 2 * torch.bmm(o, v.mT) + o.square().sum(-1, keepdim=True)
        floor = 1e-9 * v.square().sum(-1).mean() + torch.finfo(v.dtype).tiny
        return distance.clamp_min(floor).log()


def best_low_rank(q: Tensor, k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The maps of rank r that minimise the mean of (q . k - <A q, B k>)^2 over all pairs, keys centred.

    With C_q = mean of q q^T, C_k the covariance of the keys (a shift of all keys changes no attention row) and
    the singular value decomposition C_q^{1/2} C_k^{1/2} = U diag(s) W^T, cut off after r values,

        A^T = C_k^{1/2} W diag(s)^{-1/2},        B^T = C_q^{1/2} U diag(s)^{-1/2}

    (Eckart and Young 1936, in the metric of the queries' and keys' second moments).

    Parameters
    ----------
    q : Tensor, (N, M, E)
    k : Tensor, (N, n, E)
    rank : int
        r, 1 <= r <= E.

    Returns
    -------
    tuple of Tensor
        A^T and B^T, each (N, E, r), in q's dtype: q @ A^T and k @ B^T are the maps' values.
    """
    x, y = q.double(), k.double()
    y = y - y.mean(1, keepdim=True)
    root_q, root_k = (_root(t.mT @ t / max(1, t.shape[1])) for t in (x, y))
    u, s, wt = torch.linalg.svd(root_q @ root_k)
    s = s[..., None, :rank]
    # Directions without variance carry no logits: 0 rather than a division by 0.
    inverse = torch.where(s > 1e-12 * s[..., :1], s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt(), 0.0)
    a, b = root_k @ wt.mT[..., :rank] * inverse, root_q @ u[..., :rank] * inverse
    return a.to(q.dtype), b.to(q.dtype)


def _root(c: Tensor) -> Tensor:
    """The symmetric square root of positive semi-definite matrices (N, E, E)."""
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def _renyi(log_p: Tensor, log_q: Tensor, log_cost: Tensor | None = None) -> Tensor:
    """log sum_j cost_j p_j^2 / q_j of each row, in nats; masked keys add nothing."""
    masked = log_p == -torch.inf
    terms = 2 * log_p.masked_fill(masked, 0) - log_q.masked_fill(masked, 0)
    terms = terms if log_cost is None else terms + log_cost
    return terms.masked_fill(masked, -torch.inf).logsumexp(-1)


def _log_inclusion(log_q: Tensor, num_samples: int | Tensor, independent: bool) -> Tensor:
    """log pi of keys of probability q among S draws of a row."""
    if independent:
        q = log_q.exp().clamp_max(1)
        return (-torch.expm1(num_samples * torch.log1p(-q))).log()
    return (log_q.exp() * num_samples).clamp_max(1).log()


def _standard_error(means: Tensor) -> Tensor:
    """Standard error of the mean of independent replicates (..., R, d), R >= 2: (..., d)."""
    variance = means.var(-2) if means.numel() else means.sum(-2)
    return (variance / means.shape[-2]).sqrt()


def _spread(
    rows: _Rows,
    heads: slice,
    part: slice,
    draws: Draws,
    output: Tensor,
    proposal: Tensor,
    independent: bool,
) -> Tensor:
    """Variance of each coordinate of the self-normalised estimator, (heads, rows, d), by the delta method.

    With the keys seen at their estimated probabilities p_hat_j = w_j pi_j, and the rest, of mass
    1 - sum_{j seen} q_j under the proposal, at the mean over the row's keys:

        (1/R) [ sum_{j seen} ((1 - pi_j) / pi_j) p_hat_j^2 (v_j - o)^2 + (1/S) (1 - sum_{j seen} q_j) mean_j (v_j - o)^2 ].
    """
    replicates = draws.replicates
    size = draws.indices.shape[-1] // replicates
    centre = rows.v[heads].mean(1, keepdim=True)
    table = torch.cat((rows.v[heads] - centre, (rows.v[heads] - centre).square()), -1)
    o = output - centre
    pi = _log_inclusion(proposal.log(), size, independent).exp()
    by_replicate = draws.indices.unflatten(-1, (replicates, size))
    times = Draws(by_replicate, by_replicate).multiplicity().flatten(-2).to(pi.dtype)  # in its replicate
    once = 1 / draws.multiplicity().to(pi.dtype)  # in all of them
    weight = draws.weights * replicates * times  # w_j
    a = (1 - pi) * pi * weight.square() * once  # ((1 - pi) / pi) p_hat^2, each key once
    first, second = draws.average(table, a).chunk(2, -1)
    variance = second - 2 * o * first + o.square() * a.sum(-1, keepdim=True)
    unseen = (1 - (proposal * once).sum(-1, keepdim=True)).clamp_min(0) / size
    if rows.is_causal:
        count = torch.arange(1, rows.num_keys + 1, device=o.device, dtype=o.dtype)
        moments = (table.cumsum(1) / count[:, None])[:, rows.positions(part)]
    else:
        moments = table.mean(1, keepdim=True)
    first, second = moments.chunk(2, -1)
    variance += unseen * (second - 2 * o * first + o.square())
    return (variance / replicates).clamp_min(0)


def _asker(cancel: Cancel | None) -> Callable[[], bool]:
    if cancel is None:
        return lambda: False
    if isinstance(cancel, threading.Event):
        return cancel.is_set
    if not callable(cancel):
        raise DtypeError(
            f"cancel is a {type(cancel).__name__}; it must be a threading.Event or a function without arguments."
        )
    return lambda: bool(cancel())


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator.")


def _check_normaliser(given: Tensor, rows: torch.Size, estimator: str) -> None:
    if estimator != "plain":
        raise ArgumentError(f"log_normaliser is used by estimator='plain' only; given {estimator!r}.")
    if not isinstance(given, Tensor) or given.shape != rows:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ShapeError(
            f"log_normaliser has shape {shape}; it must be {tuple(rows)}, one for each row of Q."
        )
    if not bool(given.isfinite().all()):
        raise ArgumentError("log_normaliser holds NaN or infinity; only finite numbers are allowed.")


def _check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
    embed_dim: int,
    num_heads: int,
) -> int:
    """Refuse what cannot be attended to (see `estimate`); the number of query heads a key head."""
    given = [("Q", q), ("K", k)] + ([] if v is None else [("V", v)])
    for name, x in given:
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor.")
        if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise DtypeError(f"{name} is {x.dtype}; it must be float32, float64, float16 or bfloat16.")
        if x.dtype != q.dtype or x.device != q.device:
            raise DtypeError(f"{name} is {x.dtype} on {x.device}, Q is {q.dtype} on {q.device}.")
        if x.ndim < 2:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; it must be (..., length, features).")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given)
    if q.shape[-1] != embed_dim or k.shape[-1] != embed_dim:
        raise ShapeError(f"Q and K must have embed_dim={embed_dim} features; given {shapes}.")
    if v is not None and k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"K and V must agree in all but their last dimension; given {shapes}.")
    if k.shape[-2] == 0:
        raise ShapeError(f"there must be at least one key (n >= 1); given {shapes}.")
    group = 1
    if enable_gqa and q.ndim >= 3 and k.ndim >= 3 and k.shape[-3] and q.shape[-3] % k.shape[-3] == 0:
        group = q.shape[-3] // k.shape[-3]
    grouped = (*k.shape[:-3], k.shape[-3] * group) if group > 1 else k.shape[:-2]
    if q.shape[:-2] != torch.Size(grouped):
        hint = "Q's heads a multiple of K's" if enable_gqa else "the same (or enable_gqa=True)"
        raise ShapeError(
            f"the leading dimensions of Q and K do not fit, they must be {hint}; given {shapes}."
        )
    if num_heads > 1 and (k.ndim < 3 or k.shape[-3] != num_heads):
        raise ShapeError(
            f"K must have num_heads={num_heads} heads, (..., {num_heads}, n, E); given {shapes}."
        )
    if scale is not None and not math.isfinite(scale):
        raise ArgumentError(f"scale={scale} is not allowed: it must be a finite number.")
    for name, x in given:
        if x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(f"{name} requires a gradient, which is not given: pass a detached tensor.")
        if x.numel() and not all(bool(end.isfinite()) for end in x.aminmax()):
            raise ArgumentError(f"{name} holds NaN or infinity; only finite numbers are allowed.")
    return group
