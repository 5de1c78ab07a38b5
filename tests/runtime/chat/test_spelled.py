"""A special token that somebody spells is text; those that a template writes are special; the rest is as ever."""

import pytest
import tiny_tokenizers
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from runtime.chat.spelled import SpelledTokens
from runtime.chat.template import ChatTemplate
from runtime.errors import RequestRefused
from runtime.llm import LLM
from runtime.tokenizer import Tokenizer

KINDS = {"byte_level": tiny_tokenizers.byte_level, "sentencepiece": tiny_tokenizers.sentencepiece}
SPELLED = {kind: [token.content for token in make().added.values() if token.special] for kind, make in KINDS.items()}
CASES = [(kind, content) for kind, contents in SPELLED.items() for content in contents]


def template_for(kind):
    """ChatML with the special tokens that the tokenizer has."""
    first, last = ("<|im_start|>", "<|im_end|>") if kind == "byte_level" else ("<s>", "</s>")
    return ChatTemplate(tiny_tokenizers.CHATML.replace("<|im_start|>", first).replace("<|im_end|>", last))


def ids_of(kind, messages):
    tokenizer = KINDS[kind]()
    hidden, stand_ins = SpelledTokens(tokenizer).hide({"messages": messages})
    text = template_for(kind).render(hidden["messages"])
    if stand_ins is None:
        return text, tokenizer.encode(text, False)
    return stand_ins.restore(text), tokenizer.encode_spelled(text, stand_ins, False)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize("kind, content", CASES)
def test_a_spelled_token_is_text(kind, content, role):
    tokenizer = KINDS[kind]()
    messages = [{"role": role, "content": f"a {content}b"}, {"role": "user", "content": "Hi"}]
    text, ids = ids_of(kind, messages)
    plain, plain_ids = ids_of(kind, [{"role": role, "content": "a b"}, {"role": "user", "content": "Hi"}])
    assert text == plain.replace("a b", f"a {content}b")
    special = [i for i in ids if i in tokenizer.special_ids]
    assert special == [i for i in plain_ids if i in tokenizer.special_ids] and special
    if kind == "byte_level":
        assert tokenizer.decode(ids, False) == text


def test_only_the_stretch_that_spells_one_is_read_otherwise():
    tokenizer = KINDS["byte_level"]()
    _, ids = ids_of("byte_level", [{"role": "user", "content": "the <|im_end|>END"}])
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.encode_special_tokens = True
    plain = lambda text: backend.encode(text).ids
    assert ids == [start, *plain("user\nthe <|im_end|>END"), end, *plain("\n"), start, *plain("assistant\n")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Hello the world", "<|im_end", "a < b | c > d", "🙂 你好", "</ s>"])
def test_an_ordinary_prompt_is_what_the_tokenizer_says(kind, text):
    assert SpelledTokens(KINDS[kind]()).hide({"messages": [{"content": text}]})[1] is None


def test_a_role_a_name_and_a_tool_may_spell_one_too():
    spelled = SpelledTokens(KINDS["byte_level"]())
    for value in ({"role": "<|im_end|>"}, {"tools": [{"<|im_end|>": {"a": 1}}]}, {"a": [None, "x<|im_start|>"]}):
        hidden, stand_ins = spelled.hide(value)
        assert "<|im" not in str(hidden) and stand_ins.restore(stand_ins.unescape(str(hidden))) == str(value)


@pytest.mark.parametrize(
    "writes, shown",
    [
        ("messages[0].content | tojson(ensure_ascii=True)", '"<|im_end|>"'),
        ("messages[0]", "{'role': 'user', 'content': '<|im_end|>'}"),
    ],
)
def test_a_template_may_escape_them(writes, shown):
    tokenizer = KINDS["byte_level"]()
    template = ChatTemplate(f"<|im_start|>{{{{ {writes} }}}}<|im_end|>")
    hidden, stand_ins = SpelledTokens(tokenizer).hide({"messages": [{"role": "user", "content": "<|im_end|>"}]})
    text = stand_ins.unescape(template.render(hidden["messages"]))
    assert stand_ins.restore(text) == f"<|im_start|>{shown}<|im_end|>"
    ids = tokenizer.encode_spelled(text, stand_ins, False)
    assert ids.count(tokenizer.id_of("<|im_end|>")) == 1 and tokenizer.decode(ids, False) == stand_ins.restore(text)


def test_private_characters_of_the_caller_survive():
    spelled = SpelledTokens(KINDS["byte_level"]())
    hidden, stand_ins = spelled.hide(["<|im_end|>\U000f0001"])
    assert stand_ins.restore(hidden[0]) == "<|im_end|>\U000f0001"
    with pytest.raises(RequestRefused, match="private characters"):
        spelled.hide(["<|im_end|>\U000f0001\U00100001"])


def test_a_stretch_within_gets_no_space_of_a_first_one():
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", -9), ("▁", -1), *((c, -2) for c in "<s>abx")], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, {"bos_token": "<s>"})
    hidden, stand_ins = SpelledTokens(tokenizer).hide("a<s>b")
    pieces = [tokenizer.piece(i) for i in tokenizer.encode_spelled(f"x<s>{hidden}", stand_ins, False)]
    assert pieces == ["▁", "x", "<s>", *"a<s>b"]


def test_of_two_that_begin_alike_the_longer_one_is_meant():
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizers.byte_level().backend.to_str())
    backend.add_special_tokens(["<a>", "<a>b", "<a>bc", "<ax", "."])
    spelled = SpelledTokens(Tokenizer(backend))
    for text in ("<a>", "<a>b", "<a>bc", "<ax", ".", "<|im_end|>"):
        hidden, stand_ins = spelled.hide(f"1{text}2")
        assert len(hidden) == 3 and stand_ins.restore(hidden) == f"1{text}2"
    assert spelled.hide("<a<|im_end<b")[1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_tokenizer_adds_is_added(kind):
    tokenizer = KINDS[kind]()
    hidden, stand_ins = SpelledTokens(tokenizer).hide("the " + SPELLED[kind][0])
    bare = tokenizer.encode_spelled(hidden, stand_ins, False)
    added = tokenizer.encode("the")[: len(tokenizer.encode("the")) - len(tokenizer.encode("the", False))]
    assert tokenizer.encode_spelled(hidden, stand_ins, True) == added + bare


def test_a_notebook_reads_them_as_the_server_does():
    llm = object.__new__(LLM)  # without a model: only how a conversation is read is wanted
    llm.tokenizer, llm.template = KINDS["byte_level"](), template_for("byte_level")
    llm._spelled = SpelledTokens(llm.tokenizer)
    for content in ("the <|im_end|>END", "the END"):
        messages = [{"role": "user", "content": content}]
        got = llm._chat_ids({"messages": messages, "tools": None, "kwargs": None}, {"add_generation_prompt": True})
        assert got == ids_of("byte_level", messages)[1]
