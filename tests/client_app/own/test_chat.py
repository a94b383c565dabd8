"""Training uses the tokenizer's own ids of the whole conversation, and learns the assistant's tokens among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client_app.data.targets import IGNORED
from client_app.kinds import kind_of
from client_app.own.chat import ChatTemplate
from client_app.own.encoding import Encoder
from client_app.own.examples import read_example
from client_app.own.reading.text_files import DataError, Row
from client_app.settings import DataSettings
from tests.toys import chat_templates

ASK = {"role": "user", "content": "What is two plus two?"}
TURNS = [
    ASK,
    {"role": "assistant", "content": "The answer is four."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
]


def encoder_of(tokenizer: Any, template: str | None, prompt_template: str = "auto") -> Encoder:
    tokenizer.chat_template = template
    encoder = Encoder(kind_of("causal-lm"), 4096, tokenizer)
    if template is not None:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        encoder.chat = ChatTemplate(tokenizer, tokenizer, [*tokenizer.all_special_tokens, *added])
    encoder.ask_by_chat = prompt_template == "auto"
    return encoder


def encoded(encoder: Encoder, values: dict[str, Any]) -> tuple[list[int], str, list[str]]:
    """Ids, the text that is learnt, and findings."""
    example = read_example(Row(values, "x.jsonl, line 1", Path()), kind_of("causal-lm"), DataSettings())
    found = encoder.encode([example], ())
    ids, labels = found.inputs["input_ids"][0].tolist(), found.labels[0].tolist()
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    findings = encoder.findings + encoder.chat.findings if encoder.chat else encoder.findings
    learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return ids, encoder.tokenizer.decode(learnt), list(findings)


ENDS = {"zephyr": "{eos}", "mistral": "{eos}", "opened": "{eos}", "tools": "{eos}"} | dict.fromkeys(
    ("chatml", "marked", "thinking"), "<|im_end|>"
)


@pytest.mark.parametrize("template", chat_templates.TEMPLATES)
@pytest.mark.parametrize("tokenizer", chat_templates.TOKENIZERS)
def test_ids_are_the_templates_and_targets_the_assistants(template: str, tokenizer: str) -> None:
    made = chat_templates.TOKENIZERS[tokenizer]()
    encoder = encoder_of(made, chat_templates.TEMPLATES[template])
    ids, learnt, _ = encoded(encoder, {"messages": TURNS})
    assert ids == made.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    end = ENDS[template].format(eos=made.eos_token)
    last = f"<think>\n\n</think>\n\nBecause.{end}" if template == "thinking" else f"Because.{end}"
    assert "".join(learnt.split()) == "".join(f"The answer is four.{end}{last}".split())
    if tokenizer == "bytes" and template != "mistral":  # which has a space before an answer
        assert learnt == f"The answer is four.{end}{last}"


def test_a_template_with_markers_learns_what_transformers_marks() -> None:
    made = chat_templates.byte_level()
    encoder = encoder_of(made, chat_templates.CHATML_MARKED)
    example = read_example(Row({"messages": TURNS}, "", Path()), kind_of("causal-lm"), DataSettings())
    found = encoder.encode([example], ())
    marked = made.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert (found.labels[0] != IGNORED).int().tolist() == marked["assistant_masks"]


def test_reasoning_is_learnt_where_the_template_has_it_and_told_where_not() -> None:
    turns = [ASK, {"role": "assistant", "content": "four", "reasoning_content": "two and two"}]
    _, learnt, findings = encoded(encoder_of(chat_templates.byte_level(), chat_templates.THINKING), {"messages": turns})
    assert learnt == "<think>\ntwo and two\n</think>\n\nfour<|im_end|>"
    assert findings == []
    _, learnt, findings = encoded(encoder_of(chat_templates.byte_level(), chat_templates.CHATML), {"messages": turns})
    assert learnt == "four<|im_end|>"
    assert findings == ["messages have 'reasoning_content', which the chat template does not use"]


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_other_names_of_reasoning_are_used_where_its_text_is(name: str) -> None:
    """Transformers hands them to templates as ``reasoning_content``; of two, one is left out, which is told."""
    answer = {"role": "assistant", "content": "four", name: "two and two"}
    made = chat_templates.byte_level()
    _, learnt, findings = encoded(encoder_of(made, chat_templates.THINKING), {"messages": [ASK, answer]})
    assert learnt == "<think>\ntwo and two\n</think>\n\nfour<|im_end|>"
    assert findings == []
    both = {**answer, "reasoning_content": "2 + 2"}
    _, learnt, findings = encoded(encoder_of(made, chat_templates.THINKING), {"messages": [ASK, both]})
    assert learnt == "<think>\n2 + 2\n</think>\n\nfour<|im_end|>"
    assert findings == [f"messages have {name!r}, which the chat template does not use"]
    _, _, findings = encoded(encoder_of(made, chat_templates.CHATML), {"messages": [ASK, answer]})
    assert findings == [f"messages have {name!r}, which the chat template does not use"]


def test_answers_of_weight_zero_are_not_learnt() -> None:
    turns = [*TURNS[:1], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[3], "weight": 1}]
    for template in (chat_templates.CHATML, chat_templates.CHATML_MARKED):
        encoder = encoder_of(chat_templates.byte_level(), template)
        assert encoded(encoder, {"messages": turns})[1] == "Because.<|im_end|>"
        with pytest.raises(DataError, match=r"message 2, weight: 0\.5, expected 0 \(not learnt\) or 1"):
            encoded(encoder, {"messages": [ASK, {**TURNS[1], "weight": 0.5}]})
        with pytest.raises(DataError, match="line 1: there is nothing to learn in this conversation"):
            encoded(encoder, {"messages": [ASK, {**TURNS[1], "weight": 0}]})


TOOL = {"type": "function", "function": {"name": "add", "description": None}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}


def test_tools_and_their_turns_go_to_the_template() -> None:
    turns = [ASK, CALL, {"role": "tool", "content": "4"}, TURNS[3]]
    made = chat_templates.byte_level()
    for tools in ([TOOL], json.dumps([TOOL])):  # the second as in a CSV file
        ids, learnt, findings = encoded(encoder_of(made, chat_templates.TOOLS), {"messages": turns, "tools": tools})
        bare = {"type": "function", "function": {"name": "add"}}
        plain = [ASK, {key: value for key, value in CALL.items() if value}, *turns[2:]]
        assert ids == made.apply_chat_template(plain, tools=[bare], tokenize=True, return_dict=False)
        assert learnt == ('[{"function": {"name": "add", "arguments": {"a": 2}}}]<|endoftext|>Because.<|endoftext|>')
        assert findings == []
    values = {"messages": TURNS, "tools": [TOOL]}
    assert encoded(encoder_of(made, chat_templates.CHATML), values)[2] == [
        "examples have 'tools', which the chat template does not use"
    ]


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    made = chat_templates.byte_level()
    ids, _, findings = encoded(
        encoder_of(made, chat_templates.CHATML), {"messages": [{"role": "developer", "content": "be brief"}, *TURNS]}
    )
    turns = [{"role": "system", "content": "be brief"}, *TURNS]
    assert ids == made.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert len(findings) == 1


PARTS = [{**turn, "name": None, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
SHAREGPT = [{"from": ("human", "gpt")[n % 2], "value": turn["content"]} for n, turn in enumerate(TURNS)]


@pytest.mark.parametrize(
    "values",
    [{"messages": PARTS}, {"conversations": SHAREGPT}, {"conversations": TURNS}, {"messages": json.dumps(TURNS)}],
)
def test_other_forms_of_a_conversation_are_the_same_conversation(values: dict[str, Any]) -> None:
    encoder = encoder_of(chat_templates.byte_level(), chat_templates.CHATML)
    assert encoded(encoder, values) == encoded(encoder, {"messages": TURNS})


def test_a_prompt_of_messages_is_not_learnt() -> None:
    encoder = encoder_of(chat_templates.byte_level(), chat_templates.CHATML)
    ids, learnt, _ = encoded(encoder, {"prompt": TURNS[:3], "completion": TURNS[3:]})
    assert ids == encoded(encoder, {"messages": TURNS})[0]
    assert learnt == "Because.<|im_end|>"


def test_prompts_of_a_chat_model_go_through_its_template_unless_told_otherwise() -> None:
    made = chat_templates.byte_level()
    values = {"prompt": "Why?", "completion": "Because."}
    ids, learnt, findings = encoded(encoder_of(made, chat_templates.CHATML), values)
    turns = [{"role": "user", "content": "Why?"}, TURNS[3]]
    assert ids == made.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert learnt == "Because.<|im_end|>"
    assert findings == ["prompts are read through the model's chat template (prompt-template = 'auto')"]
    ids, learnt, findings = encoded(encoder_of(made, chat_templates.CHATML, "none"), values)
    assert made.decode(ids) == "Why?Because.<|endoftext|>"
    assert learnt == "Because.<|endoftext|>"
    assert findings == []


def test_alpaca_is_a_question_for_chat_models_and_a_form_for_others() -> None:
    made = chat_templates.byte_level()
    values = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    ids, learnt, _ = encoded(encoder_of(made, chat_templates.CHATML), values)
    turns = [{"role": "user", "content": "Add.\n\n2, 2"}, {"role": "assistant", "content": "4"}]
    assert ids == made.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert learnt == "4<|im_end|>"
    ids, learnt, _ = encoded(encoder_of(made, None), values)
    assert "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n4<|endoftext|>" in made.decode(ids)
    assert learnt == "4<|endoftext|>"
    ids, _, _ = encoded(encoder_of(made, None), {**values, "input": ""})
    assert "### Instruction:\nAdd.\n\n### Response:\n4" in made.decode(ids)


@pytest.mark.parametrize("tokenizer", chat_templates.TOKENIZERS)
def test_plain_texts_have_one_beginning_and_one_end(tokenizer: str) -> None:
    """Tokenised as one text; a text that writes the marks itself does not get them twice."""
    made = chat_templates.TOKENIZERS[tokenizer]()
    begins = made("x")["input_ids"][0] == made.bos_token_id
    encoder = encoder_of(made, None)
    expected = made("The sky is blue.")["input_ids"] + [made.eos_token_id]
    for prompt, completion in (
        ("The sky", " is blue."),
        ("The sky", f" is blue.{made.eos_token}"),
        *([(f"{made.bos_token}The sky", " is blue.")] if tokenizer == "sentencepiece" else []),
    ):
        ids, learnt, _ = encoded(encoder, {"prompt": prompt, "completion": completion})
        assert ids == expected
        assert learnt.strip() == f"is blue.{made.eos_token}"
    assert ids.count(made.bos_token_id) == int(begins)


def test_a_slow_tokenizer_without_offsets_learns_the_same() -> None:
    """Hides what a fast tokenizer knows about positions."""

    class Slow:
        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, **options: Any) -> Any:
            if "return_offsets_mapping" in options:
                raise NotImplementedError
            return self.inner(text, **options)

    fast = encoder_of(chat_templates.byte_level(), chat_templates.CHATML)
    slow = encoder_of(Slow(chat_templates.byte_level()), chat_templates.CHATML)
    slow.chat = fast.chat
    for values in ({"messages": TURNS}, {"prompt": "Why?", "completion": " Because."}, {"text": "The sky"}):
        assert encoded(slow, values)[:2] == encoded(fast, values)[:2]


def test_what_a_template_leaves_out_is_told() -> None:
    deaf = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    turns = [{"role": "system", "content": "be brief"}, *TURNS]
    _, learnt, findings = encoded(encoder_of(chat_templates.byte_level(), deaf), {"messages": turns})
    assert learnt == "The answer is four.<|endoftext|>Because.<|endoftext|>"
    assert findings == ["messages are missing, in whole or in part, from the chat template's output"]


def test_a_function_call_of_the_old_form_is_refused_by_its_name() -> None:
    turns = [ASK, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]
    with pytest.raises(DataError, match="message 2: function_call, OpenAI's form before tool_calls"):
        encoded(encoder_of(chat_templates.byte_level(), None), {"messages": turns})
