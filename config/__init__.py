"""Settings: defaults, then config/default.toml, then LAYERSCOPE_* in the environment, then what the caller names.

Only app.py, the worker and the command line read this module; everything else is handed the values it needs.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from backend.durable import FolderLock, private_folder, secret_key
from backend.errors import LayerscopeError

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "LAYERSCOPE_"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _hub_cache() -> Path:
    """Where huggingface_hub keeps downloads (its own order: HF_HUB_CACHE, HF_HOME/hub, the default)."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


class Settings(BaseSettings):
    """Every setting of Layerscope; config/default.toml says what each does. Paths are absolute after loading."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, toml_file=ROOT / "config" / "default.toml", extra="forbid", populate_by_name=True)

    host: str = "127.0.0.1"
    port: int = Field(8050, ge=0, le=65535)
    allowed_hosts: Annotated[list[str], NoDecode] = []
    max_body_mb: int = Field(64, ge=1)

    data_dir: Path = ROOT / "data"
    models_dirs: Annotated[list[Path], NoDecode] = [ROOT / "models"]
    presets_file: Path = ROOT / "config" / "presets.toml"
    use_hf_cache: bool = True
    hf_cache: Path = Field(default_factory=_hub_cache)

    device: str = "auto"
    n_gpu_layers: int | Literal["auto"] = "auto"
    n_ctx: int | None = Field(None, ge=1)
    kv_cache: Literal["f16", "f32"] = "f16"
    n_threads: int | None = Field(None, ge=1)

    queue_limit: int = Field(20, ge=1)
    job_timeout_s: float = Field(3600.0, gt=0)
    cancel_grace_s: float = Field(1.5, ge=0)
    derived_cache_mb: int = Field(1024, ge=1)
    redis_url: str = Field("", validation_alias=AliasChoices(f"{PREFIX}REDIS_URL", "REDIS_URL"))

    @field_validator("allowed_hosts", "models_dirs", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A list in the environment is JSON or separated by commas."""
        if isinstance(value, str):
            return json.loads(value) if value.lstrip().startswith("[") else [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("data_dir", "presets_file", "hf_cache")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))

    @field_validator("models_dirs")
    @classmethod
    def _absolute_each(cls, value: list[Path]) -> list[Path]:
        return [cls._absolute(path) for path in value]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def traces_dir(self) -> Path:
        return self.data_dir / "traces"

    @property
    def variants_dir(self) -> Path:
        """Where GGUF variants of the demo models are made."""
        return self.data_dir / "models"

    @property
    def worker_log(self) -> Path:
        return self.data_dir / "logs" / "worker.log"

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @cached_property
    def secret_key(self) -> bytes:
        """32 random bytes kept in data_dir/secret.key; signs the queue's messages and the session."""
        private_folder(self.data_dir)
        return secret_key(self.data_dir / "secret.key")

    def lock(self) -> FolderLock:
        """Take the data folder for this server; LayerscopeError if another has it. Keep the returned object."""
        private_folder(self.data_dir)
        return FolderLock(self.data_dir)

    def environment(self) -> dict[str, str]:
        """These settings as LAYERSCOPE_* variables, for a process that shall have the same."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {PREFIX + name.upper(): value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; an override that is None counts as not given. Raises LayerscopeError naming the setting and its value."""
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        raise LayerscopeError(f"The setting {name} is {str(first['input'])[:80]!r}: {first['msg'][:1].lower()}{first['msg'][1:]}.") from None
