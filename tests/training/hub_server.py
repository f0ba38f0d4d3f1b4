"""A hub small enough to run beside a test: repositories in memory, spoken to over HTTP by the real client."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "c0ffee" * 6 + "c0de"


@dataclass
class Hub:
    """What the hub has and was told."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """By `<type>s/<repository>/<path>`."""
    private: dict[str, bool] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    """What callers sent to be let in."""
    refuses: int | None = None
    """Status code of everything, where the hub does not work."""


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.tokens.add(self.headers["Authorization"] or "")
            if hub.refuses:
                return self.answer({"error": "no"}, hub.refuses)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('type', 'model')}s/{asked.get('organization') or 'me'}/{asked['name']}"
                known = name in hub.private
                hub.private.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
                return self.answer({"url": f"{hub.url}/me/it"}, 409 if known else 200)
            if "/preupload/" in self.path:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            repo = re.fullmatch(r"/api/(.*)/commit/main", self.path)
            assert repo is not None, self.path
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[f"{repo[1]}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{hub.url}/me/it/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""})

        def do_GET(self) -> None:
            if hub.refuses:
                return self.answer({"error": "no"}, hub.refuses)
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/(revision|tree)/\w+)?", path):
                names = sorted(name.removeprefix(f"{found[1]}/") for name in hub.files if name.startswith(f"{found[1]}/"))
                if found[2] == "tree":
                    return self.answer(
                        [
                            {"type": "file", "path": name, "size": len(hub.files[f"{found[1]}/{name}"]), "oid": "0" * 40}
                            for name in names
                        ]
                    )
                siblings = [{"rfilename": name} for name in names]
                return self.answer({"id": "me/it", "sha": COMMIT, "siblings": siblings, "private": True, "tags": []})
            found = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/\w+/(.*)", path)
            assert found is not None, path
            content = hub.files[f"{found[1] or 'models'}/{found[2]}/{found[3]}"]
            return self.answer(content, headers={"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(raw)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
