"""The oracle's HTTP client against servers and proxies that answer in bytes of a test's own."""

import asyncio
import gzip
import json
import socketserver
import threading

import pytest

from rayrl.config import HttpOracleConfig, RubricConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.http import HttpOracle

RUBRIC = load_rubric(RubricConfig())
COMPLETION = json.dumps({"choices": [{"message": {"content": "It says caf\u00e9.\nScore: 3"}}]}, ensure_ascii=False)


class RawServer(socketserver.ThreadingTCPServer):
    """Answers each request with the next reply; the last one from then on. An empty one closes the connection."""

    daemon_threads = True

    def __init__(self, *replies: bytes, close: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies, self.close_after = list(replies), close
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.port = self.server_address[1]

    def __enter__(self) -> "RawServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(socketserver.StreamRequestHandler):
    server: RawServer

    def handle(self) -> None:
        self.server.num_connections += 1
        while head := self._head():
            length = [int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-le")]
            self.rfile.read(sum(length))
            self.server.requests.append(head)
            raw = self.server.replies[min(len(self.server.requests), len(self.server.replies)) - 1]
            self.wfile.write(raw)
            if self.server.close_after or not raw:
                return

    def _head(self) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self.rfile.readline()
            if not line:
                return b""
            head += line
        return head


def reply(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def oracle_at(url, **settings):
    defaults = {"base_url": url, "model": "m", "api_key_env": "none", "timeout_s": 10, "max_retries": 0}
    return HttpOracle(HttpOracleConfig(**(defaults | settings)), RUBRIC)


def asked(*replies, num=1, close=False, wait_s=0.0):
    """Ask `num` times in one event loop: the verdicts, and how many connections were made."""

    async def ask(oracle):
        verdicts = []
        for _ in range(num):
            verdicts.append(await oracle.judge("p", "r"))
            await asyncio.sleep(wait_s)
        return verdicts

    with RawServer(*replies, close=close) as server:
        return asyncio.run(ask(oracle_at(f"http://127.0.0.1:{server.port}/v1"))), server.num_connections


@pytest.mark.parametrize(
    ("body", "headers", "rationale"),
    [
        (COMPLETION.encode(), [], "It says caf\u00e9."),
        (gzip.compress(COMPLETION.encode()), ["Content-Encoding: gzip"], "It says caf\u00e9."),
        (COMPLETION.encode("latin-1"), ["Content-Type: application/json; charset=latin-1"], "It says caf\u00e9."),
        (COMPLETION.encode("latin-1"), [], "It says caf\ufffd."),
        (COMPLETION.encode(), ["Content-Type: application/json; charset=klingon"], "It says caf\u00e9."),
        (COMPLETION.encode(), ["Content-Type: application/json; charset=base64"], "It says caf\u00e9."),
        (COMPLETION.encode(), [f"X-Policy: {'x' * 30_000}"], "It says caf\u00e9."),
    ],
)
def test_answers_are_decoded_leniently(body, headers, rationale):
    (verdict,), _ = asked(reply(body, *headers))
    assert (verdict.score, verdict.rationale) == (3.0, rationale)


@pytest.mark.parametrize(
    "raw", [b"garbage\r\n\r\n", reply(b"no gzip", "Content-Encoding: gzip"), b"HTTP/1.1 200 OK\r\n"]
)
def test_an_answer_that_is_no_http_counts_as_paid(raw):
    (verdict,), _ = asked(raw, close=True)
    assert verdict.score is None and verdict.billed and "connection lost" in verdict.rationale


def test_a_connection_is_kept_and_one_that_the_server_has_closed_is_not_used():
    verdicts, num_connections = asked(reply(COMPLETION.encode()), num=3)
    assert [verdict.score for verdict in verdicts] == [3.0] * 3 and num_connections == 1
    verdicts, num_connections = asked(reply(COMPLETION.encode()), num=3, close=True, wait_s=0.2)
    assert [verdict.score for verdict in verdicts] == [3.0] * 3 and num_connections == 3


def test_a_kept_connection_that_is_dropped_without_an_answer_counts_as_paid():
    # The second reply is empty, and ends the connection.
    (first, second), num_connections = asked(reply(COMPLETION.encode()), b"", num=2)
    assert num_connections == 1 and first.score == 3.0
    assert second.score is None and second.billed and "connection lost" in second.rationale


def test_a_proxy_gets_its_password_and_no_message_shows_it(monkeypatch):
    refusal = b"HTTP/1.1 407 No, hunter3\r\nContent-Length: 0\r\n\r\n"
    with RawServer(reply(COMPLETION.encode())) as proxy, RawServer(refusal) as refusing:
        monkeypatch.setenv("http_proxy", f"http://me:hunter2@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("https_proxy", f"http://me:hunter2@127.0.0.1:{refusing.port}")
        assert asyncio.run(oracle_at("http://judge.invalid/v1").judge("p", "r")).score == 3.0
        verdict = asyncio.run(oracle_at("https://judge.invalid/v1").judge("p", "r"))
    (request,) = proxy.requests
    assert request.startswith(b"POST http://judge.invalid/v1/chat/completions ")
    assert b"Proxy-Authorization: Basic bWU6aHVudGVyMg==" in request
    assert refusing.requests[0].startswith(b"CONNECT judge.invalid:443 ")
    assert not verdict.billed and "No, hunter3" in verdict.failure and "hunter2" not in verdict.failure


@pytest.mark.parametrize("proxy", ["ftp://proxy:21", "http://", "http://proxy:port", "socks4://proxy:1080"])
def test_an_unusable_proxy_is_refused(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(ConfigError, match="no usable address: correct HTTP_PROXY"):
        oracle_at("http://judge.invalid/v1")


@pytest.mark.parametrize("url", ["http://a..b/v1", f"http://{'a' * 70}.com/v1"])
def test_a_host_that_nothing_can_look_up_is_refused(url):
    with pytest.raises(ConfigError, match="no usable address"):
        oracle_at(url)


def test_the_check_works_where_an_event_loop_is_running():
    async def check(oracle):
        oracle.check()

    with RawServer(reply(b'{"data": []}')) as server:
        asyncio.run(check(oracle_at(f"http://127.0.0.1:{server.port}/v1")))
        assert server.requests[0].startswith(b"GET /v1/models ")
