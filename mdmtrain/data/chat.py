"""Convert a conversation to a prompt and a response. A chat template renders the messages before the last one.

Special tokens that a tokenizer's own chat template writes are encoded as their ids. A special token that is spelled in
the text of a message is encoded as ordinary text, as in all other text.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_MARK = "\U0010f582"  # private-use character, put into special tokens in message text and removed later
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """Renders messages as a prompt.

    Without `jinja`, each message is a line "<|role|>" and then its content, and the prompt ends with a line
    "<|assistant|>". All of this is ordinary text, without special tokens. `jinja` is a chat template of transformers,
    `specials` are the special tokens of its tokenizer.
    """

    jinja: str | None = None
    specials: tuple[str, ...] = ()
    eos: str = ""  # the value of eos_token in templates

    def prompt(self, messages: list[dict[str, str]]) -> tuple[str, Spans]:
        """The prompt to which the assistant responds, and [start, end) of each special token in it.

        Raises ValueError if the template rejects the messages.
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
        except Exception as error:  # a template can raise any error
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        return rendered[0]

    def _longest_first(self) -> list[str]:
        return sorted(self.specials, key=len, reverse=True)

    def _apart(self, content: str) -> str:
        """The content with TEXT_MARK inserted into each special token spelled in it.

        Raises ValueError if the content already contains TEXT_MARK.
        """
        if TEXT_MARK in content:
            raise ValueError(f"a message contains U+{ord(TEXT_MARK):X}, which is reserved to mark text")
        for special in self._longest_first():
            content = content.replace(special, special[:1] + TEXT_MARK + special[1:])
        return content


PLAIN = Template()


def template_in(folder: Path) -> str | None:
    """The chat template in a model folder, in the places where transformers stores it; None if there is none.

    If the folder has several templates, the default one. Raises ValueError if the file is damaged.
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
