"""Request bodies: the file or files in them and the parameters beside."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from app.errors import BadRequest, ClientGone, FieldError, InvalidParameters, ServiceError
from app.http.fields import fields_of

MAX_FIELDS = 64
MAX_FIELD_BYTES = 4096
MAX_JSON_BYTES = 16 * 2**20  # parsing more would hold the interpreter, and every other request
_NO_NAME = "part without a filename"
_DATA_URL = re.compile(rb"data:[A-Za-z0-9.+/;=-]{0,100},")
_TEXT = 'a file in the field "file"', "text; curl sends a file with -F file=@NAME"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The contents of the files, and every parameter of query and form with its values."""

    files: list[bytes]
    parameters: Mapping[str, list[str]]


async def read_upload(request: Request, *, max_files: int) -> Upload:
    """Read a form with its files in the field ``file``, JSON, or the whole body as one file.

    A body that is no form counts as a file whatever its declared type, and an empty one as none;
    a form without files may come url-encoded. JSON has images in base64 under ``image``, one or a
    list, and the parameters beside; a file may also come as a data URL.
    Parameters come from the query, or from the form, which wins. Raises BadRequest, ClientGone,
    InvalidParameters, or what the middleware raises for a body too large or too slow.
    """
    query = request.query_params
    parameters = {name: query.getlist(name) for name in dict.fromkeys(query)}
    kind = fields_of(request.scope).get(b"content-type", b"").decode("latin-1").lower()
    try:
        if not kind.startswith("multipart/form-data"):
            # Not request.body(), which keeps it as long as the request.
            body = b"".join([piece async for piece in request.stream()])
            if fields := _url_encoded(kind, body):
                return Upload(files=[], parameters=parameters | fields)
            if _is_json(kind, body):
                files, fields = _read_json(body, max_files)
                return Upload(files=files, parameters=parameters | fields)
            return Upload(files=[_plain(body)] if body else [], parameters=parameters)
        files, fields = await _read_form(request, max_files)
    except ClientDisconnect:
        raise ClientGone("The client hung up before its body was complete.") from None
    return Upload(files=files, parameters=parameters | fields)


def _url_encoded(kind: str, body: bytes) -> dict[str, list[str]]:
    """The fields of a URL-encoded form; curl labels any body as one, so files are recognized."""
    text = len(body) <= MAX_FIELDS * MAX_FIELD_BYTES and body.isascii() and body.find(b"\0") < 0
    if not kind.startswith("application/x-www-form-urlencoded") or not text:
        return {}
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise BadRequest("The form has too many fields.") from None
    if "file" in fields:
        raise _fault(*_TEXT)
    return fields


def _is_json(kind: str, body: bytes) -> bool:
    """Whether the body is declared as JSON and starts like an object."""
    kind = kind.partition(";")[0].strip()
    return (kind == "application/json" or kind.endswith("+json")) and body.lstrip()[:1] == b"{"


def _read_json(body: bytes, max_files: int) -> tuple[list[bytes], dict[str, list[str]]]:
    """The files and parameters of ``{"image": "<base64>", "eps": "8/255"}``.

    Raises BadRequest for what is no flat object, InvalidParameters for what is no base64.
    """
    # A long list costs an object per item; the text of an image is a single one.
    if len(body) > MAX_JSON_BYTES or body.count(b",") + body.count(b"[") > 1000:
        raise BadRequest("The JSON is too large; send images as multipart/form-data.")
    try:
        values = from_json(body)
    except ValueError:
        raise BadRequest("The body is declared as JSON, but is not valid JSON.") from None
    files = [
        _from_base64(item)
        for name in ("image", "images", "file")
        for item in _list(values.pop(name, []))
    ]
    if len(files) > max_files:
        raise _fault(f"at most {max_files}", "more")
    return files, {name: [_text(item) for item in _list(value)] for name, value in values.items()}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise BadRequest("expected text and numbers as parameters in the JSON")
    return str(value)


def _from_base64(value: object) -> bytes:
    if not isinstance(value, str):
        raise _fault("an image as text in base64", "another kind of value")
    text = value.encode()
    if _DATA_URL.match(text):
        return _plain(text)
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise _fault("an image as text in base64", f"text of {len(text)} characters") from None


def _plain(data: bytes) -> bytes:
    """A file as it is, or the one that a data URL holds."""
    if not (match := _DATA_URL.match(data)):
        return data
    if not match[0].lower().endswith(b";base64,"):
        raise _fault("a data URL in base64", "one in another form")
    try:
        return b64decode(data[match.end() :].strip(), validate=True)
    except ValueError:
        raise _fault("a data URL in base64", f"{len(data)} bytes that are none") from None


class _Parser(MultiPartParser):
    """Takes a part `file` without a filename as a file, of any size.

    Knows whether the form came to its end: what is cut short is no form with fewer parts."""

    complete = False

    def on_headers_finished(self) -> None:
        disposition = self._current_part.content_disposition or b""
        _, options = parse_options_header(disposition)
        if options.get(b"name") == b"file" and b"filename" not in options:
            named = disposition + f'; filename="{_NO_NAME}"'.encode()
            self._current_part.content_disposition = named
        super().on_headers_finished()

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        """Close all files, also those of incomplete parts."""
        for file in self._files_to_close_on_error:
            file.close()


async def _read_form(request: Request, max_files: int) -> tuple[list[bytes], dict[str, list[str]]]:
    _, options = parse_options_header(request.headers["content-type"])
    if b"boundary" not in options:
        raise BadRequest(
            "multipart/form-data without a boundary: leave the Content-Type to your client."
        )
    parser = _Parser(
        request.headers,
        request.stream(),
        max_files=max_files,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    # Never to disk: the middleware bounds the body, and the root file system may be read-only.
    parser.spool_max_size = 0
    try:
        form = await parser.parse()
    except (ServiceError, ClientDisconnect):
        raise
    except Exception as error:  # the parser and the codecs behind it raise many kinds
        if isinstance(error, MultiPartException) and error.message.startswith("Too many files"):
            raise _fault(f"at most {max_files}", "more") from None
        raise BadRequest("The multipart form is malformed, or has too many fields.") from None
    if not parser.complete:
        parser.close()
        raise BadRequest("The multipart form is cut short: its closing boundary is missing.")
    files: list[bytes] = []
    fields: dict[str, list[str]] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "file":
                    raise _fault('a file in the field "file"', "a file in another field")
                data = await value.read()
                if value.filename == _NO_NAME and _is_a_name(data):
                    raise _fault(*_TEXT)
                files.append(_plain(data))
            else:
                fields.setdefault(name, []).append(value)
    finally:
        await form.close()
    return files, fields


def _is_a_name(data: bytes) -> bool:
    """Whether a part is text, such as the name of a file that was to be sent."""
    return len(data) <= MAX_FIELD_BYTES and data.isascii() and not _DATA_URL.match(data)


def _fault(expected: str, got: str) -> InvalidParameters:
    return InvalidParameters([FieldError(field="file", expected=expected, got=got)])
