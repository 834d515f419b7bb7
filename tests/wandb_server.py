"""A stand-in for W&B's server on 127.0.0.1: what the real client asks for in a sweep, and a record of what it received."""

import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tests"


class Server:
    """Hands the agent its commands and remembers each run.

    decide: from this server and the ids of the runs under way to the agent's next commands, as W&B's server sends them.
    runs: by id, the rows of the history, the summary, the config, the exit codes and how often a process has begun it.
    artifacts: by name, the type of each.
    """

    def __init__(self, decide: Callable[["Server", list[str]], list[dict[str, Any]]]):
        self.decide = decide
        self.sweep_yaml = ""
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, str] = {}
        self.lock = threading.Lock()

    def run(self, name: str) -> dict[str, Any]:
        empty = {"config": {}, "rows": [], "summary": {}, "exit_codes": [], "starts": 0}
        return self.runs.setdefault(name, {**empty, "project": None})

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL reply."""
        for operation, reply in self.REPLIES.items():
            if operation in query:
                return reply(self, variables)
        return {}

    def viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    def upsert_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.sweep_yaml = variables["config"]
        project = {"id": "1", "name": variables["projectName"], "entity": {"id": "1", "name": ENTITY}}
        return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}

    def sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = {"id": "1", "name": "sweep1", "state": "RUNNING", "config": self.sweep_yaml, "runs": {"edges": []}}
        return {"project": {"sweep": {**sweep, "method": "grid", "createdAt": "2026-01-01T00:00:00"}}}

    def heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        under_way = list(json.loads(variables["runState"]))
        commands = json.dumps(self.decide(self, under_way))
        return {"agentHeartbeat": {"agent": {"id": "agent1"}, "commands": commands}}

    def upsert_run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.run(variables["name"])
        run["project"] = run["project"] or variables["project"]
        run["config"] |= json.loads(variables.get("config") or "{}")
        bucket = {"id": variables["name"], "name": variables["name"], "displayName": variables.get("displayName")}
        project = {"id": "1", "name": variables["project"], "entity": {"id": "1", "name": ENTITY}}
        more = {"sweepName": "sweep1", "historyLineCount": len(run["rows"]), "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": bucket | more, "inserted": not run["rows"]}}

    def resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": {"bucket": None}}
        last = json.dumps([json.dumps(row) for row in run["rows"][-1:]])
        bucket = {
            "name": variables["name"],
            "historyLineCount": len(run["rows"]),
            "historyTail": last,
            "logLineCount": 0,
        }
        more = {"summaryMetrics": json.dumps(run["summary"]), "eventsLineCount": 0, "eventsTail": "[]", "config": "{}"}
        return {"model": {"bucket": bucket | more | {"id": variables["name"], "wandbConfig": '{"t": 1}', "tags": []}}}

    def create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        names = variables["files"]
        self.run(variables["run"])["starts"] += "wandb-metadata.json" in names
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in names]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    def create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Answers as for an artifact whose files W&B has already, so that the client does not upload them."""
        given = variables["input"]
        self.artifacts[given["artifactCollectionName"]] = given["artifactTypeName"]
        own = {"id": given["artifactCollectionName"]}
        return {"createArtifact": {"artifact": {**own, "state": "COMMITTED", "artifactSequence": {"latestArtifact": own}}}}

    REPLIES = {
        "query ArtifactType(": lambda self, variables: {"project": {"artifact": None}},
        "createArtifact(": create_artifact,
        "query Viewer": viewer,
        "upsertSweep": upsert_sweep,
        "sweep(sweepName": sweep,
        "createAgent": lambda self, variables: {"createAgent": {"agent": {"id": "agent1"}}},
        "agentHeartbeat": heartbeat,
        "upsertBucket": upsert_run,
        "createRunFiles": create_files,
        "historyTail": resume_status,
        "serverInfo": lambda self, variables: {"serverInfo": {"features": []}},
    }

    def receive_stream(self, name: str, received: dict[str, Any]) -> None:
        """What a run sends while it lasts: rows of its history, its summary, its exit code."""
        run, files = self.run(name), received.get("files") or {}
        run["rows"] += [json.loads(row) for row in files.get("wandb-history.jsonl", {}).get("content", [])]
        for text in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"] |= json.loads(text)
        if "exitcode" in received:
            run["exit_codes"].append(received["exitcode"])


@contextmanager
def wandb_server(decide: Callable[[Server, list[str]], list[dict[str, Any]]]) -> Iterator[Server]:
    """The server while the block lasts; its `environment` makes the client talk to it."""
    server = Server(decide)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            reply = json.dumps(self.reply(self.body())).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = do_PUT = handle_request

        def body(self) -> bytes:
            data = b""
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def reply(self, body: bytes) -> dict[str, Any]:
            with server.lock:
                if self.path == "/graphql":
                    request = json.loads(body)
                    return {"data": server.answer(request["query"], request.get("variables") or {})}
                stream = re.fullmatch(r"/files/.*/([^/]+)/file_stream", self.path)
                if stream:
                    server.receive_stream(stream[1], json.loads(body))
                return {}

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    server.environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
