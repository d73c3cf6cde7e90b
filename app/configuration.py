"""Writes the page on the settings: `python -m app.configuration > docs/configuration.md`."""

from __future__ import annotations

import click
from pydantic.fields import FieldInfo

from app.settings import Settings
from robust.threat_model import format_eps

_HEAD = """\
# Configuration of the service

Every setting is an environment variable; an empty one counts as unset, except `ROBUST_COMPARE`.
Options of `robust serve` override the variables of the same name (`--model` is
`ROBUST_CHECKPOINT`). With an invalid value the service does not start, and one line names the
variable, what was expected and what was found. A variable `ROBUST_*` that is no setting is ignored,
and a warning in the log names it. Numbers use the digits 0 to 9; limits on eps are in pixel units
and may be fractions (`8/255`).

This page is generated from `app/settings.py` with
`python -m app.configuration > docs/configuration.md`; a test checks that it is up to date.

| variable | default | what |
|---|---|---|
"""
_TAIL = """
## Which settings to change

- **On the open internet**: `ROBUST_API_KEYS`, `ROBUST_ALLOWED_HOSTS`, and
  `ROBUST_TRUSTED_PROXIES` if there is a proxy in front of the service. Without the last one, all
  clients behind the proxy count as a single client.
- **Little memory**: the service uses at most `ROBUST_MAX_HELD_BYTES` for request bodies, 1.5 times
  `ROBUST_DECODE_MEMORY` for decoding, `ROBUST_JOBS_BYTES` for evaluations (only without
  `ROBUST_JOBS` and `ROBUST_DATABASE_URL`), and about 1.3 GB for the shipped model and the
  comparison model, or 1.6 GB during an evaluation. Reading a registered dataset is not limited.
- **A slow model**: with the CIFAR stem, on two cores of an AMD EPYC, a forward pass of one image
  takes 20 ms and a gradient 40 ms in float32, and about two thirds of that in bfloat16, so the
  default `ROBUST_DEADLINE_SECONDS` is enough for some 700 gradients. Raise it for longer attacks,
  or use `POST /evaluate`, which has no deadline. A prediction may wait for one pass of an
  evaluation, of `ROBUST_EVALUATION_BATCH` images.
- **Long attacks delay other clients**: lower `ROBUST_CLIENT_SHARE`. One request may cost at most
  that share of `ROBUST_QUEUE_LIMIT`; by default 8,192 forward passes, enough for square with its
  5,000 queries.
"""


def page() -> str:
    """The page in Markdown."""
    rows = [
        f"| `ROBUST_{name.upper()}` | {_default(name, field)} | {field.description} |\n"
        for name, field in Settings.model_fields.items()
    ]
    return _HEAD + "".join(rows) + _TAIL


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if value is None or value in ((), ""):
        return "unset"
    if name.startswith("max_eps"):
        return f"`{format_eps(value)}`"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    if isinstance(value, int) and name.endswith(("bytes", "memory")):
        return f"`{value}` ({value // 2**20} MiB)"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    click.echo(page(), nl=False)
