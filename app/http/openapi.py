"""The OpenAPI document and its self-contained page."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files as package_files
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic import BaseModel
from starlette.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from app.http.auth import is_open
from app.http.open_inference_codec import InferRequest
from app.http.openapi_examples import FAULTS, REQUEST_ID, answers
from app.http.problem import MEDIA_TYPE, PROTOCOL, Problem, ProtocolError, problem_of

ASSETS = "/docs/assets"
PNG_ANSWER: dict[str, Any] = {
    "description": "The attacks, or only the image with `Accept: image/png`.",
    "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
}
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Where ROBUST_API_KEYS is set."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_FILE = {"type": "string", "format": "binary"}
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")


# Swagger's page lacks a language, a link back, and sufficient contrast.
_HEAD = """<style>
    .back { max-width: 1460px; margin: auto; padding: 12px 20px; font: 15px system-ui, sans-serif; }
    .back a, .swagger-ui .info a, .swagger-ui .info .url { color: #2c5eb5; }
    .swagger-ui .json-schema-2020-12-expand-deep-button { color: #4b5058; }
    .swagger-ui .info .title small { background: #565c66; }
    .swagger-ui .info .title small.version-stamp { background: #4b6b00; }
    .swagger-ui .opblock .opblock-summary-method { background: #2c5eb5 !important; }
    .swagger-ui .opblock-post .opblock-summary-method { background: #1b7042 !important; }
    .swagger-ui .opblock-delete .opblock-summary-method { background: #ad2218 !important; }
    </style>
    </head>"""
_BODY = """<body>
    <nav class="back" aria-label="Site"><a href="./">Back to the playground</a></nav>"""
_MENDED = {
    "<html>": '<html lang="en">',
    "</head>": _HEAD,
    "<body>": _BODY,
    '<div id="swagger-ui">\n    </div>': '<main id="swagger-ui"></main>',
}


class Application(FastAPI):
    """FastAPI whose document includes schemas that no route's signature has."""

    def openapi(self) -> dict[str, Any]:
        """The document, generated once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for kind in (Problem, ProtocolError, InferRequest):
                schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[kind.__name__] = schema
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            settings = self.state.service.settings
            if settings.api_keys or settings.admin_keys:  # otherwise the page would show padlocks
                components["securitySchemes"] = _KEYS
                document["security"] = [{name: []} for name in _KEYS]
            _complete(document["paths"])
        assert self.openapi_schema is not None
        return self.openapi_schema


def _complete(paths: dict[str, Any]) -> None:
    """Add to every operation what all have in common, and an example to every response."""
    examples = answers()
    for path, operations in paths.items():
        for method, operation in operations.items():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]  # FastAPI's own: no path here can be invalid
            if is_open(path):
                operation["security"] = []
            else:
                responses["401"] = _fault(path, 401)
            if method in ("post", "delete"):
                responses["403"] = _fault(path, 403)
            for status in [status for status in responses if int(status) >= 400]:
                responses[status] = _fault(path, int(status))
            for (of, at, kind), example in examples.items():
                if (of, at) == (method, path):
                    for status in [status for status in responses if int(status) < 400]:
                        content = responses[status].setdefault("content", {})
                        content.setdefault(kind, {})["example"] = example
            operation["responses"] = dict(sorted(responses.items()))


def _fault(path: str, status: int) -> dict[str, Any]:
    """The error response of a path."""
    answer = problem_of(REQUEST_ID, FAULTS[status])
    headers = {
        name: {"schema": {"type": "string"}, "example": value}
        for name, value in (answer.more or {}).items()
    }
    form, kind, example = "Problem", MEDIA_TYPE, answer.problem.model_dump()
    if path == PROTOCOL or path.startswith(f"{PROTOCOL}/"):
        form, kind, example = "ProtocolError", "application/json", {"error": example["detail"]}
    schema = {"$ref": f"#/components/schemas/{form}"}
    return {
        "description": HTTPStatus(status).phrase,
        "headers": headers,
        "content": {kind: {"schema": schema, "example": example}},
    }


def body(
    parameters: type[BaseModel], *, files: Literal["image", "images", "set"]
) -> dict[str, Any]:
    """The request body of a route for the document: a form with files, or just the file."""
    form = parameters.model_json_schema()
    assert "$defs" not in form, "nested models have no place in a form"
    file: dict[str, Any] = dict(_FILE)
    if files == "images":
        file = {"type": "array", "items": _FILE, "minItems": 1}
    form["properties"] = {"file": file} | {
        name: _without_null(schema) for name, schema in form["properties"].items()
    }
    form["required"] = [] if files == "set" else ["file"]
    encoding = {
        name: {"style": "form", "explode": True}
        for name, schema in form["properties"].items()
        if schema.get("type") == "array" and name != "file"
    }
    raw = ("application/octet-stream",) if files == "set" else _IMAGE_TYPES
    text = {"type": "string", "description": "In base64, or as a data URL."}
    inputs: dict[str, Any] = {"image": text}
    if files == "images":
        inputs["images"] = {"type": "array", "items": text}
    if files == "set":
        inputs = {"file": text}
    properties = {name: item for name, item in form["properties"].items() if name != "file"}
    as_json = {"type": "object", "properties": inputs | properties}
    return {
        "requestBody": {
            "required": True,
            "description": "The parameters may also be given in the query string.",
            "content": {
                "multipart/form-data": {"schema": form, "encoding": encoding},
                "application/json": {"schema": as_json},
                **{kind: {"schema": _FILE} for kind in raw},
            },
        }
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Remove null from a form's fields: a form omits a field, and Swagger shows that correctly."""
    kinds = [kind for kind in schema.pop("anyOf", []) if kind != {"type": "null"}]
    if kinds:
        schema.pop("default", None)
    return {**(kinds[0] if kinds else {}), **schema}


def _policy(page: str) -> str:
    """The page's Content-Security-Policy: its two scripts, and requests to this service only."""
    inline = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in inline]
    scripts = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in digests)])
    return (
        # Swagger sets styles and shows small images from its style sheet.
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def install(app: FastAPI) -> None:
    """Add /docs with its assets."""
    static = package_files("fastapi_offline") / "static"
    app.mount(ASSETS, StaticFiles(directory=str(static)), name="docs-assets")
    routes = APIRouter(include_in_schema=False)

    page = get_swagger_ui_html(
        openapi_url="openapi.json",  # relative, so that it works behind a path prefix too
        title=app.title,
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon.png",
    )
    html = bytes(page.body).decode()
    for old, new in _MENDED.items():
        assert html.count(old) == 1, old
        html = html.replace(old, new)
    headers = {"Content-Security-Policy": _policy(html)}

    @routes.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    app.include_router(routes)
