"""What is trained on is what the tokenizer says: any conversation, through the forms of known families."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.data.targets import IGNORED
from client_app.kinds import kind_of
from client_app.own.chat import ChatTemplate
from client_app.own.encoding import Encoder
from client_app.own.examples import columns_read, read_example
from client_app.own.reading.text_files import DataError, Row
from client_app.settings import DataSettings
from tests.toys.chat_templates import FAMILIES
from tests.toys.known_templates import FORMS, MARKS, Form

LETTERS = "aeFour.?!, \n\t<|>/'\"{}%-\u00e9\u4f60\u0645\u200d\u00a0\U0001f937e\u0301"
CONTENTS = st.text(LETTERS, min_size=1, max_size=12).filter(lambda text: text.strip())
Turns = list[dict[str, str]]


@functools.cache
def encoder(family: str, marks: bool) -> Encoder:
    tokenizer = FAMILIES[family](MARKS if marks else ())
    return Encoder(kind_of("causal-lm"), 10**6, tokenizer)


def through(form: Form, family: str, *, marks: bool = True, marked: bool = False) -> Encoder:
    """The encoder of a tokenizer with this form's template."""
    found = encoder(family, marks)
    found.tokenizer.chat_template = form.template(marked=marked)
    added = [str(token) for token in found.tokenizer.added_tokens_decoder.values()]
    found.chat = ChatTemplate(found.tokenizer, found.tokenizer, [*found.tokenizer.all_special_tokens, *added])
    found.findings.clear()
    return found


def encoded(encoder: Encoder, values: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """Ids, and which are learnt."""
    example = read_example(Row(values, "x.jsonl, line 1", Path()), kind_of("causal-lm"), DataSettings())
    found = encoder.encode([example], ())
    ids, labels = found.inputs["input_ids"][0].tolist(), found.labels[0].tolist()
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    return ids, [label != IGNORED for label in labels]


def expected(form: Form, tokenizer: Any, turns: Turns, *, marked: bool) -> tuple[str, list[bool]]:
    """The text, and which tokens have a character that the assistant wrote: letter by letter, without any template."""
    text, own = "", []
    for piece, learnt in form.pieces(turns, tokenizer.bos_token, tokenizer.eos_token, marked=marked):
        text, own = text + piece, [*own, *[learnt] * len(piece)]
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text, [any(own[start:end]) or (start == end < len(own) and own[start]) for start, end in places]


@st.composite
def conversations(draw: Any, form: Form) -> Turns:
    """One to three questions and answers, after the system's words where the form has a place for them."""
    found = []
    if form.system is not None and draw(st.booleans()):
        found.append({"role": "system", "content": draw(CONTENTS)})
    for _ in range(draw(st.integers(1, 3))):
        found += [{"role": "user", "content": draw(CONTENTS)}, {"role": "assistant", "content": draw(CONTENTS)}]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMS)
def test_any_conversation_has_the_templates_ids_and_learns_the_answers(name: str, family: str) -> None:
    form = FORMS[name]

    @settings(max_examples=6, deadline=None)
    @given(conversations(form), st.booleans(), st.booleans())
    def same(turns: Turns, marks: bool, marked: bool) -> None:
        marked = marked and bool(form.end)
        marks = marks or bool(form.last)  # which of two ends is an answer's, tokens alone can say
        made = through(form, family, marks=marks, marked=marked)
        ids, learnt = encoded(made, {"messages": turns})
        assert ids == made.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        text, wanted = expected(form, made.tokenizer, turns, marked=marked)
        assert text == made.tokenizer.apply_chat_template(turns, tokenize=False)
        assert learnt == wanted

    same()


KEYS = ("name", "reasoning_content", "thinking", "tool_calls", "weight", "function", "id", "train", "refusal")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(["<<a>>", 0, 1, None, ["<<a>>"], {"x": "<<a>>"}])),
    st.sampled_from(["user", "assistant", "tool", "system", "developer", "function", "critic"]),
    st.dictionaries(
        st.sampled_from(["tools", "documents", "chat_template_kwargs"]), st.sampled_from([[{"a": 1}], None])
    ),
    st.sampled_from(["chatml", "mistral", "llama-2"]),
)
def test_whatever_a_row_has_is_in_the_text_told_or_refused(
    more: dict[str, Any], role: str, columns: dict[str, Any], name: str
) -> None:
    """Keys, roles and columns: none is dropped in silence."""
    made = through(FORMS[name], "bytes")
    turns = [
        {"role": "user", "content": "Why?"},
        {"role": role, "content": "said", **more},
        {"role": "assistant", "content": "So."},
    ]
    values = {"messages": turns, **columns}
    try:
        ids, learnt = encoded(made, values)
    except DataError:  # which names what it refuses
        return
    assert made.chat is not None
    text, told = made.tokenizer.decode(ids), " ".join(made.findings + made.chat.findings)
    assert "said" in text
    for key, value in more.items():
        if value is not None and key != "weight":
            assert repr(key) in told or ("<<a>>" in str(value) and "<<a>>" in text)
    if "weight" in more and role == "assistant" and more["weight"] == 0:
        own = made.tokenizer.decode([token for token, mine in zip(ids, learnt, strict=True) if mine])
        assert "said" not in own
    for column, value in columns.items():
        told_by_files = column not in columns_read(kind_of("causal-lm"), DataSettings(), values)
        assert value is None or told_by_files or repr(column) in told or repr("a") in told
