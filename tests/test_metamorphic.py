"""What must follow, for every architecture and in both engines, from a change to a model that is known not to matter.

Values twice as large and an output matrix half as large, heads in another order, a token swapped by hand in the residual stream:
each changes a few sites in a way that can be said beforehand, and nothing else. A site that is a neighbour's, transposed or
taken before or after the right step fails here even if both engines agreed on it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from backend.engines import OpenOptions, open_engine
from backend.files.hf_config import model_info
from backend.sites import SITES
from backend.weight_names import EACH, HF_NAMES, Stored, section_rows
from tests.test_engines_agree import IDS, KINDS, NMSE, nmse
from tests.test_hf_engine import Values, capture
from tests.tiny_models import TinyModel

Array = NDArray[Any]
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1)


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    return tiny_model(request.param)


def changed(tiny: TinyModel, folder: Path, changes: dict[str, Callable[[Array], Array]]) -> TinyModel:
    """A copy of the checkpoint in which attention's weights, by canonical name and (out, in), are replaced by a function of themselves."""
    shutil.copytree(tiny.hf, folder)
    info, tensors = model_info(tiny.hf), load_file(tiny.hf / "model.safetensors")
    for name, place in HF_NAMES[info.architecture].items():
        change = changes.get(name.removeprefix("blocks.{}.attn."))
        stored = place if isinstance(place, Stored) else Stored(place)
        for layer in range(info.n_layers) if change else ():
            mark = next((mark for mark in EACH if mark in stored.name), "")
            paths = [stored.name.replace("{}", str(layer)).replace(mark, str(i)) for i in range(info.dims[EACH[mark]])] if mark else [stored.name.format(layer)]
            if change is None or paths[0] not in tensors:
                continue
            if mark:
                tensors |= dict(zip(paths, change(np.stack([tensors[path] for path in paths])), strict=True))
                continue
            out_in = tensors[paths[0]].T if stored.transposed else tensors[paths[0]]
            rows = section_rows(stored.section, info, len(out_in)) if stored.section else np.arange(len(out_in))
            out_in[rows] = change(out_in[rows])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return TinyModel(folder, tiny.kind)


def values_of(tiny: TinyModel) -> Iterator[Values]:
    """Every site of every layer, in the PyTorch engine and then in llama.cpp."""
    for path in (tiny.hf, tiny.gguf):
        engine = open_engine(path, OPTIONS)
        yield capture(engine, IDS)
        engine.close()


def test_larger_values_and_a_smaller_output_matrix_change_v_and_z_alone(tiny: TinyModel, tmp_path: Path) -> None:
    """W_V and b_V times 4, W_O by 4: exact in binary floating point, so every other site is the same to the bit."""
    grown = changed(tiny, tmp_path / tiny.kind, {"W_V": lambda w: w * 4, "b_V": lambda b: b * 4, "W_UV": lambda w: w * 4, "W_O": lambda w: w / 4})
    for before, after in zip(values_of(tiny), values_of(grown), strict=True):
        assert set(before) == set(after)
        different = {site for site, layer in before if not np.array_equal(after[site, layer], before[site, layer])}
        assert different == {"v", "z"} & {site for site, _ in before}
        for site, layer in before:
            if site in different:
                assert np.array_equal(after[site, layer], 4 * before[site, layer])


def test_heads_in_another_order_are_captured_in_that_order(tiny: TinyModel, tmp_path: Path) -> None:
    info = model_info(tiny.hf)
    kv_order = np.arange(info.n_kv_heads)[::-1]
    share = info.n_heads // info.n_kv_heads
    order = (kv_order[:, None] * share + np.roll(np.arange(share), 1)).reshape(-1)  # groups turned round, heads of a group moved on

    def rows(order: Array) -> Callable[[Array], Array]:
        def moved(weight: Array) -> Array:
            norms_one_head = weight.ndim == 1 and len(weight) == info.d_head
            return weight if norms_one_head else weight.reshape(len(order), -1, *weight.shape[1:])[order].reshape(weight.shape)

        return moved

    def columns(weight: Array) -> Array:
        return weight.reshape(len(weight), info.n_heads, -1)[:, order].reshape(weight.shape)

    of_heads, of_kv_heads = ("W_Q", "b_Q", "q_norm.w", "W_UQ", "W_UK", "W_UV", "sinks"), ("W_K", "b_K", "k_norm.w", "W_V", "b_V")
    changes = {**dict.fromkeys(of_heads, rows(order)), **dict.fromkeys(of_kv_heads, rows(kv_order)), "W_O": columns}
    moved = changed(tiny, tmp_path / tiny.kind, changes)
    for before, after in zip(values_of(tiny), values_of(moved), strict=True):
        for (site, layer), values in before.items():
            dims = SITES[site].dims
            axis = next((dims.index(name) for name in ("head", "kv_head") if name in dims), None)
            want = values if axis is None else np.take(values, order if dims[axis] == "head" else kv_order, axis)
            assert nmse(after[site, layer], want) < NMSE, (site, layer)
            if axis is not None:
                assert nmse(after[site, layer], values) > 1e-3, (site, layer)
