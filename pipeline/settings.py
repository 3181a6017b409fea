"""Where things are kept, from environment variables that begin with ``CLOZELINE_``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The settings of this machine; none of them changes a byte of a result."""

    model_config = SettingsConfigDict(env_prefix="CLOZELINE_")

    home: Path = Field(Path(), description="what relative task paths of deployments start from")
    store: Path | None = Field(None, description="the artifact store; by default HOME/.clozeline/store")

    @property
    def store_path(self) -> Path:
        """The store's directory."""
        return (self.store or self.home / ".clozeline" / "store").absolute()

    def release_path(self, name: str) -> Path:
        """Where releases go when neither the task nor the command says."""
        return (self.home / "releases" / name).absolute()
