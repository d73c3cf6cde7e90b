"""FastAPI as in a tutorial: a sync endpoint that runs the network. For uvicorn."""

from __future__ import annotations

from typing import Any

import torch
from fastapi import FastAPI, UploadFile
from network import answer, load_network, to_input
from PIL import Image

app = FastAPI()
network = load_network()


@app.post("/predict")
def predict(file: UploadFile) -> dict[str, Any]:
    x = to_input(Image.open(file.file)).unsqueeze(0)
    with torch.inference_mode():
        return answer(network(x).softmax(dim=1)[0])
