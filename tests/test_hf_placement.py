"""Claims about weights in fewer bits and models spread over devices, as far as a machine without a GPU can hold them: what is missing
is said in one sentence before anything is loaded, and transformers is told just what was asked for. Whether the numbers that
bitsandbytes then computes are right is not tested here."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.engines import OpenOptions, open_engine
from backend.engines import hf as hf_module
from backend.engines import hf_placement as placement
from backend.engines.hf import HfEngine
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec
from backend.experiments.capture import capture as capture_trace
from backend.files import hf_config
from backend.trace import Trace
from tests.tiny_models import TinyModel

CUDA = torch.device("cuda", 1)
NF4_CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these packages, and no other of the two, are installed, and that there is a CUDA device or none."""
    real = importlib.util.find_spec

    def pretend(*packages: str, cuda: bool) -> None:
        def find(name: str, *rest: Any) -> Any:
            return (object() if name in packages else None) if name in ("bitsandbytes", "accelerate") else real(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        monkeypatch.setattr(placement, "_has_cuda", lambda: cuda)

    return pretend


def folder_with(tiny: TinyModel, to: Path, quantization: Any) -> Path:
    copy = Path(shutil.copytree(tiny.hf, to / "quantized"))
    (copy / "config.json").write_text(json.dumps({**json.loads((copy / "config.json").read_text()), "quantization_config": quantization}))
    return copy


@pytest.mark.parametrize(
    ("packages", "cuda", "options", "sentence"),
    [
        ((), False, {"quantize": "nf4"}, "nf4 weights of tiny-llama need .*; missing here: bitsandbytes and accelerate and a CUDA device"),
        (("accelerate",), True, {"quantize": "int8"}, "int8 weights .*; missing here: bitsandbytes[.]$"),
        (("bitsandbytes",), True, {"quantize": "nf4"}, "missing here: accelerate[.]$"),
        (("bitsandbytes", "accelerate"), False, {"quantize": "nf4"}, "missing here: a CUDA device[.]$"),
        (("bitsandbytes", "accelerate"), True, {"quantize": "nf4", "device": "cpu"}, "nf4 weights of tiny-llama need a CUDA device, and 'cpu' was asked for"),
        (("bitsandbytes",), True, {"device_map": "auto"}, "A device map needs accelerate; missing here: accelerate[.]$"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(tiny_llama: TinyModel, installed: Callable[..., None], packages: Any, cuda: bool, options: Any, sentence: str) -> None:
    installed(*packages, cuda=cuda)
    with pytest.raises(LayerscopeError, match=sentence):
        HfEngine(tiny_llama.hf, OpenOptions(**options))


def test_without_either_option_nothing_is_needed_and_nothing_is_passed(tiny_llama: TinyModel, installed: Callable[..., None]) -> None:
    installed(cuda=False)
    assert placement.quantization(OpenOptions(), tiny_llama.hf) == ""
    assert placement.arguments(OpenOptions(), "", False, torch.device("cpu")) == {}


def test_transformers_is_told_what_was_asked_for() -> None:
    int8 = placement.arguments(OpenOptions(quantize="int8"), "int8", False, CUDA)
    assert int8["device_map"] == {"": "cuda:1"} and int8["quantization_config"].load_in_8bit and not int8["quantization_config"].load_in_4bit
    nf4 = placement.arguments(OpenOptions(quantize="nf4", device_map="auto"), "nf4", False, torch.device("cuda"))
    config = nf4["quantization_config"]
    assert nf4["device_map"] == "auto" and config.load_in_4bit and config.quantization_method() == "nf4" and config.bnb_4bit_compute_dtype in (torch.float16, torch.bfloat16)
    assert placement.arguments(OpenOptions(quantize="nf4", dtype="float32"), "nf4", False, CUDA)["quantization_config"].bnb_4bit_compute_dtype == torch.float32
    assert placement.arguments(OpenOptions(device_map="auto"), "", False, torch.device("cpu")) == {"device_map": "auto"}
    # A folder that was saved quantized says for itself how.
    assert placement.arguments(OpenOptions(), "nf4", True, torch.device("cuda")) == {"device_map": {"": "cuda:0"}}


def test_the_trace_of_quantized_weights_says_so_and_what_is_not_checked(tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes itself is replaced by plain weights: this holds what is around it."""
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained

    def plain(path: Any, **arguments: Any) -> Any:
        given.update(arguments)
        return load(path, **{name: value for name, value in arguments.items() if name not in ("quantization_config", "device_map")})

    monkeypatch.setattr(placement, "missing_parts", lambda *_: [])
    monkeypatch.setattr(hf_module, "_device", lambda name: torch.device("cpu") if name == "cuda" else pytest.fail(name))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", plain)
    engine = HfEngine(tiny_llama.hf, OpenOptions(quantize="nf4"))
    assert given["quantization_config"].quantization_method() == "nf4" and given["device_map"] == {"": "cpu"}
    assert engine.info.quantization == "nf4" and engine.version.endswith("float32 on nf4 weights")
    with Trace(capture_trace(engine, CaptureSpec(token_ids=(1, 2, 3)), tmp_path)) as trace:
        projection = trace.integrity["attn_projection"]
        assert projection["checked"] == 0 and "W_O is nf4: its values are packed in memory" in projection["note"]
        assert trace.integrity["unembed"]["checked"] and trace.integrity["attn_sum"]["ok"]
    module = engine._model.get_submodule("model.layers.0.self_attn.o_proj")
    module.weight = torch.nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LayerscopeError, match="'blocks.0.attn.W_O' .* packed in memory"):
        engine.weight("blocks.0.attn.W_O")
    module.weight = torch.nn.Parameter(torch.empty(4, 4, device="meta"))
    with pytest.raises(LayerscopeError, match="'blocks.0.attn.W_O' .* not in memory"):
        engine.weight("blocks.0.attn.W_O")


def test_a_folder_that_bitsandbytes_wrote_is_accepted_only_where_it_can_be_read(tiny_llama: TinyModel, tmp_path: Path, installed: Callable[..., None]) -> None:
    folder = folder_with(tiny_llama, tmp_path, NF4_CONFIG)
    installed("accelerate", cuda=True)
    with pytest.raises(LayerscopeError, match="weights of bitsandbytes, and bitsandbytes is not installed"):
        hf_config.model_info(folder)
    installed(cuda=True)
    with pytest.raises(LayerscopeError, match="bitsandbytes and accelerate are not installed"):
        hf_config.model_info(folder)
    installed("bitsandbytes", "accelerate", cuda=False)
    assert hf_config.model_info(folder).quantization == "nf4"
    with pytest.raises(LayerscopeError, match="nf4 weights of quantized need .*; missing here: a CUDA device"):
        HfEngine(folder)
    with pytest.raises(LayerscopeError, match="quantized to nf4 already and cannot be loaded as int8"):
        HfEngine(folder, OpenOptions(quantize="int8"))


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        (NF4_CONFIG, "nf4"),
        ({"load_in_8bit": True}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "bitsandbytes"}, ""),
        ({"quant_method": "gptq", "load_in_4bit": True}, ""),
        ("nf4", ""),
        (None, ""),
    ],
)
def test_how_a_folder_is_quantized_is_read_from_its_config(quantization: Any, bits: str) -> None:
    assert hf_config.bitsandbytes_bits(quantization) == bits


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, {"quant_method": "awq", "load_in_4bit": True}, {"quant_method": "bitsandbytes"}, "x"])
def test_any_other_quantization_is_refused_by_name(tiny_llama: TinyModel, tmp_path: Path, installed: Callable[..., None], quantization: Any) -> None:
    installed("bitsandbytes", "accelerate", cuda=True)
    name = quantization["quant_method"] if isinstance(quantization, dict) else "unnamed"
    with pytest.raises(LayerscopeError, match=rf"holds quantised weights \(quantization_config: {name}\)"):
        hf_config.model_info(folder_with(tiny_llama, tmp_path, quantization))


def test_a_gguf_file_has_its_own_quantization(tiny_llama: TinyModel) -> None:
    for options in (OpenOptions(quantize="nf4"), OpenOptions(device_map="auto")):
        with pytest.raises(LayerscopeError, match="is a GGUF file; quantize and device_map are for Hugging Face folders"):
            open_engine(tiny_llama.gguf, options)


def test_the_python_api_and_the_command_line_pass_the_options_on(
    tiny_llama: TinyModel, installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from backend import open_model
    from backend.__main__ import main

    installed(cuda=False)
    with pytest.raises(LayerscopeError, match="int8 weights of tiny-llama need"):
        open_model(tiny_llama.hf, quantize="int8")
    for words, sentence in ((("--quantize", "nf4"), "nf4 weights of tiny-llama need"), (("--device-map", "auto"), "A device map needs accelerate"),
                            (("--quantize", "int4"), "'int4' is not one of none, int8, nf4")):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["backend", "trace", "-m", str(tiny_llama.hf), "-p", "x", *words])
        with pytest.raises(SystemExit):
            main()
        assert sentence in capsys.readouterr().err
