"""A stand-in of the Hub's HTTP API in this process: what huggingface_hub asks when it uploads and downloads.

It keeps commits, branches and pull requests in memory, checks that large files arrive with the hash that was announced, and
counts the uploads, so that tests can tell a file that was sent from one that was there.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OID = "a" * 40  # of every commit
LARGE = (".safetensors", ".bin", ".png", ".jpg", ".model")


class Hub:
    """The state of the stand-in.

    Attributes:
        repositories: by id: `private`, and files by branch and path.
        blobs: the contents of large files, by their sha256.
        sent: the hashes of large files in the order in which they were uploaded.
        messages: of the commits.
        lose: so many uploads of large files are refused first, as by a network that fails.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.messages: list[str] = []
        self.lose = 0
        self.url = ""

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repository]["branches"][branch]

    def commit(self, repository: str, branch: str, lines: list[dict], is_proposal: bool) -> dict:
        branches = self.repositories[repository]["branches"]
        url = f"{self.url}/{repository}/commit/{OID}"
        answer = {"commitUrl": url, "commitOid": OID, "success": True}
        if is_proposal:
            number = 1 + sum(name.startswith("refs/pr/") for name in branches)
            branches[f"refs/pr/{number}"] = dict(branches[branch])
            branch = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/{repository}/discussions/{number}"
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                branches[branch][value["path"]] = self.blobs[value["oid"]]
        return answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def _answer(self, value=None, status: int = 200, content: bytes | None = None, **headers) -> None:
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self):
        body, path = self._read(), unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.hub.repositories:
                return self._answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.repositories[name] = {"private": bool(private), "branches": {"main": {}}}
            return self._answer({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            branches = self.hub.repositories[found[1]]["branches"]
            if found[2] in branches:
                return self._answer({"error": "exists"}, 409)
            branches[found[2]] = dict(branches["main"])
            return self._answer({})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in files
            ]
            return self._answer({"files": modes})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(body)["objects"]:
                actions = {} if one["oid"] in self.hub.blobs else {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}"}}
                objects.append({"oid": one["oid"], "size": one["size"], **({"actions": actions} if actions else {})})
            return self._answer({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            is_proposal = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
            return self._answer(self.hub.commit(found[1], found[2], lines, is_proposal))
        return self._answer({"error": f"unknown {path}"}, 404)

    def do_PUT(self):
        content, oid = self._read(), self.path.rpartition("/")[2]
        if self.hub.lose:
            self.hub.lose -= 1
            return self._answer({"error": "lost"}, 400)
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        self.hub.sent.append(oid)
        return self._answer({})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": "someone", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            branches = self.hub.repositories.get(found[1], {"branches": {}})["branches"]
            if (found[2] or "main") not in branches:
                return self._answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
            names = [{"rfilename": name} for name in branches[found[2] or "main"]]
            return self._answer({"id": found[1], "sha": OID, "siblings": names, "private": False})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            files = self.hub.files(found[1], "main" if found[2] == OID else found[2])
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "b" * 40} for name in files]
            entries = [one for one in entries if not found[3] or one["path"].startswith(f"{found[3]}/")]
            if found[3] and not entries:
                return self._answer({"error": "no such folder"}, 404, X_Error_Code="EntryNotFound")
            return self._answer(entries)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            branch = "main" if found[2] == OID else found[2]
            content = self.hub.repositories.get(found[1], {"branches": {}})["branches"].get(branch, {}).get(found[3])
            if content is None:
                return self._answer({"error": "no such entry"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=OID)
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self._answer(content=content, ETag=etag, X_Repo_Commit=OID, Accept_Ranges="bytes")
        return self._answer({"error": f"unknown {path}"}, 404)

    do_HEAD = do_GET  # noqa: N815


@contextmanager
def running():
    """A stand-in that answers at `hub.url` until the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
