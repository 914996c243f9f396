"""Measure the cost and the losses of the oracle pool, against a judge on the loopback (`jobs/bench/judge.py`).

    python jobs/bench/oracle.py                        # all tables; about 6 minutes on two cores
    python jobs/bench/oracle.py --tables deaths kills

throughput: questions per second of a judge that takes 50 ms or 1 s, as a share of calls at once / the judge's time;
    beside it what a bare HTTP client reaches that asks the same judge and keeps nothing.
rate: requests per minute under oracle.requests_per_minute, as a share of it, and the most in any minute.
ledger: seconds of a judgement's two writes and of the opening, in a ledger of 10,000 judgements.
deaths: a judge that dies after some answers in each of eight ways, and is well again behind another key and limit.
real: vLLM's own OpenAI server with the quickstart's evaluator (after `make quickstart`), directly and behind a proxy
    that misbehaves.
kills: the pool's process is killed at random moments while it asks 1,000 questions, until they are answered.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from hardware import hardware

from rayrl.config import HttpOracleConfig, RubricConfig
from rayrl.errors import JudgeFailed
from rayrl.models.judge_prompt import load_rubric, oracle_prompt
from rayrl.oracles.ledger import Ledger
from rayrl.oracles.pool import OraclePool
from rayrl.oracles.protocol import Verdict
from rayrl.records import Judgement

BUILT_IN = RubricConfig()
EVALUATOR = "runs/quickstart/stages/fit_evaluator/checkpoint"
"""The quickstart's evaluator, which writes a score and its reasons after "Score:"."""
LATENCY_S = 0.05
WAYS = ("401", "402", "403", "404", "no credit", "html", "streams", "unreadable")
KILLED_LATENCY_S = 0.25
"""Long enough that the questions last for all kills."""
NUM_DEATHS = 60
"""Questions of a run whose judge dies."""


@contextlib.contextmanager
def judge(latency_s: float = LATENCY_S, in_front_of: str | None = None) -> Iterator[str]:
    """Start a judge, or a proxy before another one, in a process of its own; its address."""
    command = [sys.executable, str(Path(__file__).with_name("judge.py")), "--latency-s", str(latency_s)]
    command += ["--in-front-of", in_front_of] if in_front_of else []
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(30)


def call(url: str, path: str, body: object | None = None) -> Any:
    """Ask the judge for what it has seen, or change its plan."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=30) as answer:
        return json.loads(answer.read())


def config_of(url: str, **settings: Any) -> HttpOracleConfig:
    judge = {"base_url": f"{url}/v1", "model": "judge", "api_key_env": "none"}
    return HttpOracleConfig.model_validate(judge | settings)


def questions(num: int, what: str) -> list[Judgement]:
    return [
        Judgement(prompt_id=f"p{i}", response_id=f"p{i}-0", prompt=f"Tell of {what} {i}.", response="A story. " * 20)
        for i in range(num)
    ]


async def ask(
    config: HttpOracleConfig, folder: str, asked: list[Judgement], budget: int, rubric: RubricConfig = BUILT_IN
) -> tuple[list[Judgement], float]:
    """Ask in a pool of its own; the answers, and the seconds they took."""
    pool = OraclePool(config, load_rubric(rubric), f"{folder}/ledger.sqlite", {"label": budget})
    try:
        started = time.perf_counter()
        answers = await pool.judge(asked, "label", "query")
        return answers, time.perf_counter() - started
    finally:
        pool.close()


async def ask_bare(url: str, texts: list[str], num_at_once: int) -> float:
    """Ask with a bare HTTP client, the ceiling of what the pool can reach on this machine; the seconds it took."""
    left = iter(texts)

    async def ask_on() -> None:
        for text in left:
            message = {"role": "user", "content": text}
            payload = {"model": "judge", "messages": [message], "temperature": 0.0, "max_tokens": 512}
            async with client.post(f"{url}/v1/chat/completions", json=payload) as answer:
                await answer.json()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(num_at_once)))
        return time.perf_counter() - started


def throughput() -> None:
    print(
        "\n| judge's time | calls at once | questions/s | of calls at once / judge's time | a bare client's share "
        "| pool / bare |\n|---|---|---|---|---|---|"
    )
    rubric = load_rubric(BUILT_IN)
    for latency_s in (LATENCY_S, 1.0):
        for num_calls in (16, 64, 256):
            rates: list[float] = []
            bare_rates: list[float] = []
            for repeat in range(3):
                asked = questions((40 if latency_s < 1 else 6) * num_calls, f"{num_calls}-{repeat}")
                texts = [oracle_prompt(rubric, question.prompt, question.response) for question in asked]
                # The event loop that Ray gives to an actor such as the pool.
                with (
                    judge(latency_s) as url,
                    tempfile.TemporaryDirectory() as folder,
                    asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop,
                ):
                    bare_rates.append(len(asked) / loop.run(ask_bare(url, texts, num_calls)))
                    _, seconds = loop.run(ask(config_of(url, max_concurrency=num_calls), folder, asked, len(asked)))
                rates.append(len(asked) / seconds)
            rate, bare = sorted(rates)[1], sorted(bare_rates)[1]
            most = num_calls / latency_s
            print(
                f"| {1000 * latency_s:.0f} ms | {num_calls} | {rate:.0f} | {rate / most:.2f} | {bare / most:.2f} | "
                f"{rate / bare:.2f} |",
                flush=True,
            )


def rate() -> None:
    print("\n| allowed a minute | asked a minute | share | most in any 60 s |\n|---|---|---|---|")
    allowed, seconds = 600, 90
    with judge() as url, tempfile.TemporaryDirectory() as folder:
        asked = questions(allowed * seconds // 60, "limits")
        asyncio.run(ask(config_of(url, requests_per_minute=allowed), folder, asked, len(asked)))
        times = call(url, "/seen")["times"]
    per_minute = 60 * (len(times) - 1) / (times[-1] - times[0])
    most = max(sum(start <= at < start + 60 for at in times) for start in times)
    print(f"| {allowed} | {per_minute:.0f} | {per_minute / allowed:.3f} | {most} |", flush=True)


def ledger() -> None:
    num = 10_000
    with tempfile.TemporaryDirectory() as folder:
        location = f"{folder}/ledger.sqlite"
        book = Ledger(location, {"label": 3 * num})
        verdict = Verdict(score=3.0, rationale="It says so. " * 20, cost_usd=0.001, input_tokens=300, output_tokens=20)

        async def pay(question: Judgement) -> None:
            reserved = book.reserve(question, 0.01, stage="query")
            await book.sync()
            book.commit(reserved, verdict)  # type: ignore[arg-type]
            await book.sync()

        async def pay_all(asked: list[Judgement], num_at_once: int) -> float:
            started = time.perf_counter()
            for start in range(0, len(asked), num_at_once):
                await asyncio.gather(*(pay(question) for question in asked[start : start + num_at_once]))
            return (time.perf_counter() - started) / len(asked)

        keyed = [
            Judgement(key=f"{i}", prompt_id="p", response_id="r", prompt="x" * 400, response="y" * 800, purpose="label")
            for i in range(num + 2000)
        ]
        asyncio.run(pay_all(keyed[:num], 256))
        alone = asyncio.run(pay_all(keyed[num : num + 1000], 1))
        together = asyncio.run(pay_all(keyed[num + 1000 :], 16))
        book.close()
        started = time.perf_counter()
        Ledger(location, {"label": num}).close()
        opening = time.perf_counter() - started
        megabytes = os.path.getsize(location) / 1e6
    print("\n| judgements | MB | ms per judgement, one at a time | 16 at once | opening, s |\n|---|---|---|---|---|")
    print(f"| {num:,} | {megabytes:.1f} | {1000 * alone:.2f} | {1000 * together:.2f} | {opening:.2f} |", flush=True)


def deaths() -> None:
    num_at_once, num_well = 16, 24
    print(
        "\n| way | asked after its death | beyond those in flight | stopped with | same answers | answered twice |\n"
        "|---|---|---|---|---|---|"
    )
    for way in WAYS:
        with judge(0.01) as url, tempfile.TemporaryDirectory() as folder:
            asked = questions(NUM_DEATHS, way)
            with tempfile.TemporaryDirectory() as other:
                undisturbed, _ = asyncio.run(ask(config_of(url), other, asked, NUM_DEATHS))
            call(url, "/plan", {"die_after": num_well, "way": way})
            num_before = call(url, "/seen")["num_asked"]
            try:
                asyncio.run(ask(config_of(url, max_concurrency=num_at_once), folder, asked, 2 * NUM_DEATHS))
                stopped = "nothing"
            except JudgeFailed:
                stopped = "JudgeFailed"
            num_dead = call(url, "/seen")["num_asked"] - num_before - num_well
            call(url, "/plan", {})
            well = config_of(url, max_concurrency=4, requests_per_minute=60_000, timeout_s=60.0)
            answers, _ = asyncio.run(ask(well, folder, asked, 2 * NUM_DEATHS))
            same = [a.score for a in answers] == [a.score for a in undisturbed]
            # Every question was answered once in the undisturbed run, too.
            num_twice = call(url, "/seen")["num_answered_again"] - NUM_DEATHS
        print(
            f"| {way} | {num_dead} | {max(0, num_dead - num_at_once)} | {stopped} | {same} | {num_twice} |", flush=True
        )


ASKED = """
import asyncio, json, logging, sys
sys.path.insert(0, sys.argv[1])
from oracle import ask, config_of, questions
logging.disable()
asyncio.run(ask(config_of(sys.argv[2], max_concurrency=16), sys.argv[3], questions(1000, "kills"), 2000))
"""


def kills() -> None:
    num_kills, draw = 20, random.Random(0)
    with judge(KILLED_LATENCY_S) as url, tempfile.TemporaryDirectory() as folder:
        num_killed = 0
        while True:
            process = subprocess.Popen([sys.executable, "-c", ASKED, str(Path(__file__).parent), url, folder])
            try:
                process.wait(draw.uniform(1.5, 2.2) if num_killed < num_kills else 300)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait(30)
                num_killed += 1
        seen = call(url, "/seen")
        with contextlib.closing(sqlite3.connect(f"{folder}/ledger.sqlite")) as db:
            states = dict(db.execute("SELECT state, count(*) FROM attempts GROUP BY state"))
            num_keys = db.execute("SELECT count(DISTINCT key) FROM attempts WHERE state = 'scored'").fetchone()[0]
    print(
        "\n| kills | questions | answered | kept twice | lost, counted | in flight at most | asked of the judge |\n"
        "|---|---|---|---|---|---|---|"
    )
    num_scored, num_lost = states.get("scored", 0), states.get("lost", 0)
    print(
        f"| {num_killed} | 1,000 | {num_keys} | {num_scored - num_keys} | {num_lost} | {16 * num_killed} | "
        f"{seen['num_asked']} |",
        flush=True,
    )


CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@contextlib.contextmanager
def vllm_server() -> Iterator[str]:
    """Start vLLM's OpenAI server with the quickstart's evaluator on a free port; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", EVALUATOR]
    command += ["--served-model-name", "judge", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--chat-template", CHAT_TEMPLATE]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"vLLM's server did not start within 300 s:\n{log.read()[-3000:].decode()}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def real() -> None:
    if not Path(EVALUATOR).is_dir():
        raise SystemExit(f"{EVALUATOR} is not there: run `make quickstart` first")
    num = 100
    asked = questions(num, "hares")
    print("\n| judge | asked | answered | abstained | calls | the commonest reason |\n|---|---|---|---|---|---|")
    with vllm_server() as direct, judge(in_front_of=direct) as proxy, tempfile.TemporaryDirectory() as folder:
        template = Path(folder, "judge.txt")
        template.write_text(Path("jobs/quickstart/judge.txt").read_text() + "\nScore:")
        rubric = RubricConfig(template=str(template), pattern=r"\A\s*([0-5])\b")
        for name, url in (("vLLM's server", direct), ("behind the proxy", proxy)):
            limits = {"max_tokens": 200, "max_concurrency": 8, "max_retries": 8, "max_unreadable": num}
            ledger_folder = f"{folder}/{name}"
            asyncio.run(ask(config_of(url, **limits), ledger_folder, asked, num, rubric))
            with contextlib.closing(Ledger(f"{ledger_folder}/ledger.sqlite", {"label": num})) as book:
                found = book.summary()["label"]
            num_calls = call(proxy, "/seen")["num_asked"] if url == proxy else num
            reason = next(iter(found.abstentions), "-")
            print(
                f"| {name} | {found.spent} | {found.scored} | {found.abstained} | {num_calls} | {reason} |", flush=True
            )
        print(f"\nThe proxy: {call(proxy, '/seen')['happened']}")


TABLES = {"throughput": throughput, "rate": rate, "ledger": ledger, "deaths": deaths, "kills": kills, "real": real}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    logging.disable()
    print(hardware())
    for name in options.tables:
        TABLES[name]()
