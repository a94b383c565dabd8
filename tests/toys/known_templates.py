"""Chat templates in the forms of known model families, and what each writes, said a second time without any template.

A family's form is a table: what stands before and after a message. The template is made of it, and so is the list of
pieces of which it is known whether they are the assistant's: the two meet in tests and in the comparison with TRL only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Form:
    """How a family writes a conversation; ``BOS`` and ``EOS`` stand for the tokenizer's own.

    Attributes:
        user: before and after a message of the user.
        before: before an answer.
        ask: the generation prompt; None: it is ``before``.
        end: what ends an answer.
        after: what the template writes behind the end.
        system: before and after a system message; None: it is refused; ``"user"``: in the first message of the user.
        begin: before everything.
        last: behind everything, unless an answer is asked for.
        trim: whether contents lose blanks at their ends.
    """

    user: tuple[str, str]
    before: str
    end: str
    after: str = ""
    ask: str | None = None
    system: tuple[str, str] | str | None = None
    begin: str = ""
    last: str = ""
    trim: bool = False

    @property
    def asked(self) -> str:
        """The generation prompt."""
        return self.before if self.ask is None else self.ask

    def template(self, *, marked: bool = False) -> str:
        """The Jinja template; ``marked``: with ``{% generation %}`` around an answer and its end."""
        content = "(m['content'] | trim)" if self.trim else "m['content']"
        opened, closed = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
        joined = self.system == "user"
        lines = [f"{{{{ {_text(self.begin)} }}}}"]
        if joined:
            lines.append("{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% endif %}")
        lines.append("{% for m in messages %}{% if m['role'] == 'user' %}")
        shown = "{% if s and loop.index0 == 1 %}{{ '<<' + s + '>>' }}{% endif %}" if joined else ""
        lines.append(f"{{{{ {_text(self.user[0])} }}}}{shown}{{{{ {content} + {_text(self.user[1])} }}}}")
        lines.append(f"{{% elif m['role'] == 'assistant' %}}{{{{ {_text(self.before)} }}}}")
        lines.append(f"{opened}{{{{ {content} + {_text(self.end)} }}}}{closed}{{{{ {_text(self.after)} }}}}")
        if isinstance(self.system, tuple):
            before, after = map(_text, self.system)
            lines.append(f"{{% elif m['role'] == 'system' %}}{{{{ {before} + {content} + {after} }}}}")
        elif self.system is None:
            lines.append("{% else %}{{ raise_exception('no ' + m['role'] + ' here') }}")
        lines.append("{% endif %}{% endfor %}")
        ask = f"{{% if add_generation_prompt %}}{{{{ {_text(self.asked)} }}}}"
        return "".join([*lines, ask, f"{{% else %}}{{{{ {_text(self.last)} }}}}{{% endif %}}"])

    def pieces(self, turns: Turns, begin: str, end: str, *, marked: bool = False) -> list[tuple[str, bool]]:
        """The conversation's text piece by piece, and whether a piece is the assistant's or ends its answer.

        Args:
            turns: the messages.
            begin: the tokenizer's first token, as text.
            end: its last.
            marked: whether the template's own markers say what is learnt.
        """

        def own(text: str) -> str:
            return text.replace("BOS", begin).replace("EOS", end)

        found, joined = [(own(self.begin), False)], ""
        for turn in turns:
            content = turn["content"].strip() if self.trim else turn["content"]
            if turn["role"] == "system":
                if self.system == "user":
                    joined = f"<<{turn['content']}>>"
                else:
                    assert isinstance(self.system, tuple)
                    found.append((own(self.system[0]) + content + own(self.system[1]), False))
            elif turn["role"] == "user":
                found.append((own(self.user[0]) + joined + content + own(self.user[1]), False))
                joined = ""
            else:
                written, ask = own(self.before) + content, own(self.asked)
                given = next((n for n, pair in enumerate(zip(written, ask, strict=False)) if len(set(pair)) > 1), None)
                given = min(len(written), len(ask)) if given is None else given
                given = len(own(self.before)) if marked else given
                # Where nothing ends an answer, the template's line breaks are all that does.
                end_of = own(self.end) or own(self.after)
                found += [(written[:given], False), (written[given:] + end_of, True)]
                found.append((own(self.after) if self.end else "", False))
        return [*found, (own(self.last), not self.end)]


def _text(text: str) -> str:
    """A text as Jinja has it; the tokenizer's tokens by their names."""
    parts, found = text.replace("BOS", "\0bos_token\0").replace("EOS", "\0eos_token\0").split("\0"), []
    for number, part in enumerate(parts):
        if number % 2:
            found.append(part)
        elif part:
            found.append("'" + part.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'")
    return " + ".join(found) or "''"


def _marks(end: str, *, ask: str | None = None, last: str = "") -> Form:
    """``<|user|>`` and the like, each on a line of its own before a message."""
    system = ("<|system|>\n", f"{end}\n")
    return Form(("<|user|>\n", f"{end}\n"), "<|assistant|>\n", end, "\n", ask, system, last=last)


_CHATML = Form(
    ("<|im_start|>user\n", "<|im_end|>\n"),
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "\n",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
)
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n".format
FORMS: dict[str, Form] = {
    "chatml": _CHATML,
    "internlm2": replace(_CHATML, begin="BOS"),
    "llama-2": Form(("BOS[INST] ", " [/INST]"), " ", " EOS", ask="", system="user", trim=True),
    "llama-3": Form(
        (_HEADER("user"), "<|eot_id|>"),
        _HEADER("assistant"),
        "<|eot_id|>",
        system=(_HEADER("system"), "<|eot_id|>"),
        begin="BOS",
        trim=True,
    ),
    "mistral": Form(("[INST] ", " [/INST]"), " ", "EOS", begin="BOS", ask=""),
    "mistral-v3": Form(("[INST] ", "[/INST]"), " ", "EOS", begin="BOS", ask="", system="user"),
    "gemma": Form(
        ("<start_of_turn>user\n", "<end_of_turn>\n"),
        "<start_of_turn>model\n",
        "<end_of_turn>",
        "\n",
        begin="BOS",
        trim=True,
    ),
    "phi-3": _marks("<|end|>", last="EOS"),
    "phi-4": Form(
        ("<|im_start|>user<|im_sep|>", "<|im_end|>"),
        "<|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
        system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
    ),
    "zephyr": _marks("EOS", ask="<|assistant|>"),
    "tulu": Form(("<|user|>\n", "\n"), "<|assistant|>\n", "EOS", "\n", system=("<|system|>\n", "\n")),
    "olmo": Form(("<|user|>\n", "\n"), "<|assistant|>\n", "EOS", "\n", begin="EOS"),
    "vicuna": Form(("USER: ", " "), "ASSISTANT: ", "EOS", begin="BOS", ask="ASSISTANT:", system=("", " ")),
    "alpaca": Form(("### Instruction:\n", "\n\n"), "### Response:\n", "EOS", "\n\n", system=("", "\n\n")),
    "solar": Form(("### User:\n", "\n\n"), "### Assistant:\n", "EOS", "\n\n", system=("### System:\n", "\n\n")),
    "openchat": Form(
        ("GPT4 Correct User: ", "<|end_of_turn|>"),
        "GPT4 Correct Assistant: ",
        "<|end_of_turn|>",
        begin="BOS",
        ask="GPT4 Correct Assistant:",
    ),
    "falcon": Form(("User: ", "\n"), "Falcon: ", "EOS", "\n", ask="Falcon:", system=("System: ", "\n")),
    "end of text": Form(("User: ", "\n"), "Bot: ", "", "\n", ask="Bot:", last="EOS"),
    "no end": Form(("User: ", "\n\n"), "Assistant: ", "", "\n\n", ask="Assistant:"),
    "command-r": Form(
        ("<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        begin="BOS",
        trim=True,
    ),
    "granite": Form(
        ("<|start_of_role|>user<|end_of_role|>", "EOS\n"),
        "<|start_of_role|>assistant<|end_of_role|>",
        "EOS",
        "\n",
        system=("<|start_of_role|>system<|end_of_role|>", "EOS\n"),
    ),
    "exaone": Form(
        ("[|user|]", "\n"), "[|assistant|]", "[|endofturn|]", "\n", system=("[|system|]", "[|endofturn|]\n")
    ),
    "deepseek": Form(("User: ", "\n\n"), "Assistant: ", "EOS", begin="BOS", ask="Assistant:", system=("", "\n\n")),
    "starchat": _marks("<|end|>"),
    "nemotron": Form(
        ("<extra_id_1>User\n", "\n"), "<extra_id_1>Assistant\n", "", "\n", system=("<extra_id_0>System\n", "\n")
    ),
}
"""By family; close to each in what matters here: marks, blanks, ends, and where the system's words stand."""

MARKS = (
    "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|end_of_turn|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|start_of_role|>", "<|end_of_role|>", "[|user|]", "[|assistant|]", "[|system|]", "[|endofturn|]",
    "<extra_id_0>", "<extra_id_1>",
)  # fmt: skip
"""What these families have as tokens of their own."""
