"""GET /limits: attacks, largest values and registered datasets."""

from __future__ import annotations

import asyncio
from typing import Literal, get_args

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.http.dependencies import ServiceOf
from app.http.sets import registered
from app.settings import Settings
from robust.attack_registry import REGISTRY, AttackEntry
from robust.attacks import (
    DEFAULT_ATTACKS,
    DEFAULT_EPS,
    resolve_attack,
)
from robust.threat_model import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)


class AttackChoice(BaseModel):
    """An attack with its parameters."""

    name: str = Field(examples=["pgd"])
    title: str = Field(description="The name for display.", examples=["PGD"])
    summary: str = Field(description="What it does, in one line.")
    takes_steps: bool = Field(description="Whether it has the parameter `steps`.")
    takes_target: bool = Field(description="Whether it supports `target`.")
    steps: int = Field(description="Default steps or queries, within the limits.", examples=[20])
    unit: Literal["steps", "queries"] = Field(description="What `steps` counts.")
    uses_gradient: bool = Field(description="Whether it needs a model with gradients.")
    cost: int = Field(description="Maximum passes for one image with that many steps.")


class Limits(BaseModel):
    """The attacks, the largest accepted values, and the registered datasets."""

    attacks: list[AttackChoice]
    norms: list[Norm] = Field(description="Supported norms.")
    default_attacks: list[str] = Field(description="The attacks that run if none is named.")
    default_eps: dict[str, float] = Field(description="By norm, in pixel units.")
    max_eps: dict[str, float] = Field(description="By norm, in pixel units.")
    max_cost: int = Field(description="Maximum forward passes of one POST /attack.")
    max_steps: int
    max_queries: int = Field(description="Maximum queries of an attack that counts queries.")
    max_restarts: int
    max_images: int = Field(description="Maximum images in one POST /predict.")
    max_upload_images: int = Field(description="Maximum images in a set sent to POST /evaluate.")
    max_body_bytes: int
    max_pixels: int = Field(description="Maximum pixels of an image.")
    deadline_seconds: float = Field(description="Time limit of a prediction or an attack.")
    datasets: list[str] = Field(description="Registered sets that POST /evaluate accepts by name.")


router = APIRouter(tags=["status"])


@router.get("/limits", summary="Accepted parameters")
async def limits(service: ServiceOf) -> Limits:
    """The attacks with their parameters, the largest accepted values, and the registered sets."""
    settings = service.settings
    names = await asyncio.to_thread(registered, settings)
    return Limits(
        attacks=[_choice(entry, settings) for entry in REGISTRY.values()],
        norms=list(NORMS),
        default_attacks=list(DEFAULT_ATTACKS),
        default_eps={norm: min(DEFAULT_EPS[norm], settings.max_eps(norm)) for norm in NORMS},
        max_eps={norm: settings.max_eps(norm) for norm in NORMS},
        max_cost=settings.max_cost,
        max_steps=settings.max_steps,
        max_queries=settings.max_queries,
        max_restarts=settings.max_restarts,
        max_images=settings.max_predictions,
        max_upload_images=settings.max_upload_images,
        max_body_bytes=settings.max_body_bytes,
        max_pixels=settings.max_pixels,
        deadline_seconds=settings.deadline_seconds,
        datasets=list(names),
    )


def _choice(entry: AttackEntry, settings: Settings) -> AttackChoice:
    """An attack's registry entry, with its default steps within the service's limits."""
    takes_steps = "steps" in entry.parameters
    most = settings.max_queries if entry.unit == "queries" else settings.max_steps
    attack = resolve_attack(
        entry.name,
        ThreatModel(norm="linf", eps=DEFAULT_EPS["linf"]),
        steps=min(entry.budget, most) if takes_steps else None,
    )
    return AttackChoice(
        name=entry.name,
        title=entry.title or entry.name.upper(),
        summary=entry.summary,
        takes_steps=takes_steps,
        takes_target=entry.takes_target,
        steps=attack.steps,
        unit=entry.unit,
        uses_gradient=attack.uses_gradient,
        cost=attack.cost,
    )
