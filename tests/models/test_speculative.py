"""Lossless generation gives the exact model's text, in distribution and greedily, and a report of it."""

import itertools
import math
import os
from collections import Counter

import pytest
import torch
from greenlet import getcurrent, greenlet
from scipy import stats

import qtx_lab as qtx
from qtx_lab.models import speculative
from qtx_lab.models.speculative import Draft, DraftLength, PassCounts, SampledDrafter, token_probabilities

TEXT = qtx.reference_text()[:400]

SOAK = os.environ.get("QTX_LAB_SOAK", "0") not in ("", "0")

FALSE_ALARM = 1e-4
"""How often a right implementation fails a statistical test here; seeds are fixed."""


@pytest.fixture(scope="module")
def model():
    return qtx.load_reference_model()


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "options",
    [{"num_samples": 8, "rank": 8}, {"proposal": "mixed", "rank": 8, "max_drafts": 3}, {"proposal": "exact"}],
)
def test_greedily_it_is_the_text_of_exact_attention(model, options):
    exact = b"".join(model.generate(TEXT, 40, proposal=None))
    pieces = model.generate(TEXT, 40, lossless=True, generator=generator(0), **options)
    assert b"".join(pieces) == exact
    report = pieces.report
    assert report.tokens == 39 == report.passes + sum(report.accepted)
    assert report.drafted[0] <= report.passes
    assert all(a >= b for a, b in zip(report.accepted, report.drafted[1:], strict=False))
    assert len(report.drafted) <= options.get("max_drafts", 7)
    assert report.tokens_per_pass > 1
    assert report.attention_bytes > report.passes / 39


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    texts = [
        qtx.generate(model, TEXT, 15, lossless=True, temperature=1.0, num_samples=8, generator=generator(s))
        for s in (3, 3, 4)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_a_cache_keeps_is_from_exact_passes_alone(model):
    tokens = qtx.encode(TEXT)
    drafter = speculative.SampledDrafter.after(model, tokens[:300], "low-rank", 8, 4, 0)
    for i in range(300, 303):
        drafter.draft(int(tokens[i]) ^ 1)
    logits = drafter.verify(tokens[300:305].tolist())
    drafter.keep(2)
    more = drafter.verify(tokens[302:310].tolist())
    drafter.keep(8)
    with torch.no_grad():
        exact = model(tokens[None, :310])[0]
    torch.testing.assert_close(logits, exact[300:305], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(more, exact[302:310], atol=2e-4, rtol=1e-4)
    for cache, (_, k, v) in zip(drafter.caches, model.attention_inputs(tokens[None, :310]), strict=True):
        held = cache.tokens()
        torch.testing.assert_close(held[0], k, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(held[1], v, atol=2e-4, rtol=1e-4)


# --- The distribution -----------------------------------------------------------------------------


KEPT = 31
"""Tokens of the vocabulary that are told apart at a position, the others being one."""


def drafted_pairs(model, monkeypatch, count):
    """The exact p and the drafter's q, float64 (positions, KEPT + 1), where the model drafted a text.

    At temperature 2 there is much to reject.
    """
    pairs = []

    def record(tokens, p, q, u):
        order = p.argsort(descending=True)
        pairs.append([torch.cat((x[order[:KEPT]], x[order[KEPT:]].sum(0, keepdim=True))) for x in (p, q)])
        return is_accepted(tokens, p, q, u)

    is_accepted = speculative.is_accepted
    with monkeypatch.context() as patch:
        patch.setattr(speculative, "is_accepted", record)
        options = {"temperature": 2.0, "num_samples": 4, "max_drafts": 2}
        list(model.generate(TEXT, count, lossless=True, generator=generator(0), **options))
    return [torch.stack(x) for x in zip(*pairs, strict=True)]


def uniform_ranks(tokens, p, u):
    """Numbers that are uniform on [0, 1) where tokens (M,) have the distributions p (M, V), or all p (1, V).

    Tokens are in the order of their probabilities, with u (M,) uniform beside them.
    """
    order = p.argsort(-1)
    upto = p.gather(-1, order).cumsum(-1).gather(-1, order.argsort(-1))
    upto, of_token = (x.expand(len(tokens), -1).gather(-1, tokens[:, None])[:, 0] for x in (upto, p))
    return upto - u * of_token


def p_value(ranks, bins=10):
    """Of Pearson's chi-squared test that numbers are uniform on [0, 1)."""
    return stats.chisquare(torch.histc(ranks, bins, 0, 1).numpy()).pvalue


def p_value_of_acceptance(p, q, draws):
    """Of two chi-squared tests that accepted and replaced tokens have the distribution p.

    There are `draws` of them at each position. One test is of all tokens, in ten classes of equal
    probability. The other is of two classes, the tokens that a draft takes too often (p < q) and the others,
    between which a wrong acceptance moves probability; positions count by how much it moves there.
    """
    g, ranks = generator(1), []
    excess, variance = 0.0, 0.0
    for p_row, q_row in zip(p, q, strict=True):
        drafts = q_row.multinomial(draws, replacement=True, generator=g)
        rows = [x.expand(draws, -1) for x in (p_row, q_row)]
        tokens, _ = speculative.accept_or_replace(drafts, *rows, g)
        u = torch.rand(draws, dtype=p.dtype, generator=g)
        ranks.append(uniform_ranks(tokens, p_row[None], u))
        often = p_row < q_row
        mass = float(p_row[often].sum())
        excess += (int(often[tokens].sum()) - draws * mass) / (1 - mass)
        variance += draws * mass / (1 - mass)
    of_classes = stats.chi2.sf(excess**2 / variance, 1)
    return min(1.0, 2 * min(p_value(torch.cat(ranks)), of_classes))


@pytest.mark.statistical
def test_accepted_and_replaced_tokens_have_the_exact_distribution(model, monkeypatch):
    p, q = drafted_pairs(model, monkeypatch, 40)
    draws = math.ceil(6e6 / len(p))
    assert p_value_of_acceptance(p, q, draws) > FALSE_ALARM
    is_accepted = speculative.is_accepted
    for error in (1.005, 0.995):  # a draft is accepted in so many times the cases in which it should be
        with monkeypatch.context() as patch:
            patch.setattr(speculative, "is_accepted", lambda t, p, q, u, e=error: is_accepted(t, e * p, q, u))
            assert p_value_of_acceptance(p, q, draws) < FALSE_ALARM


TEMPERATURE = 0.8
"""Of sampled texts: drafts are often more sure than the exact model, where a wrong acceptance shows most."""


class LaneDrafter:
    """The drafter of one of many texts: it asks for what it does, and all texts are answered at once."""

    def __init__(self, logits):
        self.logits, self.draft_reads = logits, 0.0

    def draft(self, token):
        draft, self.draft_reads = getcurrent().parent.switch(token)
        return draft

    def verify(self, tokens):
        return getcurrent().parent.switch(tokens)

    def keep(self, count):
        getcurrent().parent.switch(count)


class ManyDrafters(SampledDrafter):
    """Drafts and verifies many texts of equal length at once, in caches of many sequences."""

    def draft_all(self, tokens):
        self._errors = []
        tokens = torch.tensor(tokens)[:, None]
        logits = self._forward(tokens, len(self.caches[0]), self._attend_by_draws)[:, 0]
        error = math.sqrt(sum(self._errors) / len(self._errors))
        return [(Draft(x, error), self.draft_reads) for x in logits]

    def verify_all(self, tokens):
        longest = max(map(len, tokens))  # what is filled in after a text changes no logits before it
        logits = self._verify(torch.tensor([x + [0] * (longest - len(x)) for x in tokens]))
        return [x[: len(y)] for x, y in zip(logits, tokens, strict=True)]

    def select(self, index):
        for cache in self.caches:
            cache.select_sequences(torch.tensor(index))


def sampled_texts(model, prompt, count, seed, passes=6):
    """`count` texts after one prompt, each by a loop of its own; what the loops ask for is computed together.

    Caches hold texts of one length, so that after a pass those texts go on that kept as many tokens as most
    did. Which these are is known before their next token is drawn: each token of each text has its exact
    distribution given those before it.
    """
    drafter = ManyDrafters.after(model, prompt, "low-rank", 8, 32, seed)
    drafter.select([0] * count)
    g = generator(seed)
    texts = [[] for _ in range(count)]

    def write(text):
        for token in speculative.speculate(
            LaneDrafter(drafter.logits),
            model.config.context,
            lambda before, logits: token_probabilities(logits, TEMPERATURE),
            DraftLength(3, TEMPERATURE),
            PassCounts(),
            generator=g,
        ):
            text.append(token)

    lanes = [greenlet(write) for _ in texts]
    asked = [lane.switch(text) for lane, text in zip(lanes, texts, strict=True)]
    for _ in range(passes):
        while any(isinstance(x, int) for x in asked):  # those that wait for their exact pass draft nothing
            drafts = drafter.draft_all([x if isinstance(x, int) else 0 for x in asked])
            asked = [
                lane.switch(draft) if isinstance(x, int) else x
                for lane, x, draft in zip(lanes, asked, drafts, strict=True)
            ]
        kept = [lane.switch(x) for lane, x in zip(lanes, drafter.verify_all(asked), strict=True)]
        usual = Counter(kept).most_common(1)[0][0]
        drafter.keep(usual)
        asked = [lane.switch() for lane in lanes]
        going_on = [i for i, x in enumerate(kept) if x == usual]
        lanes, asked = ([x[i] for i in going_on] for x in (lanes, asked))
        drafter.select(going_on)
    return texts


def exact_probabilities(model, prompt, tokens):
    """What the model says of tokens (B, T) after one prompt, by exact attention without a cache of ours."""
    before = model.attention_inputs(prompt[None])

    def attend(layer, q, k, v):
        _, k_before, v_before = (x.expand(len(q), -1, -1, -1) for x in before[layer])
        k, v = torch.cat((k_before, k), 2), torch.cat((v_before, v), 2)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(len(prompt))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    with torch.no_grad():
        first = model(prompt[None], logits_to_keep=1).expand(len(tokens), -1, -1)
        logits = torch.cat((first, model(tokens[:, :-1], attend, len(prompt))), 1)
    return (logits.double() / TEMPERATURE).softmax(-1)


class Decisions:
    """What `accept_or_replace` gives in place of drafts, in two classes: see `p_value_of_acceptance`.

    Each draft of the texts is decided on three times: as it should be, by which the text goes on, and, by
    other random numbers, accepted in 1 - `error` and in 1 + `error` times the cases in which it should be.
    Decisions count by how much probability the last would move.
    """

    def __init__(self, error):
        self.error, self.count = error, 0
        self._excess, self._variance = dict.fromkeys((1, 1 - error, 1 + error), 0.0), 0.0

    def patch(self, patch):
        right, decide = speculative.is_accepted, speculative.accept_or_replace
        times = 1

        def is_accepted(tokens, p, q, u):
            return right(tokens, times * p, q, u)

        def accept_or_replace(drafts, p, q, g):
            nonlocal times
            often = p < q
            mass = float(p[often].sum())
            variance = mass * (1 - mass)
            weight = float((torch.minimum(q, (1 + self.error) * p) - p)[often].sum()) / max(variance, 1e-12)
            self.count += 1
            self._variance += variance * weight**2
            for times in reversed(self._excess):
                result = decide(drafts, p, q, g)
                self._excess[times] += (float(often[result[0]]) - mass) * weight
            return result

        patch.setattr(speculative, "is_accepted", is_accepted)
        patch.setattr(speculative, "accept_or_replace", accept_or_replace)

    def p_values(self):
        """By how many times a draft is accepted too often."""
        return {times: stats.chi2.sf(x**2 / self._variance, 1) for times, x in self._excess.items()}


@pytest.mark.statistical
@pytest.mark.timeout(7200)
def test_sampled_texts_have_the_exact_distribution(model, monkeypatch):
    tokens, texts, error = (1_000_000, 512, 0.005) if SOAK else (2_000, 96, 0.5)
    manual, g, ranks = qtx.encode(qtx.reference_text()), generator(1 << 40), []
    decisions = Decisions(error)
    decisions.patch(monkeypatch)
    # Error bars only decide how many tokens are drafted; those of one layer take less time.
    monkeypatch.setattr(speculative, "LAYERS_WITH_ERROR_BARS", 1)
    for seed in itertools.count():
        if sum(map(len, ranks)) >= tokens:
            break
        prompt = manual[97 * seed :][:64]
        new = [torch.tensor(x) for x in sampled_texts(model, prompt, texts, seed)]
        padded = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
        there = torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in new])[:, None]
        p = exact_probabilities(model, prompt, padded)[there]
        ranks.append(uniform_ranks(padded[there], p, torch.rand(len(p), dtype=p.dtype, generator=g)))
    of_ranks, of_decisions = p_value(torch.cat(ranks)), decisions.p_values()
    print(f"{sum(map(len, ranks)):,} tokens, {decisions.count:,} decisions: {of_ranks}, {of_decisions}")
    assert decisions.count > tokens / 2
    assert min(of_ranks, of_decisions[1]) > FALSE_ALARM / 2
    assert max(of_decisions[1 - error], of_decisions[1 + error]) < FALSE_ALARM / 2


# --- How many tokens are drafted ------------------------------------------------------------------


def test_drafting_stops_where_the_error_bars_say_that_the_next_token_is_unsure():
    sure, unsure = torch.zeros(10), torch.zeros(10)
    sure[3], unsure[3], unsure[4] = 12.0, 1.0, 0.999

    def drafts(logits, error):
        length, made = DraftLength(12), 0
        while length.goes_on():
            length.drafted(Draft(logits, error))
            made += 1
        return made

    assert drafts(sure, 0.1) > drafts(unsure, 0.1) >= 1
    assert drafts(unsure, 1e-6) > drafts(unsure, 0.1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_length_follows_the_acceptance(temperature):
    logits = torch.linspace(0, 5, 20)
    length, counts = DraftLength(12, temperature), PassCounts()
    before = length.predicted(Draft(logits, 0.1))
    for _ in range(30):  # exact logits are far from what was drafted
        counts.add(2, 0)
        counts.draft_reads += 0.2
        length.learn([Draft(logits, 0.1)] * 2, logits.flip(0).expand(3, -1), 0, counts)
    assert length.acceptance < 0.1
    assert length.predicted(Draft(logits, 0.1)) < before
    length.begin()
    length.drafted(Draft(logits, 0.1))
    assert not length.goes_on()


# --- Refusals -------------------------------------------------------------------------------------

BAD = [
    ({"lossles": True}, "Did you mean 'lossless'"),
    ({"lossless": True, "proposal": None}, "exact already"),
    ({"max_drafts": 3}, "max_drafts=3 is for lossless=True only"),
    ({"lossless": True, "max_drafts": 0}, "max_drafts=0"),
    ({"lossless": True, "max_drafts": 8}, "max_drafts=8 is not allowed.*up to 7 drafts"),
    ({"lossless": True, "rank": 33}, "rank=33"),
]


@pytest.mark.parametrize(("options", "match"), BAD)
def test_settings_that_cannot_be_lossless_are_refused_on_the_call(model, options, match):
    with pytest.raises(qtx.ArgumentError, match=match):
        model.generate(TEXT, 5, **options)


def test_lossless_is_true_or_false(model):
    with pytest.raises(qtx.DtypeError, match="lossless=1 is not allowed"):
        model.generate(TEXT, 5, lossless=1)


def test_other_texts_have_no_report(model):
    with pytest.raises(qtx.ArgumentError, match="lossless=True only"):
        _ = model.generate(TEXT, 5).report
