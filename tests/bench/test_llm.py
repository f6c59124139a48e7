"""`qtx-lab bench llm`: methods side by side are the methods one by one, and a stopped run goes on."""

import itertools

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.bench import llm
from qtx_lab.cache.policies import ExactPolicy, make_policy
from qtx_lab.models.generation import Decoding, Prefill
from qtx_lab.models.tasks import make_task
from qtx_lab.models.tasks.scoring import score_prompt
from qtx_lab.models.tasks.side_by_side import score_methods

METHODS = ("head-tail", "cache, int4", "Quest")
PLAN = llm.TaskPlan("long-text", 256, 2, (0.1,), METHODS)


@pytest.fixture(scope="module")
def model():
    return qtx.load_language_model("reference")


@pytest.fixture(scope="module", autouse=True)
def two_at_a_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm, "SIDE_BY_SIDE", 2)
        yield


@pytest.fixture(scope="module")
def outcomes(model):
    return list(llm.measure(model, PLAN))


def test_methods_side_by_side_score_as_one_by_one(model):
    prompt = make_task("long-text", model, length=200, seed=1)
    prefill = Prefill.of(model, prompt.tokens[None])
    every_key = make_policy("sampled", budget=300)  # rounding changes no draw
    policies = [every_key, ExactPolicy(), make_policy("oracle-top-k", budget=5)]
    together = score_methods(prefill, prompt, policies)
    for policy, (score, reads) in zip(policies, together, strict=True):
        state = Decoding.after(prefill, policy)
        alone = score_prompt(model, prompt, lambda state=state: state)
        assert score.log_probability == pytest.approx(alone.log_probability, abs=2e-3)
        assert reads.bytes == pytest.approx(state.reads.bytes)
    with pytest.raises(qtx.ArgumentError, match="prefill has 2 prompts"):
        Decoding.side_by_side(prefill.repeated(2), policies)


def test_a_batch_of_one_prompt_decodes_as_the_prompt_does(model):
    tokens = model.encode(qtx.reference_text())[:60]
    prefill = Prefill.of(model, tokens[None])
    one, three = Decoding.after(prefill, ExactPolicy()), Decoding.after(prefill.repeated(3), ExactPolicy())
    token = torch.tensor([65])
    torch.testing.assert_close(
        three.step(token.expand(3)), one.step(token).expand(3, -1), atol=1e-4, rtol=1e-4
    )


def test_every_method_is_measured_on_the_same_prompts(outcomes):
    by_method = {name: [x for x in outcomes if x.method == name] for name in ("exact", *METHODS)}
    assert all(len(x) == PLAN.prompts for x in by_method.values())
    assert len({x.digest for x in outcomes}) == PLAN.prompts
    for exact, *others in zip(*by_method.values(), strict=True):
        assert (exact.divergence, exact.bytes) == (None, 1.0)
        assert all(x.divergence > -1e-9 and x.bytes < 1 for x in others)


def test_rows_say_what_is_lost_and_who_is_on_the_front(outcomes, capsys):
    rows = {row.method.partition(",")[0] + row.method[-4:]: row for row in llm.task_rows(PLAN, outcomes)}
    exact = next(row for row in rows.values() if row.method == "exact")
    assert (exact.error, exact.details["bytes"]) == (0.0, 1.0)
    for row in rows.values():
        d = row.details
        assert d["score low"] <= d["score"] <= d["score high"] < 0  # nats
        assert row.error == -d["difference"]
    assert "10 % of keys" in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_the_same_numbers(model, outcomes):
    some = list(itertools.islice(llm.measure(model, PLAN), 3))
    rest = list(llm.measure(model, PLAN, some))
    assert len(some) + len(rest) == len(outcomes)

    def numbers(x):
        return (x.seed, x.method, x.bytes)

    assert sorted(map(numbers, some + rest)) == sorted(map(numbers, outcomes))
    scores = {(x.seed, x.method): x.log_probability for x in outcomes}
    for x in some + rest:
        # Other methods beside it round otherwise, which moves a draw now and then.
        assert x.log_probability == pytest.approx(scores[x.seed, x.method], abs=1)


def test_the_loss_over_text_falls_with_better_draws(model):
    rows = {row.method: row for row in llm.text_rows(model, 256, 2)}
    assert rows["exact"].error == 0
    assert 0 < rows["head-tail"].error < rows["monte-carlo"].error


def test_the_time_of_a_token_is_compared_only_where_the_logits_are_near(model):
    rows = llm.speed_rows(model, ((200, 2),))
    assert [row.method for row in rows] == list(llm.SPEED_METHODS)
    assert all((row.ratio is None) == (row.error > llm.ALLOWED_LOGITS) for row in rows)
