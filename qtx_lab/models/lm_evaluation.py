"""lm-evaluation-harness with every language model and cache policy of the lab, by the name "qtx"."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..cache.policies import CachePolicy, make_policy
from ..errors import ArgumentError, TextError
from .calibration import adapter_policies, reseeded
from .generation import Decoding, Prefill
from .hub_results import HubResult, lm_eval_rows, write_hub_rows
from .language_model import load_language_model
from .text import read_text

HARNESS_DEVICE = "cuda:0"
"""Which device the harness asks for where its user does not."""

MAX_NEW_TOKENS = 256
"""Tokens that are generated at most where a task does not say."""


class PolicyScorer:
    """A language model that reads contexts exactly, and goes on by a cache policy.

    Of a context, all tokens but the last are read exactly. The last one, and those of the continuation,
    attend as the policy says, so that it decides the first token of an answer, too.

    Parameters
    ----------
    model : str
        As for `load_language_model`.
    policy : str
        As for `make_policy`.
    settings : str, optional
        In place of a policy: a file that `qtx-lab calibrate --json` wrote, or one that holds what
        `config.qtx_sampled` takes.
    seed : int
        Of all draws; every request has others.
    device : str
    **options
        Settings of the policy, `budget` among them.

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Examples
    --------
    >>> scorer = PolicyScorer("reference", "sampled", budget=16)
    >>> context = scorer.encode("The import statement")
    >>> log_probability, likeliest = scorer.score(context, scorer.encode(" is"))
    >>> log_probability < 0
    True
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        policy: str = "exact",
        settings: str | None = None,
        seed: int = 0,
        device: str = "cpu",
        **options: Any,
    ):
        self.model = load_language_model(model, device=device)
        self._device = torch.device(device)
        layers = self.model.config.layers
        self.policies: Sequence[CachePolicy]
        if settings is None:
            self.policies = [make_policy(policy, **{"seed": seed, **options})] * layers
        elif policy != "exact" or options:
            raise ArgumentError("settings is not allowed together with a policy or its options.")
        else:
            self.policies = adapter_policies(_read_settings(settings), layers)
        self._prompt: tuple[list[int], Prefill] | None = None  # the last, which several continuations have
        self._requests = 0

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without added ones."""
        return self.model.encode(text).tolist()

    def check_length(self, length: int) -> None:
        """Refuse, before any work, what would have to be cut off.

        Raises
        ------
        TextError
        """
        limit = self.model.config.context
        if length > limit:
            raise TextError(f"A request has {length} tokens; the context has {limit}.")

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-probability of a continuation, and whether all its tokens are the likeliest."""
        state = self._start(context)
        target = self._tokens(continuation)
        logits = state.logits
        if target.shape[1] > 1:
            logits = torch.cat((logits, state.steps(target[:, :-1])[0]))
        log_p = logits.float().log_softmax(-1)
        likeliest = bool((log_p.argmax(-1) == target[0]).all())
        return float(log_p.gather(-1, target[0, :, None]).sum()), likeliest

    def generate(self, context: list[int], until: Sequence[str], count: int) -> str:
        """The likeliest tokens after a context, up to `count`, before the first string of `until`."""
        state = self._start(context)
        tokens: list[int] = []
        text = ""
        for left in reversed(range(count)):
            token = state.logits[0].argmax(-1, keepdim=True)
            if int(token) in self.model.stop_tokens:
                break
            tokens.append(int(token))
            text = self.model.decode(torch.tensor(tokens))
            ends = [text.index(end) for end in until if end and end in text]
            if ends:
                return text[: min(ends)]
            if left:
                state.step(token)
        return text

    def _start(self, context: list[int]) -> Decoding:
        """Decoding after a context."""
        prompt = context[:-1] or context
        if self._prompt is None or self._prompt[0] != prompt:
            self._prompt = (prompt, Prefill.of(self.model, self._tokens(prompt)))
        self._requests += 1
        state = Decoding.after(self._prompt[1], reseeded(self.policies, self._requests))
        if len(prompt) < len(context):
            state.step(self._tokens(context)[0, -1:])
        return state

    def _tokens(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self._device)


def _read_settings(path: str) -> Any:
    """The settings in a file of JSON."""
    try:
        given = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ArgumentError(f"settings={path!r} is not JSON: {error}.") from error
    return given.get("qtx_sampled", given) if isinstance(given, dict) else given


def register_model() -> None:
    """Make `--model qtx` known to lm-evaluation-harness, with the arguments of `PolicyScorer`."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import MODEL_REGISTRY
    from lm_eval.api.registry import register_model as register
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class PolicyLM(TemplateLM):
        """What the harness asks of a model, by a `PolicyScorer`."""

        def __init__(
            self,
            batch_size: object = None,
            max_batch_size: object = None,
            device: str | None = None,
            **arguments: Any,
        ):
            super().__init__()
            if device == HARNESS_DEVICE and not torch.cuda.is_available():
                logging.getLogger("lm_eval").warning("There is no CUDA device: the model is on the CPU.")
                device = None
            self.scorer = PolicyScorer(device=device or "cpu", **arguments)  # one request after the other

        @property
        def eot_token_id(self) -> int:
            """The token at which texts end; a line's end where the model has none."""
            stop = self.scorer.model.stop_tokens
            return min(stop) if stop else self.scorer.encode("\n")[0]

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return self.scorer.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **_: Any
        ) -> list[tuple[float, bool]]:
            for _, context, continuation in requests:
                self.scorer.check_length(len(context) + len(continuation))
            bar = tqdm(requests, desc="scoring", disable=disable_tqdm)
            return [self.scorer.score(context, continuation) for _, context, continuation in bar]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in tqdm(requests, desc="scoring", disable=disable_tqdm):
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.scorer.model.config.context - 1,
                    context_len=1,
                )
                pairs = map(make_disjoint_window, windows)
                totals.append(sum(self.scorer.score(*pair)[0] for pair in pairs))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            jobs = [_generation(self.scorer, *request.args) for request in requests]
            return [self.scorer.generate(*job) for job in tqdm(jobs, disable=disable_tqdm)]

    if "qtx" not in MODEL_REGISTRY:
        register("qtx")(PolicyLM)


def _generation(
    scorer: PolicyScorer, context: str, asked: dict[str, Any]
) -> tuple[list[int], Sequence[str], int]:
    """The arguments of `PolicyScorer.generate` that a task means."""
    if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
        raise ArgumentError("do_sample=True is not allowed: tokens are the likeliest ones.")
    until = asked.get("until") or []
    count = int(asked.get("max_gen_toks", MAX_NEW_TOKENS))
    tokens = scorer.encode(context)
    scorer.check_length(len(tokens) + count)
    return tokens, [until] if isinstance(until, str) else until, count


def run_harness(arguments: Sequence[str], hub: Path | None = None) -> None:
    """Run lm-evaluation-harness's own command line, in which `--model qtx` is this lab's.

    Parameters
    ----------
    arguments : sequence of str
        As after `lm-eval`.
    hub : Path, optional
        File for the results in the schema of the sparse-attention hub: see `HubResult`.

    Raises
    ------
    ArgumentError
        If results are asked for in that schema, and the harness had none.
    """
    from lm_eval.__main__ import cli_evaluate

    register_model()
    with tempfile.TemporaryDirectory() as folder:
        given = list(arguments)
        if hub is not None:
            if any(x.split("=")[0] in ("--output_path", "-o") for x in given):
                raise ArgumentError("--output_path is not allowed together with --hub.")
            given += ["--output_path", folder]
        former, sys.argv = sys.argv, ["lm-eval", *given]
        try:
            cli_evaluate()
        finally:
            sys.argv = former
        if hub is not None:
            write_hub_rows(hub, _rows(Path(folder)))


def _rows(folder: Path) -> list[HubResult]:
    """The rows of the results that the harness wrote to a folder."""
    written = sorted(folder.rglob("results_*.json"))
    if not written:
        raise ArgumentError("--hub is for evaluations; the harness wrote no results.")
    results = json.loads(written[-1].read_text(encoding="utf-8"))
    options = dict(results["config"]["model_args"] or {})
    llm = str(options.pop("model", options.pop("pretrained", results["config"]["model"])))
    budget = options.get("budget")
    return lm_eval_rows(
        results,
        baseline=str(options.get("policy", "calibrated" if "settings" in options else "exact")),
        llm=llm,
        target_sparsity=100 * budget if isinstance(budget, float) else None,
        additional_params=options,
    )
