"""POST /attack: how little it takes to mislead the model on one image."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from torch import Tensor

from app.attacks import Attacked, attack_together, cost
from app.documents import PNG_ANSWER, body
from app.errors import FieldError, InvalidParameters
from app.images import decode
from app.model import ServedModel
from app.parameters import AttackImageParameters, parse, resolve_attacks, resolve_class
from app.problem import documented
from app.schemas import AttackResponse
from app.service import Service, unless_gone
from app.uploads import read_upload
from app.views import attack_result, base64_png, class_name, seen
from robust.images import encode_png
from robust.prediction import AttackOutcome


def router(service: Service) -> APIRouter:
    """The route on `service`."""
    routes = APIRouter(tags=["attack"])

    @routes.post(
        "/attack",
        summary="Attack an image",
        response_model=AttackResponse,
        responses={200: PNG_ANSWER, **documented(400, 408, 413, 415, 422, 429, 503, 504)},
        openapi_extra=body(AttackImageParameters, files="image"),
    )
    async def attack(request: Request) -> AttackResponse | Response:
        """Run each attack on the image and give back what it found.

        Everything told of an adversarial image is measured on the 8-bit image given. With
        `Accept: image/png` and one attack the answer is that image itself, and headers name
        the result.
        """
        upload = await read_upload(request, max_files=1)
        parameters = parse(AttackImageParameters, upload.parameters)
        model = service.model_for(request)
        attacks = resolve_attacks(parameters, service.settings)
        label = resolve_class(parameters.label, "label", model.classes)
        target = resolve_class(parameters.target, "target", model.classes)
        for item in attacks:
            if target is not None and not item.takes_target:
                raise _fault("target", "an attack that takes a target", item.name)
        as_png = _wants_png(request)
        if as_png and len(attacks) != 1:
            raise _fault("attack", "exactly one for Accept: image/png", f"{len(attacks)}")
        if cost(attacks) > service.settings.queue_limit:
            expected = f"at most {service.settings.queue_limit} forward passes in all"
            raise _fault("steps", expected, f"{cost(attacks)}")

        async def work() -> AttackResponse | Response:
            image = (await decode(service, model, upload.files))[0]
            outcomes = await attack_together(
                service.engine,
                model,
                Attacked(image=image, label=label, target=target),
                attacks,
                deadline=service.deadline(request),
            )
            if as_png:
                return await service.beside(_png_answer, outcomes[0], model)
            return await service.beside(_answer, outcomes, image, model)

        return await unless_gone(request, work())

    return routes


def _answer(outcomes: list[AttackOutcome], image: Tensor, model: ServedModel) -> AttackResponse:
    first, classes = outcomes[0], model.classes
    return AttackResponse(
        model_sha256=model.sha256,
        label=class_name(first.label, classes),
        target=None if first.target is None else class_name(first.target, classes),
        before=seen(first.before, classes),
        already_wrong=first.already_wrong,
        input_png=base64_png(image),
        results=[attack_result(outcome, classes) for outcome in outcomes],
    )


def _png_answer(outcome: AttackOutcome, model: ServedModel) -> Response:
    before, after = (seen(row, model.classes) for row in (outcome.before, outcome.after))
    headers = {
        "X-Attack": outcome.settings.label,
        "X-Success": str(outcome.success).lower(),
        "X-Label": quote(model.classes[outcome.label]),
        "X-Before": quote(before.label),
        "X-After": quote(after.label),
        "X-After-Probability": f"{after.probability:.6f}",
        "X-Linf": f"{outcome.linf:.6f}",
        "X-L2": f"{outcome.l2:.6f}",
        "Vary": "Accept",
    }
    return Response(encode_png(outcome.image), media_type="image/png", headers=headers)


def _wants_png(request: Request) -> bool:
    """Whether the client takes a PNG and does not name JSON."""
    accept = request.headers.get("accept", "").lower()
    return "image/png" in accept and "json" not in accept


def _fault(field: str, expected: str, got: str) -> InvalidParameters:
    return InvalidParameters([FieldError(field=field, expected=expected, got=got)])
