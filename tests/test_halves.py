"""Claims about work done in two halves: nothing is left out or done twice, and an error of either half is heard, after both have ended."""

from __future__ import annotations

import time

import numpy as np
import pytest

from backend.compute import halves
from backend.compute.halves import in_halves


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_every_place_is_worked_on_once(monkeypatch, n, cores):
    monkeypatch.setattr(halves, "n_cores", lambda: cores)
    done = np.zeros(n, int)

    def work(places: slice) -> None:
        done[places] += 1

    in_halves(work, n)
    assert (done == 1).all()


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_half_is_raised_when_the_other_has_ended(monkeypatch, broken):
    monkeypatch.setattr(halves, "n_cores", lambda: 2)
    ended = []

    def work(places: slice) -> None:
        half = int(places.start > 0)
        if half == broken:
            raise ValueError(f"half {half}")
        time.sleep(0.05)
        ended.append(half)

    with pytest.raises(ValueError, match=f"half {broken}"):
        in_halves(work, 4)
    assert ended == [1 - broken]
