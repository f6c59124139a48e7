"""`SoftmaxCircuitSampler`: draws keys by circuits that compute the softmax of queries and keys."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..circuits import SoftmaxLoader
from ..circuits.softmax import check_vectors, row_vectors
from ..errors import ArgumentError, DtypeError, FallbackWarning, ShapeError
from ..estimates import Draws
from ..problem import AttentionProblem
from ..samplers import Sampler
from ..samplers.base import Budget, Facts, SampledRows, average_rows, check_draw_arguments
from ..streams import Stream
from .counts import RowCounts
from .qiskit import QiskitQuantumBackend
from .requests import RowRequest
from .sampler import all_discarded, deal


def _check_rows(q: Tensor, k: Tensor, allowed: Tensor | None) -> None:
    """Refuse what `SoftmaxCircuitSampler.measure` does not take for queries and keys of rows."""
    check_vectors(q, k, allowed)
    given = f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}"
    if q.dim() != 2 or k.dim() not in (2, 3) or k.shape[-1] != q.shape[1]:
        raise ShapeError(f"{given}; they must be (R, d) and (R, n, d), or (n, d) for keys of all rows.")
    if k.dim() == 3 and len(k) != len(q):
        raise ShapeError(f"{given}; both must have as many rows.")
    if allowed is not None and allowed.shape != (len(q), k.shape[-2]):
        raise ShapeError(
            f"allowed has shape {tuple(allowed.shape)}; it must be (R, n) = ({len(q)}, {k.shape[-2]})."
        )


class SoftmaxCircuitSampler(Sampler):
    """A sampler whose circuits are given queries and keys, and compute the softmax that they draw from.

    It is for small problems: at most 64 keys, and few components. Each shot that passes is a draw; the
    others are discarded, and the draws that are left have the weight 1 / valid shots. Without noise, draws
    come from a distribution within the total variation `tolerance` of the row, so that the estimate is biased
    by that much.

    Computing this softmax and drawing from it on a classical computer is exact and takes less than a
    microsecond a row: the draws of `info.classical` are those. See `SoftmaxLoader` for the circuit and for
    what it costs.

    Parameters
    ----------
    backend : QiskitQuantumBackend
        Where circuits are run; its loader is not used.
    degree, rounds, max_logit, tolerance
        As for `SoftmaxLoader`. Its `features` are those of the queries.

    Raises
    ------
    DtypeError, ArgumentError
        If an argument has the wrong type or is out of its bounds.

    Examples
    --------
    >>> import qtx_lab as qtx
    >>> sampler = SoftmaxCircuitSampler(QiskitQuantumBackend("aer"), degree=6)
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = torch.rand(3, 1, 4, 2, generator=g)
    >>> estimate = qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=4000, generator=g)
    >>> exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    >>> bool((estimate.output - exact).abs().max() < 0.05)
    True
    """

    name = "softmax-circuit"
    exchangeable = True  # shots are independent, from whatever distribution
    classical_baseline = "monte-carlo"

    def __init__(
        self,
        backend: QiskitQuantumBackend,
        *,
        degree: int = 12,
        rounds: int = 0,
        max_logit: float | None = None,
        tolerance: float = 0.01,
    ):
        if not isinstance(backend, QiskitQuantumBackend):
            raise DtypeError(f"backend is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")
        self.backend = backend
        self.settings = {"degree": degree, "rounds": rounds, "max_logit": max_logit, "tolerance": tolerance}
        self.loader(1)  # refuses settings that are not allowed
        self.last_facts: Mapping[str, Any] = {}

    def loader(self, features: int) -> SoftmaxLoader:
        """The circuits for queries of so many components."""
        return SoftmaxLoader(features, **self.settings)  # type: ignore[arg-type]

    def measure(
        self,
        q: Tensor,
        k: Tensor,
        shots: int | None = None,
        *,
        scale: float | None = None,
        allowed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Measure rows that are given by their queries and keys.

        Parameters
        ----------
        q : Tensor, (R, d)
        k : Tensor, (R, n, d) or (n, d)
        shots : int, optional
            Shots of each row, discarded ones included; those of the backend where None.
        scale : float, optional
            1 / sqrt(d) if None.
        allowed : Tensor, bool, (R, n), optional
            Keys that may be drawn. A row without any is not run.
        generator : torch.Generator, optional
            The only source of randomness of a simulator and of the classical baseline.

        Returns
        -------
        RowCounts
            `classical` has as many draws from the exact softmax. Its diagnostics are those of
            `QiskitQuantumBackend.sample_rows` and `success_probability` and `alpha` (by theory, without
            noise, of each row that is run), `key_loads` (of a shot) and `error_free_probability` (of the
            transpiled circuit).

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As for `SoftmaxLoader.vector_angles`, or if an argument has another shape.
        BackendUnavailable
            If the device cannot be reached, or cannot run the circuit.
        """
        _check_rows(q, k, allowed)
        loader = self.loader(q.shape[-1])
        k = k.expand(len(q), *k.shape[-2:])
        allowed = torch.ones(k.shape[:2], dtype=torch.bool) if allowed is None else allowed.cpu()
        running = allowed.any(-1)
        here = (q.cpu()[running], k.cpu()[running])
        expected, bindings = loader.computed(*here, scale=scale, allowed=allowed[running])
        p = torch.zeros(k.shape[:2], dtype=torch.float64)
        p[running] = expected.softmax
        backend = self.backend.with_loader(loader)
        request: RowRequest = backend.request(p, shots, generator)
        if not len(here[0]):
            return request.finish_counts([])
        circuit, engine = backend.transpiled(p.shape[-1]), backend.engine
        facts = {
            **backend.diagnostics(circuit, request),
            "success_probability": expected.amplified,
            "alpha": expected.alpha,
            "key_loads": expected.key_loads,
            "error_free_probability": float(np.prod([1 - e for e in engine.errors(circuit)])),
        }
        request = RowRequest(p, loader, request.shots, request.seed, facts)
        return request.finish_by(engine.run, circuit, bindings)

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys of rows of logits, as keys of one component; arguments and result as for `Sampler.draw`.

        Raises
        ------
        ArgumentError
            If the degree is too low for the range of a row's logits.
        """
        num_samples, replicates = check_draw_arguments(logits, num_samples, replicates)
        rows = logits.reshape(-1, logits.shape[-1]).to("cpu", torch.float64)
        allowed = rows > -torch.inf
        q, k = row_vectors(rows)
        return self._draws(q, k, 1.0, allowed, logits, Budget(num_samples, replicates), generator)

    def estimate_rows(self, problem: AttentionProblem, budget: Budget, stream: Stream) -> SampledRows:
        """Estimate the rows of a problem from its queries and keys; see `Sampler.estimate_rows`.

        Raises
        ------
        ArgumentError
            If the problem has a bias or a softcap: the circuit computes the softmax of products alone.
        """
        if problem.softcap is not None or (problem.mask is not None and problem.mask.dtype != torch.bool):
            raise ArgumentError(
                "sampler='softmax-circuit' computes the softmax of q·k alone: softcap, and an attn_mask of "
                "numbers, which are added to it, are not allowed. Give a boolean mask."
            )
        facts = Facts()

        def draw(heads: slice, rows: slice) -> Draws:
            logits = problem.logits(heads, rows)
            n = logits.shape[-1]
            q = problem.queries[heads, rows].flatten(0, 1)
            k = problem.keys[heads, None, :n].expand(*logits.shape, -1).flatten(0, 1)
            allowed = (logits > -torch.inf).flatten(0, 1)
            generator = stream.of_block(heads, problem.positions(rows)).make_generator()
            draws = self._draws(q, k, problem.scale, allowed, logits, budget, generator)
            facts.add(self.last_facts)
            return draws

        return average_rows(problem, budget, draw, self, facts)

    def _draws(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        allowed: Tensor,
        logits: Tensor,
        budget: Budget,
        generator: torch.Generator | None,
    ) -> Draws:
        """Draws of the rows of logits (..., n)."""
        counts = self.measure(q, k, budget.total, scale=scale, allowed=allowed, generator=generator)
        empty = int((allowed.any(-1).cpu() & (counts.counts.sum(-1) == 0)).sum())
        fallbacks = tuple(counts.diagnostics.get("fallbacks", ()))
        if empty:
            message = all_discarded(budget.total, empty, len(q))
            fallbacks += (message,)
            warnings.warn(message, FallbackWarning, stacklevel=4)
        self.last_facts = {
            **counts.diagnostics,
            "quantum_rows": int(allowed.any(-1).sum()),
            "discarded_shots": counts.discarded,
            "fallbacks": fallbacks,
        }
        keys, weights = deal(counts.counts, budget.total, budget.replicates, generator)
        shape = (*logits.shape[:-1], budget.total)
        return Draws(
            keys.view(shape).to(logits.device), weights.view(shape).to(logits), None, budget.replicates
        )
