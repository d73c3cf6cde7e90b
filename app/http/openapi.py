"""The OpenAPI document, and the page /docs, which loads nothing from other sites."""

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

from app.http.auth import is_public
from app.http.open_inference_codec import InferRequest
from app.http.openapi_examples import EXAMPLE_ERRORS, REQUEST_ID, example_responses
from app.http.problem import (
    MEDIA_TYPE,
    Problem,
    ProtocolError,
    has_protocol_errors,
    problem_response,
)

ASSETS = "/docs/assets"
PNG_ANSWER: dict[str, Any] = {
    "description": "The attacks, or only the image with `Accept: image/png`.",
    "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
}
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "If ROBUST_API_KEYS is set."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_FILE = {"type": "string", "format": "binary"}
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")


# Fixes of Swagger UI's page, which lacks a language, a link back, and sufficient contrast.
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
_REPLACEMENTS = {
    "<html>": '<html lang="en">',
    "</head>": _HEAD,
    "<body>": _BODY,
    '<div id="swagger-ui">\n    </div>': '<main id="swagger-ui"></main>',
}


class Application(FastAPI):
    """FastAPI whose OpenAPI document also has schemas that are in no route's signature."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document, generated once."""
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
            if settings.api_keys or settings.admin_keys:  # without keys, show no padlocks
                components["securitySchemes"] = _SECURITY_SCHEMES
                document["security"] = [{name: []} for name in _SECURITY_SCHEMES]
            _complete(document["paths"])
        assert self.openapi_schema is not None
        return self.openapi_schema


def _complete(paths: dict[str, Any]) -> None:
    """Add the error responses that all operations share, and an example to every response."""
    examples = example_responses()
    for path, operations in paths.items():
        for method, operation in operations.items():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]  # FastAPI's own, for an invalid path; no path here can be
            if is_public(path):
                operation["security"] = []
            else:
                responses["401"] = _error_response(path, 401)
            if method in ("post", "delete"):
                responses["403"] = _error_response(path, 403)
            for status in [status for status in responses if int(status) >= 400]:
                responses[status] = _error_response(path, int(status))
            for (example_method, example_path, media_type), example in examples.items():
                if (example_method, example_path) == (method, path):
                    for status in [status for status in responses if int(status) < 400]:
                        content = responses[status].setdefault("content", {})
                        content.setdefault(media_type, {})["example"] = example
            operation["responses"] = dict(sorted(responses.items()))


def _error_response(path: str, status: int) -> dict[str, Any]:
    """The documentation of an error response of `path`."""
    response = problem_response(REQUEST_ID, EXAMPLE_ERRORS[status])
    headers = {
        name: {"schema": {"type": "string"}, "example": value}
        for name, value in (response.extra_headers or {}).items()
    }
    model, media_type, example = "Problem", MEDIA_TYPE, response.problem.model_dump()
    if has_protocol_errors(path):
        model, media_type = "ProtocolError", "application/json"
        example = {"error": example["detail"]}
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {
        "description": HTTPStatus(status).phrase,
        "headers": headers,
        "content": {media_type: {"schema": schema, "example": example}},
    }


def body(
    parameters: type[BaseModel], *, files: Literal["image", "images", "set"]
) -> dict[str, Any]:
    """OpenAPI's `requestBody` of a route: a form with files, JSON, or just the file."""
    form = parameters.model_json_schema()
    assert "$defs" not in form, "a form can't have nested models"
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
    """The schema of a form field without null: a form omits a field instead of sending null."""
    kinds = [kind for kind in schema.pop("anyOf", []) if kind != {"type": "null"}]
    if kinds:
        schema.pop("default", None)
    return {**(kinds[0] if kinds else {}), **schema}


def _policy(page: str) -> str:
    """The page's Content-Security-Policy: only its own two scripts and requests to this service."""
    inline = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in inline]
    scripts = " ".join(["'self'", *(f"'sha256-{digest}'" for digest in digests)])
    return (
        # Swagger UI sets inline styles, and has small images in its style sheet.
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def install(app: FastAPI) -> None:
    """Add the page /docs and its assets to `app`."""
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
    for old, new in _REPLACEMENTS.items():
        assert html.count(old) == 1, old
        html = html.replace(old, new)
    headers = {"Content-Security-Policy": _policy(html)}

    @routes.get("/docs")
    async def docs() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    app.include_router(routes)
