"""A proposal from a learned low-rank projection: exact logits only at the drawn keys."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import MAX_SEED, check_count, check_flags, check_generator, check_number
from ..errors import ArgumentError, FallbackWarning, ShapeError, unknown_name
from ..estimates import AttentionEstimate, Draws, EstimateInfo
from ..problem import AttentionProblem
from ..storage import read_tensors, write_tensors
from ..streams import Stream, make_seed
from .base import Budget, SampledRows, Sampler, StreamSampler
from .inversion_sampler import InversionSampler
from .learned_estimators import adaptive, debiased, importance
from .learned_fit import Cancel, FitHistory, asker, fit_maps, start
from .learned_proposal import ProposedRows, renyi
from .monte_carlo import MonteCarloSampler
from .systematic import SystematicSampler

log = logging.getLogger(__name__)

ESTIMATORS = ("self-normalised", "plain", "debiased")
STARTS = ("low-rank", "random", "current")
POINTS: dict[str, type[InversionSampler]] = {cls.name: cls for cls in (MonteCarloSampler, SystematicSampler)}
NOT_FITTED = "The proposal was not fitted: it is the best low-rank map of this call's own queries and keys."
SETTINGS = ("embed_dim", "rank", "num_heads", "points", "defensive")


class LearnedImportanceSampler(nn.Module, StreamSampler):
    """A proposal q(j | query) from a learned low-rank projection, corrected by the exact logits of the draws.

    For a query x and keys k_j, with the probabilities p_j proportional to exp(scale x . k_j),

        q_j = (1 - epsilon) softmax_j(scale <A x + a, B k_j>) + epsilon / n,        A, B of rank r <= E / 2,

    so that a query costs O(n r) for the proposal and O(S E) for the exact logits of S drawn keys. The uniform
    part is a defensive mixture (Owen and Zhou, Safe and effective importance sampling, 2000): every
    importance weight is at most p_j n / epsilon, and the variance at most 1 / (1 - epsilon) times the one
    without it. Masks act on both.

    **Estimators** (`estimate`). Let D be the distinct keys among S draws and pi_j the probability that key j
    is among them: 1 - (1 - q_j)^S for independent points, min(1, S q_j) for systematic ones.

    - `self-normalised`: o_hat = sum_{j in D} w_j v_j with w_j proportional to exp(scale x . k_j) / pi_j
      (Hajek 1971), so that a key drawn twice counts no more than one drawn once, and one sure to be drawn has
      no noise. Needs no normaliser. Biased, to leading order and for pi_j << 1 the classical term, E[o_hat] -
      o = -sum_j ((1 - pi_j) / pi_j) p_j^2 (v_j - o)  ->  -(1/S) sum_j (p_j^2 / q_j) (v_j - o), which is
      O(1/S); its variance is sum_j ((1 - pi_j) / pi_j) p_j^2 (v_j - o)^2, also O(1/S).
    - `plain`: o_hat = sum_{j in D} (p_j / pi_j) v_j with the exact normaliser of p (Horvitz and Thompson
      1952). Unbiased; its weights need not sum to 1. The normaliser costs O(n E) where it is not given.
    - `debiased`: classical self-normalised estimates (weights p_j / q_j of independent draws) at S 2^l draws,
      telescoped up to a random level l of probability P(l),

          Z = mean of the 2^l estimates at S + [l > 0] (o_hat(all) - (o_hat(half) + o_hat(other half)) / 2) /
          P(l),

      unbiased with finite variance and 2.2 S draws on average (Rhee and Glynn, Unbiased estimation with
      square root convergence for SDE models, 2015; with antithetic halves for functions of means Blanchet and
      Glynn, Unbiased Monte Carlo for optimization and functions of expectations via multi-level
      randomization, 2015).

    **Training** (`fit`) minimises the variance itself. What the variances above exceed those of draws from p
    by is the variance of the importance weights, chi^2(p || q) = sum_j p_j^2 / q_j - 1. Its direction
    matters: it punishes q_j << p_j, where weights explode, which KL(q || p) forgives. Minimised is the mean
    over rows of log(1 + chi^2), Renyi's divergence of order 2, so that no single row dominates; with values V
    given, the logarithm of the summed variance of the rows, sum_j (p_j^2 / q_j) |v_j - o|^2, over that of
    draws from p, which is the squared error of the output itself. With a number of draws given, it minimises
    the variance at that number, (1 - pi_j) / pi_j in place of 1 / q_j (`learned_proposal.SURE` of it): the
    weight of a key that is drawn with certainty does not matter. With systematic points this cuts the error
    by a tenth and more. The start is the best rank-r map in the least-squares sense (`best_low_rank`). A
    sampler that was not fitted uses that map of each call's own queries and keys, and says so in
    `diagnostics["fallbacks"]`.

    As a `Sampler`, `draw` is given exact logits and draws from them: unbiased.

    Parameters
    ----------
    embed_dim : int, optional
        E >= 2, features of a query and of a key; where None, those of each call, until `fit` settles them.
    rank : int, optional
        r, 1 <= r <= E / 2; E / 2 where None.
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
    self_normalised = True
    takes_sinks = True
    exchangeable = False
    fitted: Tensor

    def __init__(
        self,
        embed_dim: int | None = None,
        rank: int | None = None,
        num_heads: int = 1,
        *,
        points: str = "systematic",
        defensive: float = 0.02,
    ):
        super().__init__()
        num_heads = check_count("num_heads", num_heads)
        if rank is not None:
            rank = check_count("rank", rank)
        if points not in POINTS:
            raise unknown_name("points", points, POINTS)
        defensive = check_number("defensive", defensive, above=0, below=1)
        self.embed_dim, self.rank, self.num_heads = embed_dim, rank, num_heads
        self.points, self.defensive = points, defensive
        self.independent = POINTS[points].independent
        self.history: FitHistory | None = None
        for name in ("query_map", "query_bias", "key_map"):  # A^T, a and B^T
            self.register_parameter(name, None)
        self.register_buffer("fitted", torch.tensor(False))
        if embed_dim is not None:
            self._settle(embed_dim)

    def _settle(self, embed_dim: int) -> None:
        """Make the maps for this many features."""
        embed_dim = check_count("embed_dim", embed_dim)
        self.embed_dim, self.rank = embed_dim, self._rank(embed_dim)
        shape = (self.num_heads, embed_dim, self.rank)
        self.query_map, self.key_map = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        self.query_bias = nn.Parameter(torch.zeros(self.num_heads, 1, self.rank))

    def _rank(self, embed_dim: int) -> int:
        if embed_dim < 2:
            raise ArgumentError(f"embed_dim={embed_dim} is not allowed: it must be at least 2.")
        rank = embed_dim // 2 if self.rank is None else self.rank
        if rank > embed_dim // 2:
            raise ArgumentError(
                f"rank={rank} is not allowed: it must be in 1..{embed_dim // 2}, half of embed_dim."
            )
        return rank

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)

    # --- Drawing ------------------------------------------------------------------------------

    def draw_from(
        self,
        stream: Stream,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draws from softmax(logits) itself: where exact logits are given, a proposal saves nothing.

        See `Sampler.draw_from`. The proposal is used by `estimate`, `estimate_rows` and `forward`.
        """
        exact = POINTS[self.points]()
        return exact.draw_from(stream, logits, num_samples, values=values, replicates=replicates)

    def correctable(self) -> Sampler:
        """The plain estimator of the same proposal, which knows the probabilities of its draws."""
        return PlainProposal(self)

    def estimate_rows(
        self,
        problem: AttentionProblem,
        budget: Budget,
        stream: Stream,
        *,
        estimator: str = "self-normalised",
        log_normaliser: Tensor | None = None,
    ) -> SampledRows:
        """An estimate from draws of the proposal: see `Sampler.estimate_rows`.

        `estimate` says which estimators there are.
        """
        self._check(problem)
        info = EstimateInfo(
            sampler=self.name,
            unbiased=estimator != "self-normalised",
            estimator=estimator,
            num_samples=budget.num_samples,
            replicates=budget.replicates,
            fallbacks=() if bool(self.fitted) else (NOT_FITTED,),
        )
        with torch.no_grad():
            rows = self._propose(problem)
            if estimator == "debiased":
                return debiased(rows, budget, stream, info)
            sampler, plain = POINTS[self.points](), estimator == "plain"
            return importance(rows, sampler, budget, stream, info, plain=plain, log_normaliser=log_normaliser)

    def estimate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_samples: int = 32,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        replicates: int = 1,
        estimator: str = "self-normalised",
        log_normaliser: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> AttentionEstimate:
        """Estimate softmax(q k^T scale + mask) v from draws of the proposal; no gradients.

        Parameters
        ----------
        q, k, v, attn_mask, is_causal, scale, enable_gqa
            As in `sampled_attention`, with E = embed_dim.
        num_samples : int
            S, the draws of a row and replicate; of the debiased estimator, of its first level.
        replicates : int
            R independent repetitions, averaged. The bias stays that of S draws.
        estimator : {"self-normalised", "plain", "debiased"}
            See the class.
        log_normaliser : Tensor, (..., H, L), optional
            log sum_j exp(logit_j), for the plain estimator; computed in O(n E) where None.
        generator : torch.Generator, optional
            The only source of randomness; torch's default generator of the device where None.

        Returns
        -------
        AttentionEstimate
            `draws` hold a weight for each draw (w_j shared by the draws of a key; negative ones, and rows
            padded by weight 0, in the debiased estimator); probabilities only in the plain one, which knows
            them. `std_error` of the self-normalised estimator: the variance above by the delta method, from
            the draws (`learned_errors.Spread`); of the others: from the replicates, None for one.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Before any work: as `sampled_attention`; an unknown estimator, a log_normaliser for another
            estimator.
        """
        num_samples = check_count("num_samples", num_samples)
        replicates = check_count("replicates", replicates)
        if estimator not in ESTIMATORS:
            raise unknown_name("estimator", estimator, ESTIMATORS)
        check_generator(generator)
        problem = self._problem(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if log_normaliser is not None:
            _check_normaliser(log_normaliser, problem.row_shape, estimator)
            log_normaliser = log_normaliser.to(problem.queries).reshape(problem.shape)
        stream = problem.stream(make_seed(generator))
        sampled = self.estimate_rows(
            problem,
            Budget(num_samples, replicates),
            stream,
            estimator=estimator,
            log_normaliser=log_normaliser,
        )
        return sampled.to_estimate(problem)

    def forward(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        base_num_samples: int = 32,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The self-normalised estimate of `estimate`, with more draws in the rows that need them.

        How many a row gets depends on the proposal (`learned_estimators.allocate`) and not on the draws,
        which adds no bias; where the proposal is far from p on peaked rows, it is too few there.

        Parameters
        ----------
        Q, K, V, attn_mask, is_causal, scale, enable_gqa, generator
            As in `estimate`.
        base_num_samples : int
            The most draws of a row, on average over the rows of the call.

        Returns
        -------
        Tensor, (..., H, L, Ev), V's dtype

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As in `estimate`.
        """
        base_num_samples = check_count("base_num_samples", base_num_samples)
        check_generator(generator)
        problem = self._problem(
            Q, K, V, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if not bool(self.fitted):
            warnings.warn(NOT_FITTED, FallbackWarning, stacklevel=3)  # where the module is called
        stream = problem.stream(make_seed(generator))
        with torch.no_grad():
            output = adaptive(self._propose(problem), base_num_samples, self.independent, stream)
        return problem.in_units(output).view(*problem.row_shape, problem.width).to(V.dtype)

    def proposal(
        self,
        q: Tensor,
        k: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """q(j | query) of every row, (..., H, L, n), for plots and tests.

        It takes memory L * n. Errors are as for `estimate`.
        """
        problem = self._problem(
            q, k, k, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        count, rows = problem.shape
        with torch.no_grad():
            proposal = self._propose(problem).log_proposal(slice(0, count), slice(0, rows)).exp()
            proposal = F.pad(proposal, (0, problem.num_keys - proposal.shape[-1]))
        return proposal.view(*problem.row_shape, problem.num_keys)

    def chi_square(
        self,
        q: Tensor,
        k: Tensor,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """chi^2(p || q) of every row, (..., H, L), from all exact logits.

        It takes O(n E) operations a row. Errors are as for `estimate`.
        """
        problem = self._problem(
            q, k, k, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        result = problem.queries.new_empty(problem.shape)
        with torch.no_grad():
            rows = self._propose(problem)
            for block in rows.blocks(1):
                result[block] = renyi(rows.log_target(*block), rows.log_proposal(*block)).expm1().clamp_min(0)
        return result.view(problem.row_shape)

    def _problem(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> AttentionProblem:
        """The problem of a call, checked; its tensors must not require gradients."""
        problem = AttentionProblem.of(q, k, v, **call)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(
                    f"{name} requires a gradient, which a sampler's own estimate does not have: use "
                    "sampled_attention, call it under torch.no_grad(), or pass detached tensors."
                )
        self._check(problem)
        return problem

    def _propose(self, problem: AttentionProblem) -> ProposedRows:
        maps = (self.query_map, self.query_bias, self.key_map) if bool(self.fitted) else None
        if maps is None:
            log.info(NOT_FITTED)
        return ProposedRows(problem, maps, self._rank(problem.q.shape[-1]), self.defensive)

    def _check(self, problem: AttentionProblem) -> None:
        """Refuse what does not fit these settings."""
        q, k = problem.q, problem.k
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        if self.embed_dim not in (None, q.shape[-1]):
            raise ShapeError(f"q and k must have embed_dim={self.embed_dim} features; given {shapes}.")
        if self.num_heads > 1 and (k.ndim < 3 or k.shape[-3] != self.num_heads):
            raise ShapeError(
                f"k must have num_heads={self.num_heads} heads, (..., {self.num_heads}, n, E); given "
                f"{shapes}."
            )

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
        num_samples: int | None = None,
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
        num_samples : int, optional
            The draws that it will be used with: what is minimised is then the variance at that many.
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
        steps = check_count("steps", steps, 0)
        check_flags(progress=progress)
        batch_rows = check_count("batch_rows", batch_rows)
        if num_samples is not None:
            num_samples = check_count("num_samples", num_samples)
        lr = check_number("lr", lr, above=0)
        if initialise not in STARTS:
            raise unknown_name("initialise", initialise, STARTS)
        if seed is not None and generator is not None:
            raise ArgumentError(f"seed={seed} and generator exclude each other: give one of them.")
        check_generator(generator)
        cancelled = asker(cancel)
        if seed is not None:
            seed = check_count("seed", seed, 0, MAX_SEED)
            generator = torch.Generator().manual_seed(seed)
        values = K if V is None else V
        problem = self._problem(Q, K, values, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        if Q.shape[:-1].numel() == 0:
            raise ShapeError(f"q has shape {tuple(Q.shape)}: there must be at least one row to fit to.")
        if self.embed_dim is None:
            self._settle(Q.shape[-1])
        maps = self.query_map, self.query_bias, self.key_map
        with torch.no_grad():
            problem = problem.detached()
            start(maps, problem, initialise, generator)
            self.fitted.fill_(True)
        with torch.enable_grad():
            self.history = fit_maps(
                maps,
                problem,
                defensive=self.defensive,
                use_values=V is not None,
                num_samples=num_samples,
                independent=self.independent,
                steps=steps,
                lr=lr,
                batch_rows=batch_rows,
                generator=generator,
                progress=progress,
                cancelled=cancelled,
            )
        if steps and self.history.best_step == 0:
            warnings.warn(
                f"None of {self.history.steps[-1]} steps made the proposal better than the best low-rank "
                "map, which is kept: these queries and keys have no more structure than that, or lr is too "
                "large.",
                FallbackWarning,
                stacklevel=2,
            )
        return self.history

    # --- On disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the parameters as safetensors, the settings and the history as JSON in its metadata.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        settings = {name: getattr(self, name) for name in SETTINGS}
        metadata = {
            "learned_importance_sampler": json.dumps(settings),
            "history": json.dumps(None if self.history is None else asdict(self.history)),
        }
        write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> LearnedImportanceSampler:
        """The sampler that `save` wrote, on the CPU.

        Raises
        ------
        ArgumentError
            If the file is missing or holds something else.
        """
        try:
            state, metadata = read_tensors(path)
            settings = json.loads(metadata["learned_importance_sampler"])
            history: dict[str, Any] | None = json.loads(metadata["history"])
            sampler = cls(**settings)
            sampler.load_state_dict(state)
            if history is not None:
                values: dict[str, Any] = {
                    name: tuple(x) if isinstance(x, list) else x for name, x in history.items()
                }
                sampler.history = FitHistory(**values)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"path={str(path)!r} does not hold a learned sampler: {error}") from error
        return sampler


class PlainProposal(Sampler):
    """The unbiased estimator of a `LearnedImportanceSampler`, which knows the probabilities of its draws."""

    name = "learned"
    unbiased = True

    def __init__(self, proposal: LearnedImportanceSampler):
        self.proposal = proposal

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys: see `LearnedImportanceSampler.draw_from`."""
        return self.proposal.draw(
            logits, num_samples, values=values, generator=generator, replicates=replicates
        )

    def estimate_rows(self, problem: AttentionProblem, budget: Budget, stream: Stream) -> SampledRows:
        """The plain estimate: see `LearnedImportanceSampler.estimate`."""
        return self.proposal.estimate_rows(problem, budget, stream, estimator="plain")


def _check_normaliser(given: Tensor, rows: torch.Size, estimator: str) -> None:
    if estimator != "plain":
        raise ArgumentError(f"log_normaliser is used by estimator='plain' only; given {estimator!r}.")
    if not isinstance(given, Tensor) or given.shape != rows:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ShapeError(
            f"log_normaliser has shape {shape}; it must be {tuple(rows)}, one for each row of q."
        )
    if not bool(given.isfinite().all()):
        raise ArgumentError("log_normaliser holds NaN or infinity; only finite numbers are allowed.")
