"""Conversations in a row: messages, ShareGPT's conversations, lists as prompt and completion, Alpaca's columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from client_app.kinds.generation import INPUT, INSTRUCTION, KWARGS, OUTPUT, TOOLS
from client_app.own.reading.text_files import DataError, Row
from client_app.own.reading.values import checked_text, short, value_in

Turn = Mapping[str, Any]
"""One message: role, content (a text, or a list of parts), and whatever else the chat template may use."""
PLACEHOLDER = "<image>"
"""The place of an image in a text, in the data of LLaVA and of those that followed it."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"} | {
    "bot": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool"
}  # fmt: skip
_ALPACA = (
    "Below is an instruction that describes a task{and_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}{input}\n\n### Response:\n"
)


def read_messages(row: Row, column: str) -> tuple[Turn, ...]:
    """The conversation in a column of messages, which must end with the assistant's.

    Raises:
        DataError: it is not a conversation; names the message.
    """
    turns = _turns(row, column)
    where = f"{row.place}, column {column!r}"
    _require_end(turns, where)
    if not any(turn["role"] == "user" for turn in turns):
        raise DataError(f"{where}: no message of the user")
    return turns


def read_turns(row: Row, column: str) -> tuple[Turn, ...]:
    """The messages in a column, or the only one, whoever wrote the last."""
    value = row.values.get(column)
    return _turns(Row({column: [value]}, row.place, row.folder) if isinstance(value, Mapping) else row, column)


def read_prompt_and_completion(row: Row, prompt: str, completion: str) -> tuple[tuple[Turn, ...], int]:
    """The conversation in two lists of messages (TRL's conversational form), and how many messages are the prompt's."""
    asked, answered = _turns(row, prompt), _turns(row, completion)
    _require_end(answered, f"{row.place}, column {completion!r}")
    return (*asked, *answered), len(asked)


def read_alpaca(row: Row) -> tuple[tuple[Turn, ...], str, str]:
    """Alpaca's instruction, input and output: as a conversation, and as its prompt for models without a chat template.

    The wording is that of Stanford Alpaca's ``train.py``.
    """
    instruction = checked_text(value_in(row, INSTRUCTION), f"{row.place}, column {INSTRUCTION!r}")
    output = checked_text(value_in(row, OUTPUT), f"{row.place}, column {OUTPUT!r}")
    more = row.values.get(INPUT) or ""
    if not isinstance(more, str):
        raise DataError(f"{row.place}, column {INPUT!r}: {short(more)} is {type(more).__name__}, expected text")
    asked = f"{instruction}\n\n{more}" if more.strip() else instruction
    prompt = _ALPACA.format(
        and_input=", paired with an input that provides further context" if more.strip() else "",
        instruction=instruction,
        input=f"\n\n### Input:\n{more}" if more.strip() else "",
    )
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": output}), prompt, output


def read_context(row: Row) -> dict[str, Any]:
    """Everything else that a chat template gets for a row: ``tools``, and ``chat_template_kwargs``."""
    found: dict[str, Any] = {}
    tools = _parsed(row, TOOLS)
    if tools:
        if not isinstance(tools, Sequence) or isinstance(tools, str) or not all(isinstance(t, Mapping) for t in tools):
            raise DataError(f"{row.place}, column {TOOLS!r}: {short(tools)}, expected a list of JSON schemas")
        found[TOOLS] = [without_nulls(tool) for tool in tools]
    more = _parsed(row, KWARGS)
    if more:
        if not isinstance(more, Mapping):
            raise DataError(f"{row.place}, column {KWARGS!r}: {short(more)}, expected an object")
        found |= without_nulls(more)
    return found


def without_nulls(value: Any) -> Any:
    """A JSON value without the nulls that Arrow puts where rows have different keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def text_of(turn: Turn) -> str:
    """The text of a message, whatever form its content has."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_parts(turns: Sequence[Turn]) -> list[Mapping[str, Any]]:
    """The messages' places for images, in order; ``image`` is the image if the message itself names it."""
    lists = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    return [part for content in lists for part in content if part.get("type") == "image"]


def with_parts(turns: Sequence[Turn], images: int, place: str) -> list[Turn]:
    """Messages as templates of processors expect them: lists of parts.

    An image's place is a part of type ``image``, or ``<image>`` in a text that is not the assistant's (LLaVA); if no
    message has a place, images come first.

    Raises:
        DataError: there are more or less places than images.
    """
    found = [dict(turn) for turn in turns]
    for turn in found:
        if isinstance(turn.get("content"), str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        turn["content"] = [{"type": "image"} if p["type"] == "image" else p for p in turn.get("content") or []]
    if image_parts(found):
        return list(found)
    asked = [turn for turn in found if turn["role"] != "assistant"]
    places = sum(part["text"].count(PLACEHOLDER) for turn in asked for part in turn["content"])
    if places not in (0, images):
        raise DataError(f"{place}: {places} times {PLACEHOLDER} in the messages, and {images} images")
    for turn in asked if places else ():
        turn["content"] = [piece for part in turn["content"] for piece in _divided(part["text"])]
    if not places:
        user = next(turn for turn in found if turn["role"] == "user")
        user["content"] = [*({"type": "image"} for _ in range(images)), *user["content"]]
    return list(found)


def _divided(text: str) -> list[dict[str, str]]:
    """A text's parts between the places for images, and those places."""
    found: list[dict[str, str]] = []
    for number, part in enumerate(text.split(PLACEHOLDER)):
        found += [{"type": "image"}] if number else []
        found += [{"type": "text", "text": part}] if part else []
    return found


def _parsed(row: Row, column: str) -> Any:
    value = row.values.get(column)
    if isinstance(value, str) and value.strip():  # in a CSV file
        try:
            return json.loads(value)
        except ValueError:
            raise DataError(f"{row.place}, column {column!r}: not valid JSON") from None
    return value


def _turns(row: Row, column: str) -> tuple[Turn, ...]:
    value_in(row, column)
    where = f"{row.place}, column {column!r}"
    try:
        value = _parsed(row, column)
    except DataError:
        raise DataError(f"{where}: not a JSON list of messages") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: {short(value)}, expected a list of messages")
    turns = [_turn(turn, f"{where}, message {number}") for number, turn in enumerate(value, start=1)]
    for number, turn in enumerate(turns, start=1):
        if turn["role"] in ("system", "developer") and number > 1:
            raise DataError(f"{where}, message {number}: a {turn['role']} message, expected it first or not at all")
    return tuple(turns)


def _turn(turn: Any, at: str) -> Turn:
    if isinstance(turn, Mapping) and "from" in turn and "value" in turn and "role" not in turn:
        told = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": _SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"], **told}
    if not isinstance(turn, Mapping) or "role" not in turn or not ("content" in turn or "tool_calls" in turn):
        raise DataError(f"{at}: {short(turn)}, expected an object with role and content")
    if turn["role"] not in ROLES:
        raise DataError(f"{at}: role {short(turn['role'])}, expected one of {', '.join(ROLES)}")
    found: dict[str, Any] = {key: without_nulls(value) for key, value in turn.items() if value is not None}
    if "function_call" in found:
        raise DataError(f"{at}: function_call, OpenAI's form before tool_calls, expected tool_calls")
    weight = found.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{at}, weight: {short(weight)}, expected 0 (not learnt) or 1")
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = [_part(part, f"{at}, content") for part in content]
        if not any(part["type"] == "image" for part in found["content"]):
            found["content"] = "".join(part["text"] for part in found["content"])
    elif not found.get("tool_calls") and not (found["role"] == "tool" and content == ""):
        checked_text(content, f"{at}, content")
    return found


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": checked_text(part["text"], where)}
    if kind in ("image", "image_url"):
        given = part.get(kind) or part.get("path")
        given = given.get("url") if kind == "image_url" and isinstance(given, Mapping) else given
        return {"type": "image"} | ({"image": given} if given else {})
    raise DataError(f"{where}: {short(part)}, expected a part with type 'text' or 'image'")


def _require_end(turns: Sequence[Turn], where: str) -> None:
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the last message is the {turns[-1]['role']}'s, expected the assistant's")
