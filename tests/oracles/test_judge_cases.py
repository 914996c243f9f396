"""The HTTP judge against what servers, gateways, proxies and keys do in practice. Each case was reported by a user."""

import asyncio
import json
import sys

import pytest
from pydantic import ValidationError

from rayrl.config import HttpOracleConfig, RubricConfig
from rayrl.errors import ConfigError
from rayrl.models.judge_prompt import Rubric, load_rubric
from rayrl.oracles.http import HttpOracle
from rayrl.oracles.proxies import proxy_of
from tests.judge_server import Reply

RUBRIC = load_rubric(RubricConfig())
TEN = Rubric(template="{prompt} {response}", min_score=0, max_score=10)
PRICES = {"usd_per_1m_input": 2.0, "usd_per_1m_output": 8.0}
KEY = "sk-judge-0123456789"
CLEAR = "Right.\nScore: 4"
FAILED = None  # stands for the score of a failed call


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def oracle_for(server, rubric=RUBRIC, **settings):
    defaults = {"base_url": server.url, "model": "judge-1", "api_key_env": "JUDGE_KEY", "max_retries": 1}
    return HttpOracle(HttpOracleConfig(**(defaults | settings)), rubric)


def ask(oracle, prompt="What is 2+2?", response="4"):
    return asyncio.run(oracle.judge(prompt, response))


def answered(server, *replies, rubric=RUBRIC, **settings):
    """Verdict of a judge that gives these replies in turn, the last one for ever."""
    server.plan = lambda index, question: replies[min(index, len(replies) - 1)]
    return ask(oracle_for(server, rubric, **settings))


def error(message, *, status=400, kind="invalid_request_error", param=None, code=None, headers=None):
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return Reply(status=status, body=body, headers=headers or {})


# Bodies and usage.


def test_content_in_parts_is_one_text(server):
    verdict = answered(server, Reply(text=[{"type": "text", "text": "Right.\n"}, {"type": "text", "text": "Score: 4"}]))
    assert (verdict.score, verdict.rationale) == (4.0, "Right.")


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": 300, "completion_tokens": None, "total_tokens": 300},
        {"prompt_tokens": 300, "total_tokens": 300},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": "300", "completion_tokens": -1},
    ],
)
def test_a_clear_answer_without_a_count_is_priced_at_the_bound(server, usage):
    verdict = answered(server, Reply(text=CLEAR, usage=usage), **PRICES)
    assert verdict.score == 4.0
    assert verdict.cost_usd == oracle_for(server, **PRICES).estimate_usd("What is 2+2?", "4") > 0


def test_usage_under_other_names_is_understood(server):
    verdict = answered(server, Reply(text=CLEAR, usage={"input_tokens": 300, "output_tokens": 20}), **PRICES)
    assert (verdict.score, verdict.input_tokens, verdict.output_tokens) == (4.0, 300, 20)
    assert verdict.cost_usd == pytest.approx(300 * 2e-6 + 20 * 8e-6)


def test_thoughts_that_only_the_total_counts_are_paid(server):
    usage = {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 420}
    assert answered(server, Reply(text=CLEAR, usage=usage), **PRICES).output_tokens == 120


@pytest.mark.parametrize("code", [502, "502", None])
def test_an_error_object_under_status_200_is_a_failed_call(server, code):
    reply = error("Upstream overloaded", status=200, kind="server_error", code=code)
    verdict = answered(server, reply, **PRICES)
    assert (verdict.score, verdict.billed, verdict.cost_usd, verdict.is_readable) == (FAILED, False, 0.0, False)
    assert "Upstream overloaded" in verdict.rationale and verdict.failure is None
    assert server.num_asked == 2  # tried again
    assert answered(server, reply, reply, reply, Reply(text=CLEAR)).score == 4.0


@pytest.mark.parametrize(
    ("reply", "failure"),
    [
        (error("no credit", status=200, code="insufficient_quota"), "no credit is left"),
        (error("You exceeded your current quota", status=200), "no credit is left"),
        (error("Bad key", status=200, code="invalid_api_key"), "JUDGE_KEY"),
        (error("no such model", status=200, code="model_not_found"), "oracle.model"),
    ],
)
def test_an_error_object_under_status_200_may_be_the_judges_failure(server, reply, failure):
    verdict = answered(server, reply)
    assert (verdict.score, verdict.billed) == (FAILED, False)
    assert failure in verdict.failure and server.num_asked == 1


def test_an_error_inside_of_a_choice_is_a_failed_call(server):
    choice = {"message": {"content": ""}, "finish_reason": "error", "error": {"code": 502, "message": "broke off"}}
    verdict = answered(server, Reply(body=json.dumps({"choices": [choice]})))
    assert (verdict.billed, verdict.is_readable) == (False, False) and "broke off" in verdict.rationale


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "broke off", "code": 502}},
        {"choices": [{"message": {"content": "Sco"}, "finish_reason": "error"}]},
        {"error": {"message": "Rate limit", "code": 429}},
    ],
)
def test_an_error_after_tokens_were_used_costs_them_and_is_not_asked_twice(server, body):
    verdict = answered(
        server, Reply(body=json.dumps(body | {"usage": {"prompt_tokens": 300, "completion_tokens": 40}})), **PRICES
    )
    assert (verdict.score, verdict.billed, verdict.is_readable, verdict.failure) == (None, True, False, None)
    assert (verdict.input_tokens, verdict.output_tokens, server.num_asked) == (300, 40, 1)
    assert verdict.cost_usd == pytest.approx(300 * 2e-6 + 40 * 8e-6)


@pytest.mark.parametrize(
    ("usage", "is_billed"),
    [
        ({"prompt_tokens": 300}, True),
        ({"total_tokens": 340}, True),
        ({"prompt_tokens": 0, "completion_tokens": 0, "is_byok": True}, False),
        ({}, False),
    ],
)
def test_an_error_that_counts_a_part_of_the_tokens_is_priced_at_the_bound(server, usage, is_billed):
    body = {"error": {"message": "broke off", "code": 502}, "usage": usage}
    verdict = answered(server, Reply(body=json.dumps(body)), **PRICES)
    bound_usd = oracle_for(server, **PRICES).estimate_usd("What is 2+2?", "4")
    assert (verdict.billed, verdict.cost_usd) == (is_billed, bound_usd if is_billed else 0.0)
    assert server.num_asked == (1 if is_billed else 2)


def test_a_null_error_beside_an_answer_is_none(server):
    body = {"error": None, "choices": [{"message": {"content": CLEAR}}]}
    assert answered(server, Reply(body=json.dumps(body))).score == 4.0


def test_empty_choices_cost_what_is_told(server):
    body = {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 0}}
    verdict = answered(server, Reply(body=json.dumps(body)), **PRICES)
    assert (verdict.score, verdict.billed, verdict.is_readable) == (None, True, False)
    assert verdict.cost_usd == pytest.approx(10 * 2e-6) and "no choices" in verdict.rationale


def test_a_refusal_is_the_reason(server):
    verdict = answered(server, Reply(text=None, message={"refusal": "I cannot assess this."}))
    assert (verdict.score, verdict.billed, verdict.is_readable) == (None, True, True)
    assert "I cannot assess this." in verdict.rationale


def test_a_filtered_answer_says_so(server):
    verdict = answered(server, Reply(text=None, finish="content_filter"))
    assert (verdict.score, verdict.billed, verdict.is_readable) == (None, True, True)
    assert "content_filter" in verdict.rationale


def test_a_call_of_a_tool_is_no_answer(server):
    call = {"id": "1", "type": "function", "function": {"name": "score", "arguments": '{"score": 4}'}}
    verdict = answered(server, Reply(text=None, finish="tool_calls", message={"tool_calls": [call]}))
    assert (verdict.score, verdict.is_readable) == (None, False) and "tool" in verdict.rationale


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body="<!doctype html><title>Gateway</title><div id=app></div>", headers={"Content-Type": "text/html"}),
        Reply(body="<html>gateway</html>"),
    ],
)
def test_a_page_for_browsers_is_no_judge(server, reply):
    server.models = reply
    verdict = answered(server, reply, base_url=server.root, **PRICES)
    assert (verdict.score, verdict.billed, verdict.cost_usd) == (FAILED, False, 0.0)
    assert "is /v1 missing" in verdict.failure and f"{server.root}/v1" in verdict.failure
    with pytest.raises(ConfigError, match="is /v1 missing"):
        oracle_for(server, base_url=server.root).check()


@pytest.mark.parametrize(
    "reply",
    [
        Reply(
            body='data: {"choices":[{"delta":{"content":"Score: 4"}}]}\n\ndata: [DONE]\n\n',
            headers={"Content-Type": "text/event-stream"},
        ),
        Reply(body='data: {"choices":[{"delta":{"content":"Score: 4"}}]}\n\ndata: [DONE]\n\n'),
        Reply(status=400, body='{"detail": "Stream must be set to true"}'),
        Reply(status=422, body='{"error": {"message": "This model only supports streaming"}}'),
    ],
)
def test_a_server_that_only_streams_is_no_judge(server, reply):
    verdict = answered(server, reply)
    assert (verdict.score, verdict.billed) == (FAILED, False) and "stream" in verdict.failure
    assert "oracle.base_url" in verdict.failure and server.num_asked == 1


# Status codes.


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error("Incorrect API key", status=401, code="invalid_api_key"), ["401", "Incorrect API key", "JUDGE_KEY"]),
        (error("API key not valid", status=400, code="API_KEY_INVALID"), ["JUDGE_KEY"]),
        (error("can only afford 20 tokens", status=402, code=402), ["402", "afford", "credit"]),
        (error("Your credit balance is too low"), ["credit"]),
        (Reply(status=403, body="<html>Forbidden by proxy</html>"), ["403", "Forbidden by proxy", "JUDGE_KEY"]),
        (Reply(status=404, body='{"detail": "Not Found"}'), ["404", "no chat endpoint", "oracle.base_url"]),
        (Reply(status=405, body=""), ["405", "no chat endpoint"]),
        (error("The model judge-1 does not exist", status=404, code="model_not_found"), ["judge-1", "oracle.model"]),
        (error("Model Not Exist"), ["oracle.model"]),
        (Reply(status=407, body="no"), ["407", "HTTPS_PROXY"]),
        (Reply(status=410, body="gone"), ["410", "oracle.base_url"]),
        (Reply(status=301, body="", headers={"Location": "https://elsewhere/v1"}), ["https://elsewhere/v1"]),
        (error("You exceeded your current quota", status=429, kind="insufficient_quota", code="insufficient_quota",
               headers={"Retry-After": "0"}), ["429", "exceeded", "credit"]),
        (error("Billing hard limit has been reached", status=429, code="billing_hard_limit_reached"), ["credit"]),
    ],
)  # fmt: skip
def test_a_failed_judge_tells_what_happened_and_the_remedy_after_one_call(server, reply, said):
    verdict = answered(server, reply, max_retries=4, **PRICES)
    assert (verdict.score, verdict.billed, verdict.cost_usd, server.num_asked) == (FAILED, False, 0.0, 1)
    assert all(words in verdict.failure for words in [server.url, *said]), verdict.failure
    assert "Remedy: " in verdict.failure and KEY not in verdict.failure


def test_an_address_without_v1_is_told(server):
    verdict = answered(server, Reply(status=404, body='{"detail": "Not Found"}'), base_url=server.root)
    assert "is /v1 missing" in verdict.failure and f"{server.root}/v1" in verdict.failure


@pytest.mark.parametrize(
    "reply",
    [
        error("input was flagged", status=403, code=403),
        error("The response was filtered due to the content management policy", code="content_filter"),
    ],
)
def test_a_filtered_item_is_no_failed_judge(server, reply):
    verdict = answered(server, reply)
    assert (verdict.score, verdict.billed, verdict.is_readable, verdict.failure) == (None, False, True, None)
    assert "filter" in verdict.rationale and server.num_asked == 1


@pytest.mark.parametrize(
    "reply",
    [
        error("This model's maximum context length is 4096 tokens", code="context_length_exceeded"),
        error("'max_tokens' or 'max_completion_tokens' is too large: 512. The maximum context length is unsupported"),
        Reply(status=413, body="<html>Request Entity Too Large</html>"),
        Reply(status=422, body='{"detail": [{"loc": ["body", "messages"], "msg": "too long"}]}'),
        error("the request exceeds the available context size", kind="exceed_context_size_error"),
        error("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000", status=422),
        error("The input token count (9000) exceeds the maximum number of tokens allowed (8192)."),
        error("'max_tokens' is too large: 512. This model's maximum context length is 4096 tokens and your request "
              "has 3900 input tokens"),
        error("too many", status=200, code="context_length_exceeded"),
    ],
)  # fmt: skip
def test_an_item_that_is_too_long_abstains_unbilled_and_is_no_unreadable_answer(server, reply):
    verdict = answered(server, reply, **PRICES)
    assert (verdict.score, verdict.billed, verdict.is_readable, verdict.failure) == (None, False, True, None)
    assert "too long" in verdict.rationale and server.num_asked == 1


def test_an_item_that_is_refused_without_a_reason_abstains_unbilled_and_is_unreadable(server):
    verdict = answered(server, error("bad request"))
    assert (verdict.score, verdict.billed, verdict.is_readable, verdict.failure) == (None, False, False, None)
    assert server.num_asked == 1


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens is too large: 512. This model supports at most 256 completion tokens",
        "'max_tokens' is too large: 512. This model's maximum context length is 512 tokens and your request has 9",
    ],
)
def test_answers_that_may_be_longer_than_the_model_can_write_are_the_settings_fault(server, message):
    verdict = answered(server, error(message))
    assert (verdict.score, verdict.billed) == (FAILED, False) and "lower oracle.max_tokens" in verdict.failure


def test_milliseconds_to_wait_are_honoured(server):
    slow = error("slow", status=429, code="rate_limit_exceeded", headers={"Retry-After-Ms": "1100"})
    assert answered(server, slow, Reply(text=CLEAR)).score == 4.0
    assert 1.1 <= server.times[1] - server.times[0] < 5


@pytest.mark.parametrize(
    "reply",
    [
        error("Rate limit reached, add a payment method at https://x/billing", status=429, code="rate_limit_exceeded"),
        error("You exceeded your current quota. Please retry in 0.05s.", status=429, kind="RESOURCE_EXHAUSTED"),
    ],
)
def test_a_rate_limit_is_not_taken_for_missing_credit(server, reply):
    assert answered(server, reply, Reply(text=CLEAR)).score == 4.0


# Thoughts, and answers that were cut off.


@pytest.mark.parametrize(
    "text", ["Excellent in every respect.\nScore: 1", "So so.\nScore: 3", "<think>Suppose I were to say\nScore: 1", ""]
)
def test_an_answer_that_was_cut_off_is_none(server, text):
    verdict = answered(server, Reply(text=text, finish="length"), rubric=TEN)
    assert (verdict.score, verdict.billed, verdict.is_readable) == (None, True, False)
    assert "oracle.max_tokens = 512 was used up" in verdict.rationale and "raise it" in verdict.rationale


@pytest.mark.parametrize("text", ["<think>\nA draft, to be checked:\nScore: 5", "\u25c1think\u25b7 a guess\nScore: 5"])
def test_an_open_thought_is_no_answer_whatever_ended_it(server, text):
    verdict = answered(server, Reply(text=text))
    assert verdict.score is None and "inside of a thought" in verdict.rationale


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("content", [None, ""])
def test_thoughts_without_an_answer_name_the_remedy(server, field, content):
    verdict = answered(server, Reply(text=content, message={field: "Let me see.\nScore: 4"}))
    assert (verdict.score, verdict.is_readable) == (None, False)
    assert all(words in verdict.rationale for words in ("empty", "finish_reason stop", "oracle.extra_body"))


def test_thoughts_that_used_up_the_tokens_name_the_remedy(server):
    usage = {"prompt_tokens": 300, "completion_tokens": 512}
    thoughts = {"reasoning_content": "Hmm, first..."}
    verdict = answered(server, Reply(text="", finish="length", message=thoughts, usage=usage), **PRICES)
    assert (verdict.score, verdict.failure) == (None, None)
    assert verdict.cost_usd == pytest.approx(300 * 2e-6 + 512 * 8e-6)
    assert "oracle.max_tokens" in verdict.rationale and "oracle.extra_body" in verdict.rationale


def test_the_line_in_backticks_is_the_line_that_was_asked_for(server):
    assert answered(server, Reply(text="Clear.\n`Score: 4`")).score == 4.0


def test_another_form_of_answer_cannot_be_read(server):
    verdict = answered(server, Reply(text="Good.\nRating: [[4]]"))
    assert (verdict.score, verdict.billed, verdict.is_readable) == (None, True, False)


def test_a_server_that_ignores_max_tokens_keeps_its_answer_and_has_failed(server):
    usage = {"prompt_tokens": 300, "completion_tokens": 9000}
    verdict = answered(server, Reply(text=CLEAR, usage=usage), **PRICES)
    assert (verdict.score, verdict.billed) == (4.0, True)
    assert verdict.cost_usd == pytest.approx(300 * 2e-6 + 9000 * 8e-6)
    beyond = verdict.cost_usd - oracle_for(server, **PRICES).estimate_usd("What is 2+2?", "4")
    assert "8488 more than oracle.max_tokens = 512" in verdict.failure and f"{beyond:.6f} USD" in verdict.failure
    unpriced = answered(server, Reply(text=CLEAR, usage=usage))
    assert unpriced.cost_usd is None and "USD" not in unpriced.failure


def test_an_endpoint_that_adds_to_the_question_keeps_its_answer_and_has_failed(server):
    usage = {"prompt_tokens": 50_000, "completion_tokens": 20}
    verdict = answered(server, Reply(text=CLEAR, usage=usage), **PRICES)
    assert (verdict.score, verdict.billed) == (4.0, True)
    beyond = verdict.cost_usd - oracle_for(server, **PRICES).estimate_usd("What is 2+2?", "4")
    assert "50000 prompt tokens" in verdict.failure and f"{beyond:.6f} USD more" in verdict.failure
    assert "oracle.max_tokens" not in verdict.failure and "Remedy: " in verdict.failure
    assert answered(server, Reply(text=CLEAR, usage=usage)).failure is None  # without prices nothing is agreed


# Requests that a server refuses.


def refusing(server, refusal, has):
    """Refuse requests for which `has` holds, and answer the others."""
    server.plan = lambda index, question: refusal if has(server.payloads[index]) else Reply(text=CLEAR)


@pytest.mark.parametrize(
    ("wanted", "refusal"),
    [
        ("max_completion_tokens", error("Unsupported parameter: max_tokens. Use max_completion_tokens.",
                                        param="max_tokens", code="unsupported_parameter")),
        ("max_completion_tokens", error("Unsupported parameter: 'max_tokens' is not supported with this model.")),
    ],
)  # fmt: skip
def test_the_other_name_of_max_tokens_is_learned_once(server, wanted, refusal):
    refusing(server, refusal, lambda payload: wanted not in payload)
    oracle = oracle_for(server, max_retries=0)
    assert [ask(oracle).score, ask(oracle).score] == [4.0, 4.0]
    assert server.num_asked == 3 and wanted in server.payloads[2] and "max_tokens" not in server.payloads[2]


def test_a_server_that_knows_neither_name_is_not_asked_for_ever(server):
    refused = [
        error(f"Unrecognized request argument: {name}", param=name) for name in ("max_tokens", "max_completion_tokens")
    ]
    server.plan = lambda index, question: refused["max_completion_tokens" in server.payloads[index]]
    verdict = ask(oracle_for(server))
    assert (verdict.score, verdict.billed, server.num_asked) == (None, False, 2)


def test_openais_hosts_get_the_new_name_and_their_key_at_once(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-0123456789")
    for host in ("api.openai.com", "eu.api.openai.com"):
        config = HttpOracleConfig(base_url=f"https://{host}/v1", model="m")
        assert config.is_openai and config.key_source() == "OPENAI_API_KEY"
    for host in ("api.openai.com.evil.example", "myapi.openai.com", "me.openai.azure.com"):
        config = HttpOracleConfig(base_url=f"https://{host}/v1", model="m")
        assert not config.is_openai and config.key_source() is None


def test_openais_key_goes_to_no_host_that_was_not_named_for_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai-0123456789")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    oracle = oracle_for(server, api_key_env=None)
    oracle.check()
    assert ask(oracle).score == 3.0
    assert "sk-openai" not in str(server.headers) and "org-1" not in str(server.headers)
    assert ask(oracle_for(server, api_key_env="OPENAI_API_KEY")).score == 3.0
    assert server.headers[-1]["authorization"] == "Bearer sk-openai-0123456789"


def test_a_refused_temperature_names_the_remedy_and_can_be_left_out(server):
    refusal = error("temperature: only the default (1) is supported", param="temperature", code="unsupported_value")
    refusing(server, refusal, lambda payload: "temperature" in payload)
    verdict = ask(oracle_for(server))
    assert verdict.score is None and 'oracle.temperature = "default"' in verdict.failure
    assert ask(oracle_for(server, temperature="default")).score == 4.0


def test_more_fields_of_a_request(server):
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    assert ask(oracle_for(server, extra_body=body)).score == 3.0
    assert server.payloads[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_refused_extra_field_names_it(server):
    server.plan = lambda *_: error("Unrecognized request argument supplied: reasoning_effort")
    verdict = ask(oracle_for(server, extra_body={"reasoning_effort": "low"}))
    assert "oracle.extra_body.reasoning_effort" in verdict.failure


def test_a_gateways_headers(server, monkeypatch, tmp_path):
    monkeypatch.setenv("GATEWAY_KEY", "gw-secret-1")
    (tmp_path / "token").write_text("Bearer gw-secret-2\n")
    headers = {"api-key": "env:GATEWAY_KEY", "authorization": f"file:{tmp_path}/token", "x-route": "judges"}
    server.plan = lambda *_: Reply(text="You sent gw-secret-1 and gw-secret-2.\nScore: 4")
    verdict = ask(oracle_for(server, api_key_env=None, extra_headers=headers))
    sent = server.headers[0]
    assert (sent["api-key"], sent["authorization"], sent["x-route"]) == ("gw-secret-1", "Bearer gw-secret-2", "judges")
    assert verdict.score == 4.0 and "gw-secret" not in verdict.rationale


def test_azures_query(server):
    oracle = oracle_for(
        server, base_url=f"{server.root}/openai/deployments/gpt", extra_query={"api-version": "2024-06-01"}
    )
    assert ask(oracle).score == 3.0
    assert server.paths == ["/openai/deployments/gpt/chat/completions?api-version=2024-06-01"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "http://h/v1/chat/completions"}, "use http://h/v1"),
        ({"base_url": "http://h/openai/deployments/gpt?api-version=2024-06-01"}, "extra_query"),
        ({"base_url": "http://h/v1?api-key=sk-abcdefgh"}, "extra_query"),
        ({"base_url": "http://h/v1#sk-abcdefgh"}, "fragment"),
        ({"base_url": "http://h/sk-abcdefgh/v1"}, "api_key_env"),
        ({"base_url": "me:sk-abcdefgh@h/v1"}, "not shown"),
        ({"extra_headers": {"api-key": "sk-abcdefgh"}}, "env:NAME"),
        ({"extra_headers": {"X-Auth-Token": "abcdefgh"}}, "env:NAME"),
        ({"extra_headers": {"x-config": "sk-abcdefgh"}}, "env:NAME"),
        ({"extra_headers": {"x route": "a"}}, "no name of a header"),
        ({"extra_headers": {"Host": "a"}}, "leave it out"),
        ({"extra_headers": {"x-route": "\u201ca\u201d"}}, "ASCII"),
        ({"extra_headers": {"Authorization": "env:A"}, "api_key_env": "B"}, "both send a key"),
        ({"extra_query": {"key": "abcdefgh"}}, "extra_headers"),
        ({"extra_body": {"model": "x"}}, r"set oracle\.model"),
        ({"extra_body": {"stream": True}}, "in one piece"),
        ({"extra_body": {"n": 3}}, r"oracle\.num_samples"),
        ({"extra_body": {"max_completion_tokens": 3}}, r"oracle\.max_tokens"),
        ({"extra_body": {"provider": {"api_key": "abcdefgh"}}}, r"extra_body\.provider\.api_key"),
        ({"extra_body": {"top_p": float("nan")}}, "nan"),
        ({"temperature": "hot"}, '"default"'),
        ({"temperature": -1}, "at least 0"),
        ({"temperature": True}, "at least 0"),
        ({"num_samples": 3}, "temperature above 0"),
        ({"num_samples": 3, "temperature": 1, "extra_body": {"seed": 1}}, "seed"),
        ({"usd_per_1m_input": 0, "usd_per_1m_output": 0, "budget_usd": 1}, "limits nothing"),
        ({"failover": [{"base_url": "http://h/v1?key=sk-abcdefgh"}]}, "extra_query"),
    ],
)
def test_settings_that_leak_or_do_nothing_are_refused_and_not_shown(settings, message):
    with pytest.raises(ValidationError, match=message) as caught:
        HttpOracleConfig(**{"base_url": "http://h/v1", "model": "m"} | settings)
    assert "abcdefgh" not in str(caught.value)


# Keys and proxies.


@pytest.mark.parametrize("api_key_env", ["none", "", None])
def test_a_judge_without_a_key(server, api_key_env):
    assert ask(oracle_for(server, api_key_env=api_key_env)).score == 3.0
    assert "authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("\u201csk-abcdefgh\u201d", "LEFT DOUBLE QUOTATION MARK, at position 1"),
        ("sk-abcd\nefgh", "a line break, at position 8"),
        ("sk-abcdefgh\u200b", "ZERO WIDTH SPACE"),
        ("Bearer sk-abcdefgh", "write the key alone"),
    ],
)
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(server, monkeypatch, key, message):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ConfigError, match=message) as caught:
        oracle_for(server)
    assert "abcd" not in str(caught.value) and "JUDGE_KEY" in str(caught.value)


def test_what_editors_add_to_a_key_is_cut_off(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"\ufeff{KEY}\r\n")
    assert ask(oracle_for(server)).score == 3.0
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_a_judge_on_this_machine_is_reached_directly(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:9")
    oracle = oracle_for(server)
    oracle.check()
    assert ask(oracle).score == 3.0


def test_a_dead_proxy_is_named_without_its_password(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:9")
    oracle = oracle_for(server, base_url="http://judge.invalid/v1", max_retries=0)
    with pytest.raises(ConfigError) as caught:
        oracle.check()
    for message in (ask(oracle).failure, str(caught.value)):
        assert "through the proxy http://127.0.0.1:9" in message and "NO_PROXY" in message
        assert "hunter2" not in message


def test_a_host_that_is_exempt_from_the_proxy_is_reached_directly(monkeypatch):
    monkeypatch.setenv("https_proxy", "proxy:3128")
    assert proxy_of("https://judge.example/v1") == "http://proxy:3128"
    monkeypatch.setenv("no_proxy", "judge.example")
    assert proxy_of("https://judge.example/v1") is None


def test_a_socks_proxy_without_its_package_is_refused(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp_socks", None)
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:9")
    with pytest.raises(ConfigError, match="pip install aiohttp-socks"):
        oracle_for(server, base_url="http://judge.invalid/v1")


# Questions and templates.


def test_half_a_character_is_asked_as_a_replacement(server):
    oracle = oracle_for(server, **PRICES)
    assert oracle.estimate_usd("p", "ok \ud83d end") > 0
    assert ask(oracle, response="ok \ud83d end").score == 3.0
    assert server.responses() == ["ok \ufffd end"]


def test_half_a_character_in_an_answer_is_replaced(server):
    assert answered(server, Reply(text="So \ud83d so.\nScore: 2")).rationale == "So \ufffd so."
    assert "so \ufffd so" in answered(server, error("so \ud83d so")).rationale


def template(tmp_path, text, **settings):
    path = tmp_path / "template.txt"
    path.write_bytes(text.encode())
    return load_rubric(RubricConfig(template=str(path), **settings))


def test_slots_in_two_braces_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\{\{prompt\}\}"):
        template(tmp_path, "Question: {{prompt}}\nAnswer: {{response}}")


def test_a_byte_order_mark_is_no_part_of_the_question(server, tmp_path):
    ask(oracle_for(server, template(tmp_path, "\ufeffQ: {prompt}\r\nA: {response}\r\n")))
    assert server.questions[0].startswith("Q: ")


MT_BENCH = (
    "[Instruction]\nRate the response on a scale of 1 to 10 by strictly following this format: \"[[rating]]\", for "
    'example: "Rating: [[5]]".\n\n[Question]\n{prompt}\n\n[Answer]\n{response}'
)  # fmt: skip


def test_a_template_with_an_answer_format_of_its_own_names_its_pattern(server, tmp_path):
    scale = {"min_score": 1, "max_score": 10}
    with pytest.raises(ConfigError, match=r"rubric\.pattern"):
        template(tmp_path, MT_BENCH, **scale)
    rubric = template(tmp_path, MT_BENCH, pattern=r"\[\[(\d+)\]\]", **scale)
    verdict = answered(server, Reply(text="Good.\nRating: [[7]]"), rubric=rubric)
    assert (verdict.score, verdict.rationale) == (7.0, "Good.\nRating:")
    assert "Score: n" not in server.questions[0]
    assert answered(server, Reply(text="Good: [[7]] or [[8]]"), rubric=rubric).score is None
