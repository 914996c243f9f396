"""A judge on the loopback for benchmarks: an OpenAI-compatible server that answers after a fixed time, or fails.

    python jobs/bench/judge.py --latency-s 0.05
    python jobs/bench/judge.py --in-front-of http://127.0.0.1:8000    # a proxy that misbehaves, before a real judge

It prints its address, and serves until its standard input is closed. Answers are a function of the question. It keeps
when each question came and how often; `GET /seen` returns that. `POST /plan` with {"die_after": n, "way": WAY} makes it
fail from the n-th question on, in one of the `WAYS`; {} makes it well.
"""

import argparse
import asyncio
import hashlib
import json
import random
import sys
import time
from collections import Counter

import uvloop
from aiohttp import ClientSession, web

WAYS: dict[str, tuple[int, str, str]] = {
    "401": (401, "application/json", '{"error": {"message": "Incorrect API key provided"}}'),
    "402": (402, "application/json", '{"error": {"message": "can only afford 20 tokens"}}'),
    "403": (403, "text/html", "<html>Forbidden</html>"),
    "404": (404, "application/json", '{"error": {"message": "The model does not exist", "code": "model_not_found"}}'),
    "no credit": (429, "application/json", '{"error": {"message": "quota", "code": "insufficient_quota"}}'),
    "html": (200, "text/html", "<!doctype html><title>Gateway</title>"),
    "streams": (200, "text/event-stream", 'data: {"choices": []}\n\ndata: [DONE]\n\n'),
    "unreadable": (200, "application/json", json.dumps({"choices": [{"message": {"content": "I cannot say."}}]})),
}
"""Status, content type and body of a judge that fails."""


class Proxy:
    """Passes questions on to a judge, and misbehaves as gateways do: drawn by the number of the question."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.num_seen = 0
        self.happened: Counter[str] = Counter()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.num_seen += 1
        outcomes = ("passed on", "502", "429", "slow", "bare")
        what = random.Random(self.num_seen).choices(outcomes, weights=(60, 10, 10, 10, 10))[0]
        self.happened[what] += 1
        if what == "502":
            return web.Response(status=502, content_type="text/html", text="<html>Bad gateway</html>")
        if what == "429":
            slow_down = '{"error": {"message": "slow down"}}'
            return web.Response(status=429, headers={"retry-after-ms": "50"}, text=slow_down)
        if what == "slow":
            await asyncio.sleep(2.0)
        async with (
            ClientSession() as session,
            session.post(f"{self.url}/v1/chat/completions", json=await request.json()) as answer,
        ):
            body, status = await answer.json(), answer.status
        if what == "bare" and status == 200:  # no usage, and the text in parts
            body.pop("usage", None)
            for choice in body["choices"]:
                choice["message"]["content"] = [{"type": "text", "text": choice["message"]["content"]}]
        return web.json_response(body, status=status)

    async def seen(self, request: web.Request) -> web.Response:
        return web.json_response({"num_asked": self.num_seen, "happened": self.happened})


class Judge:
    """State of the server."""

    def __init__(self, latency_s: float) -> None:
        self.latency_s = latency_s
        self.die_after: int | None = None
        self.way = ""
        self.num_seen = 0
        self.times: list[float] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()

    async def complete(self, request: web.Request) -> web.Response:
        payload = await request.json()
        digest = hashlib.sha256(payload["messages"][0]["content"].encode()).hexdigest()
        self.num_seen += 1
        self.times.append(time.time())
        self.asked[digest] += 1
        is_dead = self.die_after is not None and self.num_seen > self.die_after
        await asyncio.sleep(self.latency_s)
        if is_dead:
            status, content_type, body = WAYS[self.way]
            return web.Response(status=status, content_type=content_type, text=body)
        self.answered[digest] += 1
        text = f"It says so.\nScore: {int(digest, 16) % 6}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": 8}})

    async def plan(self, request: web.Request) -> web.Response:
        plan = await request.json()
        self.num_seen = 0
        self.die_after, self.way = plan.get("die_after"), plan.get("way", "")
        return web.json_response({})

    async def seen(self, request: web.Request) -> web.Response:
        num_repeated = sum(num - 1 for num in self.answered.values())
        seen = {"num_asked": sum(self.asked.values()), "num_answered_again": num_repeated, "times": self.times}
        return web.json_response(seen)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "judge"}]})


def judge_app(latency_s: float) -> web.Application:
    """Make the judge's routes."""
    judge = Judge(latency_s)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", judge.complete)
    app.router.add_get("/v1/models", judge.models)
    app.router.add_post("/plan", judge.plan)
    app.router.add_get("/seen", judge.seen)
    return app


def proxy_app(url: str) -> web.Application:
    """Make the proxy's routes. It has no list of models, as many gateways have none."""
    proxy = Proxy(url)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", proxy.complete)
    app.router.add_get("/seen", proxy.seen)
    return app


async def serve(app: web.Application) -> None:
    """Serve until standard input is closed."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    host, port = runner.addresses[0]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-s", type=float, default=0.05)
    parser.add_argument("--in-front-of", metavar="URL")
    options = parser.parse_args()
    uvloop.run(serve(proxy_app(options.in_front_of) if options.in_front_of else judge_app(options.latency_s)))
