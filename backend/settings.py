"""What the backend needs to be told: the part of `config.Settings` that it reads, as a protocol.

Only the entry points read configuration; they hand the object on, and nothing below them imports `config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol


class Settings(Protocol):
    """See config/default.toml for what each value means. All paths are absolute."""

    data_dir: Path
    models_dirs: list[Path]
    presets_file: Path
    use_hf_cache: bool
    hf_cache: Path
    device: str
    n_gpu_layers: int | Literal["auto"]
    n_ctx: int | None
    kv_cache: Literal["f16", "f32"]
    n_threads: int | None
    queue_limit: int
    job_timeout_s: float
    cancel_grace_s: float
    derived_cache_mb: int
    redis_url: str

    @property
    def traces_dir(self) -> Path: ...
    @property
    def variants_dir(self) -> Path: ...
    @property
    def worker_log(self) -> Path: ...
    @property
    def secret_key(self) -> bytes: ...
    def environment(self) -> dict[str, str]: ...
