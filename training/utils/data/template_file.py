"""What ``--chat_template`` names: a bundled template, a Jinja file, or a conversation template in JSON.

The JSON is ColossalChat's: ``chat_template`` (Jinja, or the model that it is taken from), ``system_message``,
``end_of_assistant`` and ``stop_ids``, all of them optional.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils.errors import UserError, half_character
from training.utils.run.files import once_each

TEMPLATES = Path(__file__).parent / "templates"
_KEYS = {"chat_template": str, "system_message": str, "end_of_assistant": str, "stop_ids": list}
_UNREAD = ("response_format_tags",)  # what ColossalChat's own reward functions look for in an answer


@dataclass(frozen=True)
class TemplateFile:
    """What a file of ``--chat_template`` says.

    Attributes:
        template: Jinja; empty for the tokenizer's own.
        model: the model whose template it is, where the file names one in place of Jinja.
        system_message: for conversations that have no system turn.
        end_of_assistant: the text that ends an answer, as the file claims.
        stop_ids: tokens that end a response.
        unread: keys that nothing here reads.
    """

    template: str = ""
    model: str = ""
    system_message: str = ""
    end_of_assistant: str = ""
    stop_ids: tuple[int, ...] = ()
    unread: tuple[str, ...] = ()


def template_names() -> list[str]:
    """The names that ``--chat_template`` understands."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def read_template_file(name: str) -> TemplateFile:
    """Read a bundled template by its name, a Jinja file, or a conversation template (``.json``).

    Raises:
        UserError: no such file, or not what it must be.
    """
    bundled = TEMPLATES / f"{name}.jinja"
    path = Path(name).expanduser()
    if bundled.is_file() and bundled.parent == TEMPLATES:
        return TemplateFile(bundled.read_text(encoding="utf-8"))
    try:
        if not path.is_file():
            raise UserError(
                f"--chat_template {name}: no such file, and not one of the names {', '.join(template_names())}"
            )
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".json":
            return TemplateFile(text)
        return _conversation_template(name, json.loads(text, object_pairs_hook=once_each))
    except json.JSONDecodeError as error:
        raise UserError(f"--chat_template {name}: broken JSON in line {error.lineno}: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, or a number of too many digits
        raise UserError(f"--chat_template {name}: {error}") from None


def _conversation_template(name: str, given: Any) -> TemplateFile:
    where = f"--chat_template {name}"
    if not isinstance(given, dict) or not _KEYS.keys() & given.keys():
        raise UserError(f"{where}: no conversation template; it is a JSON object with {', '.join(_KEYS)}")
    if unknown := [key for key in given if key not in _KEYS and key not in _UNREAD]:
        raise UserError(f"{where}: unknown keys {', '.join(unknown)}; it may have {', '.join(_KEYS)}")
    for key, kind in _KEYS.items():
        if not isinstance(given.get(key), (kind, type(None))):
            raise UserError(f"{where}: {key} must be a {'text' if kind is str else 'list of token ids'}")
        if half := half_character(json.dumps(given.get(key), ensure_ascii=False)):
            raise UserError(f"{where}: {key} holds half a character, {half}, which is no text")
    template, model = given.get("chat_template") or "", ""
    if template in template_names():
        template = read_template_file(template).template
    elif template and not re.search(r"\{[{%#]", template):
        template, model = "", template
    return TemplateFile(
        template=template,
        model=model,
        system_message=given.get("system_message") or "",
        end_of_assistant=(given.get("end_of_assistant") or "").strip(),
        stop_ids=_stop_ids(where, given.get("stop_ids") or []),
        unread=tuple(key for key in _UNREAD if key in given),
    )


def _stop_ids(where: str, given: list[Any]) -> tuple[int, ...]:
    """Token ids; each may stand in a list of its own, as their GRPO has them."""
    ids = [item[0] if isinstance(item, list) and len(item) == 1 else item for item in given]
    wrong = next((item for item in ids if not isinstance(item, int) or isinstance(item, bool) or item < 0), None)
    if wrong is not None:
        raise UserError(f"{where}: stop_ids must be a list of token ids, not {json.dumps(wrong)[:60]}")
    return tuple(dict.fromkeys(ids))
