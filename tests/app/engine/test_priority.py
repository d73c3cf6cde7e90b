"""During an evaluation a prediction waits for the current pass only."""

import asyncio
from pathlib import Path

import torch
from torch import Tensor

from app.engine.engine import Engine
from app.engine.model_reloader import ModelReloader
from app.jobs.service import Jobs
from app.metrics import Metrics
from app.settings import Settings
from robust.attacks import resolve_attack
from robust.datasets import Dataset
from robust.threat_model import ThreatModel
from tests.app.engine.test_engine import Brightness, image, run, served, settled

ATTACKS = ("fgsm", "pgd-3", "apgd-t-3", "fab-t-3", "square-20")


class Half(Brightness):
    """Sees light from a mean of 0.45: images around 0.5 are near enough to be misled."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) - torch.tensor([0.0, 0.45])


def test_prediction_runs_after_every_pass_of_an_evaluation() -> None:
    images = torch.randint(
        100, 156, (100, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images[50:] //= 2
    labels = (torch.arange(100) < 50).long()
    dataset = Dataset(images=images, labels=labels, classes=("dark", "light"), name="test")

    async def test(engine: Engine, metrics: Metrics) -> None:
        loop, log = asyncio.get_running_loop(), list[str]()
        model, urgent = Half(), Brightness()
        urgent.hook = lambda: log.append("prediction")
        predicted: list[asyncio.Task[Tensor]] = []

        async def ask() -> None:
            predicted.append(asyncio.create_task(engine.predict(served(urgent), image(1))))
            await settled()

        def hook() -> None:
            log.append("pass")
            asyncio.run_coroutine_threadsafe(ask(), loop).result(280)

        model.hook = hook
        models = ModelReloader(Path("none.pt"), device=torch.device("cpu"), metrics=metrics)
        jobs = Jobs(engine, models, Settings(evaluation_batch=32), metrics)
        await jobs.start()
        attacks = [resolve_attack(name, ThreatModel(eps=0.1)) for name in ATTACKS]
        job = await jobs.submit(served(model), dataset, attacks)
        job = await jobs.ended(job, 280)
        assert job.state == "done", job.error
        assert job.result is not None
        assert job.result["results"][0]["correct"] == 100
        assert job.result["worst_case"]["correct"] == 50
        await asyncio.gather(*predicted)
        assert max(model.batches) == 32
        assert len(log) > 40
        assert log == ["pass", "prediction"] * (len(log) // 2)
        await jobs.stop()
        await jobs.close()

    run(test, queue_limit=10_000)
