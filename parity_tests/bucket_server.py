"""A bucket of Google Cloud Storage's on this machine: what gcsfs and tensorstore ask of its API, in memory.

It keeps the rules that matter to a writer: an object appears whole when its upload is finished, under a new
generation; none can be appended to; what is asked for under a condition on the generation fails where that is
not met; and there are no directories.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

NAME = "bucket"


class Bucket:
    """The objects, and what the bucket does.

    Attributes:
        objects: {name: content}.
        read_only: refuses uploads, as where the caller has no right to write.
        hidden: does not describe itself, as where the caller may only see what is in it.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.read_only = self.hidden = False
        self.lock = threading.RLock()
        self._generations: dict[str, tuple[bytes, int]] = {}
        self._uploads: list[str] = []

    def generation(self, name: str) -> int:
        """A number that is another for every content that an object had; 0 where there is none."""
        if name not in self.objects:
            return 0
        content, known = self._generations.get(name, (b"", 0))
        if content is not self.objects[name]:
            known += 1
            self._generations[name] = self.objects[name], known
        return known

    def answer(self, method: str, url: str, content: bytes, head: Mapping[str, str]) -> Answer:
        """What is answered to a request: the status, the body, and headers."""
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        if found := re.fullmatch(
            r"/(?:upload|download)?/?storage/v1/b/([^/]+)(?:/o)?(?:/(.+))?/?", parts.path
        ):
            if found[1] != NAME:
                return _failed(404, "The specified bucket does not exist.")
            with self.lock:
                if parts.path.startswith("/upload/"):
                    return self._upload(query, content, head)
                if found[2] is None and parts.path.endswith("/o"):
                    return self._listed(query)
                if found[2] is None:
                    no = "The caller does not have storage.buckets.get access."
                    return _failed(403, no) if self.hidden else (200, {"name": NAME}, {})
                return self._of_one(method, unquote(found[2]), query, head)
        return _failed(501, f"{method} {url}")

    def _upload(self, query: dict[str, str], content: bytes, head: Mapping[str, str]) -> Answer:
        if self.read_only:
            return _failed(403, "The caller does not have storage.objects.create access.")
        name, kind = query.get("name", ""), query["uploadType"]
        if kind == "multipart":  # a description and the content, between boundaries
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", head["Content-Type"])
            assert boundary
            description, content = content.split(b"--" + boundary[1].encode())[1:3]
            name = json.loads(description[description.index(b"{") :])["name"]
            content = re.sub(rb"\A.*?\r?\n\r?\n", b"", content, count=1, flags=re.DOTALL)
            content = content.removesuffix(b"\n").removesuffix(b"\r")
        elif kind == "resumable" and "upload_id" not in query:  # its content comes with the next request
            self._uploads.append(name or json.loads(content)["name"])
            place = f"/upload/storage/v1/b/{NAME}/o?uploadType=resumable&upload_id={len(self._uploads) - 1}"
            return 200, b"", {"Location": f"http://{head['Host']}{place}"}
        elif kind == "resumable":
            name = self._uploads[int(query["upload_id"])]
        if int(query.get("ifGenerationMatch", self.generation(name))) != self.generation(name):
            return _failed(412, "conditionNotMet")
        self.objects[name] = bytes(bytearray(content))  # never the same as the content before
        return 200, self._described(name), {}

    def _listed(self, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items: list[str] = []
        prefixes: set[str] = set()
        for name in sorted(self.objects):
            inside, between, _ = name.removeprefix(prefix).partition(delimiter or "\0")
            if name.startswith(prefix) and name >= query.get("startOffset", ""):
                prefixes.add(f"{prefix}{inside}{between}") if between else items.append(name)
        return 200, {"items": [self._described(n) for n in items], "prefixes": sorted(prefixes)}, {}

    def _of_one(self, method: str, name: str, query: dict[str, str], head: Mapping[str, str]) -> Answer:
        name, _, target = name.partition("/moveTo/o/")
        if name not in self.objects:
            return _failed(404, f"No such object: {NAME}/{name}")
        generation = self.generation(name)
        if int(query.get("ifGenerationMatch", generation)) != generation:
            return _failed(412, "conditionNotMet")
        if method == "DELETE":
            del self.objects[name]
            return 204, b"", {}
        if target:
            self.objects[target] = self.objects.pop(name)
            return 200, self._described(target), {}
        if query.get("alt") != "media":
            return 200, self._described(name), {}
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        content, extra = self.objects[name], {"x-goog-generation": str(generation)}
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", head.get("Range", "")):
            size = len(content)
            first = int(asked[1]) if asked[1] else size - int(asked[2])
            last = min(int(asked[2]) if asked[1] and asked[2] else size - 1, size - 1)
            if first >= size:
                return 416, b"", {}
            return 206, content[first : last + 1], extra | {"Content-Range": f"bytes {first}-{last}/{size}"}
        return 200, content, extra

    def _described(self, name: str) -> dict[str, str]:
        content = self.objects[name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        of_both = {"bucket": NAME, "name": name, "size": str(len(content)), "md5Hash": digest}
        return of_both | {
            "generation": str(self.generation(name)), "metageneration": "1",
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip


Answer = tuple[int, "bytes | dict[str, Any]", dict[str, str]]


@contextmanager
def serving() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """A bucket ``gs://bucket``, and the environment in which processes find it."""
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            head = {name.title(): value for name, value in self.headers.items()}
            status, body, extra = bucket.answer(self.command, self.path, content, head)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_DELETE = _reply  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A caller that does not wait for an answer is no error."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield (
        bucket,
        {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, and Google's own client
            "TENSORSTORE_GCS_HTTP_URL": url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore's
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC
        },
    )
    server.shutdown()


def _failed(status: int, message: str) -> Answer:
    return status, {"error": {"code": status, "message": message}}, {}
