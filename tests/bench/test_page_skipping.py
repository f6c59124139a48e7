"""The model of a scan that leaves pages unread: its bytes, and the error of what is drawn in their place."""

import pytest
import torch
from click.testing import CliRunner

from qtx_lab.bench import page_skipping
from qtx_lab.bench.page_skipping import PAGE, SHARES, bytes_per_key, errors_of_shares


def test_pages_of_one_kind_of_keys_can_stay_unread(generator):
    """Pages that are clusters tell where the mass is, keys in random order do not."""
    pages, features = 16, 16
    centres = 4 * torch.randn(pages, 1, features, generator=generator)
    k = (centres + 0.5 * torch.randn(pages, PAGE, features, generator=generator)).flatten(0, 1)
    q = torch.randn(2, pages * PAGE, features, generator=generator)
    v = torch.randn(pages * PAGE, 8, generator=generator)
    mixed = torch.randperm(len(k), generator=generator)
    clustered, shuffled = errors_of_shares(q, k, v, 64), errors_of_shares(q, k[mixed], v[mixed], 64)
    assert [x.share for x in clustered] == list(SHARES)
    assert clustered[2].error < 1.5 * clustered[0].error
    assert shuffled[2].error > 2 * shuffled[0].error


def test_bytes_fall_with_the_pages_read():
    assert bytes_per_key(0.5, 16) == pytest.approx((16 + 2.5) / 2 + 32 / 64)


def test_the_command_prints_every_share(monkeypatch):
    monkeypatch.setattr(page_skipping, "SEEDS", 1)
    done = CliRunner().invoke(page_skipping.main, ["reference", "--tokens", "256"])
    assert done.exit_code == 0, done.output
    assert "12.5%" in done.output
    assert "bytes a key" in done.output
