"""A conversation as the model's own chat template writes it, and which of its characters are learnt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from client_app.own.messages import Turn, text_of
from client_app.own.reading.text_files import DataError

Span = tuple[int, int]
"""Start and end of learnt characters."""
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_KNOWN = ("role", "content", "weight")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of an answer's reasoning: transformers passes it to templates under all of these names."""


@dataclass
class ChatTemplate:
    """Renders conversations; ``findings`` counts what a template leaves out, in words without any data.

    Args:
        speaker: the tokenizer or the processor with the chat template.
        tokenizer: the one whose special tokens it writes.
        special: tokens that can end an answer, as text.
    """

    speaker: Any
    tokenizer: Any
    special: Sequence[str]
    findings: Counter[str] = field(default_factory=Counter)
    _reasoned: dict[tuple[str, tuple[str, ...]], bool] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> str:
        """The template itself; all of them if the model has several."""
        found = self.speaker.chat_template
        return found if isinstance(found, str) else "\n".join(found.values())

    def render(
        self, turns: Sequence[Turn], context: Mapping[str, Any], first: int, place: str
    ) -> tuple[str, list[Span]]:
        """The conversation's text, and the spans of it that are learnt.

        The model learns what it has to generate after the template's generation prompt, up to the token that ends the
        answer; if the template has generation markers, it learns the marked text. Answers with weight 0 are not learnt.

        Args:
            turns: messages; the last one is the assistant's.
            context: everything else that the template gets, above all ``tools``.
            first: the first message that may be learnt.
            place: the row's, for errors.

        Raises:
            DataError: the template refuses the conversation, or changes it so that the last answer cannot be found.
        """
        turns = self._for_template(turns, context)
        try:
            text = self._text(turns, context)
        except Exception as error:  # a template may raise any error
            raise DataError(f"{place}: the model's chat template refuses this conversation: {error}") from None
        answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        marked = bool(_MARKERS.search(self.source))
        if marked:
            found = self._marked(turns, context, answers, text)
        else:
            found = [(number, self._span(turns, context, number, text)) for number in answers]
        if not any(span for number, span in found if number == answers[-1]):
            what = "mark the last answer" if marked else "put this conversation in order"
            raise DataError(f"{place}: the model's chat template does not {what}")
        spans = []
        for number, span in found:
            if span is None:
                self.findings["answers are not learnt, because the chat template rewrites them"] += 1
            elif number >= first and turns[number].get("weight", 1):
                spans.append(span if marked else self._ended(text, span, text_of(turns[number]).strip()))
        self._count_lost(turns, text)
        return text, spans

    def _for_template(self, turns: Sequence[Turn], context: Mapping[str, Any]) -> list[dict[str, Any]]:
        source, found = self.source, [dict(turn) for turn in turns]
        for turn in found:
            if turn["role"] == "developer" and "developer" not in source:
                turn["role"] = "system"
                self.findings["developer messages are read as system messages"] += 1
            named = tuple(key for key in _REASONING if turn.get(key) is not None)
            for key in turn:
                if key in _KNOWN or (key in _REASONING and key not in named):
                    continue
                if not (self._has_reasoning(key, named) if key in named else key in source):
                    self.findings[f"messages have {key!r}, which the chat template does not use"] += 1
        for key in context:
            if key not in source:
                self.findings[f"examples have {key!r}, which the chat template does not use"] += 1
        return found

    def _has_reasoning(self, key: str, named: tuple[str, ...]) -> bool:
        """Whether a last answer's text has the reasoning under this name when it has values under all of ``named``."""
        if (key, named) not in self._reasoned:
            answer = {"role": "assistant", "content": "a", **{name: f"<<{name}>>" for name in named}}
            try:
                shown = f"<<{key}>>" in self._text([{"role": "user", "content": "q"}, answer], {})
            except Exception:  # a template that needs a longer conversation: look for the key in its source
                shown = key in self.source
            self._reasoned[key, named] = shown
        return self._reasoned[key, named]

    def _text(self, turns: Sequence[Turn], context: Mapping[str, Any], **options: Any) -> str:
        return str(self.speaker.apply_chat_template(list(turns), tokenize=False, **context, **options))

    def _span(self, turns: Sequence[Turn], context: Mapping[str, Any], number: int, text: str) -> Span | None:
        """The place of one answer in the text of the whole conversation; None if the template rewrites it."""
        try:
            asked = self._text(turns[:number], context, add_generation_prompt=True) if number else ""
            before = self._text(turns[:number], context) if number else ""
            after = self._text(turns[: number + 1], context)
        except Exception:  # it accepts the whole conversation, not its beginning
            return None
        if not asked.startswith(before):  # a mark at the end of a whole text, which is not this answer's (Phi-3)
            before, bare = (t.rstrip().removesuffix(str(self.tokenizer.eos_token)) for t in (before, after))
            after = bare if after != text or self._has_end(bare.rstrip()) else after
        start = common_start(text, asked)
        # A generation prompt may open something that not every answer has, like <think>; all before it must be there.
        if start < len(before) or not text.startswith(before):
            return None
        if text.startswith(after):
            return start, len(after)
        content = text_of(turns[number]).strip()
        at, at_end = text.find(content, start), after.rfind(content)
        if not content or at < 0 or at_end < 0:
            return None
        end = at + len(content)
        rest = after[at_end + len(content) :].rstrip()
        return (start, end + len(rest)) if text.startswith(rest, end) else None

    def _marked(
        self, turns: Sequence[Turn], context: Mapping[str, Any], answers: Sequence[int], text: str
    ) -> list[tuple[int, Span | None]]:
        """What the template's own markers mark: each span with the number of its answer, which may have several."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools, template = context.get("tools"), self.speaker.chat_template
        if not isinstance(template, str):
            template = self.tokenizer.get_chat_template(tools=tools)
        rest = {key: value for key, value in context.items() if key != "tools"}
        render: Any = render_jinja_template
        _, marked = render(
            conversations=[list(turns)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **rest},
        )
        spans = list(marked[0])
        if len(spans) == len(answers):
            return list(zip(answers, spans, strict=True))
        ends = [common_start(text, self._begun(turns[: number + 1], context)) for number in answers[:-1]]
        found: list[tuple[int, Span | None]] = []
        for span in spans:
            found.append((answers[sum(end <= span[0] for end in ends)], span))
        return found + [(number, None) for number in answers if number not in dict(found)]

    def _begun(self, turns: Sequence[Turn], context: Mapping[str, Any]) -> str:
        """The text of a conversation's beginning; empty where the template takes whole conversations only."""
        try:
            return self._text(turns, context)
        except Exception:
            return ""

    def _ended(self, text: str, span: Span, content: str) -> Span:
        """Nothing after the end token is learnt: what follows it are the template's line breaks.

        The same if an end is written in plain text; if there is none, only line breaks end the answer.
        """
        start, end = span
        shown = text[start:end].rstrip()
        has_token = self._has_end(shown)
        if not has_token:
            self.findings["answers have no end token in the chat template"] += 1
        return (start, start + len(shown)) if has_token or not shown.endswith(content) else span

    def _has_end(self, text: str) -> bool:
        return any(text.endswith(token) for token in self.special)

    def _count_lost(self, turns: Sequence[Turn], text: str) -> None:
        for turn in turns:
            content = turn.get("content")
            parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content or []]
            if not all(part.strip() in text for part in parts):
                self.findings["messages are missing, in whole or in part, from the chat template's output"] += 1


def common_start(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common from their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(first), len(second)))
