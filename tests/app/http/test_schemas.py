"""HTTP answers have the fields of the library's results, no more and no less."""

import json
from dataclasses import replace

import torch

from app.http.schemas import EvaluationResult
from robust.attacks import resolve_attack
from robust.evaluation import (
    CurvePoint,
    Evaluation,
    Flag,
    Probes,
)
from robust.evaluation.outcomes import Outcomes
from robust.evaluation.result import StageAccuracy
from robust.threat_model import ThreatModel


def evaluation() -> Evaluation:
    """One with a value in every field."""
    ball = ThreatModel(eps=8 / 255)
    labels = torch.tensor([0, 1, 2, 0])
    clean, attacked = (
        Outcomes(attack, labels, num_classes=3, batch_size=4)
        for attack in (None, resolve_attack("autoattack", ball, seed=3))
    )
    clean.add_rows(
        [(i, int(i == 3), int(labels[i]) if i < 3 else 1, 0.0, 0, 1, 0) for i in range(4)]
    )
    attacked.start_from(clean)
    attacked.add_rows([(0, 1, 2, 0.03, 0, 5, 4), (1, 0, 1, 0.0, 1, 9, 8), (2, 0, 2, 0.0, 0, 9, 8)])
    stages = resolve_attack("autoattack", ball).stages
    attacked.stages = [
        StageAccuracy(attack=stage.label, attacked=3, correct=2, seconds=1.5) for stage in stages
    ]
    attacked.seconds = 6.0
    repeated = replace(
        attacked.accuracy(),
        attack=resolve_attack("pgd-7", ball, restarts=3, random_start=False, seed=1),
        stages=(),
    )
    return Evaluation(
        n=4,
        total=4,
        clean=clean.accuracy(),
        attacks=(attacked.accuracy(), repeated),
        worst_correct=2,
        curve=(CurvePoint(eps=0.25, correct=1, n=4),),
        probes=Probes(
            n=4,
            difference=0.5,
            probabilities=False,
            zero_gradients=1,
            nan_gradients=2,
            right=3,
            right_normalized=2,
            normalization="CIFAR",
            search_difference=0.125,
        ),
        flags=(Flag(name="chance", text="seen", advice="do"),),
        notes=("fab-t: tries 2 target classes, not 9",),
        image_dtype="float32",
        precision="bf16 search, fp32 verified",
        precision_reason="as requested",
    )


def test_result_round_trips_through_json() -> None:
    whole = evaluation()
    again = Evaluation.from_dict(json.loads(json.dumps(whole.to_dict())))
    assert again == whole
    assert again.to_dict() == whole.to_dict()
    assert again.attacks[0].attack == whole.attacks[0].attack
    assert again.attacks[1].label == "pgd-7x3"
    assert again.attacks[1].attack == whole.attacks[1].attack
    assert whole.to_dict()["results"][2]["random_start"] is False


def test_http_response_has_the_same_fields() -> None:
    values = evaluation().to_dict() | {"done": 1.0}
    answer = EvaluationResult.model_validate(values, extra="forbid").model_dump(mode="json")
    clean, *attacks = values["results"]
    settings = ("norm", "eps", "eps_text", "alpha", "steps", "restarts", "random_start", "seed")
    nothing = dict.fromkeys(settings)
    assert answer == json.loads(json.dumps(values | {"results": [clean | nothing, *attacks]}))


def test_results_from_before_a_field_was_renamed_are_read() -> None:
    values = evaluation().to_dict() | {"done": 1.0}
    for result in values["results"]:
        result["unheld"] = result.pop("unconfirmed")
    values["probes"]["right_normalised"] = values["probes"].pop("right_normalized")
    values["probes"]["normalisation"] = values["probes"].pop("normalization")
    del values["precision_reason"], values["image_dtype"]
    del values["results"][1]["random_start"]
    answer = EvaluationResult.model_validate(values)
    assert answer.results[1].unconfirmed == 1
    assert answer.probes is not None
    assert (answer.probes.right_normalized, answer.probes.normalization) == (2, "CIFAR")
