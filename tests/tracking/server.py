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


@dataclass
class SentRun:
    """What the server knows of one run."""

    id: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)  # of the last upsert
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
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
    metadata: dict[str, Any]
    committed: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}:v{self.version}"


class Server:
    """State and switches; `url` is its address."""

    def __init__(self) -> None:
        self.runs: dict[str, SentRun] = {}
        self.artifacts: list[Artifact] = []
        self.views: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, bytes]] = []  # method, path, body
        self.headers: list[str] = []  # of all requests
        self.delay = 0.0  # seconds before each answer
        self.refuse = False  # answer 403 to everything
        self.die_after: int | None = None  # file-stream posts until the server is gone
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.dead = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def die(self) -> None:
        """Close the port: connections are refused from here on."""
        self.dead = True
        self._http.shutdown()
        self._http.server_close()

    def close(self) -> None:
        if not self.dead:
            self.die()

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

    def graphql(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else ""
        with self._lock:
            answer: dict[str, Any] = getattr(self, f"_{name}", lambda values: {})(values)
        return answer

    def stream(self, run_id: str, body: dict[str, Any]) -> None:
        with self._lock:
            run = self.runs.setdefault(run_id, SentRun(run_id, ""))
            files = body.get("files") or {}
            history = files.get("wandb-history.jsonl")
            if history:
                rows = [json.loads(line) for line in history["content"]]
                run.history[history["offset"] :] = rows
            for line in files.get("wandb-summary.json", {}).get("content", []):
                run.summary = json.loads(line)
            if body.get("complete"):
                run.exit_code = body.get("exitcode")

    def _Viewer(self, values: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {"id": "u", "entity": ENTITY, "username": "u", "name": "u", "email": "u@example.org", "flags": "{}"}
        return {"viewer": {**viewer, "admin": False, "teams": teams, "apiKeys": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _RunResumeStatus(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(values["name"])
        project = {"id": "p", "name": values["project"], "entity": {"id": "e", "name": ENTITY}}
        if run is None:
            return {"model": {**project, "bucket": None}}
        tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
        bucket = {
            "id": _id("Run", run.id),
            "name": run.id,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.fields.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": tail,
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": run.fields.get("tags") or [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {**project, "bucket": bucket}}

    def _Run(self, values: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(values["name"])
        if run is None:
            return {"project": {"run": None}}
        found = {
            "projectId": 1,
            "id": _id("Run", run.id),
            "tags": run.fields.get("tags") or [],
            "name": run.id,
            "displayName": run.fields.get("displayName"),
            "sweepName": None,
            "state": "finished",
            "config": json.dumps(run.config),
            "group": run.fields.get("groupName"),
            "jobType": run.fields.get("jobType"),
            "commit": None,
            "readOnly": False,
            "createdAt": "2026-01-01T00:00:00Z",
            "heartbeatAt": "2026-01-01T00:00:00Z",
            "description": "",
            "notes": None,
            "systemMetrics": "{}",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "user": {"name": "u", "username": "u"},
            "historyKeys": {"lastStep": max((row["_step"] for row in run.history), default=-1)},
        }
        return {"project": {"run": found}}

    _RunHistoryKeys = _Run

    def _RunParquetHistory(self, values: dict[str, Any]) -> dict[str, Any]:
        rows = self.runs[values["runName"]].history
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": rows}}}}

    def _HistoryPage(self, values: dict[str, Any]) -> dict[str, Any]:
        rows = [row for row in self.runs[values["run"]].history if values["minStep"] <= row["_step"] < values["maxStep"]]
        return {"project": {"run": {"history": [json.dumps(row) for row in rows]}}}

    def _UpsertBucket(self, values: dict[str, Any]) -> dict[str, Any]:
        new = values["name"] not in self.runs
        run = self.runs.setdefault(values["name"], SentRun(values["name"], values["project"]))
        run.fields |= {key: value for key, value in values.items() if value is not None}
        if values.get("config"):
            run.config = json.loads(values["config"])
        if new or values.get("config"):
            run.exit_code = None if new else run.exit_code
        bucket = {
            "id": _id("Run", run.id),
            "name": run.id,
            "displayName": run.fields.get("displayName") or run.id,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new, "configData": None}}

    def _CreateRunFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{values['run']}/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": _id("Run", values["run"]), "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, values: dict[str, Any]) -> dict[str, Any]:
        name = str(values["name"]).split(":")[0]
        known = next((one for one in self.artifacts if one.name == name), None)
        return {"project": {"artifact": {"artifactType": {"name": known.type}} if known else None}}

    def _ServerFeaturesQuery(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _CreateArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        given = values["input"]
        name, digest = given["artifactCollectionName"], given["digest"]
        versions = [one for one in self.artifacts if one.name == name]
        found = next((one for one in versions if one.digest == digest), None)
        if found is None:
            metadata = json.loads(given["metadata"] or "{}")
            found = Artifact(
                _id("Art", f"{name}{len(versions)}"), name, given["artifactTypeName"], len(versions), digest, metadata
            )
            self.artifacts.append(found)
        if given.get("runName"):
            self._edge(self.runs[given["runName"]].logged, found.label)
        sequence = {"id": _id("Seq", name), "latestArtifact": {"id": found.id, "versionIndex": found.version}}
        state = "COMMITTED" if found.committed else "PENDING"
        return {"createArtifact": {"artifact": {"id": found.id, "state": state, "artifactSequence": sequence}}}

    def _manifest(self, values: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "f", "uploadUrl": f"{self.url}/storage/manifest/{values.get('artifactID', 'm')}", "uploadHeaders": []}
        return {"id": "m", "file": file}

    def _CreateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(values)}}

    def _UpdateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(values)}}

    def _CreateArtifactFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "id": "f",
                "name": spec["name"],
                "displayName": spec["name"],
                "uploadUrl": f"{self.url}/storage/artifact/{spec['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "storagePath": f"wandb_artifacts/{spec['name']}",
                "artifact": {"id": spec["artifactID"]},
            }
            for spec in values["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        found = next(one for one in self.artifacts if one.id == values["artifactID"])
        found.committed = True
        return {"commitArtifact": {"artifact": {"id": found.id, "digest": found.digest}}}

    def _UseArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        given = values["input"]
        found = next(one for one in self.artifacts if one.id == given["artifactID"])
        self._edge(self.runs[given["runName"]].used, found.label)
        return {"useArtifact": {"artifact": {"id": found.id}}}

    def _ArtifactByID(self, values: dict[str, Any]) -> dict[str, Any]:
        one = next(one for one in self.artifacts if one.id == values["id"])
        project = {"id": "p", "internalId": "p", "name": "project", "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": one.name, "project": project}
        return {
            "artifact": {
                "__typename": "Artifact",
                "id": one.id,
                "artifactSequence": collection,
                "versionIndex": one.version,
                "artifactType": {"name": one.type},
                "description": None,
                "metadata": json.dumps(one.metadata),
                "ttlDurationSeconds": -2,
                "ttlIsInherited": True,
                "tags": [],
                "historyStep": None,
                "state": "COMMITTED" if one.committed else "PENDING",
                "size": 0,
                "digest": one.digest,
                "commitHash": "c",
                "fileCount": 1,
                "createdAt": "2026-01-01T00:00:00Z",
                "updatedAt": None,
                "aliases": [],
            }
        }

    def _GetProjects(self, values: dict[str, Any]) -> dict[str, Any]:
        names = {run.project for run in self.runs.values()} | {"isd-repro"}
        facts = {"entityName": ENTITY, "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
        edges = [{"node": {"__typename": "Project", "id": "p", "name": name, **facts}} for name in sorted(names)]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": edges}}

    def _upsertView(self, values: dict[str, Any]) -> dict[str, Any]:
        identity = values.get("id") or _id("View", f"{len(self.views)}")
        known = next((view for view in self.views if view["id"] == identity), None)
        if known is None:
            self.views.append(known := {})
        known |= {**values, "id": identity, "project": {"name": values["projectName"], "entityName": values["entityName"]}}
        return {"upsertView": {"view": known, "inserted": False}}

    _UpsertView2 = _upsertView

    def _View(self, values: dict[str, Any]) -> dict[str, Any]:
        found = [view for view in self.views if view["name"].strip("nw-v") == values["viewName"].strip("nw-v")]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    @staticmethod
    def _edge(edges: list[str], label: str) -> None:
        if label not in edges:
            edges.append(label)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state.requests.append((method, self.path, body))
        state.headers += [f"{name}: {value}" for name, value in self.headers.items()]
        time.sleep(state.delay)
        if state.refuse:
            self._answer({"errors": [{"message": "permission denied"}]}, 403)
            return
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            self._answer({"data": state.graphql(asked["query"], asked.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            state.stream(self.path.split("/")[-2], json.loads(body))
            self._answer({"exitcode": None, "limits": {}})
            if state.die_after is not None:
                state.die_after -= 1
                if state.die_after <= 0 and not state.dead:
                    state.dead = True
                    threading.Thread(target=state.die, daemon=True).start()
            return
        self._answer({})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
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
        server.close()
