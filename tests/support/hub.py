"""Emulates the Hugging Face Hub: writes files to a Hub cache, and serves repositories from a dictionary."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import threading
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The files of a gated repository. Anyone may list them, but nobody may download them.
GATED = {"config.json": b"{}", "gated": b""}
OLD_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


def add_to_cache(home, name, files, *, kind="model", commit=COMMIT, refs=("main",), listed=None):
    """Writes a repository to the cache in a Hugging Face home, in the layout of `huggingface_hub`.

    Args:
      home: the folder set by `HF_HOME`.
      name: `owner/name`.
      files: file contents, keyed by path.
      kind: model or dataset.
      commit: the revision of the files.
      refs: branches and tags that point to this commit.
      listed: paths of all files in the repository, to be listed in the cache; None for no listing.

    Returns:
      The folder of the commit.
    """
    folder = home / "hub" / f"{kind}s--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path, content in files.items():
        blob = folder / "blobs" / blob_id(content)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(os.path.relpath(blob, (snapshot / path).parent))
    for ref in refs:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    if listed is not None:
        (folder / "trees").mkdir(exist_ok=True)
        entries = {path: {"size": 1, "blob_id": "0" * 40} for path in listed}
        listing = {"format_version": 1, "files": entries}
        (folder / "trees" / f"{commit}.json").write_text(json.dumps(listing))
    return snapshot


def folder_files(folder):
    """Returns the contents of all files in a folder, keyed by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """The Hub's repositories and its download log.

    Attributes:
      repos: maps (kind, name) to the files, keyed by path, or to the error code that the Hub sends instead.
      downloads: paths of the downloaded files.
    """

    def __init__(self):
        self.repos = {}
        self.downloads = []

    def answer(self, method, path, query):
        """Returns the status, headers and body of the response to a request."""
        if match := re.fullmatch(r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(/.*)?", path):
            return self._answer_api(match[1], match[2], match[3] or "", query)
        if match := re.fullmatch(r"(/datasets)?/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            kind = "dataset" if match[1] else "model"
            return self._answer_file(method, kind, match[2], match[4])
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _answer_api(self, kind, name, rest, query):
        files = self.repos.get((kind, name), "RepoNotFound")
        if isinstance(files, str):
            return 404, {"X-Error-Code": files}, b""
        revision = unquote(rest.split("/")[2]) if rest.count("/") > 1 else "main"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if rest.startswith(("/tree", "/paths-info")):
            wanted = re.findall(r"paths=([^&]+)", query)
            below = "/".join(rest.split("/")[3:])
            return 200, {}, json.dumps(self._tree(files, below, wanted)).encode()
        return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()

    def _tree(self, files, below, wanted):
        """Returns the entries of the wanted paths or, if none are given, of the files and folders in `below`."""
        folders = {parent for path in files for parent in parents(path)}
        entries = [
            {"type": "file", "path": p, "size": len(c), "oid": blob_id(c)} for p, c in files.items()
        ]
        entries += [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)]
        if wanted:
            return [entry for entry in entries if entry["path"] in map(unquote, wanted)]
        return [e for e in entries if not below or e["path"].startswith(below + "/")]

    def _answer_file(self, method, kind, name, path):
        files = self.repos.get((kind, name), {})
        path = unquote(path)
        headers = {"X-Repo-Commit": COMMIT}
        if files is GATED:
            return 403, {**headers, "X-Error-Code": "GatedRepo"}, b""
        if path not in files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        if method == "GET":
            self.downloads.append(path)
        return 200, {**headers, "ETag": f'"{blob_id(files[path])}"'}, files[path]


def parents(path):
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


@contextlib.contextmanager
def serve_hub():
    """Yields a running `FakeHub` and the address to which `HF_ENDPOINT` must be set."""
    hub = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def respond(self):
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            query = url.query + "&" + self.rfile.read(length).decode()
            status, headers, body = hub.answer(self.command, url.path, query)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = respond

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
