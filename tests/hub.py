"""A small Hugging Face hub on 127.0.0.1: what `datasets` and `huggingface_hub` need to read and upload, over a folder.

with serve(root) as env:                        root/models/user/name/…, root/datasets/user/name/…
    subprocess.run([…], env=os.environ | env)   HF_ENDPOINT, HF_HOME …: set before huggingface_hub is imported
"""

import base64
import gzip
import hashlib
import json
import re
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from urllib.parse import unquote, urlsplit


def files_of(repo):
    return sorted(p for p in repo.rglob("*") if p.is_file())


@cache
def sha1_of(path, changed):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def oid_of(path):
    return sha1_of(path, (path.stat().st_mtime_ns, path.stat().st_size))


def commit_of(repo):
    """A commit id that depends on the content, so that no cache goes stale."""
    lines = "".join(f"{path.relative_to(repo)} {oid_of(path)}\n" for path in files_of(repo))
    return hashlib.sha1(lines.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", headers.get("Content_Length", len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code="EntryNotFound"):
        self.answer({"error": code}, 404, X_Error_Code=code)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repo(self, kind, name):
        return self.server.root / kind / name

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path))
        if status := self.server.fail(self.command, path):
            return self.answer(b"the hub is ill", status)
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            repo = self.repo(m[1], m[2])
            if not repo.is_dir():
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": str(p.relative_to(repo))} for p in files_of(repo)]
            return self.answer({"id": m[2], "sha": commit_of(repo), "siblings": siblings, "tags": [], "private": False})
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", path):
            repo = self.repo(m[1], m[2])
            folder = repo / (m[3] or "")
            if not folder.is_dir():
                return self.missing()
            recursive = "recursive=true" in self.path.lower() or "recursive=1" in self.path
            entries = []
            for p in sorted(folder.rglob("*") if recursive else folder.iterdir()):
                kind = {"type": "directory", "oid": "0" * 40, "size": 0}
                if p.is_file():
                    kind = {"type": "file", "oid": oid_of(p), "size": p.stat().st_size}
                entries.append(kind | {"path": str(p.relative_to(repo))})
            return self.answer(entries)
        if m := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo = self.repo("datasets" if m[1] else "models", m[2])
            file = repo / m[3]
            if not repo.is_dir():
                return self.missing("RepoNotFound")
            if not file.is_file():
                return self.missing()
            content = file.read_bytes()
            headers = {"ETag": f'"{oid_of(file)}"', "X_Repo_Commit": commit_of(repo)}
            headers |= {"Accept_Ranges": "bytes", "Content_Type": "application/octet-stream"}
            status = 200
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(part[1]), int(part[2] or len(content) - 1)
                headers["Content_Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                content, status = content[first : last + 1], 206
            self.server.sent += 0 if self.command == "HEAD" else len(content)
            return self.answer(content, status, **headers)
        if path == "/api/whoami-v2":
            return self.answer({"name": "user", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        return self.missing()

    do_HEAD = do_GET

    def do_POST(self):
        path, body = urlsplit(self.path).path, self.body()
        self.server.log.append(("POST", path))
        if status := self.server.fail("POST", path):
            return self.answer(b"the hub is ill", status)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = (asked.get("organization") or "user") + "/" + asked["name"].split("/")[-1]
            repo = self.repo(asked.get("type", "model") + "s", name)
            status = 409 if repo.is_dir() else 200
            repo.mkdir(parents=True, exist_ok=True)
            self.server.created.append(asked)
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name}, status)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/[^/]+", path):
            mode = lambda name: "lfs" if name.endswith((".safetensors", ".parquet")) else "regular"
            files = [{"path": f["path"], "uploadMode": mode(f["path"])} for f in json.loads(body)["files"]]
            return self.answer({"files": [f | {"shouldIgnore": False, "oid": None} for f in files]})
        if m := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            host = self.headers["Host"]
            objects = [
                o | {"actions": {"upload": {"href": f"http://{host}/lfs/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/[^/]+", path):
            repo = self.repo(m[1], m[2])
            for line in body.splitlines():
                value = (item := json.loads(line))["value"]
                if item["key"] == "deletedFile":
                    (repo / value["path"]).unlink()
                if item["key"] in ("file", "lfsFile"):
                    target = repo / value["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    is_lfs = item["key"] == "lfsFile"
                    target.write_bytes(self.server.lfs[value["oid"]] if is_lfs else base64.b64decode(value["content"]))
            url = f"http://{self.headers['Host']}/{m[2]}/commit/{commit_of(repo)}"
            return self.answer({"success": True, "commitUrl": url, "commitOid": commit_of(repo), "hookOutput": ""})
        return self.missing()

    def do_PUT(self):
        self.server.lfs[self.path.split("/")[-1]] = self.body()
        self.answer()


def publish(root, id, subsets):
    """Write a data set into a hub: {subset: {split: [rows of file 0, rows of file 1 …]}}, a row being a dict."""
    import pyarrow
    import pyarrow.parquet

    repo = Path(root) / "datasets" / id
    configs, infos = [], []
    for subset, splits in subsets.items():
        for split, files in splits.items():
            for i, rows in enumerate(files):
                path = repo / subset / f"{split}-{i:05d}-of-{len(files):05d}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        files = [{"split": split, "path": f"{subset}/{split}-*"} for split in splits]
        configs.append({"config_name": subset, "data_files": files})
        columns = [{"name": name, "dtype": "string"} for name in rows[0]]
        counts = [{"name": s, "num_bytes": 1, "num_examples": sum(map(len, files))} for s, files in splits.items()]
        infos.append({"config_name": subset, "features": columns, "splits": counts})
    card = json.dumps({"configs": configs, "dataset_info": infos})  # JSON is YAML
    (repo / "README.md").write_text(f"---\n{card}\n---\n")


def publish_mixture(root, stories=200):
    """Tiny copies of the data sets of config/mixture.py, with their true column names. `stories`: rows of the last."""
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ay", "ing", "er")]
    random = Random(0)

    def prose(length=60):
        return " ".join(random.choices(words, k=length)) + ".\n"

    def rows(number, **columns):
        return [{name: make() for name, make in columns.items()} for _ in range(number)]

    def articles(number):
        texts = [[f" = Title {i} = \n", "", prose(), " = = Part = = \n", prose()] for i in range(number)]
        return [{"text": text} for lines in texts for text in lines]

    wiki = {"train": [articles(20), articles(15)], "validation": [articles(4)], "test": [articles(2)]}
    publish(root, "Salesforce/wikitext", {"wikitext-103-raw-v1": wiki})
    news = {"article": prose, "highlights": prose, "id": lambda: "x"}
    news = {"train": [rows(100, **news) for _ in range(3)], "validation": [rows(9, **news)]}
    publish(root, "abisee/cnn_dailymail", {"3.0.0": news})
    book = {"TEXT": lambda: prose(900), "SOURCE": prose, "METADATA": prose}
    publish(root, "sedthh/gutenberg_english", {"default": {"train": [rows(20, **book), rows(20, **book)]}})
    page = {"prompt": prose, "text_token_length": lambda: 60, "text": prose, "seed_data": prose}
    subsets = "auto_math_text khanacademy openstax stanford stories web_samples_v1 web_samples_v2 wikihow"
    pages = {subset: {"train": [rows(300, **page)]} for subset in subsets.split()}
    publish(root, "HuggingFaceTB/cosmopedia", pages)
    science = ("question", "distractor3", "distractor1", "distractor2", "correct_answer", "support")
    science = dict.fromkeys(science, lambda: prose(9))
    science = {"train": [rows(50, **science)], "validation": [rows(6, **science)], "test": [rows(6, **science)]}
    publish(root, "allenai/sciq", {"default": science})
    story = {"train": [rows(stories, text=prose) for _ in range(4)], "validation": [rows(20, text=prose)]}
    publish(root, "roneneldan/TinyStories", {"default": story})
    code = rows(60, repo_name=prose, path=prose, content=prose, license=lambda: "mit")
    (root / "datasets/codeparrot/codeparrot-clean-valid").mkdir(parents=True)
    with gzip.open(root / "datasets/codeparrot/codeparrot-clean-valid/file-000000000054.json.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in code)


class Hub(dict):
    """The environment that leads to a hub; `.server`: its root, log [(method, path)], bytes sent, created, fail()."""


@contextmanager
def serve(root):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.log, server.lfs, server.created, server.sent = Path(root), [], {}, [], 0
    server.fail = lambda method, path: None  # or the status with which a request fails
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # a client that was killed
    Thread(target=server.serve_forever, daemon=True).start()
    hub = Hub(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HOME=str(Path(root) / "cache"),
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_TOKEN="hf_test",
        HF_HUB_OFFLINE="0",
    )
    hub.server = server
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
