"""Threads and memory within nested control groups, on made-up files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer import limits


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cgroup"
    (root / "job/step").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(limits, "ROOT", root)
    monkeypatch.setattr(limits, "OWN", tmp_path / "own")
    monkeypatch.setattr(limits, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    return root


def test_without_limits(groups: Path) -> None:
    assert limits.default_threads() == 16
    assert limits.available_memory() == 8000 * 1024


def test_the_tightest_quota_of_all_levels_counts(groups: Path) -> None:
    (groups / "job/step/cpu.max").write_text("max 100000\n")
    (groups / "job/cpu.max").write_text("350000 100000\n")
    (groups / "cpu.max").write_text("800000 100000\n")
    assert limits.default_threads() == 3
    (groups / "job/step/cpu.max").write_text("50000 100000\n")
    assert limits.default_threads() == 1


def test_page_cache_is_not_counted_as_used(groups: Path) -> None:
    (groups / "job/memory.max").write_text("5000000\n")
    (groups / "job/memory.current").write_text("4000000\n")
    (groups / "job/memory.stat").write_text("anon 1\nactive_file 1000000\ninactive_file 2000000\n")
    assert limits.available_memory() == 4000000


def test_damaged_files_are_passed_over(groups: Path, tmp_path: Path) -> None:
    (groups / "cpu.max").write_text("nonsense\n")
    (groups / "job/cpu.max").write_text("1 0\n")
    (groups / "memory.max").write_text("12x\n")
    (tmp_path / "meminfo").write_text("")
    assert limits.default_threads() == 16
    assert limits.available_memory() is None
