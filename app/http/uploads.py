"""Reads a request body: its files, and the parameters sent with them."""

from __future__ import annotations

import asyncio
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

from app.errors import BadRequest, ClientGone, InvalidParameters, ServiceError, invalid
from app.http.headers import headers_of
from app.http.parameters import safe_name

MAX_FIELDS = 64
MAX_FIELD_BYTES = 4096
MAX_JSON_BYTES = 16 * 2**20  # parsing holds the GIL, and so delays every other request
MAX_JSON_VALUES = 1000
BASE64_PIECE = 2**18  # characters decoded at a time; a multiple of 4
_NO_FILENAME = "part without a filename"  # given to a part `file` that has none
_DATA_URL = re.compile(rb"data:[A-Za-z0-9.+/;=-]{0,100},")


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The contents of the files, and the values of each parameter from query and body."""

    files: list[bytes]
    parameters: Mapping[str, list[str]]


async def read_upload(request: Request, *, max_files: int) -> Upload:
    """Read the files and parameters of a request, in any of these forms.

    - multipart/form-data, with files in the field ``file`` and parameters in the other fields
    - a URL-encoded form, with parameters only
    - JSON, with one base64 image or a list of them under ``image``, and the parameters beside it
    - any other body, whatever its Content-Type: it is one file, or none if it is empty

    A file may also be a data URL. Parameters may be in the query string too; those in the body
    take precedence. Raises BadRequest, ClientGone, InvalidParameters, or what the middleware
    raises for a body that is too large or too slow.
    """
    query = request.query_params
    parameters = {name: query.getlist(name) for name in dict.fromkeys(query)}
    content_type = headers_of(request.scope).get(b"content-type", b"").decode("latin-1").lower()
    try:
        if content_type.startswith("multipart/form-data"):
            files, fields = await _read_form(request, max_files)
        else:
            # Not request.body(), which keeps the bytes in memory as long as the request.
            body = b"".join([piece async for piece in request.stream()])
            files, fields = await _read_body(content_type, body, max_files)
    except ClientDisconnect:
        raise ClientGone("The client disconnected before its body was complete.") from None
    return Upload(files=files, parameters=parameters | fields)


async def _read_body(
    content_type: str, body: bytes, max_files: int
) -> tuple[list[bytes], dict[str, list[str]]]:
    """The files and parameters of a body that is not multipart."""
    if fields := _url_encoded_fields(content_type, body):
        return [], fields
    if _is_json(content_type, body):
        return await _read_json(body, max_files)
    return [await _decode_data_url(body)] if body else [], {}


def _url_encoded_fields(content_type: str, body: bytes) -> dict[str, list[str]]:
    """The fields of a URL-encoded form; none for another body.

    curl declares any body as such a form by default, so one that is not short ASCII is a file.
    """
    text = len(body) <= MAX_FIELDS * MAX_FIELD_BYTES and body.isascii() and body.find(b"\0") < 0
    if not content_type.startswith("application/x-www-form-urlencoded") or not text:
        return {}
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise BadRequest("The form has too many fields.") from None
    if "file" in fields:
        raise _text_instead_of_file()
    return fields


def _is_json(content_type: str, body: bytes) -> bool:
    """Whether the body is declared as JSON and starts like an object."""
    media_type = content_type.partition(";")[0].strip()
    declared = media_type == "application/json" or media_type.endswith("+json")
    return declared and body.lstrip()[:1] == b"{"


async def _read_json(body: bytes, max_files: int) -> tuple[list[bytes], dict[str, list[str]]]:
    """The files and parameters of ``{"image": "<base64>", "eps": "8/255"}``.

    Raises BadRequest unless it is a flat object, and InvalidParameters for invalid base64.
    """
    # Every item of a list becomes a Python object; the text of an image is a single one.
    if len(body) > MAX_JSON_BYTES or body.count(b",") + body.count(b"[") > MAX_JSON_VALUES:
        raise BadRequest(
            f"expected JSON of at most {MAX_JSON_BYTES} bytes and {MAX_JSON_VALUES} values; send "
            "images as multipart/form-data."
        )
    try:
        values = from_json(body)
    except ValueError:
        raise BadRequest("The body is declared as JSON, but is not valid JSON.") from None
    files = [
        await _from_base64(item)
        for name in ("image", "images", "file")
        for item in _as_list(values.pop(name, []))
    ]
    if len(files) > max_files:
        raise _too_many_files(max_files)
    return files, {
        name: [_parameter_text(name, item) for item in _as_list(value)]
        for name, value in values.items()
    }


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _parameter_text(name: str, value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise invalid(safe_name(name), "text or a number", "another kind of value")
    return str(value)


async def _from_base64(value: object) -> bytes:
    if not isinstance(value, str):
        raise invalid("file", "an image as text in base64", "another kind of value")
    text = value.encode()
    if _DATA_URL.match(text):
        return await _decode_data_url(text)
    try:
        return await _decode_base64(text)
    except ValueError:
        got = f"text of {len(text)} characters"
        raise invalid("file", "an image as text in base64", got) from None


async def _decode_base64(text: bytes) -> bytes:
    """Decode in small pieces, so that other requests run in between. Raises ValueError."""
    pieces: list[bytes] = []
    for begin in range(0, len(text), BASE64_PIECE):
        if pieces:
            await asyncio.sleep(0)
            if text[begin - 1 : begin] == b"=":
                raise ValueError("expected padding only at the end")
        pieces.append(b64decode(text[begin : begin + BASE64_PIECE], validate=True))
    return b"".join(pieces)


async def _decode_data_url(data: bytes) -> bytes:
    """The file in a data URL; `data` itself if it is not one."""
    if not (match := _DATA_URL.match(data)):
        return data
    if not match[0].lower().endswith(b";base64,"):
        raise invalid("file", "a data URL in base64", "a data URL with another encoding")
    try:
        return await _decode_base64(data[match.end() :].strip())
    except ValueError:
        got = f"{len(data)} bytes with invalid base64"
        raise invalid("file", "a data URL in base64", got) from None


class _FormParser(MultiPartParser):
    """A parser that treats every part named `file` as a file, even without a filename.

    Starlette would treat it as a text field, whose size is limited. `complete` says whether the
    closing boundary was seen: without it, a truncated form would look like one with fewer parts.
    """

    complete = False

    def on_headers_finished(self) -> None:
        disposition = self._current_part.content_disposition or b""
        _, options = parse_options_header(disposition)
        if options.get(b"name") == b"file" and b"filename" not in options:
            disposition += f'; filename="{_NO_FILENAME}"'.encode()
            self._current_part.content_disposition = disposition
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
            "multipart/form-data needs a boundary; let your HTTP client set the Content-Type."
        )
    parser = _FormParser(
        request.headers,
        request.stream(),
        max_files=max_files,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    # In memory, never on disk: the middleware limits the body, and the disk may be read-only.
    parser.spool_max_size = 0
    try:
        form = await parser.parse()
    except (ServiceError, ClientDisconnect):
        raise
    except Exception as error:  # the parser and its codecs raise many types
        if isinstance(error, MultiPartException) and error.message.startswith("Too many files"):
            raise _too_many_files(max_files) from None
        raise BadRequest("The multipart form is malformed, or has too many fields.") from None
    if not parser.complete:
        parser.close()
        raise BadRequest("The multipart form is incomplete: its closing boundary is missing.")
    files: list[bytes] = []
    fields: dict[str, list[str]] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "file":
                    raise invalid("file", 'a file in the field "file"', "a file in another field")
                data = await value.read()
                if value.filename == _NO_FILENAME and _looks_like_text(data):
                    raise _text_instead_of_file()
                files.append(await _decode_data_url(data))
            else:
                fields.setdefault(name, []).append(value)
    finally:
        await form.close()
    return files, fields


def _looks_like_text(data: bytes) -> bool:
    """Whether a part is short text, such as the name of the file instead of its content."""
    return len(data) <= MAX_FIELD_BYTES and data.isascii() and not _DATA_URL.match(data)


def _text_instead_of_file() -> InvalidParameters:
    got = "text; curl sends a file with -F file=@NAME"
    return invalid("file", 'a file in the field "file"', got)


def _too_many_files(limit: int) -> InvalidParameters:
    return invalid("file", f"at most {limit} file{'s' * (limit != 1)}", "more")
