"""Servers that answer like the public APIs of systems that people connect, and one that answers whatever a test wants.

Belongs here: the shapes of requests and answers as the systems' public documentation gives them, each with what makes it
awkward. Does not: the systems themselves; that an example works against the real one is only as sure as its documentation.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Reply = tuple[int, Any, dict[str, str]]


@dataclass
class Request:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: Any


@dataclass
class Record:
    """What a system holds of one entity."""

    id: str
    value: Any
    closed: bool = False
    version: int = 1
    updated: datetime = datetime(2026, 1, 1)
    changes: list[tuple[datetime, str, Any, Any]] = field(default_factory=list)


class Api:
    """A system over HTTP on a free port of 127.0.0.1: records, who changed them, and every request that came."""

    env: ClassVar[dict[str, str]] = {}
    person = "someone"

    @staticmethod
    def parse(raw: bytes) -> Any:
        """A request's body."""
        return json.loads(raw)

    def __init__(self, records: dict[str, Any], closed: tuple[str, ...] = ()) -> None:
        self.records = {i: Record(i, value, i in closed) for i, value in records.items()}
        self.requests: list[Request] = []
        self.applied: Counter[str] = Counter()
        self.before_write: Callable[[str], None] | None = None
        self.lock = threading.RLock()

    def handle(self, request: Request) -> Reply:
        raise NotImplementedError

    def allowed(self, request: Request) -> bool:
        raise NotImplementedError

    def set(self, id_: str, value: Any, actor: str | None = None) -> Record:
        """A change by a person, or by ``actor``."""
        with self.lock:
            record = self.records[id_]
            now = datetime.now(UTC).replace(tzinfo=None)
            if record.value != value:
                record.changes.append((now, actor or self.person, record.value, value))
            record.value, record.updated, record.version = value, now, record.version + 1
            return record

    def write(self, id_: str, value: Any, actor: str) -> Record:
        """A change through the API, counted."""
        self.applied[id_] += 1
        return self.set(id_, value, actor)

    def somebody(self, id_: str) -> None:
        """Let a test's person change something just before a write is looked at."""
        if self.before_write is not None:
            self.before_write(id_)

    def writes(self) -> list[Request]:
        return [r for r in self.requests if r.method in ("PUT", "PATCH") or r.path.endswith("batch/update")]


@contextlib.contextmanager
def serving(api: Api) -> Iterator[str]:
    """Serve it; gives the URL of its host."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def answer(self) -> None:
            parts = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            request = Request(
                self.command,
                parts.path,
                parse_qs(parts.query, keep_blank_values=True),
                {k.lower(): v for k, v in self.headers.items()},
                api.parse(raw) if raw else None,
            )
            with api.lock:
                api.requests.append(request)
                status, body, headers = (
                    api.handle(request) if api.allowed(request) else (401, {"error": "bad token"}, {})
                )
            payload = b"" if body is None else json.dumps(body).encode()
            lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(payload)}", "Content-Type: application/json"]
            lines += [f"{k}: {v}" for k, v in headers.items()]
            self.wfile.write("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)

        do_GET = do_PUT = do_POST = do_PATCH = answer

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def iso(moment: datetime, timespec: str = "seconds") -> str:
    return moment.isoformat(timespec=timespec) + "Z"


class Zendesk(Api):
    """Tickets; ``safe_update`` compares whole seconds; lists leave out what is not there."""

    env: ClassVar = {"ZENDESK_USER": "me@acme.com/token", "ZENDESK_API_TOKEN": "zendesk-secret-1"}
    base = "/api/v2"
    own = 900100
    person = "7"

    def allowed(self, request: Request) -> bool:
        return request.headers.get("authorization") == basic(*self.env.values())

    def show(self, r: Record) -> dict[str, Any]:
        status = "closed" if r.closed else "open"
        return {"id": int(r.id), "subject": "?", "priority": r.value, "status": status, "updated_at": iso(r.updated)}

    def handle(self, request: Request) -> Reply:
        missing: Reply = (404, {"error": "RecordNotFound", "description": "Not found"}, {})
        if request.path == f"{self.base}/tickets/show_many.json":
            ids = request.query["ids"][0].split(",")
            found = [self.show(self.records[i]) for i in ids if i in self.records]
            return 200, {"tickets": found, "next_page": None, "count": len(found)}, {}
        match = re.fullmatch(rf"{self.base}/tickets/(\d+)(/audits)?\.json", request.path)
        if not match or match[1] not in self.records:
            return missing
        if match[2]:
            audits = [
                {
                    "id": n,
                    "author_id": int(actor),
                    "created_at": iso(at),
                    "events": [
                        {"type": "Comment", "body": "priority"},
                        {"type": "Change", "field_name": "priority", "previous_value": old, "value": new},
                    ],
                }
                for n, (at, actor, old, new) in enumerate(self.records[match[1]].changes)
            ]
            first = int(request.query.get("page", ["1"])[0])
            link = (
                f"http://{request.headers['host']}{request.path}?page={first + 1}" if len(audits) > first * 2 else None
            )
            return 200, {"audits": audits[first * 2 - 2 : first * 2], "next_page": link}, {}
        if request.method == "PUT":
            self.somebody(match[1])
            record, said = self.records[match[1]], request.body["ticket"]
            if record.closed:
                return 422, {"error": "RecordInvalid", "description": "Status: closed prevents ticket update"}, {}
            if said.get("safe_update") and said.get("updated_stamp") != iso(record.updated):
                return 409, {"error": "UpdateConflict", "description": "Safe Update prevented the update"}, {}
            if said["priority"] not in ("urgent", "high", "normal", "low"):
                return 422, {"error": "RecordInvalid", "description": "Priority is invalid"}, {}
            self.write(match[1], said["priority"], str(self.own))
            return 200, {"ticket": self.show(record), "audit": {}}, {}
        return 200, {"ticket": self.show(self.records[match[1]])}, {}


class Jira(Api):
    """Issues by key; a changed one is answered with 204; what may not be seen is not there."""

    env: ClassVar = {"JIRA_USER": "me@acme.com", "JIRA_API_TOKEN": "jira-secret-2"}
    base = "/rest/api/3"
    own = "5b10a2844c20165700ede21g"

    def allowed(self, request: Request) -> bool:
        return request.headers.get("authorization") == basic(*self.env.values())

    def show(self, r: Record) -> dict[str, Any]:
        status = {"name": "Done" if r.closed else "To Do", "statusCategory": {"key": "done" if r.closed else "new"}}
        return {"id": "10001", "key": r.id, "fields": {"priority": {"id": r.value, "name": "?"}, "status": status}}

    def handle(self, request: Request) -> Reply:
        if request.path == f"{self.base}/issue/bulkfetch":
            wanted = request.body["issueIdsOrKeys"]
            found = [self.show(self.records[i]) for i in reversed(wanted) if i in self.records]
            return 200, {"issues": found, "issueErrors": []}, {}
        match = re.fullmatch(rf"{self.base}/issue/([A-Z]+-\d+)(/changelog)?", request.path)
        if not match or match[1] not in self.records:
            return (
                404,
                {"errorMessages": ["Issue does not exist or you do not have permission to see it."], "errors": {}},
                {},
            )
        record = self.records[match[1]]
        if match[2]:
            entries = [
                {
                    "id": str(n),
                    "author": {"accountId": actor},
                    "created": f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03}+0000",
                    "items": [
                        {"field": "labels", "to": None, "from": None},
                        {"field": "priority", "fieldId": "priority", "from": old, "to": new},
                    ],
                }
                for n, (at, actor, old, new) in enumerate(record.changes)
            ]
            start = int(request.query["startAt"][0])
            return 200, {"startAt": start, "total": len(entries), "values": entries[start : start + 1]}, {}
        if request.method == "PUT":
            self.somebody(match[1])
            priority = request.body["fields"]["priority"]["id"]
            if priority not in ("1", "2", "3", "4", "5"):
                return 400, {"errorMessages": [], "errors": {"priority": "Specify a valid priority"}}, {}
            self.write(match[1], priority, self.own)
            return 204, None, {}
        return 200, self.show(record), {}


class ServiceNow(Api):
    """Incidents: texts for numbers, found by number and changed by sys_id; a query that it does not know is left out."""

    env: ClassVar = {"SERVICENOW_USER": "signalbox", "SERVICENOW_PASSWORD": "servicenow-secret-3"}
    base = "/api/now/table"
    own = "signalbox"
    cancelled = 0
    """So many queries to come are cancelled: answered with 200, an empty list, and an error after it."""

    def allowed(self, request: Request) -> bool:
        return request.headers.get("authorization") == basic(*self.env.values())

    def sys_id(self, id_: str) -> str:
        return id_[3:].rjust(32, "0")

    def show(self, r: Record) -> dict[str, Any]:
        return {"number": r.id, "sys_id": self.sys_id(r.id), "urgency": r.value, "state": "7" if r.closed else "2"}

    def handle(self, request: Request) -> Reply:
        query = request.query.get("sysparm_query", [""])[0]
        offset, limit = (int(request.query.get(f"sysparm_{n}", [d])[0]) for n, d in (("offset", "0"), ("limit", "10")))
        if request.path == f"{self.base}/sys_audit":
            wanted = re.search(r"documentkey=(\w+)", query)
            assert wanted and "fieldname=urgency" in query
            rows = [
                {"newvalue": new, "sys_created_on": f"{at:%Y-%m-%d %H:%M:%S}", "user": actor}
                for r in self.records.values()
                if self.sys_id(r.id) == wanted[1]
                for at, actor, _, new in r.changes
            ]
            return 200, {"result": rows[offset : offset + limit]}, {}
        if request.path == f"{self.base}/incident":
            if self.cancelled:
                self.cancelled -= 1
                says = "Transaction cancelled: maximum execution time exceeded"
                return (
                    200,
                    {"result": [], "error": {"message": says, "detail": f"{says} Check logs"}, "status": "failure"},
                    {},
                )
            numbers = query.removeprefix("numberIN").removeprefix("number=").split(",")
            rows = [self.show(r) for r in self.records.values() if r.id in numbers]
            return 200, {"result": rows[offset : offset + min(limit, 2)]}, {}
        found = [r for r in self.records.values() if request.path == f"{self.base}/incident/{self.sys_id(r.id)}"]
        if not found:
            error = {
                "message": "No Record found",
                "detail": "Record doesn't exist or ACL restricts the record retrieval",
            }
            return 404, {"error": error, "status": "failure"}, {}
        self.somebody(found[0].id)
        self.write(found[0].id, request.body["urgency"], self.own)
        return 200, {"result": {"sys_id": self.sys_id(found[0].id), "urgency": found[0].value}}, {}


class Redmine(Api):
    """Issues: numbers; fields that it does not know are ignored and answered with 204; lists leave out closed ones."""

    env: ClassVar = {"REDMINE_API_KEY": "redmine-secret-4"}
    base = ""
    own = 12
    person = "3"
    locked: tuple[str, ...] = ()
    """Issues whose priority this user may not set: left out of what is changed, without a word."""

    def __init__(self, records: dict[str, Any], closed: tuple[str, ...] = ()) -> None:
        super().__init__(records, closed)
        self.notes: list[str] = []

    def allowed(self, request: Request) -> bool:
        return request.headers.get("x-redmine-api-key") == self.env["REDMINE_API_KEY"]

    def show(self, r: Record) -> dict[str, Any]:
        status = {"id": 5 if r.closed else 1, "name": "?", "is_closed": r.closed}
        return {"id": int(r.id), "priority": {"id": r.value, "name": "?"}, "status": status}

    def handle(self, request: Request) -> Reply:
        if request.path == "/issues.json":
            ids = request.query["issue_id"][0].split(",")
            every = request.query.get("status_id") == ["*"]
            found = [self.show(r) for r in self.records.values() if r.id in ids and (every or not r.closed)]
            start, limit = int(request.query["offset"][0]), min(int(request.query["limit"][0]), 3)
            return (
                200,
                {"issues": found[start : start + limit], "total_count": len(found), "offset": start, "limit": limit},
                {},
            )
        match = re.fullmatch(r"/issues/(\d+)\.json", request.path)
        if not match or match[1] not in self.records:
            return 404, None, {}
        record = self.records[match[1]]
        if request.method == "PUT":
            self.somebody(match[1])
            priority = request.body["issue"].get("priority_id") if match[1] not in self.locked else None
            self.notes += [match[1]] if request.body["issue"].get("notes") else []
            if priority is not None and priority not in (1, 2, 3, 4, 5):
                return 422, {"errors": ["Priority is invalid"]}, {}
            if priority is not None:
                self.write(match[1], priority, str(self.own))
            return 204, None, {}
        shown = self.show(record)
        if request.query.get("include") == ["journals"]:
            shown["journals"] = [
                {
                    "id": n,
                    "user": {"id": int(actor), "name": "?"},
                    "created_on": iso(at),
                    "details": [
                        {"property": "attr", "name": "priority_id", "old_value": str(old), "new_value": str(new)}
                    ],
                }
                for n, (at, actor, old, new) in enumerate(record.changes)
            ]
        return 200, {"issue": shown}, {}


class RequestTracker(Api):
    """Tickets with an ETag that is the last transaction; 200 comes with messages, some of which are errors."""

    env: ClassVar = {"RT_TOKEN": "rt-secret-5"}
    base = "/REST/2.0"
    own = "signalbox"
    locked: tuple[str, ...] = ()
    refusal = "Ticket {}: Permission Denied"

    def allowed(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"token {self.env['RT_TOKEN']}"

    def handle(self, request: Request) -> Reply:
        match = re.fullmatch(rf"{self.base}/ticket/(\d+)(/history)?", request.path)
        if not match or match[1] not in self.records:
            return 404, {"message": "No such ticket"}, {}
        record = self.records[match[1]]
        if match[2]:
            items = [
                {
                    "Type": "Set",
                    "Field": "Priority",
                    "OldValue": str(old),
                    "NewValue": str(new),
                    "Created": iso(at),
                    "Creator": {"id": actor, "type": "user"},
                }
                for at, actor, old, new in record.changes
            ]
            items.append(
                {"Type": "EmailRecord", "Field": None, "Created": iso(record.updated), "Creator": {"id": "RT_System"}}
            )
            page = int(request.query["page"][0])
            return 200, {"page": page, "pages": len(items), "total": len(items), "items": items[page - 1 : page]}, {}
        if request.method == "PUT":
            self.somebody(match[1])
            if request.headers.get("if-match") not in (None, f'"{record.version}"'):
                return 412, None, {}
            if record.id in self.locked:
                return 200, [self.refusal.format(record.id)], {}
            old = record.value
            self.write(match[1], int(request.body["Priority"]), self.own)
            return (
                200,
                [f"Ticket {record.id}: Priority changed from '{old}' to '{record.value}'"],
                {"ETag": f'"{record.version}"'},
            )
        status = "resolved" if record.closed else "open"
        body = {"id": int(record.id), "Subject": "?", "Priority": str(record.value), "Status": status}
        return 200, body, {"ETag": f'"{record.version}"'}


class HubSpot(Api):
    """Tickets of a CRM: names, bulk reads and writes that answer 207 with the failed rows beside the others."""

    env: ClassVar = {"HUBSPOT_TOKEN": "hubspot-secret-6"}
    base = "/crm/v3/objects/tickets"
    own = "3141592"
    names = ("LOW", "MEDIUM", "HIGH", "URGENT")

    def allowed(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.env['HUBSPOT_TOKEN']}"

    def show(self, r: Record) -> dict[str, Any]:
        stage = "4" if r.closed else "1"
        return {
            "id": r.id,
            "properties": {"hs_ticket_priority": r.value, "hs_pipeline_stage": stage},
            "updatedAt": iso(r.updated, "milliseconds"),
            "archived": False,
        }

    def many(self, found: list[Any], lost: list[str]) -> Reply:
        body: dict[str, Any] = {"status": "COMPLETE", "results": found}
        if lost:
            error = {
                "status": "error",
                "category": "OBJECT_NOT_FOUND",
                "message": "Could not get some TICKET objects, they may be deleted or not exist.",
                "context": {"ids": lost},
            }
            body |= {"numErrors": 1, "errors": [error]}
        return (207 if lost else 200), body, {}

    def handle(self, request: Request) -> Reply:
        if request.path.startswith(f"{self.base}/batch/"):
            rows = request.body["inputs"]
            assert len(rows) <= 100
            lost = [r["id"] for r in rows if r["id"] not in self.records]
            rows = [r for r in rows if r["id"] in self.records]
            if request.path.endswith("update"):
                values = {r["id"]: r["properties"]["hs_ticket_priority"] for r in rows}
                if any(v not in self.names for v in values.values()):
                    return (
                        400,
                        {
                            "status": "error",
                            "message": "Property values were not valid",
                            "category": "VALIDATION_ERROR",
                        },
                        {},
                    )
                for i, value in values.items():
                    self.somebody(i)
                    self.write(i, value, self.own)
            return self.many([self.show(self.records[r["id"]]) for r in reversed(rows)], lost)
        id_ = unquote(request.path.removeprefix(f"{self.base}/"))
        if id_ not in self.records:
            return 404, {"status": "error", "message": "resource not found", "category": "OBJECT_NOT_FOUND"}, {}
        record = self.records[id_]
        if request.method == "PATCH":
            self.somebody(id_)
            value = request.body["properties"]["hs_ticket_priority"]
            if value not in self.names:
                return 400, {"status": "error", "message": f"{value} was not one of the allowed options"}, {}
            self.write(id_, value, self.own)
        shown = self.show(record)
        if request.query.get("propertiesWithHistory"):
            shown["propertiesWithHistory"] = {
                "hs_ticket_priority": [
                    {"value": new, "timestamp": iso(at, "milliseconds"), "sourceType": "API", "sourceId": actor}
                    for at, actor, _, new in reversed(record.changes)
                ]
            }
        return 200, shown, {}


class GitLab(Api):
    """Issues of a project: pages in the Link header, smaller than asked for; its own user names in the history."""

    env: ClassVar = {"GITLAB_TOKEN": "gitlab-secret-7"}
    base = "/api/v4/projects/42"
    own = "signalbox"

    def allowed(self, request: Request) -> bool:
        return request.headers.get("private-token") == self.env["GITLAB_TOKEN"]

    def show(self, r: Record) -> dict[str, Any]:
        return {
            "id": 9000 + int(r.id),
            "iid": int(r.id),
            "weight": r.value,
            "state": "closed" if r.closed else "opened",
        }

    def page(self, request: Request, rows: list[Any], size: int) -> Reply:
        page = int(request.query.get("page", ["1"])[0])
        query = "&".join(f"iids%5B%5D={i}" for i in request.query.get("iids[]", []))
        url = f"http://{request.headers['host']}{request.path}?{query}&page="
        links = [f'<{url}1>; rel="first"', f'<{url}{page + 1}>; rel="next"']
        headers = {"Link": ", ".join(links[: 2 if len(rows) > page * size else 1])}
        return 200, rows[(page - 1) * size : page * size], headers

    def handle(self, request: Request) -> Reply:
        if request.path == f"{self.base}/issues":
            wanted = request.query.get("iids[]", list(self.records))
            return self.page(request, [self.show(r) for r in self.records.values() if r.id in wanted], 2)
        match = re.fullmatch(rf"{self.base}/issues/(\d+)(/resource_weight_events)?", request.path)
        if not match or match[1] not in self.records:
            return 404, {"message": "404 Not found"}, {}
        record = self.records[match[1]]
        if match[2]:
            rows = [
                {"id": n, "user": {"id": 1, "username": actor}, "created_at": iso(at, "milliseconds"), "weight": new}
                for n, (at, actor, _, new) in enumerate(record.changes)
            ]
            return self.page(request, rows, 20)
        if request.method == "PUT":
            self.somebody(match[1])
            self.write(match[1], request.body["weight"], self.own)
        return 200, self.show(record), {}


class Scripted(Api):
    """Answers whatever a test's function says; no token is asked for."""

    def __init__(self, script: Callable[[Request], Reply]) -> None:
        super().__init__({})
        self.script = script

    def allowed(self, request: Request) -> bool:
        return True

    def handle(self, request: Request) -> Reply:
        return self.script(request)


@contextlib.contextmanager
def talking(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server below HTTP: ``talk`` gets each connection once its request's head is read, and writes what it likes."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    over = threading.Event()
    threads: list[threading.Thread] = []

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5)
            head = b""
            while b"\r\n\r\n" not in head:
                piece = connection.recv(65536)
                if not piece:
                    return
                head += piece
            talk(connection)

    def accept() -> None:
        while not over.is_set():
            with contextlib.suppress(TimeoutError):
                thread = threading.Thread(target=one, args=(listener.accept()[0],), daemon=True)
                thread.start()
                threads.append(thread)

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        acceptor.join(2)
        listener.close()
