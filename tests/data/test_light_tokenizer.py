"""The tokenizer of a plan renders as the one of the run does, or refuses with the same error."""

import time

import pytest

from rayrl.config import PolicyConfig
from rayrl.data.light_tokenizer import load_light_tokenizer
from rayrl.data.tokenizing import encode_prompt, load_tokenizer, render, renderer_of
from rayrl.errors import ConfigError, DataError
from rayrl.records import content_id
from tests.chat_policies import BOS, BROKEN, CHATML, CLOCK, GEMMA, TOOLS_NONE, TYPE_ERROR, WITH_TOOLS, chat_policy, user

RENDERED = "<|im_start|>user\nWhat is a fjord?<|im_end|>\n<|im_start|>assistant\n"
FJORD = [user("What is a fjord?")]


def both(policy):
    return load_tokenizer(policy), load_light_tokenizer(policy.path)


@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS, TOOLS_NONE, GEMMA, BOS])
def test_both_render_the_same(tmp_path, template):
    tokenizer, light = both(chat_policy(tmp_path / "m", template))
    rendered = render(tokenizer, "auto", FJORD)
    assert render(light, "auto", FJORD) == rendered
    assert light.count_tokens([rendered], add_special_tokens=False) == [len(encode_prompt(tokenizer, rendered))]


def test_a_template_may_ask_whether_there_are_tools(tmp_path):
    for tokenizer in both(chat_policy(tmp_path / "m", TOOLS_NONE)):
        assert render(tokenizer, "auto", FJORD) == RENDERED


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False}])
def test_tokens_named_only_in_the_map_are_known(tmp_path, token):
    names = {"bos_token": token, "eos_token": "</s>", "pad_token": "<pad>"}
    policy = chat_policy(tmp_path / "m", BOS, without=list(names), token_map=names)
    for tokenizer in both(policy):
        assert render(tokenizer, "auto", FJORD) == "<s>" + RENDERED


def test_a_template_of_bad_syntax_is_the_models_fault(tmp_path):
    policy = chat_policy(tmp_path / "m", BROKEN)
    for tokenizer in both(policy):
        with pytest.raises(
            ConfigError, match=r"policy.path: the tokenizer's chat template must be valid Jinja, .*line 1"
        ):
            render(tokenizer, "auto", FJORD)
        assert render(tokenizer, "plain", "hi") == "hi"


def test_a_template_that_fails_is_an_error_of_the_data(tmp_path):
    for tokenizer in both(chat_policy(tmp_path / "m", TYPE_ERROR)):
        with pytest.raises(DataError, match=r"chat template refuses these messages: can only concatenate str .*fjord"):
            render(tokenizer, "auto", FJORD)


def test_several_templates_need_a_default(tmp_path):
    named = [{"name": "tool_use", "template": CHATML}, {"name": "rag", "template": CHATML}]
    for tokenizer in both(chat_policy(tmp_path / "m", named)):
        for source in (FJORD, "hi"):
            with pytest.raises(ConfigError, match=r'one must be named "default", got tool_use, rag; name one so'):
                render(tokenizer, "auto", source)
        assert render(tokenizer, "plain", "hi") == "hi"
    default = [*named, {"name": "default", "template": CHATML}]
    for tokenizer in both(chat_policy(tmp_path / "n", default)):
        assert render(tokenizer, "auto", FJORD) == RENDERED


def test_a_prompt_has_the_same_id_at_any_time(tmp_path):
    for tokenizer in both(chat_policy(tmp_path / "m", CLOCK)):
        ids = set()
        for _ in range(2):
            ids.add(content_id(render(tokenizer, "auto", FJORD)))
            time.sleep(0.002)
        assert len(ids) == 1


def test_a_tokenizer_without_an_end_of_sequence_is_refused_by_both(tmp_path):
    policy = chat_policy(tmp_path / "m", without=["eos_token"])
    for load in (lambda: load_tokenizer(policy), lambda: load_light_tokenizer(policy.path)):
        with pytest.raises(ConfigError, match=r"an end-of-sequence token, got .*; set eos_token in"):
            load()


def test_neither_makes_up_a_padding_token(tmp_path):
    policy = chat_policy(tmp_path / "m", "{{ pad_token }}" + CHATML, without=["pad_token"])
    for tokenizer in both(policy):
        assert render(tokenizer, "auto", FJORD) == RENDERED


def test_a_template_gets_the_variables_of_the_config(tmp_path):
    thinking = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    policy = chat_policy(tmp_path / "m", thinking)
    off = policy.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    misspelt = policy.model_copy(update={"chat_template_kwargs": {"enable_thinkin_g": False}})
    for tokenizer in both(policy):
        assert renderer_of(tokenizer, policy)("What is a fjord?") == RENDERED
        assert renderer_of(tokenizer, off)(FJORD) == RENDERED + "<think>\n\n</think>\n\n"
        with pytest.raises(ConfigError, match=r"must name variables .*, got enable_thinkin_g, which"):
            renderer_of(tokenizer, misspelt)(FJORD)
    with pytest.raises(ValueError, match=r"variables of the chat template's own, got tokenize; leave them out"):
        PolicyConfig(path="x", chat_template_kwargs={"tokenize": True})
