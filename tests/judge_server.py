"""HTTP server on the loopback that speaks the chat completions protocol, and fails as a test plans it."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the server does with one request."""

    text: str | list | None = "It answers the question.\nScore: 3"
    """Content of the message; or the message of an error, if the status is one."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    """Sent instead of a chat completion."""
    usage: tuple[int, int] | dict | None = (100, 20)
    finish: str | None = "stop"
    message: dict = field(default_factory=dict)
    """More fields of the message."""
    wait: bool = False
    """Hold the answer until the server's `gate` opens."""
    drip: bool = False
    """Send a byte every 50 ms."""
    drop: bool = False
    """Close the connection without an answer."""


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 drops connections when many callers start at once


class JudgeServer:
    """Context manager. `plan(index, question)` says how the index-th chat request is answered."""

    def __init__(self, plan: Callable[[int, str], Reply] = lambda index, question: Reply()) -> None:
        self.plan = plan
        self.questions: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.payloads: list[dict] = []
        self.paths: list[str] = []
        """Of chat requests, with their queries."""
        self.models = Reply(body='{"data": []}')
        self.gate = threading.Event()
        self.num_active = self.max_active = 0
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", 0), _handler(self))
        self.root = f"http://127.0.0.1:{self._http.server_port}"
        self.url = f"{self.root}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._http.shutdown()
        self._http.server_close()

    @property
    def num_asked(self) -> int:
        """Chat requests received."""
        return len(self.questions)

    def responses(self) -> list[str]:
        """What was judged, request by request."""
        return [re.findall(r"<response>\n(.*?)\n</response>", q, re.DOTALL)[-1] for q in self.questions]

    def wait_for(self, num_asked: int) -> None:
        """Block until so many chat requests have come."""
        deadline = time.monotonic() + 60
        while self.num_asked < num_asked:
            assert time.monotonic() < deadline, f"{self.num_asked} of {num_asked} requests came"
            time.sleep(0.01)

    def receive(self, path: str, payload: dict, headers: dict[str, str]) -> Reply:
        with self._lock:
            index, question = len(self.questions), payload["messages"][0]["content"]
            self.times.append(time.monotonic())
            self.paths.append(path)
            self.headers.append(headers)
            self.payloads.append(payload)
            self.questions.append(question)
            self.num_active += 1
            self.max_active = max(self.max_active, self.num_active)
        reply = self.plan(index, question)
        if reply.wait:
            self.gate.wait(60)
        with self._lock:
            self.num_active -= 1
        return reply


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(server.models)

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = server.receive(self.path, payload, {name.lower(): value for name, value in self.headers.items()})
            if reply.drop:
                self.close_connection = True
                return
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            body = (reply.body if reply.body is not None else _completion(reply)).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                # A connection per answer: a test asks from an event loop of its own, and must leave nothing open in it.
                self.send_header("Connection", "close")
                self.end_headers()
                for piece in (bytes([byte]) for byte in body) if reply.drip else (body,):
                    self.wfile.write(piece)
                    time.sleep(0.05 if reply.drip else 0)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _completion(reply: Reply) -> str:
    if reply.status >= 400:
        return json.dumps({"error": {"message": reply.text}})
    message = {"role": "assistant", "content": reply.text, **reply.message}
    completion: dict = {"choices": [{"index": 0, "message": message, "finish_reason": reply.finish}]}
    if isinstance(reply.usage, dict):
        completion["usage"] = reply.usage
    elif reply.usage is not None:
        completion["usage"] = {"prompt_tokens": reply.usage[0], "completion_tokens": reply.usage[1]}
    return json.dumps(completion)
