"""The JSON responses of the service, as pydantic models."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field

from app.jobs.job import JobState

SHA256 = Field(description="SHA-256 of the weights that computed this.", examples=["9f2c…"])


class ClassProbability(BaseModel):
    """A class with its probability."""

    label: str = Field(examples=["cat"])
    index: int = Field(examples=[3])
    probability: float = Field(ge=0, le=1, examples=[0.93])


class Seen(ClassProbability):
    """A prediction: the likeliest class, and the likeliest few in `top`."""

    top: list[ClassProbability]


class ImagePrediction(ClassProbability):
    """The prediction for one image of the request."""

    image: int = Field(description="Index of the image in the request, from 0.")
    top: list[ClassProbability]


class PredictResponse(BaseModel):
    """One prediction per image, in the order of the request."""

    model_sha256: str = SHA256
    results: list[ImagePrediction]


class ClassName(BaseModel):
    """A class by index and name."""

    label: str
    index: int


class ResolvedAttack(BaseModel):
    """An attack with all its parameters as run."""

    attack: str = Field(examples=["pgd-20"])
    name: str = Field(examples=["pgd"])
    norm: str = Field(examples=["linf"])
    eps: float = Field(description="In pixel units; pixels are in [0, 1].")
    eps_text: str = Field(examples=["8/255"])
    alpha: float
    steps: int
    restarts: int
    random_start: bool
    seed: int


ALREADY_WRONG = "Whether the original was misclassified, or classified as the target."
Outcome = Literal["broken", "withstood", "already_wrong"]


class TransferResult(BaseModel):
    """The other model's result on an adversarial image."""

    after: Seen
    outcome: Outcome = Field(description="As for the attacked model.")


class AttackResult(BaseModel):
    """One attack. Everything is measured on the returned 8-bit image."""

    parameters: ResolvedAttack
    after: Seen
    outcome: Outcome = Field(
        description="broken: moved away from the label, or to the target if given; withstood; or "
        "already_wrong: the original was misclassified, or classified as the target."
    )
    success: bool = Field(description="Whether the outcome is `broken`.")
    linf: float = Field(description="Largest change of a pixel, in pixel units.")
    l2: float = Field(description="Euclidean length of the change, in pixel units.")
    seconds: float = Field(description="Time on the device.")
    adversarial_png: str = Field(description="The adversarial image, PNG in base64.")
    perturbation_png: str = Field(
        description="The change, amplified to be visible; gray means no change. PNG in base64."
    )
    transfer: TransferResult | None = Field(
        default=None, description="The other model on this adversarial image, with `compare`."
    )


class CompareResponse(BaseModel):
    """The requested attacks on the comparison model, in order."""

    model: str = Field(description="The file of its weights.", examples=["plain_model.pt"])
    model_sha256: str = SHA256
    label: ClassName = Field(description="The given class, or this model's own prediction.")
    before: Seen
    already_wrong: bool = Field(description=ALREADY_WRONG)
    results: list[AttackResult]


class AttackResponse(BaseModel):
    """The requested attacks, in order."""

    model_sha256: str = SHA256
    label: ClassName = Field(description="The class that the attacks move away from.")
    target: ClassName | None = Field(description="The target class, if one was requested.")
    before: Seen
    already_wrong: bool = Field(description=ALREADY_WRONG)
    input_png: str = Field(description="The image at the model's input size, PNG in base64.")
    results: list[AttackResult] = Field(description="Empty with `compare=only`.")
    compare: CompareResponse | None = Field(
        default=None, description="The same for the comparison model, with `compare`."
    )


class DistanceResult(BaseModel):
    """Distances of the adversarial images from the originals, in pixel units."""

    least: float
    median: float
    most: float


class StageResult(BaseModel):
    """One stage of an attack, run on the images that no earlier stage fooled."""

    attack: str = Field(examples=["apgd-ce"])
    attacked: int
    correct: int = Field(description="Images still robust after this stage, of all.")
    seconds: float


class AccuracyResult(BaseModel):
    """How many of n images are classified correctly, with the 95% Wilson interval."""

    attack: str = Field(examples=["clean", "pgd-20"])
    accuracy: float | None = Field(description="Null before the first image.")
    correct: int
    n: int
    interval: tuple[float, float]
    per_class: list[float | None] = Field(description="Accuracy by class; null without images.")
    per_class_counts: list[tuple[int, int]] = Field(
        default_factory=list,  # none in older results
        description="Correctly classified and all images, by class.",
    )
    confusion: list[list[int]] = Field(
        description="Rows: true class, columns: predicted class; empty above 100 classes."
    )
    distances: DistanceResult | None = Field(description="Of the images that fooled the model.")
    stages: list[StageResult] = Field(description="Of a multi-stage attack.")
    forwards: int = Field(description="Forward passes, counted per image.")
    backwards: int
    unconfirmed: int = Field(
        validation_alias=AliasChoices("unconfirmed", "unheld"),  # its name in older results
        description="Successes that the exact model did not confirm; counted as robust.",
    )
    seconds: float = Field(description="Time of the attack, including other work in between.")
    fooled: list[int] = Field(
        default_factory=list,
        description="Images fooled by a finished multi-stage attack, by index from 0.",
    )
    norm: str | None = None
    eps: float | None = None
    eps_text: str | None = None
    alpha: float | None = None
    steps: int | None = None
    restarts: int | None = None
    random_start: bool | None = None
    seed: int | None = None


class DifferenceResult(BaseModel):
    """Images that one multi-stage attack fooled and another in the same ball did not."""

    attack: str = Field(examples=["audit"])
    other: str = Field(examples=["autoattack"])
    count: int
    indices: list[int]


class WorstCase(BaseModel):
    """Images that are robust to all attacks."""

    accuracy: float | None
    correct: int
    n: int
    interval: tuple[float, float]


class CurveResult(BaseModel):
    """Accuracy under pgd-20 at one eps."""

    eps: float
    eps_text: str
    accuracy: float | None
    correct: int
    n: int
    interval: tuple[float, float]


class ProbeResult(BaseModel):
    """Checks of the model before it was attacked."""

    n: int
    difference: float = Field(description="Between two passes, relative to the largest logit.")
    probabilities: bool = Field(description="Whether the model ends in a softmax.")
    sigmoid: bool = Field(default=False, description="Whether it seems to end in a sigmoid.")
    zero_gradients: int
    nan_gradients: int
    right: int
    right_normalized: int | None = Field(
        validation_alias=AliasChoices("right_normalized", "right_normalised"),
        description="Correct images with the best of the usual normalizations in front; null "
        "if there are too few images, or if none helps on the first or could help significantly.",
    )
    differentiated: int | None = Field(
        default=None,
        description="Images whose gradient was checked; null: all, 0: the model gives none.",
    )
    normalization: str = Field(validation_alias=AliasChoices("normalization", "normalisation"))
    search_difference: float = Field(
        default=0.0,
        description="Error of the faster float32 copy, relative to the largest logit.",
    )


class FlagResult(BaseModel):
    """A warning that the numbers may be unreliable."""

    name: str = Field(examples=["square stronger"])
    text: str = Field(description="What was observed.")
    advice: str = Field(description="What to do about it.")


class TimesResult(BaseModel):
    """Seconds of an evaluation, including other work in between."""

    evaluation: float
    passes: float | None = Field(description="Inside the model; null on a GPU.")
    limit: float | None = Field(description="Of the same passes at the rate of the fastest batch.")


class EvaluationResult(BaseModel):
    """Results over `n` of `total` images: clean first, then each attack."""

    n: int
    total: int
    results: list[AccuracyResult]
    worst_case: WorstCase
    differences: list[DifferenceResult] = Field(
        default_factory=list, description="Between finished multi-stage attacks."
    )
    curve: list[CurveResult]
    probes: ProbeResult | None
    flags: list[FlagResult] = Field(description="Warnings that the numbers may be unreliable.")
    notes: list[str] = Field(
        description="Changes to attacks that the model required, and missing classes."
    )
    image_dtype: str = Field(
        default="uint8",
        examples=["uint8"],
        description="Type of the images, which are scored as given.",
    )
    precision: str = Field(examples=["fp32"])
    precision_reason: str = Field(default="", description="The reason for the search precision.")
    times: TimesResult | None = None
    done: float = Field(ge=0, le=1, description="Fraction of the work that is done.")


class JobStatus(BaseModel):
    """An evaluation: its state and its result so far."""

    id: str
    state: JobState
    model_sha256: str = SHA256
    dataset: str
    images: int
    attacks: list[ResolvedAttack]
    created: datetime
    finished: datetime | None = None
    evaluation: EvaluationResult | None = Field(
        default=None, description="The result so far; on all images once the state is `done`."
    )
    error: str | None = Field(default=None, description="The reason for the state `failed`.")


class RuntimeChoice(BaseModel):
    """The runtime for predictions of batches of up to `images` images."""

    images: int = Field(description="Largest batch; batches above the last entry's are split.")
    runtime: str = Field(examples=["onnxruntime", "torch"])
    images_per_second: float = Field(description="As measured when the model was loaded.")


class CompareCard(BaseModel):
    """The comparison model of POST /attack."""

    name: str = Field(description="The file of its weights.", examples=["plain_model.pt"])
    sha256: str = SHA256
    card: dict[str, Any]


class ModelCard(BaseModel):
    """The served model: its card, from the checkpoint's sidecar."""

    name: str = Field(description="The file of its weights.", examples=["robust_model.pt"])
    sha256: str = SHA256
    device: str = Field(examples=["cpu"])
    loaded: datetime
    classes: list[str]
    input_size: int
    differentiable: bool = Field(
        description="Whether it has gradients; an ONNX file and a remote service have none."
    )
    precision: Literal["fp32", "bf16"] = Field(description="Precision of predictions.")
    precision_reason: str = Field(
        examples=["bfloat16 classifies 2.1 times as many images per second as float32"],
        description="The reason; without bfloat16, the limit that ruled it out.",
    )
    search_precision: str = Field(
        examples=["bf16 search, fp32 verified"],
        description="Precision of searches by attacks and evaluations; results are in float32.",
    )
    search_precision_reason: str = Field(description="The reason.")
    runtimes: list[RuntimeChoice] = Field(
        description="The runtime of predictions by batch size; empty: torch for all."
    )
    card: dict[str, Any]
    guessed: dict[str, str] = Field(
        default_factory=dict,
        description="Properties that neither file nor settings contain, and how each was guessed.",
        examples=[{"activation": "assumed"}],
    )
    notes: list[str] = Field(
        default_factory=list, description="How the file was interpreted when it was loaded."
    )
    compare: CompareCard | None = Field(
        default=None, description="The comparison model of POST /attack, if there is one."
    )


class Health(BaseModel):
    """The response of a health probe."""

    status: Literal["ok", "ready"]
