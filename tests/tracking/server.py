"""A W&B server of our own on 127.0.0.1: it keeps what the real client sends, and it can be slow, refuse, or die."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40
ENTITY = "team"
WHEN = "2026-01-01T00:00:00Z"
PROJECT = {"id": "p", "entity": {"id": "e", "name": ENTITY}}
Values = dict[str, Any]


@dataclass
class SentRun:
    """What the server knows of one run."""

    id: str
    project: str
    config: Values = field(default_factory=dict)
    fields: Values = field(default_factory=dict)  # of the last upsert
    history: list[Values] = field(default_factory=list)
    summary: Values = field(default_factory=dict)
    exit_code: int | None = None
    logged: list[str] = field(default_factory=list)  # artifact versions, "name:v0"
    used: list[str] = field(default_factory=list)


@dataclass
class Artifact:
    """One version of an artifact."""

    id: str
    name: str
    type: str
    version: int
    digest: str
    metadata: Values
    committed: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}:v{self.version}"

    @property
    def state(self) -> str:
        return "COMMITTED" if self.committed else "PENDING"


class Server:
    """State and switches; `url` is its address."""

    def __init__(self) -> None:
        self.runs: dict[str, SentRun] = {}
        self.artifacts: list[Artifact] = []
        self.views: list[Values] = []
        self.requests: list[tuple[str, str, bytes]] = []  # method, path, body
        self.headers: list[str] = []  # of all requests
        self.delay = 0.0  # seconds before each answer
        self.refuse = False  # answer 403 to everything
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def die(self) -> None:
        """Close the port: connections are refused from here on."""
        self._http.shutdown()
        self._http.server_close()

    def bytes(self) -> bytes:
        """All that was ever sent: headers, methods, paths and bodies."""
        head = "\n".join(self.headers).encode()
        return b"\n".join([head, *(f"{method} {path} ".encode() + body for method, path, body in self.requests)])

    def writes(self) -> int:
        """Requests that change something; questions and the client's own telemetry aside."""
        return sum(
            path.startswith(("/files", "/storage")) or b'"mutation' in body[:40].replace(b"\\n", b"")
            for _, path, body in self.requests
        )

    # --- what the handler calls ---------------------------------------------------------------------------------------

    def graphql(self, query: str, values: Values) -> Values:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        with self._lock:
            answer: Values = getattr(self, f"_{found.group(1) if found else ''}", lambda values: {})(values)
        return answer

    def stream(self, run_id: str, body: Values) -> None:
        with self._lock:
            run = self.runs.setdefault(run_id, SentRun(run_id, ""))
            files = body.get("files") or {}
            if history := files.get("wandb-history.jsonl"):
                run.history[history["offset"] :] = [json.loads(line) for line in history["content"]]
            for line in files.get("wandb-summary.json", {}).get("content", []):
                run.summary = json.loads(line)
            if body.get("complete"):
                run.exit_code = body.get("exitcode")

    def _Viewer(self, values: Values) -> Values:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "u", "entity": ENTITY, "username": "u", "name": "u", "email": "u@example.org", "flags": "{}"}
        return {"viewer": {**viewer, "admin": False, "teams": teams, "apiKeys": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _bucket(self, run: SentRun) -> Values:
        """What several answers say of a run."""
        counts = {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
        names = {"id": _id("Run", run.id), "name": run.id, "displayName": run.fields.get("displayName") or run.id}
        values = {"config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary)}
        return {**names, **values, **counts, "tags": run.fields.get("tags") or [], "notes": None, "sweepName": None}

    def _RunResumeStatus(self, values: Values) -> Values:
        run = self.runs.get(values["name"])
        if run is None:
            return {"model": {**PROJECT, "name": values["project"], "bucket": None}}
        tails = {"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]"}
        bucket = {**self._bucket(run), **tails, "wandbConfig": json.dumps({"t": 1})}
        return {"model": {**PROJECT, "name": values["project"], "bucket": bucket}}

    def _Run(self, values: Values) -> Values:
        run = self.runs.get(values["name"])
        if run is None:
            return {"project": {"run": None}}
        of_run = {"group": run.fields.get("groupName"), "jobType": run.fields.get("jobType"), "state": "finished"}
        times = {"createdAt": WHEN, "heartbeatAt": WHEN}
        rest = {"projectId": 1, "commit": None, "readOnly": False, "description": "", "systemMetrics": "{}"}
        keys = {"lastStep": max((row["_step"] for row in run.history), default=-1)}
        user = {"name": "u", "username": "u"}
        return {"project": {"run": {**self._bucket(run), **of_run, **times, **rest, "user": user, "historyKeys": keys}}}

    _RunHistoryKeys = _Run

    def _RunParquetHistory(self, values: Values) -> Values:
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": self.runs[values["runName"]].history}}}}

    def _HistoryPage(self, values: Values) -> Values:
        rows = [row for row in self.runs[values["run"]].history if values["minStep"] <= row["_step"] < values["maxStep"]]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def _UpsertBucket(self, values: Values) -> Values:
        new = values["name"] not in self.runs
        run = self.runs.setdefault(values["name"], SentRun(values["name"], values["project"]))
        run.fields |= {key: value for key, value in values.items() if value is not None}
        if values.get("config"):
            run.config = json.loads(values["config"])
        bucket = {**self._bucket(run), "description": "", "project": {**PROJECT, "name": run.project}}
        return {"upsertBucket": {"bucket": bucket, "inserted": new, "configData": None}}

    def _CreateRunFiles(self, values: Values) -> Values:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{values['run']}/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": _id("Run", values["run"]), "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, values: Values) -> Values:
        name = str(values["name"]).split(":")[0]
        known = next((one for one in self.artifacts if one.name == name), None)
        return {"project": {"artifact": {"artifactType": {"name": known.type}} if known else None}}

    def _ServerFeaturesQuery(self, values: Values) -> Values:
        return {"serverInfo": {"features": []}}

    def _CreateArtifact(self, values: Values) -> Values:
        given = values["input"]
        name, digest = given["artifactCollectionName"], given["digest"]
        versions = [one for one in self.artifacts if one.name == name]
        found = next((one for one in versions if one.digest == digest), None)
        if found is None:
            identity, metadata = _id("Art", f"{name}{len(versions)}"), json.loads(given["metadata"] or "{}")
            found = Artifact(identity, name, given["artifactTypeName"], len(versions), digest, metadata)
            self.artifacts.append(found)
        if given.get("runName"):
            self._edge(self.runs[given["runName"]].logged, found.label)
        sequence = {"id": _id("Seq", name), "latestArtifact": {"id": found.id, "versionIndex": found.version}}
        return {"createArtifact": {"artifact": {"id": found.id, "state": found.state, "artifactSequence": sequence}}}

    def _manifest(self, values: Values) -> Values:
        file = {"id": "f", "uploadUrl": f"{self.url}/storage/manifest/{values.get('artifactID', 'm')}", "uploadHeaders": []}
        return {"artifactManifest": {"id": "m", "file": file}}

    def _CreateArtifactManifest(self, values: Values) -> Values:
        return {"createArtifactManifest": self._manifest(values)}

    def _UpdateArtifactManifest(self, values: Values) -> Values:
        return {"updateArtifactManifest": self._manifest(values)}

    def _CreateArtifactFiles(self, values: Values) -> Values:
        nodes = []
        for spec in values["input"]["artifactFiles"]:
            name = spec["name"]
            places = {"uploadUrl": f"{self.url}/storage/artifact/{name}", "storagePath": f"wandb_artifacts/{name}"}
            rest: Values = {"uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}
            nodes.append({"node": {"id": "f", "name": name, "displayName": name, **places, **rest}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, values: Values) -> Values:
        found = next(one for one in self.artifacts if one.id == values["artifactID"])
        found.committed = True
        return {"commitArtifact": {"artifact": {"id": found.id, "digest": found.digest}}}

    def _UseArtifact(self, values: Values) -> Values:
        given = values["input"]
        found = next(one for one in self.artifacts if one.id == given["artifactID"])
        self._edge(self.runs[given["runName"]].used, found.label)
        return {"useArtifact": {"artifact": {"id": found.id}}}

    def _ArtifactByID(self, values: Values) -> Values:
        one = next(one for one in self.artifacts if one.id == values["id"])
        project = {"id": "p", "internalId": "p", "name": "project", "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": one.name, "project": project}
        of_it = {"id": one.id, "versionIndex": one.version, "state": one.state, "digest": one.digest}
        kind = {"__typename": "Artifact", "artifactType": {"name": one.type}, "metadata": json.dumps(one.metadata)}
        times = {"createdAt": WHEN, "updatedAt": None, "ttlDurationSeconds": -2, "ttlIsInherited": True}
        rest: Values = {
            "description": None,
            "tags": [],
            "historyStep": None,
            "size": 0,
            "commitHash": "c",
            "fileCount": 1,
            "aliases": [],
        }
        return {"artifact": {**kind, **of_it, **times, **rest, "artifactSequence": collection}}

    def _GetProjects(self, values: Values) -> Values:
        names = {run.project for run in self.runs.values()} | {"isd-repro"}
        facts = {"__typename": "Project", "id": "p", "entityName": ENTITY, "createdAt": WHEN, "isBenchmark": False, "user": None}
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": [{"node": {**facts, "name": name}} for name in sorted(names)]}}

    def _upsertView(self, values: Values) -> Values:
        identity = values.get("id") or _id("View", f"{len(self.views)}")
        known = next((view for view in self.views if view["id"] == identity), None)
        if known is None:
            self.views.append(known := {})
        known |= {**values, "id": identity, "project": {"name": values["projectName"], "entityName": values["entityName"]}}
        return {"upsertView": {"view": known, "inserted": False}}

    _UpsertView2 = _upsertView

    def _View(self, values: Values) -> Values:
        found = [view for view in self.views if view["name"].strip("nw-v") == values["viewName"].strip("nw-v")]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    @staticmethod
    def _edge(edges: list[str], label: str) -> None:
        if label not in edges:
            edges.append(label)


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append((self.command, self.path, body))
        self.state.headers += [f"{name}: {value}" for name, value in self.headers.items()]
        time.sleep(self.state.delay)
        if self.state.refuse:
            self._answer({"errors": [{"message": "permission denied"}]}, 403)
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            self._answer({"data": self.state.graphql(asked["query"], asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.state.stream(self.path.split("/")[-2], json.loads(body))
            self._answer({"exitcode": None, "limits": {}})
        else:
            self._answer({})

    do_PUT = do_POST = do_GET  # noqa: N815

    def _answer(self, content: Values, status: int = 200) -> None:
        payload = json.dumps(content).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)


def _id(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:v1:{name}".encode()).decode()


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server that is gone after the block."""
    server = Server()
    try:
        yield server
    finally:
        server.die()
