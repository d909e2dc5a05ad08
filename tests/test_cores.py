"""Claims about how many threads compute: as many as this process has cores, which its container may have fewer of than the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.compute import cores as cores_module
from backend.compute.cores import n_cores, n_physical_cores, quotas
from backend.engines import OpenOptions, open_engine, threads
from backend.engines.threads import engine_threads
from tests.tiny_models import TinyModel


@pytest.fixture(autouse=True)
def counted_anew() -> Iterator[None]:
    for counted in (n_cores, n_physical_cores):
        counted.cache_clear()
    yield
    for counted in (n_cores, n_physical_cores):
        counted.cache_clear()


def test_cores_are_those_of_this_process_and_not_the_machine():
    every = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(every)})
        assert n_cores() == n_physical_cores() == 1
    finally:
        os.sched_setaffinity(0, every)


def made(root: Path, **files: str) -> Path:
    """A folder with files, "__" for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000\n", [1.5]), ("100000 100000", [1.0]), ("max 100000", []), ("", []), ("50000 0", [])])
def test_a_containers_quota_is_read_from_its_group(tmp_path, quota, cores):
    root = made(tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu.max": quota})
    assert list(quotas(root)) == cores


def test_a_group_inside_another_has_the_limits_of_both(tmp_path):
    files = {"sys__fs__cgroup__a__b__cpu.max": "max 100000", "sys__fs__cgroup__a__cpu.max": "300000 100000", "sys__fs__cgroup__cpu.max": "800000 100000"}
    assert list(quotas(made(tmp_path, proc__self__cgroup="0::/a/b\n", **files))) == [3.0, 8.0]


@pytest.mark.parametrize(("quota", "cores"), [("250000", [2.5]), ("-1", [])])
def test_version_one_says_quota_and_period_apart(tmp_path, quota, cores):
    files = {"sys__fs__cgroup__cpu__cpu.cfs_quota_us": f"{quota}\n", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000\n"}
    assert list(quotas(made(tmp_path, proc__self__cgroup="4:cpu,cpuacct:/x\n", **files))) == cores


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert list(quotas(tmp_path)) == []


@pytest.mark.parametrize(("limits", "least"), [([], None), ([0.4], 1), ([1.5, 64.0], 2)])
def test_a_quota_is_rounded_up_and_never_more_than_there_is(monkeypatch, limits, least):
    monkeypatch.setattr(cores_module, "quotas", lambda: iter(limits))
    here = len(os.sched_getaffinity(0))
    assert n_cores() == (here if least is None else min(here, least))


@pytest.mark.parametrize(("cores", "physical", "threads_used"), [(1, 1, 1), (2, 1, 2), (4, 2, 4), (16, 8, 8), (12, 12, 12)])
def test_an_engine_takes_a_thread_a_physical_core_where_cores_are_many(monkeypatch, cores, physical, threads_used):
    monkeypatch.setattr(threads, "n_cores", lambda: cores)
    monkeypatch.setattr(threads, "n_physical_cores", lambda: physical)
    assert engine_threads() == threads_used


def test_both_engines_say_how_many_threads_they_compute_with(tiny_llama: TinyModel):
    import torch

    before = torch.get_num_threads()
    try:
        for path in (tiny_llama.hf, tiny_llama.gguf):
            engine = open_engine(path, OpenOptions(n_threads=1))
            assert engine.n_threads == 1
            engine.close()
        assert torch.get_num_threads() == 1
        torch.set_num_threads(before)
        engine = open_engine(tiny_llama.hf, OpenOptions())
        assert engine.n_threads == torch.get_num_threads() <= engine_threads()
        engine.close()
    finally:
        torch.set_num_threads(before)
