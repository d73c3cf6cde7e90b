"""The answers of the service, typed."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

SHA256 = Field(description="SHA-256 of the weights that computed this.", examples=["9f2c…"])


class ClassProbability(BaseModel):
    """A class with its probability."""

    label: str = Field(examples=["cat"])
    index: int = Field(examples=[3])
    probability: float = Field(ge=0, le=1, examples=[0.93])


class Seen(ClassProbability):
    """What the model sees in an image: the likeliest class, and the `top` ones."""

    top: list[ClassProbability]


class ImagePrediction(ClassProbability):
    """What the model sees in one image of the request."""

    image: int = Field(description="The place of the image in the request, from 0.")
    top: list[ClassProbability]


class PredictResponse(BaseModel):
    """One prediction for each image, in the order they came."""

    model_sha256: str = SHA256
    results: list[ImagePrediction]


class ClassName(BaseModel):
    """A class by index and name."""

    label: str
    index: int


class ResolvedAttack(BaseModel):
    """An attack with every parameter as it was run."""

    attack: str = Field(examples=["pgd-20"])
    name: str = Field(examples=["pgd"])
    norm: str = Field(examples=["linf"])
    eps: float = Field(description="In pixel units, [0, 1] a pixel.")
    eps_text: str = Field(examples=["8/255"])
    alpha: float
    steps: int
    restarts: int
    random_start: bool
    seed: int


class AttackResult(BaseModel):
    """One attack. Everything told here is measured on the 8-bit image that is given."""

    parameters: ResolvedAttack
    after: Seen
    success: bool = Field(description="Led away from the label, or to the target where given.")
    linf: float = Field(description="Largest change of a pixel, in pixel units.")
    l2: float = Field(description="Euclidean length of the change, in pixel units.")
    seconds: float = Field(description="Time on the device.")
    adversarial_png: str = Field(description="The adversarial image, PNG in base64.")
    perturbation_png: str = Field(
        description="What was added, amplified so that the largest change is seen; grey is none."
    )


class AttackResponse(BaseModel):
    """Each attack asked for, in order."""

    model_sha256: str = SHA256
    label: ClassName = Field(description="The class the attacks lead away from.")
    target: ClassName | None = Field(description="The class they lead to, where one was asked for.")
    before: Seen
    already_wrong: bool = Field(description="Whether the model missed the label before.")
    input_png: str = Field(description="The image as the model takes it, PNG in base64.")
    results: list[AttackResult]


class DistanceResult(BaseModel):
    """How far the adversarial images lie from theirs, in pixel units of the norm."""

    least: float
    median: float
    most: float


class StageResult(BaseModel):
    """One attack of several run in turn, each on what the ones before left standing."""

    attack: str = Field(examples=["apgd-ce"])
    attacked: int
    correct: int = Field(description="Images right after it, of all.")
    seconds: float


class AccuracyResult(BaseModel):
    """How many of n images were classified right, with the Wilson 95% interval."""

    attack: str = Field(examples=["clean", "pgd-20"])
    accuracy: float | None = Field(description="Null before the first image.")
    correct: int
    n: int
    interval: tuple[float, float]
    per_class: list[float | None] = Field(description="Accuracy by class; null for one not seen.")
    confusion: list[list[int]] = Field(
        description="Images of the class of a row seen as that of a column; empty past 100 classes."
    )
    distances: DistanceResult | None = Field(description="Of what fooled the model.")
    stages: list[StageResult] = Field(description="Where the attack is made of several.")
    forwards: int = Field(description="Forward passes spent, an image each.")
    backwards: int
    unheld: int = Field(
        description="Successes that the last exact pass did not confirm; counted as right."
    )
    seconds: float = Field(
        description="What it took, with what was served in between. Clean predictions come with "
        "fgsm where that is asked for, and then take none of their own."
    )
    norm: str | None = None
    eps: float | None = None
    eps_text: str | None = None
    alpha: float | None = None
    steps: int | None = None
    restarts: int | None = None
    seed: int | None = None


class WorstCase(BaseModel):
    """Images that withstood everything."""

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
    """What was seen of the model itself before it was attacked."""

    n: int
    difference: float = Field(description="Between two passes, as a share of the largest logit.")
    probabilities: bool = Field(description="Whether a softmax is inside.")
    zero_gradients: int
    nan_gradients: int
    right: int
    right_normalised: int = Field(description="Right at best with a usual normalisation before.")
    normalisation: str


class FlagResult(BaseModel):
    """A reason not to trust the numbers."""

    name: str = Field(examples=["square stronger"])
    text: str = Field(description="What was seen.")
    advice: str = Field(description="What to do about it.")


class EvaluationResult(BaseModel):
    """Results over `n` of `total` images: clean first, then each attack."""

    n: int
    total: int
    results: list[AccuracyResult]
    worst_case: WorstCase
    curve: list[CurveResult]
    probes: ProbeResult | None
    flags: list[FlagResult] = Field(description="Reasons not to trust these numbers.")
    notes: list[str] = Field(description="What an attack had to do otherwise than usual.")
    precision: str = Field(examples=["fp32"])
    done: float = Field(ge=0, le=1, description="Share of the work.")


JobState = Literal["queued", "running", "done", "failed", "cancelled"]


class JobStatus(BaseModel):
    """An evaluation: where it is and what came out so far."""

    id: str
    state: JobState
    model_sha256: str = SHA256
    dataset: str
    images: int
    attacks: list[ResolvedAttack]
    created: datetime
    finished: datetime | None = None
    evaluation: EvaluationResult | None = Field(
        default=None, description="The result so far; of all images once the state is done."
    )
    error: str | None = Field(default=None, description="Why it failed.")


class RuntimeChoice(BaseModel):
    """What computes predictions of up to so many images at once."""

    images: int = Field(description="At once; more than the last entry's go in several parts.")
    runtime: str = Field(examples=["onnxruntime", "torch"])
    images_per_second: float = Field(description="As measured when the model was loaded.")


class ModelCard(BaseModel):
    """The model in service: its card, as the sidecar of the checkpoint has it."""

    sha256: str = SHA256
    device: str = Field(examples=["cpu"])
    loaded: datetime
    classes: list[str]
    input_size: int
    runtimes: list[RuntimeChoice] = Field(
        description="The fastest for predictions, by number of images; empty on a GPU: torch."
    )
    card: dict[str, Any]


class Health(BaseModel):
    """A probe's answer."""

    status: Literal["ok", "ready"]
