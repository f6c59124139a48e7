"""`QuantumMultiheadAttention`, torch's attention module with drawn keys, and how a model's own modules
become it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_generator, transformed
from ..errors import ArgumentError, DtypeError, ShapeError, TransformError
from ..estimates import AttentionEstimate
from ..problem import AttentionProblem
from ..samplers import Sampler, make_sampler
from .corrections import ControlVariate, make_controls
from .dispatch import attend
from .gradients import outside_graphs
from .settings import AttentionSettings

if TYPE_CHECKING:
    from ..backends import HybridPolicy, QiskitQuantumBackend
    from .quantum_layers import AttentionKind


class QuantumMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose heads average values of drawn keys.

    Constructor, forward arguments, shapes, return values and `state_dict` are torch's; with `sampler="exact"`
    so are the outputs. It runs on what torch calls the slow path: torch's fused layers never bypass it.

    What differs:

    - A row in which everything is masked gives 0, where torch gives NaN or 0.
    - The attention weights that `need_weights=True` returns, a dense (L, n) matrix, are those of the draws,
      with no gradient.
    - In training, `dropout` drops a key for all queries of a head at once, and scales the others by
      1 / (1 - dropout): each weight has torch's mean and variance, but no (L, n) mask is needed. The returned
      weights are those before dropout.

    Parameters
    ----------
    embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        As for `torch.nn.MultiheadAttention`.
    sampler : str or Sampler, optional
        As for `sampled_attention`; "systematic" where neither it nor a backend is given.
    num_samples : int, optional
        Draws a row and replicate: the backend's shots where None, 64 without a backend.
    replicates : int
        Independent repetitions, averaged; two or more give every sampler error bars.
    control_variate : str, Control, MultilevelControlVariate, or a list of names and controls, optional
        As for `sampled_attention`: no masks but the `is_causal` hint without `need_weights`.
    quantum_backend : QiskitQuantumBackend, optional
        Draws by measuring circuits on it, in place of a sampler.
    hybrid_mode : bool or HybridPolicy
        Draws by pseudo-random numbers what the backend cannot do, with a FallbackWarning: see
        `CircuitSampler`.
    kind : str or AttentionKind
        What makes queries, keys and values of heads: "softmax", torch's linear projections; "orthogonal",
        orthogonal layers on unary states; "quantum-kernel", states whose fidelity is the logit; or an object
        of `qtx_lab.attention.quantum_layers` with other settings. Their classical controls with as many
        parameters are "orthogonal-control" and "quantum-kernel-control", to be trained for comparison. Kinds
        other than "softmax" have parameters `heads.*` in place of `in_proj_*`, and take kdim = vdim =
        embed_dim and neither add_bias_kv nor add_zero_attn. The draws, masks and outputs are the same for
        every kind.
    generator : torch.Generator, optional
        The source of the draws and of dropout; torch's default generator where None. Copies of the module
        share it: each forward of any of them takes the next seed, so that the layers of a
        `torch.nn.TransformerEncoder`, which are copies, draw independently and the generator's seed decides
        all their draws. A module loaded from a file has a generator of its own, in the state that was saved.

    Attributes
    ----------
    heads : torch.nn.Module or None
        The layer of a kind other than "softmax".
    last_estimate : AttentionEstimate or None
        Of the latest forward, all heads (N, num_heads, L, head_dim) before the output projection, without a
        gradient; not kept in copies and files, nor under `torch.func`, whose tensors end with the transform.

    Raises
    ------
    ArgumentError, DtypeError
        If a setting is not allowed, or a sampler and a backend are both given.

    Examples
    --------
    >>> import torch
    >>> settings = {"sampler": "head-tail", "num_samples": 8, "replicates": 2}
    >>> attn = QuantumMultiheadAttention(16, 4, batch_first=True, **settings)
    >>> x = torch.randn(2, 10, 16)
    >>> output, weights = attn(x, x, x)
    >>> output.shape, weights.shape, attn.last_estimate.std_error.shape
    (torch.Size([2, 10, 16]), torch.Size([2, 10, 10]), torch.Size([2, 4, 10, 4]))
    """

    heads: nn.Module | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sampler: str | Sampler | None = None,
        num_samples: int | None = None,
        replicates: int = 1,
        control_variate: ControlVariate | None = None,
        quantum_backend: QiskitQuantumBackend | None = None,
        hybrid_mode: bool | HybridPolicy = False,
        kind: str | AttentionKind = "softmax",
        generator: torch.Generator | None = None,
    ):
        settings = attention_settings(
            sampler=sampler,
            num_samples=num_samples,
            replicates=replicates,
            control_variate=control_variate,
            quantum_backend=quantum_backend,
            hybrid_mode=hybrid_mode,
            generator=generator,
        )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype,
        )  # fmt: skip
        self._adopt(settings)
        if kind != "softmax":
            self._replace_projections(kind)

    def _replace_projections(self, kind: str | AttentionKind) -> None:
        """Give the module the layer of another kind in place of torch's projections."""
        from .quantum_layers import make_kind

        chosen = make_kind(kind)
        given = {"kdim": self.kdim, "vdim": self.vdim}
        for name, size in given.items():
            if size != self.embed_dim:
                raise ArgumentError(
                    f"{name}={size} is not allowed with kind={chosen.name!r}; it must be embed_dim."
                )
        if self.bias_k is not None or self.add_zero_attn:
            raise ArgumentError(f"add_bias_kv and add_zero_attn are not allowed with kind={chosen.name!r}.")
        weight = self.out_proj.weight
        for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, None)
        self.heads = chosen.build(self.embed_dim, self.num_heads).to(weight)

    def _adopt(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.last_estimate: AttentionEstimate | None = None
        self.heads = None
        # torch's fused layers ask for it, and would read the weights and bypass forward.
        self._qkv_same_embed_dim = False

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_estimate": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "heads" not in state["_modules"]:  # files of earlier versions do not have it
            state = {"heads": None, **state}
        super().__setstate__(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantumMultiheadAttention:
        generator = self.settings["generator"]
        memo[id(generator)] = generator  # shared: two copies of it would draw the same keys
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return other

    def __prepare_scriptable__(self) -> NoReturn:
        raise TransformError(
            "QuantumMultiheadAttention draws keys, which torch.jit.script cannot compile: use torch.compile."
        )

    def extra_repr(self) -> str:
        sampler, num_samples = self.settings["sampler"].name, self.settings["num_samples"]
        return f"{self.embed_dim}, {self.num_heads}, sampler={sampler!r}, num_samples={num_samples}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: arguments and results are those of `torch.nn.MultiheadAttention`.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If inputs do not fit the module or each other, are nested, or cannot be attended to
            (`sampled_attention`).
        """
        self._check(query, key, value)
        batched, dtype = query.ndim == 3, query.dtype
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        shape = (*query.shape[:2], key.shape[1])
        if is_causal and attn_mask is None:
            raise ArgumentError(
                "is_causal=True is a hint that attn_mask is causal: give attn_mask too, as torch asks."
            )
        hint = is_causal and key_padding_mask is None and not need_weights  # as torch does
        mask = None if hint else self._merge(key_padding_mask, attn_mask, shape, dtype)

        q, k, v = self._heads(query, key, value)
        if mask is not None:  # what was added is not masked
            mask = F.pad(mask, (0, k.shape[-2] - shape[2]), value=mask.dtype == torch.bool)
        if self.training:
            v = drop_keys(v, self.dropout, self.settings["generator"])
        estimate = estimate_heads(q, k, v, mask, hint, self.settings)
        self.last_estimate = None if transformed() else replace(estimate, output=estimate.output.detach())

        output = self.out_proj(estimate.output.transpose(1, 2).flatten(-2))
        weights = None
        if need_weights:
            weights = estimate.attention_weights().to(output.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        given = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, features) in given.items():
            if not isinstance(x, Tensor) or x.is_nested:
                what = "a nested tensor" if isinstance(x, Tensor) else f"a {type(x).__name__}"
                raise DtypeError(f"{name} is {what}; it must be a dense torch.Tensor.")
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != features:
                raise ShapeError(
                    f"{name} has shape {tuple(x.shape)}; it must have {features} features and 2 dimensions, "
                    "or 3 for a batch, all three alike."
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ShapeError(
                f"key {tuple(key.shape)} and value {tuple(value.shape)} must be as long as each other."
            )

    def _merge(
        self, padding: Tensor | None, mask: Tensor | None, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one of `sampled_attention`, (N or 1, heads or 1, L or 1, n).

        True means that a key is attended to.
        """
        batch, length, keys = shape
        parts = []
        if padding is not None:
            if padding.shape != (batch, keys):
                raise ShapeError(
                    f"key_padding_mask has shape {tuple(padding.shape)}; it must be {(batch, keys)}."
                )
            parts.append(padding[:, None, None])
        if mask is not None:
            full = (batch * self.num_heads, length, keys)
            if mask.shape not in (full, full[1:]):
                raise ShapeError(f"attn_mask has shape {tuple(mask.shape)}; it must be {full[1:]} or {full}.")
            parts.append(mask.unflatten(0, (batch, self.num_heads)) if mask.ndim == 3 else mask[None, None])
        if all(x.dtype == torch.bool for x in parts):
            parts = [~x for x in parts]
            return parts[0] & parts[-1] if parts else None
        parts = [
            torch.zeros_like(x, dtype=dtype).masked_fill_(x, -torch.inf) if x.dtype == torch.bool else x
            for x in parts
        ]
        return sum(parts[1:], parts[0])

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, (N, num_heads, length, features)."""
        if self.heads is not None:
            heads: tuple[Tensor, Tensor, Tensor] = self.heads(query, key, value)
            return heads
        q, k, v = self._project(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((x, b.to(x.dtype).expand(len(x), 1, -1)), 1)
                for x, b in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        packed = cast(Tensor | None, self.in_proj_weight)
        if packed is not None:
            weights: Sequence[Tensor] = packed.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases: Sequence[Tensor | None] = (
            (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        )
        inputs = (query, key, value)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


@outside_graphs
def estimate_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, settings: dict[str, Any]
) -> AttentionEstimate:
    """The estimate of all heads (N, num_heads, L, head_dim) by the settings of a module."""
    how = {name: x for name, x in settings.items() if name != "generator"}
    problem = AttentionProblem.of(q, k, v, attn_mask=mask, is_causal=is_causal)
    return attend(problem, AttentionSettings.of(**how), settings["generator"])


def drop_keys(v: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """Values (..., n, d) of which whole keys are dropped at a rate, as dropout of the weights in training.

    The others are made larger, so that the mean stays the same.
    """
    if dropout == 0:
        return v
    source = v.device if generator is None else generator.device
    u = torch.rand(v.shape[:-1], generator=generator, device=source).to(v.device)
    factor = (u >= dropout) / (1 - dropout) if dropout < 1 else u * 0
    return v * factor[..., None].to(v.dtype)


def attention_settings(
    *,
    sampler: str | Sampler | None = None,
    num_samples: int | None = None,
    replicates: int = 1,
    control_variate: ControlVariate | None = None,
    quantum_backend: QiskitQuantumBackend | None = None,
    hybrid_mode: bool | HybridPolicy = False,
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """The arguments of `sampled_attention` that settings of a `QuantumMultiheadAttention` mean.

    Raises
    ------
    ArgumentError, DtypeError
        If a setting is not allowed, a sampler and a backend are both given, or hybrid_mode without a backend.
    """
    drawn_by: Sampler
    if quantum_backend is not None:
        if sampler is not None:
            raise ArgumentError(
                f"sampler={sampler!r} and quantum_backend exclude each other: give one of them."
            )
        from ..backends import CircuitSampler

        drawn_by = CircuitSampler(quantum_backend, hybrid_mode=hybrid_mode)
        num_samples = quantum_backend.shots if num_samples is None else num_samples
    elif hybrid_mode is not False:
        raise ArgumentError(f"hybrid_mode={hybrid_mode!r} needs a quantum_backend.")
    else:
        drawn_by = make_sampler("systematic" if sampler is None else sampler)
    num_samples = 64 if num_samples is None else num_samples
    num_samples = check_count("num_samples", num_samples)
    replicates = check_count("replicates", replicates)
    if control_variate is not None:
        make_controls(control_variate)
    check_generator(generator)
    return {
        "sampler": drawn_by,
        "num_samples": num_samples,
        "replicates": replicates,
        "control_variate": control_variate,
        "generator": generator,
    }


@dataclass(frozen=True)
class ReplacedAttention:
    """What `replace_attention` did, and the way back: `undo`, or the end of a `with` block.

    Parameters
    ----------
    layers : dict
        The modules that draw now, by their names in the model.
    restore : callable
    """

    layers: dict[str, QuantumMultiheadAttention]
    restore: Callable[[], None]

    def undo(self) -> None:
        """Make the layers torch's again, with the weights that they have now.

        A second call changes nothing.
        """
        self.restore()

    def __enter__(self) -> ReplacedAttention:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()


def replace_attention(model: nn.Module, **settings: Any) -> ReplacedAttention:
    """Make every `torch.nn.MultiheadAttention` in a model a `QuantumMultiheadAttention`.

    The model itself may be one, too.

    Modules stay the same objects with the same parameters and hooks, so that optimisers and references hold.
    Nested tensors, torch's short cut for padded batches, are switched off in every
    `torch.nn.TransformerEncoder` around them. Classes derived from `torch.nn.MultiheadAttention` are left
    alone.

    Parameters
    ----------
    model : torch.nn.Module
    **settings
        `sampler`, `num_samples`, `replicates`, `control_variate`, `quantum_backend`, `hybrid_mode` and
        `generator`, as for `QuantumMultiheadAttention`; shared by all layers.

    Returns
    -------
    ReplacedAttention

    Raises
    ------
    ArgumentError, DtypeError
        If a setting is not allowed, or the model has no such module.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    >>> x = torch.randn(2, 10, 16)
    >>> with torch.no_grad(), replace_attention(layer, num_samples=8) as replaced:
    ...     output = layer(x)
    ...     replaced.layers["self_attn"].last_estimate.draws.indices.shape
    torch.Size([2, 4, 10, 8])
    >>> type(layer.self_attn).__name__
    'MultiheadAttention'
    """
    checked = attention_settings(**settings)
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module.")
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.MultiheadAttention}
    if not layers:
        raise ArgumentError(
            f"model, a {type(model).__name__}, has no torch.nn.MultiheadAttention to replace."
        )
    nested = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    for encoder in nested:
        encoder.use_nested_tensor = False
    for layer in layers.values():
        layer.__class__ = QuantumMultiheadAttention
        layer._adopt(checked)  # type: ignore[operator]

    def restore() -> None:
        for encoder in nested:
            encoder.use_nested_tensor = True
        for layer in layers.values():
            if type(layer) is QuantumMultiheadAttention:
                layer.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
                layer._qkv_same_embed_dim = layer.in_proj_weight is not None
                del layer.settings, layer.last_estimate, layer.heads

    return ReplacedAttention(layers, restore)  # type: ignore[arg-type]
