"""GET /limits: what a client may ask for."""

from __future__ import annotations

import asyncio
from typing import get_args

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.service import Service
from app.sets import registered
from app.settings import Settings
from robust.attacks import (
    ATTACKS,
    DEFAULT_ATTACKS,
    DEFAULT_EPS,
    AttackSettings,
    resolve_attack,
)
from robust.threat_model import Norm, ThreatModel

NORMS: tuple[Norm, ...] = get_args(Norm)


class AttackChoice(BaseModel):
    """An attack by name, and what it takes."""

    name: str = Field(examples=["pgd"])
    takes_steps: bool = Field(description="Whether `steps` can be asked for.")
    takes_target: bool = Field(description="Whether `target` can be asked for.")
    steps: int = Field(description="The usual steps, as far as they are taken.", examples=[20])
    cost: int = Field(description="Forward passes that so many steps on one image can take.")


class Limits(BaseModel):
    """What the service takes: the attacks it knows, the largest values, the registered sets."""

    attacks: list[AttackChoice]
    norms: list[Norm] = Field(description="How distance can be measured.")
    default_attacks: list[str] = Field(description="Those run when none is named.")
    default_eps: dict[str, float] = Field(description="By norm, in pixel units.")
    max_eps: dict[str, float] = Field(description="By norm, in pixel units.")
    max_cost: int = Field(description="Most forward passes of one request to POST /attack.")
    max_steps: int
    max_restarts: int
    max_images: int = Field(description="Most images in one POST /predict.")
    max_upload_images: int = Field(description="Most images of a set uploaded to POST /evaluate.")
    max_body_bytes: int
    max_pixels: int = Field(description="Most pixels of an image.")
    deadline_seconds: float = Field(description="Longest wait for a prediction or an attack.")
    datasets: list[str] = Field(description="Registered sets that POST /evaluate takes by name.")


def router(service: Service) -> APIRouter:
    """The route on `service`."""
    routes = APIRouter(tags=["status"])
    settings = service.settings
    attacks = [_choice(name, settings) for name in ATTACKS]

    @routes.get("/limits", summary="What can be asked for")
    async def limits() -> Limits:
        """The attacks with their parameters, the largest values taken, and the registered sets."""
        names = await asyncio.to_thread(registered, settings)
        return Limits(
            attacks=attacks,
            norms=list(NORMS),
            default_attacks=list(DEFAULT_ATTACKS),
            default_eps={norm: min(DEFAULT_EPS[norm], settings.max_eps(norm)) for norm in NORMS},
            max_eps={norm: settings.max_eps(norm) for norm in NORMS},
            max_cost=settings.queue_limit,
            max_steps=settings.max_steps,
            max_restarts=settings.max_restarts,
            max_images=settings.max_images,
            max_upload_images=settings.max_upload_images,
            max_body_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            deadline_seconds=settings.deadline_seconds,
            datasets=list(names),
        )

    return routes


def _choice(name: str, settings: Settings) -> AttackChoice:
    """What an attack takes, found out by asking for it."""
    usual = _resolved(name)
    takes_steps = _resolved(name, usual.steps + 1).steps > usual.steps
    if takes_steps and usual.steps > settings.max_steps:
        usual = _resolved(name, settings.max_steps)
    return AttackChoice(
        name=name,
        takes_steps=takes_steps,
        takes_target=usual.takes_target,
        steps=usual.steps,
        cost=usual.cost,
    )


def _resolved(name: str, steps: int | None = None) -> AttackSettings:
    return resolve_attack(name, ThreatModel(norm="linf", eps=DEFAULT_EPS["linf"]), steps=steps)
