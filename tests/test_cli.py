"""The command line, as a person and as a program use it."""

import json
import sys

import pytest

from backend.__main__ import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tiny_llama):
    """Run one command line in this process: (exit code, stdout, stderr). Its data folder is a fresh one."""
    monkeypatch.setenv("LAYERSCOPE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LAYERSCOPE_MODELS_DIRS", json.dumps([str(tiny_llama.hf.parent)]))
    monkeypatch.setenv("LAYERSCOPE_USE_HF_CACHE", "false")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["backend", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_trace_prints_one_json_object_with_the_promised_keys(run, tiny_llama):
    code, out, err = run("trace", "--model", str(tiny_llama.hf), "--prompt", "The capital", "--max-new-tokens", "2", "--category", "geo", "--json")
    assert code == 0
    data = json.loads(out)
    assert {"trace_id", "path", "response", "n_tokens", "tokens", "top_tokens", "integrity"} <= set(data)
    assert data["n_tokens"] == len(data["tokens"]) == len(data["top_tokens"])
    for best in data["top_tokens"]:
        probs = [item["prob"] for item in best]
        assert probs == sorted(probs, reverse=True) and 0 < sum(probs) <= 1.0001 and isinstance(best[0]["token"], str)
    assert all(set(item) >= {"ok", "max_error"} for item in data["integrity"].values()) and all(item["ok"] for item in data["integrity"].values())
    assert "running" in err  # the progress bar

    shown = json.loads(run("show", data["trace_id"], "--json")[1])
    assert shown["tokens"] == data["tokens"] and shown["top_tokens"] == data["top_tokens"]
    assert run("show", data["path"])[1].startswith(f"trace {data['trace_id']}")


def test_sites_and_layers_take_aliases_commas_and_ranges(run, tiny_llama):
    options = ("--sites", "blocks.0.hook_resid_post,kq_soft_max", "--sites", "z", "--layers", "0,2")
    data = json.loads(run("trace", "-m", str(tiny_llama.hf), "-p", "Hello", *options, "--json")[1])
    assert data["sites"] == {"attn_pattern": [0, 2], "z": [0, 2], "resid_post": [0, 2]}


def test_the_same_seed_writes_the_same_text(run, tiny_llama):
    def text(seed: int) -> str:
        sampling = ("--temperature", "1.5", "--top-p", "0.95", "--seed", str(seed), "--sites", "embed")
        return json.loads(run("trace", "-m", str(tiny_llama.hf), "-p", "Hello", "-n", "8", *sampling, "--json")[1])["response"]

    assert text(3) == text(3) != text(4)


def test_models_lists_what_lies_in_the_folders(run, tiny_llama):
    names = {entry["name"]: entry for entry in json.loads(run("models", "--json")[1])["models"]}
    assert tiny_llama.hf.name in names and "demo-dense" in names
    assert tiny_llama.hf.name in run("models")[1]


def test_quantize_and_quant_make_a_variant_and_show_what_it_cost(run, tiny_llama, tmp_path):
    made, written, prompts = tmp_path / "tiny-q4_0.gguf", tmp_path / "report.json", tmp_path / "prompts.txt"
    code, out, _ = run("quantize", "--model", str(tiny_llama.gguf), "--type", "Q4_0", "--output", str(made))
    assert code == 0 and out.startswith(str(made)) and made.is_file()
    prompts.write_text("Mary gave the book\n\nHello\n")
    words = ("quant", "--model", str(made), "--reference", str(tiny_llama.gguf), "--prompt", "The capital", "--prompts-file", str(prompts), "--output", str(written))
    code, out, err = run(*words, "--json")
    data = json.loads(out)
    assert code == 0 and data == json.loads(written.read_text()) and "running the reference" in err
    assert {"sentence", "model", "reference", "weights", "activations", "predictions", "prompts"} == set(data)
    assert [prompt["prompt"] for prompt in data["prompts"]] == ["The capital", "Mary gave the book", "Hello"]
    assert data["predictions"]["kl_mean"] > 0 and data["weights"]["total"]["relative_rmse"] > 0.01
    code, out, _ = run(*words, "--sites", "resid_post,z")
    assert code == 0 and out.splitlines()[0].startswith("Q4_0 against F32: weights ") and "resid_post, layer 2" in out
    assert {row["site"] for row in json.loads(written.read_text())["activations"]} == {"resid_post", "z"}


def test_every_command_explains_itself(run):
    assert "trace" in run("--help")[1] and "models" in run("--help")[1]
    assert all("Example" in run(command, "--help")[1] for command in ("quant", "quantize"))
    assert "Example" in run("trace", "--help")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("trace", "-m", "nope", "-p", "x"), "There is no model 'nope'"),
        (("trace", "-m", "MODEL", "-p", ""), "The prompt is empty"),
        (("trace", "-m", "MODEL", "-p", "x" * 5000), "of the context"),
        (("trace", "-m", "MODEL", "-p", "x", "--sites", "attn_patern"), "Did you mean attn_pattern"),
        (("trace", "-m", "MODEL", "-p", "x", "--layers", "7"), "Layer 7 is outside 0-2"),
        (("trace", "-m", "MODEL", "-p", "x", "--layers", "a-b"), "not of the form"),
        (("trace", "-m", "MODEL", "-p", "x", "--precision", "int4"), "precision 'int4'"),
        (("trace", "-m", "BROKEN", "-p", "x"), "broken.gguf"),
        (("trace", "-m", "PICKLED", "-p", "x"), "pickle"),
        (("trace", "-m", "EMPTY", "-p", "x"), "config.json"),
        (("show", "0123456789abcdef"), "There is no trace"),
        (("quant", "-m", "GGUF", "-r", "MODEL"), "There is no prompt"),
        (("quant", "-m", "GGUF", "-r", "nope", "-p", "x"), "There is no model 'nope'"),
        (("quant", "-m", "GGUF", "-r", "demo-dense", "-p", "x"), "n_layers 3 and demo-dense has 4"),
        (("quant", "-m", "GGUF", "-r", "MODEL", "--prompts-file", "/nowhere/x.txt"), "cannot be read"),
        (("quant", "-m", "GGUF", "-r", "MODEL", "-p", "x", "--output", "/nowhere/x.json"), "There is no folder /nowhere"),
        (("quantize", "-m", "MODEL", "--type", "Q4_X"), "There is no quantization 'Q4_X'"),
        (("quantize", "-m", "MODEL", "--type", "IQ1_S"), "needs an importance matrix"),
        (("quantize", "-m", "MODEL", "--type", "Q4_0", "--output", "BROKEN"), "exists already"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr_and_exit_code_2(run, tiny_llama, tmp_path, words, message):
    (tmp_path / "broken.gguf").write_bytes(tiny_llama.gguf.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_bytes((tiny_llama.hf / "config.json").read_bytes())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    paths = {"MODEL": tiny_llama.hf, "GGUF": tiny_llama.gguf, "BROKEN": tmp_path / "broken.gguf", "PICKLED": tmp_path / "pickled", "EMPTY": tmp_path / "empty"}
    code, out, err = run(*(str(paths.get(word, word)) for word in words))
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert code == 2 and out == ""
    assert message in lines[-1] and len(lines) == 1 and "Traceback" not in err
    assert not list((tmp_path / "data").rglob("*.h5*"))


def test_weights_lists_tensors_and_their_statistics_as_table_json_and_csv(run, tiny_llama):
    import csv
    import io

    import numpy as np

    from backend.weights import open_weights

    path = str(tiny_llama.gguf)
    listed = json.loads(run("weights", "--model", path, "--json")[1])
    assert [row["name"] for row in listed["tensors"]] == list(open_weights(path).native_names) and "std" not in listed["tensors"][0]
    assert "blk.1.ffn_down.weight" in run("weights", "--model", path)[1]
    told = json.loads(run("weights", "--model", path, "--stats", "json")[1])
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(run("weights", "--model", path, "--stats", "csv")[1]))}
    assert len(rows) == len(told["tensors"]) and len(told["super_weight_candidates"]) == 3 * 3
    for row in told["tensors"]:
        values = open_weights(path)[row["name"]].astype(np.float64)
        assert row["std"] == pytest.approx(values.std(), rel=1e-6) and float(rows[row["name"]]["std"]) == row["std"]


def test_weights_of_one_tensor_are_found_by_either_name(run, tiny_mixtral):
    import numpy as np

    from backend.weights import open_weights

    one = json.loads(run("weights", "--model", str(tiny_mixtral.hf), "--tensor", "blocks.1.mlp.experts.W_out", "--index", "3", "--json")[1])
    assert one["name"] == "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    stacked = json.loads(run("weights", "--model", str(tiny_mixtral.gguf), "--tensor", "blk.1.ffn_down_exps.weight", "--index", "3", "--json")[1])
    values = open_weights(tiny_mixtral.hf)["blocks.1.mlp.experts.W_out"][3].astype(np.float64)
    for found in (one, stacked):
        np.testing.assert_allclose(found["singular_values"], np.linalg.svd(values, compute_uv=False), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found["row_norms"], np.linalg.norm(values, axis=1), rtol=1e-6)
    assert sum(one["histogram"]["counts"]) == values.size
    text = run("weights", "--model", str(tiny_mixtral.hf), "--tensor", "blocks.1.ln1.w")[1]
    assert "kurtosis" in text and "singular" not in text


def test_weights_mistakes_are_one_sentence(run, tiny_llama):
    path = str(tiny_llama.gguf)
    for words, said in (
        (("--tensor", "nonsense"), "no weight 'nonsense'"), (("--tensor", "blocks.1.mlp.W_out", "--index", "9"), "there is no number 9"),
        (("--stats", "xml"), "'xml' is not one of json, csv"), (("--stats", "csv", "--json"), "goes with neither"),
    ):  # fmt: skip
        code, out, err = run("weights", "--model", path, *words)
        assert code == 2 and out == "" and said in err.splitlines()[-1]
