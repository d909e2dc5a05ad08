"""Settings come from defaults, the file, the environment and the caller, in that order; what is wrong is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from backend.durable import FolderLock, connect, publish, remove_stale_parts, secret_key, sha256
from backend.errors import LayerscopeError
from backend.model_files import read_presets
from config import PREFIX, ROOT, Settings, load_settings

PRESETS = ("demo-dense", "demo-moe", "demo-dense-f16", "demo-dense-q8_0", "demo-dense-q4_k_m", "demo-moe-f16", "demo-moe-q8_0")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX) or name == "REDIS_URL":
            monkeypatch.delenv(name)


def test_the_dashboard_listens_on_this_machine_alone_unless_told():
    settings = load_settings()
    assert (settings.host, settings.port, settings.allowed_hosts, settings.is_loopback) == ("127.0.0.1", 8050, [], True)


def test_the_environment_wins_over_the_file_and_the_caller_over_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LAYERSCOPE_PORT", "9000")
    assert load_settings().port == 9000
    assert load_settings(port=9001).port == 9001
    assert load_settings(port=None).port == 9000, "None is no choice"


def test_every_line_of_the_settings_file_is_a_setting_with_its_default():
    text = (ROOT / "config" / "default.toml").read_text()
    written = tomllib.loads(text)
    assert set(written) <= set(Settings.model_fields)
    bare = {name: field.default for name, field in Settings.model_fields.items()}
    assert {name: value for name, value in written.items() if bare[name] != value} == {}
    for name in set(Settings.model_fields) - {"presets_file", "hf_cache"}:
        assert name in text, f"{name} is not explained"


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("allowed_hosts", "lab.example, 10.0.0.7", ["lab.example", "10.0.0.7"]),
        ("allowed_hosts", '["lab.example"]', ["lab.example"]),
        ("models_dirs", "/a,/b", [Path("/a"), Path("/b")]),
        ("n_gpu_layers", "20", 20),
        ("n_gpu_layers", "auto", "auto"),
    ],
)
def test_lists_and_numbers_are_read_from_text(monkeypatch: pytest.MonkeyPatch, name: str, value: str, want: object):
    monkeypatch.setenv(PREFIX + name.upper(), value)
    assert getattr(load_settings(), name) == want


def test_redis_is_found_under_its_common_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDIS_URL", "redis://queue:6379/0")
    assert load_settings().redis_url == "redis://queue:6379/0"


@pytest.mark.parametrize(("name", "value"), [("port", "70000"), ("port", "abc"), ("kv_cache", "q8_0"), ("queue_limit", "0")])
def test_a_wrong_value_is_named_with_its_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(PREFIX + name.upper(), value)
    with pytest.raises(LayerscopeError, match=f"The setting {name} is '{value}': "):
        load_settings()


def test_a_process_started_with_these_settings_has_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = load_settings(data_dir=tmp_path, port=1234, models_dirs=[tmp_path / "a", tmp_path / "b"], n_ctx=77, n_gpu_layers=3, job_timeout_s=1.5)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_the_presets_are_the_demo_models():
    presets = read_presets()
    assert tuple(preset.name for preset in presets) == PRESETS
    assert all(preset.prompts[0].text == "The capital of France is" for preset in presets)


# -- the data folder -----------------------------------------------------------------------------------------------------------


def test_a_second_server_is_refused_in_one_sentence(tmp_path: Path):
    settings = load_settings(data_dir=tmp_path / "data")
    code = f"from pathlib import Path; from backend.durable import FolderLock; FolderLock(Path({str(settings.data_dir)!r}))"
    with settings.lock():
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert f"is in use by another Layerscope (process {os.getpid()})" in done.stderr.splitlines()[-1]
    FolderLock(settings.data_dir).release()


def test_the_secret_is_made_once_and_is_private(tmp_path: Path):
    settings = load_settings(data_dir=tmp_path / "data")
    file = settings.data_dir / "secret.key"
    assert settings.secret_key == secret_key(file) and len(settings.secret_key) == 32
    assert (file.stat().st_mode & 0o777, settings.data_dir.stat().st_mode & 0o777) == (0o600, 0o700)
    file.chmod(0o644)
    with pytest.raises(LayerscopeError, match="Other users can read the secret key"):
        secret_key(file)


def test_publishing_replaces_the_old_file_whole(tmp_path: Path):
    part, final = tmp_path / "a.part", tmp_path / "a"
    final.write_bytes(b"old")
    part.write_bytes(b"new")
    publish(part, final)
    assert final.read_bytes() == b"new" and not part.exists()
    assert sha256(final) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"  # printf new | sha256sum


def test_committed_rows_survive_power_cuts_by_sqlites_own_settings(tmp_path: Path):
    db = connect(tmp_path / "x.sqlite")
    assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_only_part_files_that_nobody_writes_are_removed(tmp_path: Path):
    names = ("open", "young", "stale")
    parts = {name: tmp_path / f"{name}.h5.part" for name in names}
    for path in parts.values():
        path.write_bytes(b"x")
    for name in ("open", "stale"):
        os.utime(parts[name], (0, 0))
    with open(parts["open"], "rb"):
        assert remove_stale_parts(tmp_path) == [parts["stale"]]
    assert parts["open"].exists() and parts["young"].exists()
