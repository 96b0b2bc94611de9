"""A decoder goes to the Hugging Face Hub and comes back: a small server speaks the hub's upload protocol."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nd_dist.errors import CheckpointError
from nd_dist.models.decoder import Decoder
from tests.nd_dist.models.test_decoder import decoder

NAME = "lab/decoder"


class Hub(BaseHTTPRequestHandler):
    """Takes one repository's files: creating it, asking how files are sent, and a commit."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - the server makes a handler of this class for every request

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        body = self.rfile.read(int(length)) if length else self._read_chunks()
        if self.path.endswith("/repos/create"):
            self._answer({"url": f"{constants.ENDPOINT}/{NAME}"})
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
            self._answer({"commitUrl": f"{constants.ENDPOINT}/{NAME}/commit/1", "commitOid": "1"})

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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub
        server.shutdown()


def test_a_pushed_decoder_is_found_by_its_name_once_it_is_in_the_cache(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    address = model.push_to_hub(NAME, "## Metrics\n\nPixCorr .5\n", token="hf_secret")
    assert address.endswith(f"/{NAME}/commit/1")
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors"}
    assert hub.files["README.md"].endswith(b"## Metrics\n\nPixCorr .5\n")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        Decoder.from_pretrained(NAME)
    snapshot = tmp_path / "models--lab--decoder" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name, content in hub.files.items():
        (snapshot / name).write_bytes(content)
    again = Decoder.from_pretrained(NAME)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
