"""Where things are kept and run, from environment variables that begin with ``CLOZELINE_``.

They say where and by whom work is done, a task file says what it is. None changes a byte of a result but the kind of
device, which is part of every key, and a bound on memory: half batches may change the last bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipeline.errors import InputError
from pipeline.locations import masked, refuse_credentials

EngineName = Literal["local", "pool", "ray", "dask"]


class Settings(BaseSettings):
    """The settings of this machine.

    Raises:
        InputError: a variable has a value that it can't have; all are told at once.
    """

    model_config = SettingsConfigDict(env_prefix="CLOZELINE_")

    home: Path = Field(Path(), description="what relative task paths of deployments start from")
    store: str | None = Field(
        None, description="the artifact store: a directory or an fsspec URL; by default HOME/.clozeline/store"
    )
    cache: Path | None = Field(
        None,
        description="where this machine keeps copies of what lies behind a URL, and checkpoints; by default "
        "HOME/.clozeline/cache",
    )
    engine: EngineName = Field("local", description="where stages that run a model are executed")
    device: str | None = Field(
        None,
        description="the name of the device that this process stands for, where there is no GPU; two processes of one "
        "name never run a model at the same time",
    )
    stage_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="on what runs are planned to compute; set it where the machine that plans has another kind of "
        "device than the workers",
    )
    stage_timeout: float = Field(
        1800, gt=0, description="seconds without progress after which a stage's process is killed and tried again"
    )
    stage_memory: int | None = Field(
        None, gt=0, description="MiB that a stage's process may allocate; over it, it is tried again with half batches"
    )
    ray_address: str | None = Field(None, description="the Ray cluster of the engine ray; by default one is started")
    dask_address: str | None = Field(
        None, description="the Dask scheduler of the engine dask; by default one is started"
    )

    def __init__(self) -> None:
        try:
            super().__init__()
        except ValidationError as error:
            told = [_told(problem) for problem in error.errors()]
            raise InputError("\n".join(told), where="the environment", fix="correct or unset it") from None

    @field_validator("store", "cache", mode="before")
    @classmethod
    def _holds_no_credentials(cls, value: Any) -> Any:
        try:
            refuse_credentials(str(value))
        except InputError as error:
            raise ValueError(f"{error.problem}; {error.fix}") from None
        return value

    @property
    def store_location(self) -> str:
        """The store's directory or URL."""
        given = self.store or str(self.home / ".clozeline" / "store")
        return given if "://" in given else str(Path(given).absolute())

    @property
    def cache_path(self) -> Path:
        """The directory of local copies."""
        return (self.cache or self.home / ".clozeline" / "cache").absolute()

    def release_path(self, name: str) -> Path:
        """Where releases go when neither the task nor the command says."""
        return (self.home / "releases" / name).absolute()


def _told(problem: Any) -> str:
    """One validation error, with the variable and without the credentials in its value."""
    message = problem["msg"].removeprefix("Value error, ")
    variable = f"{Settings.model_config['env_prefix']}{problem['loc'][0]}".upper()
    return f"{variable}={masked(str(problem['input']))}: {message[0].lower()}{message[1:]}"
