"""The settings of the service, each read from the environment variable ROBUST_<NAME>."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from robust.threat_model import Norm, parse_eps

Size = Annotated[float, BeforeValidator(parse_eps)]  # 8/255, or a number
_ORIGIN = re.compile(r"\*|https?://[^/\s*]+")


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _visible(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if not all(re.fullmatch(r"[!-~]+", key.get_secret_value()) for key in keys):
        raise ValueError("keys of visible ASCII characters, with commas between them")
    return keys


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("origins such as https://example.org, with commas between them, or *")
    return origins


Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split), AfterValidator(_visible)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_origins)]


class Settings(BaseSettings):
    """Everything the service can be told. Raises pydantic's ValidationError for a bad value."""

    model_config = SettingsConfigDict(
        env_prefix="ROBUST_", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    checkpoint: Path = Field(
        default=Path("models/robust_model.pt"), description="Weights to serve."
    )
    device: str = Field(
        default="auto", description="auto, cpu or cuda; auto takes CUDA where there is one."
    )
    threads: int = Field(
        default=0, ge=0, description="CPU threads of the device thread; 0 takes the cgroup's share."
    )
    datasets: Path | None = Field(
        default=None,
        description="Folder whose entries POST /evaluate knows by name.",
    )
    jobs: Path | None = Field(
        default=None,
        description="Folder that keeps evaluations over a restart; empty: in memory only.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="PostgreSQL that keeps evaluations for all replicas; needs the extra postgres.",
    )

    api_keys: Keys = Field(
        default=(), description="Keys of which each request needs one, with commas; empty: none."
    )
    cors_origins: Origins = Field(
        default=(), description="Origins whose pages may ask, with commas, or *; empty: no other."
    )

    max_body_bytes: int = Field(
        default=64 * 2**20, ge=1, description="Largest request body, in bytes."
    )
    max_held_bytes: int = Field(
        default=512 * 2**20, ge=1, description="Most bytes of all bodies in hand; past it 429."
    )
    upload_seconds: float = Field(
        default=30.0, gt=0, description="Longest time for a request to arrive; past it 408."
    )
    max_requests: int = Field(
        default=256, ge=1, description="Most POST requests in hand at once; past it 429."
    )
    max_images: int = Field(default=64, ge=1, description="Most images in one POST /predict.")
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="Most pixels of an image, checked before decoding."
    )
    max_upload_images: int = Field(
        default=10_000, ge=1, description="Most images of a set uploaded to POST /evaluate."
    )
    max_eps_linf: Size = Field(
        default=64 / 255, ge=0, le=1, description="Largest eps under linf, in pixel units."
    )
    max_eps_l2: Size = Field(
        default=10.0, ge=0, description="Largest eps under l2, in pixel units."
    )
    max_steps: int = Field(default=200, ge=1, description="Most steps of an attack.")
    max_queries: int = Field(default=5000, ge=1, description="Most queries of the attack square.")
    max_restarts: int = Field(default=10, ge=1, description="Most restarts of an attack.")

    max_batch: int = Field(
        default=64, ge=1, description="Most images that predictions of several requests share."
    )
    evaluation_batch: int = Field(
        default=64,
        ge=16,
        description="Most images in a pass of an evaluation; a prediction waits for one at most.",
    )
    queue_limit: int = Field(
        default=4096, ge=1, description="Most queued work, in forward passes; past it 429."
    )
    deadline_seconds: float = Field(
        default=30.0, gt=0, description="Longest wait for a prediction or an attack; past it 504."
    )
    max_jobs: int = Field(
        default=16, ge=1, description="Most evaluations queued or running at once; past it 429."
    )
    jobs_bytes: int = Field(
        default=2 * 2**30,
        ge=1,
        description="Most bytes of all evaluations' images, journals and results; past it 429.",
    )
    lost_seconds: float = Field(
        default=20.0,
        gt=0,
        description="Silence of a replica after which its evaluation goes on elsewhere.",
    )
    job_expiry_seconds: float = Field(
        default=3600.0, gt=0, description="How long a finished evaluation can be asked for."
    )
    reload_seconds: float = Field(
        default=2.0, gt=0, description="Seconds between looks for a new checkpoint."
    )
    grace_seconds: float = Field(
        default=20.0, ge=0, description="Longest wait for requests in hand after SIGTERM."
    )

    traces: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="Where OpenTelemetry traces go, OTLP over HTTP; needs the extra otel.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe lines that are logged."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines as text or as JSON objects."
    )

    def max_eps(self, norm: Norm) -> float:
        """The largest eps accepted in this norm."""
        return self.max_eps_linf if norm == "linf" else self.max_eps_l2
