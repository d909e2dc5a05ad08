"""Claims about how many threads compute: as many as this process has cores, which its container may have fewer of than the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from backend.compute.cores import n_cores, n_physical_cores
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


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("100000 100000", 1), ("max 100000", 64), ("6400000 100000", 64)])
def test_a_containers_quota_is_what_it_may_use(monkeypatch, tmp_path, quota, cores):
    from joblib.externals.loky.backend import context

    (tmp_path / "cpu.max").write_text(quota)
    found = open  # the real one: only this one file is another
    monkeypatch.setattr(context, "open", lambda name, *rest: found(tmp_path / "cpu.max" if name == "/sys/fs/cgroup/cpu.max" else name, *rest), raising=False)
    monkeypatch.setattr(context.os.path, "exists", lambda name: str(name) == "/sys/fs/cgroup/cpu.max")
    monkeypatch.setattr(context.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(context.os, "sched_getaffinity", lambda _: set(range(64)))
    assert n_cores() == cores


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
