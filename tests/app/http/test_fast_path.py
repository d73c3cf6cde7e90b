"""The fast path to POST /predict, and the requests that take the full stack."""

import asyncio

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from app.application import create_app
from app.errors import BadRequest
from app.http.fast_path import FastPathMiddleware
from app.settings import Settings


async def predict(request: Request) -> Response:
    if request.query_params:
        raise BadRequest("told")
    return PlainTextResponse(f"short {request.scope['route'].path}")


async def long(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("long")(scope, receive, send)


def ask(method: str, path: str, *, root_path: str = "") -> httpx.Response:
    route = APIRoute("/predict", predict, methods=["POST"])
    shortcut = FastPathMiddleware(long, route=route)

    async def named(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"request_id": "1"}
        await shortcut(scope, receive, send)

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(named, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.request(method, path)

    return asyncio.run(asked())


def test_fast_path_calls_the_route() -> None:
    assert ask("POST", "/predict").text == "short /predict"


def test_fast_path_errors_are_problem_json() -> None:
    answer = ask("POST", "/predict?a=b")
    assert (answer.status_code, answer.json()["detail"]) == (400, "told")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/predict"), ("POST", "/predict/"), ("POST", "/root/predict")]
)
def test_other_requests_take_the_full_stack(method: str, path: str) -> None:
    assert ask(method, path).text == "long"


def test_fast_path_compares_the_path_without_its_prefix() -> None:
    assert ask("POST", "/root/predict", root_path="/root").text == "short /predict"
    assert ask("POST", "/predict", root_path="/predict").text == "long"


def test_predictions_take_the_fast_path() -> None:
    app = create_app(Settings())
    (route,) = (item.kwargs["route"] for item in app.user_middleware if "route" in item.kwargs)
    assert isinstance(route, APIRoute)
    assert route.path == "/predict"
