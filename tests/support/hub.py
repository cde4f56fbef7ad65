"""A stand-in of the Hugging Face hub over HTTP: repositories are made, committed to and downloaded."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants


@contextmanager
def serve_hub(tmp_path, monkeypatch):
    """The server, while huggingface_hub of this process asks it, with an empty cache; `commits` are path -> content."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.commits, server.repositories, server.refuse = [], set(), False
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def sha(self):
        return f"{len(self.server.commits):040x}"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{constants.ENDPOINT}/{name}"}
            if name in self.server.repositories:
                return self.reply(409, {"error": "exists", **url})
            self.server.repositories.add(name)
            self.server.commits.append({})
            return self.reply(200, url)
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.reply(200, {"files": files})
        name = re.match(r"/api/models/([^/]+/[^/]+)", self.path)[1]
        lines = [json.loads(line) for line in body.splitlines()]
        if self.server.refuse or lines[0]["value"]["parentCommit"] != self.sha:
            return self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = {row["value"]["path"]: base64.b64decode(row["value"]["content"])
                 for row in lines if row["key"] == "file"}  # fmt: skip
        self.server.commits.append(self.server.commits[-1] | files)
        self.reply(200, {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{self.sha}", "commitOid": self.sha})

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = re.match(r"/(?:api/models/)?([^/]+/[^/]+)", path)[1]
        if name not in self.server.repositories:
            return self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = self.server.commits[-1]
        if "/tree/" in path:
            return self.reply(200, [{"type": "file", "path": p, "size": len(content), "oid": oid(content)}
                                    for p, content in files.items()])  # fmt: skip
        if path.startswith("/api/"):
            return self.reply(200, {"id": name, "sha": self.sha})
        content = files[path.split("/resolve/")[1].partition("/")[2]]
        self.reply(200, content, ETag=f'"{oid(content)}"', X_Repo_Commit=self.sha)

    do_HEAD = do_GET


def oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
