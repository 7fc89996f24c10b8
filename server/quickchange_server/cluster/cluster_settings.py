"""Settings of a cluster besides `Settings`: how many replicas, what each reserves, how they scale.

Ray is not known here. An application of Ray Serve is given both in one flat object,
`ApplicationArguments`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from quickchange_server.config import Settings
from quickchange_server.errors import SettingError


class ClusterSettings(BaseSettings):
    """Replicas of one application, their resources and their scaling. Times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="QUICKCHANGE_", frozen=True, extra="forbid")

    engines: int = Field(2, ge=1, description="engine replicas; with max_engines the fewest")
    max_engines: int | None = Field(
        None, ge=1, description="most engine replicas under load; default: engines, no scaling"
    )
    ingresses: int = Field(1, ge=1, description="replicas that take requests over HTTP")
    engine_cpus: float | None = Field(
        None, ge=0, description="CPUs that an engine replica reserves; default: its threads"
    )
    ingress_cpus: float = Field(
        0.5, ge=0, description="CPUs that an ingress replica reserves, in Ray's books alone"
    )
    queue_target: int = Field(
        16,
        ge=1,
        description="sequences in an engine, running and waiting, above which another is wanted",
    )
    kv_target: float = Field(
        0.8, gt=0, le=1, description="share of the KV cache in use above which one is wanted"
    )
    upscale_seconds: float = Field(10.0, ge=0, description="for which more engines are wanted")
    downscale_seconds: float = Field(300.0, ge=0, description="for which fewer are enough")
    surge_percent: int = Field(
        25,
        ge=0,
        le=100,
        description="replicas that a rolling upgrade starts beside the old ones, at least one; 0 "
        "where no GPU is spare: each old one then ends before its successor starts",
    )
    ingress_drain_seconds: float = Field(
        600.0, ge=0, description="time for requests of an ingress that is taken away"
    )

    @property
    def most_engines(self) -> int:
        """`max_engines`, or `engines`. Raises SettingError if there are fewer than `engines`."""
        most = self.engines if self.max_engines is None else self.max_engines
        if most < self.engines:
            raise SettingError(
                f"max_engines: {most} is below engines, {self.engines}; raise it, or leave it out",
                param="max_engines",
            )
        return most


class ApplicationArguments(ClusterSettings, Settings):
    """What `serve run`, `serve deploy` and RayService pass to the application's builder."""

    @property
    def parts(self) -> tuple[Settings, ClusterSettings]:
        return _part(Settings, self), _part(ClusterSettings, self)


def _part(kind: type[Any], arguments: ApplicationArguments) -> Any:
    fields = {name: getattr(arguments, name) for name in kind.model_fields}
    return kind.model_construct(_fields_set=set(fields), **fields)


def for_replicas(settings: Settings, cluster: ClusterSettings, *, cpus: float) -> Settings:
    """The settings as every replica gets them. `cpus`: of all nodes.

    Raises SettingError where they make no sense in a cluster.
    """
    if settings.uds is not None:
        raise SettingError(
            "uds: a cluster's proxies listen on an address of every node; leave it out, and give "
            "--host and --port",
            param="uds",
        )
    most = cluster.most_engines
    changes: dict[str, Any] = {}
    if settings.device == "cpu" and settings.threads is None:
        changes["threads"] = max(1, int(cpus // most))
    if settings.adapter_paths is None:
        changes["adapter_paths"] = False  # a path would be that of whichever machine answers
    return settings.model_copy(update=changes)


def check_database(settings: Settings, *, machines: int) -> None:
    """Raise SettingError if replicas on so many machines can't share the database."""
    url = settings.database_url
    try:
        backend = make_url(url).get_backend_name()
    except ArgumentError:
        return  # whoever opens it says what is wrong with it
    if backend == "sqlite" and machines > 1:
        raise SettingError(
            f"database: SQLite can't be shared by {machines} machines; give a PostgreSQL database "
            "with --database postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
            param="database",
        )
