"""The settings of the service, each read from the environment variable ROBUST_<NAME>."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from robust.choices import Rgb
from robust.loading.options import (
    NAMED_MEANS,
    NAMED_STDS,
    ModelOptions,
    model_options,
    parse_rgb,
)
from robust.threat_model import Norm, parse_eps

_PREFIX = "ROBUST_"
# Without the prefix: read by the project's tests; set by Kubernetes for a Service named `robust`.
_OTHER_VARIABLES = re.compile(r"TEST_SET|(.+_)?(SERVICE_(HOST|PORT)(_.+)?|PORT_[0-9]+_.+)")
_NUMBER = re.compile(r"[-+0-9.eE/ ]+")
_ORIGIN = re.compile(r"\*|https?://[^/\s*]+")
# A name or an IPv6 address in brackets, with an optional port; or the address alone.
_HOST = re.compile(r"(?:(\*|(?:\*\.)?[a-z0-9._-]+)|\[([0-9a-f:.]+)\])(?::[0-9]+)?|([0-9a-f:.]+)")


def _size(value: Any) -> float:
    try:
        return parse_eps(value)
    except ValueError:
        raise ValueError("a number of at least 0 or a fraction such as 8/255") from None


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(item.strip() for item in value.split(",") if item.strip())


def _split_some(value: object) -> object:
    """Like `_split`, but a value such as " " is a mistake: it must not turn protection off."""
    items = _split(value)
    if value and not items:
        raise ValueError("at least one value between the commas")
    return items


def _check_keys(keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    if not all(re.fullmatch(r"[!-~]+", key.get_secret_value()) for key in keys):
        raise ValueError("comma-separated keys of visible ASCII characters")
    return keys


def _check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """The hosts as they are compared: in lowercase, without port and brackets."""
    found = [_HOST.fullmatch(host.lower()) for host in hosts]
    if not all(found):
        raise ValueError("comma-separated hosts such as example.org, *.example.org or ::1, or *")
    return tuple(match[1] or match[2] or match[3] for match in found if match)


def _check_proxies(proxies: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what uvicorn would take for a name that no client has, and so never trust."""
    try:
        if proxies != ("*",):
            for proxy in proxies:
                ip_network(proxy)
    except ValueError:
        expected = "comma-separated addresses or networks such as 10.0.0.0/8, or *"
        raise ValueError(expected) from None
    return proxies


def _check_folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise ValueError("a folder that exists")
    return path


def _check_root_path(path: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path):
        raise ValueError("a path such as /robust, without a slash at the end")
    return path


def _check_traces(url: str | None) -> str | None:
    if url is not None and not re.fullmatch(r"https?://\S+", url):
        raise ValueError("a URL that starts with http:// or https://")
    return url


def _check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    if not all(_ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("comma-separated origins such as https://example.org, or *")
    return tuple(origin.lower() for origin in origins)  # as browsers send them


def _rgb(named: dict[str, Rgb]) -> AfterValidator:
    def check(text: str | None) -> str | None:
        try:
            if text is not None:
                parse_rgb(text, named)
        except ValueError as error:
            expected = str(error).removeprefix("expected ").partition(", got ")[0]
            raise ValueError(expected) from None
        return text

    return AfterValidator(check)


Size = Annotated[float, BeforeValidator(_size)]
Mean = Annotated[str | None, _rgb(NAMED_MEANS)]
Std = Annotated[str | None, _rgb(NAMED_STDS)]
Keys = Annotated[
    tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_some), AfterValidator(_check_keys)
]
Hosts = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(_split_some), AfterValidator(_check_hosts)
]
Proxies = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(_split), AfterValidator(_check_proxies)
]
Origins = Annotated[
    tuple[str, ...], NoDecode, BeforeValidator(_split_some), AfterValidator(_check_origins)
]


class Settings(BaseSettings):
    """All settings of the service. Raises pydantic's ValidationError for an invalid value."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="ignore"
    )

    checkpoint: Path = Field(
        default=Path("models/robust_model.pt"), description="Weights to serve."
    )
    compare: str = Field(
        default="auto",
        description="Model for `compare`; auto: plain_model.pt beside the checkpoint; empty: none.",
    )
    arch: str | None = Field(
        default=None,
        description="Network of a bare state dict, such as timm:NAME; unset: found from its keys.",
    )
    stem: str | None = Field(
        default=None,
        description="Stem of the network, such as imagenet or cifar; unset: found from its shape.",
    )
    activation: str | None = Field(
        default=None, description="Activation of the network: relu or silu; unset: relu."
    )
    input_size: int | None = Field(
        default=None,
        ge=8,
        le=1024,
        description="Width and height of the input in pixels; unset: 32.",
    )
    mean: Mean = Field(
        default=None,
        description="Mean subtracted from pixels in [0, 1]: R,G,B, imagenet or cifar10.",
    )
    std: Std = Field(
        default=None, description="Standard deviation to divide by: R,G,B, imagenet or cifar10."
    )
    classes: str | None = Field(
        default=None, description="Comma-separated class names, or a file with one per line."
    )
    key: str | None = Field(
        default=None, description="Key of the weights in the file, such as ema."
    )
    device: str = Field(
        default="auto",
        description="auto, cpu, cuda, cuda:N, mps or xpu; auto: the GPU if it agrees with the CPU.",
    )
    threads: int = Field(
        default=0, ge=0, description="CPU threads for the model; 0: the CPU limit of the cgroup."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="auto, fp32 or bf16; auto: bf16 if it agrees and is faster.",
    )
    datasets: Annotated[Path | None, AfterValidator(_check_folder)] = Field(
        default=None,
        description="Folder of datasets that POST /evaluate accepts by name.",
    )
    jobs: Path | None = Field(
        default=None,
        description="Folder that stores evaluations across restarts; unset: in memory only.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="PostgreSQL URL for evaluations shared by replicas; needs the extra postgres.",
    )

    api_keys: Keys = Field(
        default=(),
        description="Comma-separated API keys; every request needs one, except for the page, /docs "
        "and the probes.",
    )
    admin_keys: Keys = Field(
        default=(), description="Comma-separated API keys that can access every evaluation."
    )
    allowed_hosts: Hosts = Field(
        default=(),
        description="Accepted hosts, or *; unset: any, but on loopback only local names.",
    )
    trusted_proxies: Proxies = Field(
        default=("127.0.0.1", "::1"),
        description="Proxies whose X-Forwarded-For, -Proto and -Prefix are trusted, or *.",
    )
    root_path: Annotated[str, AfterValidator(_check_root_path)] = Field(
        default="",
        description="Path prefix of the service behind a proxy, such as /robust.",
    )
    cors_origins: Origins = Field(
        default=(), description="Comma-separated origins whose pages may send requests, or *."
    )

    max_body_bytes: int = Field(
        default=64 * 2**20, ge=1, description="Largest request body, in bytes."
    )
    max_held_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="Maximum total bytes of request bodies in memory; above it 429.",
    )
    upload_seconds: float = Field(
        default=30.0, gt=0, description="Time limit for receiving a request; after it 408."
    )
    max_requests: int = Field(
        default=512,
        ge=1,
        description="Maximum number of active POST requests (after the upload); above it 429.",
    )
    client_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of requests, bytes and queue for one key or address; above it 429.",
    )
    max_images: int = Field(
        default=64, ge=1, description="Maximum number of images in one POST /predict."
    )
    max_pixels: int = Field(
        default=50_000_000, ge=1, description="Maximum pixels of an image, checked before decoding."
    )
    decode_workers: int = Field(
        default=2,
        ge=1,
        description="Processes for large images, and as many for quick ones; a client can use "
        "all but one.",
    )
    decode_memory: int = Field(
        default=2**30,
        ge=64 * 2**20,
        description="Memory for decoding large images and datasets, in bytes; half as much "
        "again for quick images.",
    )
    decode_seconds: float = Field(
        default=10.0, gt=0, description="Time limit for decoding an image; after it 422."
    )
    max_upload_images: int = Field(
        default=10_000, ge=1, description="Maximum images in a dataset uploaded to POST /evaluate."
    )
    max_eps_linf: Size = Field(
        default=64 / 255, ge=0, le=1, description="Largest eps under linf, in pixel units."
    )
    max_eps_l2: Size = Field(
        default=10.0, ge=0, description="Largest eps under l2, in pixel units."
    )
    max_steps: int = Field(default=200, ge=1, description="Maximum steps of an attack.")
    max_queries: int = Field(
        default=5000, ge=1, description="Maximum queries of the attack square."
    )
    max_restarts: int = Field(default=10, ge=1, description="Maximum restarts of an attack.")

    max_batch: int = Field(
        default=64, ge=1, description="Largest batch of predictions from several requests."
    )
    evaluation_batch: int = Field(
        default=0,
        ge=0,
        description="Batch size of evaluations; predictions wait for a batch; 0: 16, on GPU 64.",
    )
    queue_limit: int = Field(
        default=16_384, ge=1, description="Maximum queued work, in forward passes; above it 429."
    )
    deadline_seconds: float = Field(
        default=30.0, gt=0, description="Time limit of a prediction or an attack; after it 504."
    )
    max_jobs: int = Field(
        default=16, ge=1, description="Maximum evaluations queued or running; above it 429."
    )
    jobs_bytes: int = Field(
        default=2 * 2**30,
        ge=1,
        description="Maximum bytes of all evaluations' images, journals and results; above it 429.",
    )
    lost_seconds: float = Field(
        default=20.0,
        ge=5,  # heartbeats are sent every 2 s
        description="Heartbeat timeout before another replica takes over an evaluation.",
    )
    job_expiry_seconds: float = Field(
        default=3600.0, gt=0, description="How long a finished evaluation is kept."
    )
    reload_seconds: float = Field(
        default=2.0, gt=0, description="Seconds between checks for a new checkpoint."
    )
    grace_seconds: float = Field(
        default=20.0,
        ge=0,
        description="Time limit of a shutdown; open requests get three quarters of it.",
    )

    traces: Annotated[str | None, AfterValidator(_check_traces)] = Field(
        default=None,
        description="URL for OpenTelemetry traces (OTLP over HTTP); needs the extra otel.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines as text or JSON."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_compare(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Keep an empty ROBUST_COMPARE, which disables the comparison model."""
        if os.environ.get("ROBUST_COMPARE") == "":
            return {"compare": "", **values}
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _digits(cls, value: object, info: ValidationInfo) -> object:
        """Refuse numbers with anything but ASCII digits, such as underscores."""
        field = cls.model_fields[info.field_name or ""]
        if any(isinstance(item, BeforeValidator) for item in field.metadata):
            return value  # parsed elsewhere
        number = field.annotation in (int, float, int | None) and isinstance(value, str)
        if number and not _NUMBER.fullmatch(str(value)):
            raise ValueError("a number in digits 0 to 9")
        return value

    def model_options(self) -> ModelOptions:
        """The options that describe a bare state dict. Raises ValueError and OSError."""
        return model_options(
            arch=self.arch,
            stem=self.stem,
            activation=self.activation,
            input_size=self.input_size,
            mean=self.mean,
            std=self.std,
            classes=self.classes,
            key=self.key,
        )

    @property
    def max_cost(self) -> int:
        """The maximum forward passes of one request: a client's share of the queue."""
        return max(1, int(self.client_share * self.queue_limit))

    @property
    def max_predictions(self) -> int:
        """The maximum images of one prediction request; more would never fit into the queue."""
        return min(self.max_images, self.max_cost)

    @property
    def compare_path(self) -> Path | None:
        """The weights of the comparison model; None if there is none."""
        if self.compare != "auto":
            return Path(self.compare) if self.compare else None
        path = self.checkpoint.parent / "plain_model.pt"
        return path if path.is_file() and path != self.checkpoint else None

    def max_eps(self, norm: Norm) -> float:
        """The largest eps accepted in this norm."""
        return self.max_eps_linf if norm == "linf" else self.max_eps_l2


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A message for each variable ROBUST_* that is no setting, which may be a misspelled one."""
    known = [name.upper() for name in Settings.model_fields]
    found = []
    for variable, value in sorted(environment.items()):
        upper = variable.upper()  # as pydantic reads them
        name = upper.removeprefix(_PREFIX)
        of_kubernetes = name.endswith("PORT") and "://" in value
        if name == upper or name in known or of_kubernetes or _OTHER_VARIABLES.fullmatch(name):
            continue
        close = get_close_matches(name, known, n=1, cutoff=0.75)
        meant = f"; did you mean {_PREFIX}{close[0]}?" if close else ""
        found.append(f"{variable[:100]} is not a setting and is ignored{meant}")
    return found
