"""POST /attack: adversarial examples for one image."""

from __future__ import annotations

from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from torch import Tensor

from app.engine.attack_batch import (
    AttackItem,
    Transfer,
    attack_in_batch,
    compare_cost,
    compare_in_batch,
    cost,
)
from app.engine.served_model import ServedModel
from app.errors import invalid
from app.http.dependencies import service_of
from app.http.images import decode
from app.http.openapi import PNG_ANSWER, body
from app.http.parameters import (
    AttackImageParameters,
    check_model,
    parse,
    resolve_attacks,
    resolve_class,
)
from app.http.problem import documented
from app.http.schemas import AttackResponse, AttackResult, CompareResponse
from app.http.uploads import read_upload
from app.http.views import (
    already_wrong,
    attack_result,
    base64_png,
    class_name,
    outcome_of,
    to_prediction,
)
from app.service import Service, unless_gone
from robust.images import encode_png
from robust.prediction import AttackOutcome
from robust.threat_model import EPS_OF_8_BIT, ThreatModel

router = APIRouter(tags=["attack"])


@router.post(
    "/attack",
    summary="Attack an image",
    response_model=AttackResponse,
    responses={200: PNG_ANSWER, **documented(400, 408, 413, 415, 422, 429, 503, 504)},
    openapi_extra=body(AttackImageParameters, files="image"),
)
async def attack(request: Request) -> AttackResponse | Response:
    """Run each attack on the image and return its result.

    Every result is measured on the returned 8-bit image. With `Accept: image/png` and one attack
    the response is that image itself, and headers give the result. With `compare` a second model
    is attacked too, and each adversarial image also goes through the other model.
    """
    service = service_of(request)
    upload = await read_upload(request, max_files=1)
    parameters = parse(AttackImageParameters, upload.parameters)
    model = service.model_for(request)
    request.state.precision = model.attack_precision
    attacks = resolve_attacks(parameters, service.settings)
    label = resolve_class(parameters.label, "label", model.classes)
    target = resolve_class(parameters.target, "target", model.classes)
    for item in attacks:
        if target is not None and not item.takes_target:
            raise invalid("target", "an attack that takes a target", item.name)
    _check_eps(attacks[0].threat_model)
    as_png = _wants_png(request)
    if as_png and len(attacks) != 1:
        raise invalid("attack", "exactly one for Accept: image/png", f"{len(attacks)}")
    pairs = _compared_pairs(service, model, parameters.compare)
    for attacked in [first for first, _ in pairs] or [model]:
        check_model(attacks, attacked, targeted=target is not None)
    if as_png and pairs:
        raise invalid("compare", "no comparison for Accept: image/png", parameters.compare)
    total = len(pairs) * compare_cost(attacks) if pairs else cost(attacks)
    if total > service.settings.max_cost:
        most = service.settings.max_cost
        expected = f"at most {most} forward passes in all (POST /evaluate accepts more)"
        raise invalid("attack" if parameters.steps is None else "steps", expected, f"{total}")

    async def work() -> AttackResponse | Response:
        image = (await decode(service, request, model, upload.files))[0]
        item = AttackItem(image=image, label=label, target=target)
        engine, deadline = service.engine, service.deadline(request)
        if pairs:
            found = await compare_in_batch(engine, pairs, item, attacks, deadline=deadline)
            return await service.run_in_thread(_compared, found, image, pairs)
        outcomes = await attack_in_batch(engine, model, item, attacks, deadline=deadline)
        if as_png:
            return await service.run_in_thread(_png_answer, outcomes[0], model)
        return await service.run_in_thread(_answer, outcomes, image, model)

    return await unless_gone(request, work())


def _compared_pairs(
    service: Service, model: ServedModel, compare: str
) -> list[tuple[ServedModel, ServedModel]]:
    """The models to attack, each with the other model, which classifies the adversarial image.

    Empty without a comparison, and the comparison model is attacked last. Raises InvalidParameters
    if there is no comparison model.
    """
    if compare == "false":
        return []
    other = service.compare_with(model)
    if other is None:
        raise invalid("compare", "false: there is no comparison model (ROBUST_COMPARE)", compare)
    return [(other, model)] if compare == "only" else [(model, other), (other, model)]


def _compared(
    found: list[list[tuple[AttackOutcome, Transfer]]],
    image: Tensor,
    pairs: list[tuple[ServedModel, ServedModel]],
) -> AttackResponse:
    other, model = pairs[-1]
    results = [
        [attack_result(outcome, model.classes, transfer) for outcome, transfer in results]
        for results in found
    ]
    of_other, of_model = found[-1][0]
    compare = CompareResponse(
        model=other.name,
        model_sha256=other.sha256,
        label=class_name(of_other.label, model.classes),
        before=to_prediction(of_other.before, model.classes),
        already_wrong=already_wrong(of_other),
        results=results[-1],
    )
    own = results[0] if len(pairs) == 2 else []
    return _response(of_model, image, model, own).model_copy(update={"compare": compare})


def _answer(outcomes: list[AttackOutcome], image: Tensor, model: ServedModel) -> AttackResponse:
    results = [attack_result(outcome, model.classes) for outcome in outcomes]
    return _response(outcomes[0], image, model, results)


def _response(
    found: AttackOutcome | Transfer, image: Tensor, model: ServedModel, results: list[AttackResult]
) -> AttackResponse:
    """The response with `results`, and what `found` says of `model` on the original image."""
    classes = model.classes
    return AttackResponse(
        model_sha256=model.sha256,
        label=class_name(found.label, classes),
        target=None if found.target is None else class_name(found.target, classes),
        before=to_prediction(found.before, classes),
        already_wrong=already_wrong(found),
        input_png=base64_png(image),
        results=results,
    )


def _png_answer(outcome: AttackOutcome, model: ServedModel) -> Response:
    before, after = (to_prediction(row, model.classes) for row in (outcome.before, outcome.after))
    headers = {
        "X-Attack": outcome.settings.label,
        "X-Success": str(outcome_of(outcome) == "broken").lower(),
        "X-Outcome": outcome_of(outcome),
        "X-Label": quote(model.classes[outcome.label]),
        "X-Before": quote(before.label),
        "X-After": quote(after.label),
        "X-After-Probability": f"{after.probability:.6f}",
        "X-Linf": f"{outcome.linf:.6f}",
        "X-L2": f"{outcome.l2:.6f}",
        "Vary": "Accept",
    }
    return Response(encode_png(outcome.image), media_type="image/png", headers=headers)


def _check_eps(threat_model: ThreatModel) -> None:
    """Raise InvalidParameters if the eps ball around an 8-bit image contains no other one."""
    if not threat_model.reaches_8_bit:
        raise invalid("eps", EPS_OF_8_BIT, f"{threat_model.eps:g}")


def _wants_png(request: Request) -> bool:
    """Whether the client accepts PNG and does not mention JSON."""
    accept = request.headers.get("accept", "").lower()
    return "image/png" in accept and "json" not in accept
