"""A small server that speaks the Hugging Face Hub's upload protocol for one repository."""

from __future__ import annotations

import base64
import json
from http.server import BaseHTTPRequestHandler

from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """Takes one repository's files: creating it, asking how files are sent, and a commit."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - the server makes a handler of this class for every request

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self._read_chunks()
        if self.path.endswith("/repos/create"):
            name = json.loads(body)
            self._answer({"url": f"{constants.ENDPOINT}/{name['organization']}/{name['name']}"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer({"files": modes})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            name = self.path.removeprefix("/api/models/").partition("/commit")[0]
            self._answer({"commitUrl": f"{constants.ENDPOINT}/{name}/commit/1", "commitOid": "1"})

    def do_GET(self) -> None:
        """Say that a file is not there; a card is looked for before it is written."""
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def _read_chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _answer(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
