"""IBM accounts: whatever the file or the environment holds, the answer is a sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qtx_lab.backends import QiskitQuantumBackend
from qtx_lab.backends.ibm.accounts import account_problem
from qtx_lab.backends.ibm.engine import IBMEngine
from qtx_lab.backends.ibm.jobs import find_jobs
from qtx_lab.errors import ArgumentError, BackendUnavailable, DtypeError

pytestmark = pytest.mark.hardware

P = torch.tensor([[0.5, 0.5]])
GOOD = {"channel": "ibm_quantum_platform", "token": "a-key", "instance": None}


@pytest.fixture
def accounts(no_account: None, tmp_path: Path) -> Path:
    """The file in which IBM's client looks for saved accounts; there is none yet."""
    return tmp_path / "accounts.json"


CONTENTS = {
    "nothing": ("", "not readable JSON"),
    "no JSON": ("token: abc", "not readable JSON"),
    "not text": (b"\xff\xfe\x00", "not readable JSON"),
    "deep": ("[" * 100_000, "not readable JSON"),
    "a list": ([1, 2], "holds a list"),
    "a number": (3, "holds a int"),
    "null": (None, "holds a NoneType"),
    "no accounts": ({}, "No IBM Quantum account is saved"),
    "a list as an account": ({"mine": []}, "holds a list as the account 'mine'"),
    "an empty account": ({"mine": {}}, "'mine'.*names the channel None"),
    "a retired channel": (
        {"mine": {**GOOD, "channel": "ibm_quantum"}},
        "'ibm_quantum', which IBM has retired",
    ),
    "an unknown channel": ({"mine": {**GOOD, "channel": "ibm_clowd"}}, "'ibm_clowd', which does not exist"),
    "a channel of another type": ({"mine": {**GOOD, "channel": ["x"]}}, "which does not exist"),
    "an empty token": ({"mine": {**GOOD, "token": ""}}, "has an empty token"),
    "a token of spaces": ({"mine": {**GOOD, "token": "  "}}, "has an empty token"),
    "no token": ({"mine": {"channel": "ibm_cloud"}}, "has an empty token"),
    "a token of another type": ({"mine": {**GOOD, "token": 5}}, "a int as its token"),
    "an instance of another type": ({"mine": {**GOOD, "instance": 7}}, "a int as its instance"),
    "tags of another type": ({"mine": {**GOOD, "tags": "a"}}, "a str as its tags"),
    "plans of another type": ({"mine": {**GOOD, "plans_preference": {}, "region": 1}}, "its region"),
    "odd proxies": ({"mine": {**GOOD, "proxies": {"no": 1}}}, "no account that can be taken"),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_a_file_of_accounts_of_any_content_gives_one_sentence(accounts: Path, what: str) -> None:
    content, expected = CONTENTS[what]
    if isinstance(content, bytes):
        accounts.write_bytes(content)
    else:
        accounts.write_text(content if isinstance(content, str) else json.dumps(content))
    for engine in (IBMEngine("ibm_lagos"), IBMEngine("ibm_lagos", account="mine")):
        (problem,) = engine.problems()
        assert problem.endswith(".")
        assert "\n" not in problem
        with pytest.raises(BackendUnavailable):
            QiskitQuantumBackend("ibm", "ibm_lagos").sample_rows(P)
    with pytest.raises(BackendUnavailable, match=expected):
        QiskitQuantumBackend("ibm", "ibm_lagos").sample_rows(P)
    assert find_jobs() == []


def test_a_file_of_accounts_that_cannot_be_opened_gives_one_sentence(accounts: Path) -> None:
    accounts.mkdir()
    assert "cannot be read" in str(account_problem())


def test_the_account_that_is_taken_is_looked_at_and_no_other(accounts: Path) -> None:
    accounts.write_text(
        json.dumps({"old": {**GOOD, "channel": "ibm_quantum"}, "empty": {**GOOD, "token": ""}, "good": GOOD})
    )
    assert account_problem("good") is None
    assert "retired" in str(account_problem("old"))
    assert "empty token" in str(account_problem("empty"))
    assert "No saved account has the name 'god'" in str(account_problem("god"))
    assert "old, empty, good" in str(account_problem("god"))
    accounts.write_text(json.dumps({"old": {**GOOD, "channel": "ibm_quantum"}, "good": GOOD}))
    assert account_problem() is None


def test_the_environment_is_looked_at_first(accounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QISKIT_IBM_TOKEN", "")
    assert "QISKIT_IBM_TOKEN is empty" in str(account_problem())
    monkeypatch.setenv("QISKIT_IBM_TOKEN", "  ")
    assert "only spaces" in str(account_problem())
    monkeypatch.setenv("QISKIT_IBM_TOKEN", "a-key")
    assert account_problem() is None
    monkeypatch.setenv("QISKIT_IBM_CHANNEL", "ibm_quantum")
    assert "retired" in str(account_problem())
    monkeypatch.setenv("QISKIT_IBM_CHANNEL", "ibm-cloud")
    assert "ibm_quantum_platform, ibm_cloud" in str(account_problem())


def test_a_saved_account_is_taken_by_its_name_and_recovered_by_it(
    accounts: Path, cloud: Any, ibm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qiskit_ibm_runtime import QiskitRuntimeService

    url = f"{cloud.url}/experimental/api/v1"
    monkeypatch.delenv("QISKIT_IBM_TOKEN")
    monkeypatch.delenv("QISKIT_IBM_INSTANCE")
    QiskitRuntimeService.save_account(token="another key", url=url, instance=ibm.CRN, set_as_default=True)
    QiskitRuntimeService.save_account(token=ibm.TOKEN, url=url, instance=ibm.CRN, name="lab")
    with pytest.raises(BackendUnavailable, match="API key is not valid"):
        QiskitQuantumBackend("ibm", "ibm_lagos").sample_rows(P)
    job = QiskitQuantumBackend("ibm", "ibm_lagos", account="lab").submit_rows(P, 10)
    assert job.record.account == "lab"
    (found,) = find_jobs()
    assert found.counts(progress=False).counts.sum() == 10


def test_instances_are_preferred_by_plan_and_tag(
    cloud: Any, ibm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QISKIT_IBM_INSTANCE")
    backend = QiskitQuantumBackend("ibm", "ibm_lagos", plans_preference=["premium", "open"])
    assert backend.submit_rows(P, 10).record.instance == ibm.CRN
    with pytest.raises(BackendUnavailable, match=r"plans_preference=\['premium'\].*loopback \(plan open"):
        QiskitQuantumBackend("ibm", "ibm_lagos", plans_preference=["premium"]).sample_rows(P)
    with pytest.raises(BackendUnavailable, match=r"instance_tags=\['mine'\].*loopback \(plan open"):
        QiskitQuantumBackend("ibm", "ibm_lagos", instance_tags=["mine"]).sample_rows(P)
    assert cloud.posts() == 1


def test_a_wrong_instance_is_told_from_a_wrong_key(cloud: Any, ibm: Any) -> None:
    for instance in ("crn:v1:another", "another"):
        with pytest.raises(BackendUnavailable, match=rf"instance='{instance}'.*loopback.*{ibm.CRN}"):
            QiskitQuantumBackend("ibm", "ibm_lagos", instance=instance).sample_rows(P)
    assert find_jobs() == []


def test_options_of_an_account_are_names(logged_in: Any) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"account": 3}, DtypeError),
        ({"account": ""}, ArgumentError),
        ({"plans_preference": "open"}, DtypeError),
        ({"plans_preference": []}, ArgumentError),
        ({"instance_tags": [1]}, DtypeError),
        ({"instance_tags": ["a"], "instance": "mine"}, ArgumentError),
        ({"account": "lab", "service": logged_in}, ArgumentError),
        ({"plans_preference": ["open"], "service": logged_in}, ArgumentError),
    ]
    for options, error in wrong:
        with pytest.raises(error, match=next(iter(options))):
            QiskitQuantumBackend("ibm", "ibm_lagos", **options)
    with pytest.raises(ArgumentError, match="account='lab' is not allowed with provider='aer'"):
        QiskitQuantumBackend("aer", account="lab")
