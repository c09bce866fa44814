"""A provider of batches on loopback that speaks OpenAI's and Anthropic's documented formats.

Requests are checked as the providers check them: a wrong header, field, custom id or file makes the
job or the call fail. What goes wrong on purpose is told by `Faults` and, for single requests, by a
word in their text: `fate=NAME`.
"""

import json
import re
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "sk-loopback-0123456789"
ENDPOINT = "/v1/chat/completions"
CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
USAGE = {"prompt_tokens": 1000, "completion_tokens": 50, "cached_tokens": 200}


@dataclass
class Faults:
    """What goes wrong. A deque gives one fault a call, in order, and none when it is empty."""

    create: deque[str] = field(default_factory=deque)
    """accept-and-drop: the job is made, the connection ends without an answer. drop: no job is
    made. accept-and-hang, hang: the same, but nothing ends. fail:CODE: the job is made and
    fails validation. HTTP codes as text: that answer, no job."""
    poll: deque[str] = field(default_factory=deque)
    """HTTP codes as text, or drop."""
    results: deque[str] = field(default_factory=deque)
    """cut: the connection ends in the middle. hang: it stands still in the middle."""
    end: str = "completed"
    """How jobs end: completed, expired, cancelled (half of the requests have no result), never."""
    polls_until_end: int = 1
    """How often a job is in progress when it is looked at."""
    late_lists: int = 0
    """How many lists of jobs come too early to show any."""
    jobs_before_end: int = 1
    """How many jobs must have been made before one ends."""
    max_body_bytes: int = 1 << 30


@dataclass
class Job:
    """A batch."""

    id: str
    requests: dict[str, dict[str, Any]]
    """Custom id -> the body of the request."""
    created: float
    metadata: dict[str, str] | None = None
    fails: str | None = None
    """Code of the error that it fails with."""
    polls: int = 0
    ended: str | None = None
    cancelling: bool = False


class BatchServer:
    """The server; use as a context manager."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.jobs: dict[str, Job] = {}
        self.files: dict[str, bytes] = {}
        self.accepted: Counter[str] = Counter()
        """How often each custom id was accepted in a job that did not fail."""
        self.calls: Counter[str] = Counter()
        self.most_in_flight = 0
        self.hanging = threading.Event()
        """Set while a call hangs."""
        self._lock = threading.RLock()
        self._closing = threading.Event()
        server = self

        class Handler(_Handler):
            owner = server

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))

    def __enter__(self) -> "BatchServer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        assert not self._http.errors, self._http.errors

    def hang(self) -> None:
        """Stand still until the server closes."""
        self.hanging.set()
        self._closing.wait()
        self.hanging.clear()

    def make(self, requests: dict[str, dict[str, Any]], **fields: Any) -> Job:
        """Accept a job."""
        with self._lock:
            job = Job(f"batch_{len(self.jobs):04d}", requests, time.time(), **fields)
            self.jobs[job.id] = job
            if not job.fails:
                self.accepted.update(requests.keys())
            in_flight = sum(each.ended is None for each in self.jobs.values())
            self.most_in_flight = max(self.most_in_flight, in_flight)
            return job

    def fault(self, faults: deque[str]) -> str:
        with self._lock:
            return faults.popleft() if faults else ""

    def look(self, job: Job) -> None:
        """Count a look at a job and let it go on."""
        with self._lock:
            job.polls += 1
            if job.cancelling:
                job.ended = "cancelled"
            elif job.ended is None and (
                job.polls > self.faults.polls_until_end
                and len(self.jobs) >= self.faults.jobs_before_end
            ):
                if job.fails:
                    job.ended = "failed"
                elif self.faults.end != "never":
                    job.ended = self.faults.end

    def results(self, job: Job) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield (custom id, fate, body) of a job's requests, in another order than they came."""
        for number, (custom_id, body) in enumerate(reversed(job.requests.items())):
            cut_off = job.ended in ("expired", "cancelled") and number % 2
            yield custom_id, str(job.ended) if cut_off else fate_of(body), body


def fate_of(body: dict[str, Any]) -> str:
    match = re.search(r"fate=([\w-]+)", text_of(body))
    return match[1] if match else "good"


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def answer_to(body: dict[str, Any], fate: str) -> str:
    """Return the text of an answer: every step is harmful."""
    if fate == "nonsense":
        return "I think that most steps are fine."
    steps = re.search(r"steps=([\d,]+)", text_of(body))
    asked = re.search(r"Label the steps (\d+) to (\d+)[.,]", text_of(body))
    assert steps or asked, body
    names = steps[1].split(",") if steps else map(str, range(int(asked[1]), int(asked[2]) + 1))
    # U+2028 is a line's end to some readers of text, not to JSON lines.
    labels = {step: {"rationale": "it\u2028breaks", "label": "harmful"} for step in names}
    return json.dumps({"labels": labels}, ensure_ascii=False)


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors: list[BaseException] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error and not isinstance(error, ConnectionError):  # a killed client is no error
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet, or the client waits 40 ms for the second
    owner: BatchServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def _route(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            raise ConnectionError("the client died in the middle of its request")
        path = urlsplit(self.path).path
        openai = not path.startswith("/v1/messages")
        given = self.headers.get("Authorization")
        if given != f"Bearer {KEY}":  # anthropic 2 sends it so, too
            return self._error(401, f"Incorrect API key provided: {given}")
        if not openai and not self.headers.get("anthropic-version"):
            return self._error(400, "anthropic-version: header is required")
        if len(self.body) > self.owner.faults.max_body_bytes:
            return self._error(413, "Request exceeds the maximum size")
        for verb, pattern, call in _ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                self.owner.calls[call.__name__] += 1
                return call(self, *match.groups())
        return self._error(404, f"Not found: {method} {path}")

    # ---------------------------------------------------------------- OpenAI

    def openai_upload(self) -> None:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        parts = {}
        for piece in self.body.split(b"--" + boundary[1].encode())[1:-1]:
            head, _, content = piece[2:-2].partition(b"\r\n\r\n")
            name = re.search(rb'name="(\w+)"', head)
            assert name
            parts[name[1].decode()] = content
        if parts.get("purpose") != b"batch" or "file" not in parts:
            return self._error(400, "expected a file with the purpose batch")
        name = f"file-{len(self.owner.files):04d}"
        self.owner.files[name] = parts["file"]
        return self._json(
            {
                "id": name,
                "object": "file",
                "bytes": len(parts["file"]),
                "created_at": int(time.time()),
                "filename": f"{name}.jsonl",
                "purpose": "batch",
                "status": "processed",
            }
        )

    def openai_create(self) -> None:
        given = json.loads(self.body)
        content = self.owner.files.get(given.get("input_file_id"))
        if content is None:
            return self._error(400, "No such file")
        if given.get("endpoint") != ENDPOINT or given.get("completion_window") != "24h":
            return self._error(400, "expected an endpoint and a completion window of 24h")
        requests, wrong = {}, None
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            entry = json.loads(line)
            if entry["custom_id"] in requests:
                wrong = "duplicate_custom_id"
            if entry["method"] != "POST" or entry["url"] != ENDPOINT:
                wrong = "mismatched_url"
            if not {"model", "messages"} <= entry["body"].keys():
                wrong = f"invalid_request_line_{number}"
            requests[entry["custom_id"]] = entry["body"]
        return self._create(
            lambda code: self.owner.make(requests, metadata=given["metadata"], fails=code or wrong),
            self._openai_batch,
        )

    def openai_retrieve(self, job_id: str) -> None:
        self._retrieve(job_id, self._openai_batch)

    def openai_list(self) -> None:
        jobs, more = self._page("after")
        self._json(
            {"object": "list", "data": [self._openai_batch(job) for job in jobs], "has_more": more}
        )

    def openai_cancel(self, job_id: str) -> None:
        self._cancel(job_id, self._openai_batch)

    def openai_content(self, kind: str, job_id: str) -> None:
        lines = []
        for custom_id, fate, body in self.owner.results(self.owner.jobs[job_id]):
            entry = _openai_result(custom_id, fate, body)
            response = entry["response"]
            if (kind == "output") == bool(response and response["status_code"] == 200):
                lines.append(json.dumps(entry, ensure_ascii=False).encode())
        self._lines(lines)

    def _openai_batch(self, job: Job) -> dict[str, Any]:
        status = job.ended or ("cancelling" if job.cancelling else "in_progress")
        if not job.ended and job.polls < 1:
            status = "validating"
        has_files = job.ended in ("completed", "expired", "cancelled")
        errors = [{"code": job.fails, "message": "said the server", "line": 1, "param": None}]
        return {
            "id": job.id,
            "object": "batch",
            "endpoint": ENDPOINT,
            "errors": {"object": "list", "data": errors} if job.ended == "failed" else None,
            "input_file_id": "file-0000",
            "completion_window": "24h",
            "status": status,
            "output_file_id": f"output-{job.id}" if has_files else None,
            "error_file_id": f"error-{job.id}" if has_files else None,
            "created_at": int(job.created),
            "request_counts": {"total": len(job.requests), "completed": 0, "failed": 0},
            "metadata": job.metadata,
        }

    # ------------------------------------------------------------- Anthropic

    def anthropic_create(self) -> None:
        given = json.loads(self.body)
        requests = {}
        for entry in given["requests"]:
            if not CUSTOM_ID.fullmatch(entry["custom_id"]) or entry["custom_id"] in requests:
                return self._error(400, "requests: custom_id must be unique, and match a pattern")
            if not {"model", "max_tokens", "messages"} <= entry["params"].keys():
                return self._error(400, "requests.0.params: field required")
            requests[entry["custom_id"]] = entry["params"]
        return self._create(
            lambda code: self.owner.make(requests, fails=code), self._anthropic_batch
        )

    def anthropic_retrieve(self, job_id: str) -> None:
        self._retrieve(job_id, self._anthropic_batch)

    def anthropic_list(self) -> None:
        jobs, more = self._page("after_id")
        data = [self._anthropic_batch(job) for job in jobs]
        self._json(
            {
                "data": data,
                "has_more": more,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
            }
        )

    def anthropic_cancel(self, job_id: str) -> None:
        self._cancel(job_id, self._anthropic_batch)

    def anthropic_results(self, job_id: str) -> None:
        self._lines(
            [
                json.dumps(_anthropic_result(*result), ensure_ascii=False).encode()
                for result in self.owner.results(self.owner.jobs[job_id])
            ]
        )

    def _anthropic_batch(self, job: Job) -> dict[str, Any]:
        created = datetime.fromtimestamp(job.created, UTC)
        running = 0 if job.ended else len(job.requests)
        counts = dict.fromkeys(("succeeded", "errored", "canceled", "expired"), 0)
        counts |= {"processing": running, "succeeded": len(job.requests) - running}
        status = "canceling" if job.cancelling else "in_progress"
        url = f"{self.owner.url}/v1/messages/batches/{job.id}/results"
        return {
            "id": job.id,
            "type": "message_batch",
            "processing_status": "ended" if job.ended else status,
            "request_counts": counts,
            "created_at": created.isoformat(),
            "expires_at": (created + timedelta(hours=24)).isoformat(),
            "ended_at": created.isoformat() if job.ended else None,
            "archived_at": None,
            "cancel_initiated_at": None,
            "results_url": url if job.ended else None,
        }

    # ------------------------------------------------------------------ both

    def _create(
        self, make: Callable[[str | None], Job], shown: Callable[[Job], dict[str, Any]]
    ) -> None:
        fault = self.owner.fault(self.owner.faults.create)
        if fault == "hang":
            self.owner.hang()
        if fault in ("drop", "hang"):
            return self._drop()
        if fault.isdigit():
            return self._error(int(fault), "said the server")
        job = make(fault.removeprefix("fail:") if fault.startswith("fail:") else None)
        if fault == "accept-and-drop":
            return self._drop()
        if fault == "accept-and-hang":
            self.owner.hang()
            return self._drop()
        return self._json(shown(job))

    def _retrieve(self, job_id: str, shown: Callable[[Job], dict[str, Any]]) -> None:
        job = self.owner.jobs.get(job_id)
        if job is None:
            return self._error(404, f"No batch found with id {job_id}")
        fault = self.owner.fault(self.owner.faults.poll)
        if fault == "drop":
            return self._drop()
        if fault:
            return self._error(int(fault), "said the server")
        self.owner.look(job)
        return self._json(shown(job))

    def _cancel(self, job_id: str, shown: Callable[[Job], dict[str, Any]]) -> None:
        job = self.owner.jobs[job_id]
        job.cancelling = True
        self._json(shown(job))

    def _page(self, cursor: str) -> tuple[list[Job], bool]:
        """Return the jobs of a page of two, the newest first, and whether more follow."""
        after = parse_qs(urlsplit(self.path).query).get(cursor)
        jobs = list(reversed(self.owner.jobs.values()))
        if self.owner.faults.late_lists:
            self.owner.faults.late_lists -= 1
            jobs = []
        start = 0
        if after:
            start = 1 + next(place for place, job in enumerate(jobs) if job.id == after[0])
        for job in jobs[start : start + 2]:
            self.owner.look(job)
        return jobs[start : start + 2], start + 2 < len(jobs)

    def _lines(self, lines: list[bytes]) -> None:
        fault = self.owner.fault(self.owner.faults.results)
        content = b"".join(line + b"\n" for line in lines)
        self.send_response(200)
        self.send_header("Content-Type", "application/binary")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not fault:
            self.wfile.write(content)
            return
        half = sum(len(line) + 1 for line in lines[: len(lines) // 2])
        self.wfile.write(content[: half + 20])
        self.wfile.flush()
        if fault == "hang":
            self.owner.hang()
        self._drop()

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, message: str) -> None:
        error = {"type": "invalid_request_error", "message": message, "code": None}
        self._json({"type": "error", "error": error}, status)

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client is dead already
            self.connection.shutdown(socket.SHUT_RDWR)


_ID = r"(\w+)"
_ROUTES = (
    ("POST", "/v1/files", _Handler.openai_upload),
    ("POST", "/v1/batches", _Handler.openai_create),
    ("GET", "/v1/batches", _Handler.openai_list),
    ("GET", f"/v1/batches/{_ID}", _Handler.openai_retrieve),
    ("POST", f"/v1/batches/{_ID}/cancel", _Handler.openai_cancel),
    ("GET", f"/v1/files/(output|error)-{_ID}/content", _Handler.openai_content),
    ("POST", "/v1/messages/batches", _Handler.anthropic_create),
    ("GET", "/v1/messages/batches", _Handler.anthropic_list),
    ("GET", f"/v1/messages/batches/{_ID}", _Handler.anthropic_retrieve),
    ("POST", f"/v1/messages/batches/{_ID}/cancel", _Handler.anthropic_cancel),
    ("GET", f"/v1/messages/batches/{_ID}/results", _Handler.anthropic_results),
)


def _openai_result(custom_id: str, fate: str, body: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": "batch_req_1", "custom_id": custom_id}
    if fate in ("expired", "cancelled"):
        error = {"code": f"batch_{fate}", "message": "This request could not be executed."}
        return entry | {"response": None, "error": error}
    status = {"over-long": 400, "invalid": 400, "server-error": 500}.get(fate, 200)
    code = "context_length_exceeded" if fate == "over-long" else "invalid_value"
    content: dict[str, Any] = {
        "error": {"message": "said the server", "type": "invalid_request_error", "code": code}
    }
    if status == 200:
        refused = fate == "refusal"
        message = {
            "role": "assistant",
            "content": None if refused else answer_to(body, fate),
            "refusal": "I cannot help with that." if refused else None,
        }
        content = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": USAGE["prompt_tokens"],
                "completion_tokens": USAGE["completion_tokens"],
                "total_tokens": USAGE["prompt_tokens"] + USAGE["completion_tokens"],
                "prompt_tokens_details": {"cached_tokens": USAGE["cached_tokens"]},
            },
        }
    response = {"status_code": status, "request_id": "req_1", "body": content}
    return entry | {"response": response, "error": None}


def _anthropic_result(custom_id: str, fate: str, body: dict[str, Any]) -> dict[str, Any]:
    if fate in ("expired", "cancelled"):
        return {"custom_id": custom_id, "result": {"type": fate.replace("ll", "l")}}
    errors = {
        "over-long": ("invalid_request_error", "prompt is too long: 250000 tokens > 200000"),
        "invalid": ("invalid_request_error", "messages: field required"),
        "server-error": ("api_error", "Internal server error"),
    }
    if fate in errors:
        kind, words = errors[fate]
        error = {"type": "error", "error": {"type": kind, "message": words}, "request_id": "r"}
        return {"custom_id": custom_id, "result": {"type": "errored", "error": error}}
    refused = fate == "refusal"
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [] if refused else [{"type": "text", "text": answer_to(body, fate)}],
        "stop_reason": "refusal" if refused else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": USAGE["prompt_tokens"] - USAGE["cached_tokens"],
            "cache_read_input_tokens": USAGE["cached_tokens"],
            "cache_creation_input_tokens": 0,
            "output_tokens": USAGE["completion_tokens"],
        },
    }
    return {"custom_id": custom_id, "result": {"type": "succeeded", "message": message}}
