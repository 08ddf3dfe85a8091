"""Sites timed on this machine."""

from __future__ import annotations

import pytest

from gossamer.compress.allocate import latency, site_latency, tokens_per_second
from gossamer.errors import FormatError, UsageError
from gossamer.formats import parse


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A few megabytes are enough to see that bytes cost time."""
    monkeypatch.setattr(latency, "COLD", 1)
    monkeypatch.setattr(latency, "last_cache_bytes", lambda: 4 << 20)
    latency._measured.cache_clear()
    yield
    latency._measured.cache_clear()


def test_more_bytes_and_more_tokens_take_longer():
    """By factors of a hundred, which are seen on a busy machine too."""
    one = site_latency(parse("int4/g32"), 64, 512)
    assert 0 < one < 0.1
    assert site_latency(parse("f32"), 1024, 1024) > one
    assert site_latency(parse("int4/g32"), 64, 512, tokens=512) > one


def test_a_site_is_timed_once():
    fmt = parse("int4/g32 @ int8/token")
    assert site_latency(fmt, 64, 512) == site_latency(parse("int4/g32 @ int8/token"), 64, 512)
    assert latency._measured.cache_info().misses == 1


def test_sites_with_parts_are_timed():
    assert site_latency(parse("rows(16: int8/g32, int4/g32) @ int8/token"), 64, 128) > 0
    assert site_latency(parse("hadamard(64, 1, int4/g32) + rank8(bf16)"), 64, 128) > 0


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        site_latency(parse("int4/g32"), 64, 64, tokens=0)
    with pytest.raises(FormatError, match="higher rank"):
        site_latency(parse("rank64(bf16)"), 32, 64)


def test_seconds_become_tokens():
    assert tokens_per_second([0.004, 0.004], 0.002) == pytest.approx(100)
    with pytest.raises(UsageError, match="has no speed"):
        tokens_per_second([])
