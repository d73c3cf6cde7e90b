"""Request bodies: the file or files in them and the parameters beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from app.errors import BadRequest, ClientGone, FieldError, InvalidParameters, ServiceError

MAX_FIELDS = 64
MAX_FIELD_BYTES = 4096
_TEXT = 'a file in the field "file"', "text; curl sends a file with -F file=@NAME"


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The contents of the files, and every parameter of query and form with its values."""

    files: list[bytes]
    parameters: Mapping[str, list[str]]


async def read_upload(request: Request, *, max_files: int) -> Upload:
    """Read a multipart form with its files in the field ``file``, or the whole body as one file.

    A body that is no form counts as a file whatever its declared type, and an empty one as none;
    a form without files may come url-encoded.
    Parameters come from the query, or from the form, which wins. Raises BadRequest, ClientGone,
    InvalidParameters, or what the middleware raises for a body too large or too slow.
    """
    parameters = {
        name: request.query_params.getlist(name) for name in dict.fromkeys(request.query_params)
    }
    try:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            body = await request.body()
            if fields := _url_encoded(request, body):
                return Upload(files=[], parameters=parameters | fields)
            return Upload(files=[body] if body else [], parameters=parameters)
        files, fields = await _read_form(request, max_files)
    except ClientDisconnect:
        raise ClientGone("The client hung up before its body was complete.") from None
    return Upload(files=files, parameters=parameters | fields)


def _url_encoded(request: Request, body: bytes) -> dict[str, list[str]]:
    """The fields of a form without files. curl declares any body so: a file is told by content."""
    kind = request.headers.get("content-type", "").lower()
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


class _Parser(MultiPartParser):
    """Knows whether the form came to its end: what is cut short is no form with fewer parts."""

    complete = False

    def on_end(self) -> None:
        self.complete = True

    def close(self) -> None:
        """Let go of the files, those of parts cut short too."""
        for file in self._files_to_close_on_error:
            file.close()


async def _read_form(request: Request, max_files: int) -> tuple[list[bytes], dict[str, list[str]]]:
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
                files.append(await value.read())
            elif name == "file":
                raise _fault(*_TEXT)
            else:
                fields.setdefault(name, []).append(value)
    finally:
        await form.close()
    return files, fields


def _fault(expected: str, got: str) -> InvalidParameters:
    return InvalidParameters([FieldError(field="file", expected=expected, got=got)])
