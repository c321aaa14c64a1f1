"""Convert a conversation to a prompt and a response. A template formats all messages but the last as the prompt.

Special tokens written by a tokenizer's template become their ids. Text in a message that looks like a special token
remains text.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_MARK = "\U0010f582"  # inserted into text that looks like a special token, removed again later
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """Converts messages to a prompt.

    Without `jinja`, each message is a line "<|role|>" followed by its content, and a line "<|assistant|>" ends the
    prompt. All of it is text. `jinja` is a template of transformers, `specials` are the special tokens of its
    tokenizer.
    """

    jinja: str | None = None
    specials: tuple[str, ...] = ()
    eos: str = ""  # the token that templates call eos_token

    def prompt(self, messages: list[dict[str, str]]) -> tuple[str, Spans]:
        """The prompt for the assistant's response, and the ranges [start, end) in it that are special tokens.

        Raises ValueError if the template refuses the messages.
        """
        if self.jinja is None:
            turns = "".join(f"<|{message['role']}|>\n{message['content']}\n" for message in messages)
            return f"{turns}<|assistant|>\n", ()
        apart = [{**message, "content": self._apart(message["content"])} for message in messages]
        rendered = self._rendered(apart)
        if not self.specials:
            return rendered, ()
        text, spans = "", []
        for part in re.split(f"({'|'.join(map(re.escape, self._longest_first()))})", rendered):
            if part in self.specials:
                spans.append((len(text), len(text) + len(part)))
            text += part.replace(TEXT_MARK, "")
        return text, tuple(spans)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = {"bos_token": "", "eos_token": self.eos}  # we add bos ourselves
        try:
            rendered, _ = render_jinja_template(  # type: ignore[str-unpack] # a pair, annotated as a string
                [messages], chat_template=self.jinja, add_generation_prompt=True, **names
            )
        except Exception as error:  # a template may raise any error
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        return rendered[0]

    def _longest_first(self) -> list[str]:
        return sorted(self.specials, key=len, reverse=True)

    def _apart(self, content: str) -> str:
        """The content with a mark inside every special token. Raises ValueError if the content contains the mark."""
        if TEXT_MARK in content:
            raise ValueError(f"a message contains U+{ord(TEXT_MARK):X}, which is reserved to mark text")
        for special in self._longest_first():
            content = content.replace(special, special[:1] + TEXT_MARK + special[1:])
        return content


PLAIN = Template()


def template_in(folder: Path) -> str | None:
    """The default chat template of a model folder in the format of transformers, or None.

    Raises ValueError if its file is damaged.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, list):
                found = {one["name"]: one["template"] for one in found}.get("default")
        except (ValueError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{file}: damaged: get the original file") from None
        if found is not None:
            return found
    return None
