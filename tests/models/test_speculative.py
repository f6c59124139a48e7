"""Lossless generation gives the exact model's text, in distribution and greedily, and a report of it."""

import math
import os

import pytest
import torch
from scipy import stats

import qtx_lab as qtx
from qtx_lab.models import speculative
from qtx_lab.models.speculative import Draft, DraftLength, PassCounts

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


def uniform_ranks(tokens, p, order, u):
    """Numbers that are uniform on [0, 1) where tokens (M,) have the distribution p (V,).

    They are in the order of `order` (V,), with u (M,) uniform beside the tokens.
    """
    upto = p[order].cumsum(0)[order.argsort()]
    return upto[tokens] - u * p[tokens]


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
        ranks.append(uniform_ranks(tokens, p_row, p_row.argsort(), u))
        often = p_row < q_row
        mass = float(p_row[often].sum())
        excess += (int(often[tokens].sum()) - draws * mass) / (1 - mass)
        variance += draws * mass / (1 - mass)
    of_classes = stats.chi2.sf(excess**2 / variance, 1)
    return min(1.0, 2 * min(p_value(torch.cat(ranks)), of_classes))


@pytest.mark.statistical
def test_accepted_and_replaced_tokens_have_the_exact_distribution(model, monkeypatch):
    p, q = drafted_pairs(model, monkeypatch, 40)
    draws = math.ceil(1e6 / len(p))
    assert p_value_of_acceptance(p, q, draws) > FALSE_ALARM
    is_accepted = speculative.is_accepted
    for error in (1.005, 0.995):  # a draft is accepted in so many times the cases in which it should be
        with monkeypatch.context() as patch:
            patch.setattr(speculative, "is_accepted", lambda t, p, q, u, e=error: is_accepted(t, e * p, q, u))
            assert p_value_of_acceptance(p, q, draws) < FALSE_ALARM


def text_is_exact(model, count, seed):
    """Ranks of the bytes of a sampled text among what the model itself, attending exactly, says of each."""
    prompt = qtx.encode(TEXT)[:64]
    options = {"temperature": 1.0, "num_samples": 4, "max_drafts": 3}
    text = b"".join(model.generate(prompt, count, lossless=True, generator=generator(seed), **options))
    new = torch.tensor(list(text))
    with torch.no_grad():
        p = model(torch.cat((prompt, new))[None])[0, 63:-1].double().softmax(-1)
    g = generator(seed)
    u = torch.rand(count, dtype=p.dtype, generator=g)
    return torch.stack([uniform_ranks(t, row, row.argsort(), x) for t, row, x in zip(new, p, u, strict=True)])


@pytest.mark.statistical
@pytest.mark.timeout(40_000)
def test_sampled_texts_have_the_exact_distribution(model):
    texts = 1050 if SOAK else 1
    count = 960 if SOAK else 100
    ranks = torch.cat([text_is_exact(model, count, seed) for seed in range(texts)])
    assert p_value(ranks) > FALSE_ALARM


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
    ({"lossless": 1}, "lossless=1 is not allowed"),
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


def test_other_texts_have_no_report(model):
    with pytest.raises(qtx.ArgumentError, match="lossless=True only"):
        _ = model.generate(TEXT, 5).report
