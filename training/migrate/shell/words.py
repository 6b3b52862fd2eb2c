"""The words of a shell's text: where each one ends, and what stays in one for the shell to fill in."""

from __future__ import annotations

import re
import shlex

from training.utils.errors import UserError

LITERAL = "\ue024"  # stands for a dollar that no shell fills in, until the command is read
UNREAD = "\ue025"  # stands before what is not read here, such as a form of a known variable, until then
NAME = re.compile(r"[A-Za-z_]\w*")
_SIMPLE = re.compile(r"\$(?:[A-Za-z_]\w*|\d|[@*#?$!])")
_OPERATORS = ("&>>", "<<<", "<<-", ";;&", "&&", "||", ";;", ";&", "&>", ">>", ">&", "<&", "<<", "|&", ">|", "<>", ";",
              "&", "|", "<", ">", "(", ")", "\n")  # fmt: skip
REDIRECTIONS = ("&>>", "<<<", "<<-", "&>", ">>", ">&", "<&", "<<", ">|", "<>", "<", ">")
_GOES_ON = re.compile(r"\\(?:[ \t]+#[^\n]*)?\r?\n")  # a remark may stand there, as in their pages
_QUOTED = re.compile(r"\$'(?:[^'\\]|\\.)*'|'[^']*'|\"(?:[^\"\\]|\\.)*\"|\\.", re.DOTALL)
_NUMBER = re.compile(r"\d+(?=[<>])")  # of what is redirected
_BRACES = re.compile(r"(?<!\$)\{[^{}]*(?:,|\.\.)")
_ESCAPED = re.compile(r"\$'((?:[^'\\]|\\.)*)'", re.DOTALL)
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")


class Operator(str):
    """What stands between words."""


def tokens(text: str) -> list[str]:
    """A text's words, quotes and all, and `Operator`s; remarks and what ``<<`` reads are left out.

    Raises:
        UserError: a quote or a bracket is open.
    """
    found: list[str] = []
    documents: list[tuple[str, str]] = []  # what may stand before the end of each, and its end
    at = 0
    while at < len(text):
        token, end = "", at + 1
        if text[at] == "\n" and documents:
            token, end = Operator("\n"), _behind(text, at, documents)
            documents = []
        elif text[at] in " \t\r":
            pass
        elif between := _GOES_ON.match(text, at) or _NUMBER.match(text, at):
            end = between.end()
        elif text[at] == "#":
            end = _line_end(text, at)
        elif text.startswith("((", at):
            end = _closed(text, at + 1) + 1
            token = _joined(text[at:end])
        elif text.startswith(("<(", ">("), at):
            end = _closed(text, at + 1)
            token = UNREAD + text[at:end]
        elif token := _operator(text, at, found):
            end = at + len(token)
        else:
            end = _word_end(text, at)
            token = _joined(text[at:end])
            if found and found[-1] in ("<<", "<<-") and isinstance(found[-1], Operator):
                documents.append(("\t" * (found[-1] == "<<-"), re.sub(r"[\"'\\]", "", token)))
        found += [token] if token else []
        at = end
    return found


def _joined(word: str) -> str:
    """A word of several lines without the ends of those that go on, which count between single quotes alone."""

    def without(match: re.Match[str]) -> str:
        """What is quoted by single quotes as it stands, the rest without a backslash before the end of a line."""
        return match[0] if match[0][0] in "$'" else re.sub(r"\\\n|(\\.)", r"\1", match[0], flags=re.DOTALL)

    return _QUOTED.sub(without, word)


def _operator(text: str, at: int, found: list[str]) -> str:
    """The operator at a place, empty if there is none; within ``[[ ]]`` it is a word."""
    operator = next((one for one in _OPERATORS if text.startswith(one, at)), "")
    for word in reversed(found):
        if word == "[[":
            return operator
        if word == "]]" or word == "\n":
            break
    return Operator(operator) if operator else ""


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _behind(text: str, at: int, documents: list[tuple[str, str]]) -> int:
    """The place behind what ``<<`` reads, of documents that begin at the next line."""
    lines = text[at + 1 :].split("\n")
    for before, end in documents:
        while lines and lines.pop(0).removesuffix("\r").lstrip(before or "\0") != end:
            pass
    return len(text) - len("\n".join(lines)) if lines else len(text)


def _word_end(text: str, at: int) -> int:
    begin = at
    while at < len(text) and text[at] not in " \t\r\n;&|<>)":
        if text[at] == "(":
            if not (_ARRAY.fullmatch(text[begin:at]) or text[at - 1] in "?*+@!" and at > begin):
                break
            at = _closed(text, at)
        else:
            at = piece_end(text, at)
    return at


def piece_end(text: str, at: int, *, in_quotes: bool = False) -> int:
    """The end of what begins at a place: a quoted text, an escape, an expansion, or one character.

    ``in_quotes``: it is between double quotes, where ``$'`` begins nothing.

    Raises:
        UserError: a quote or a bracket is open.
    """
    if not in_quotes and (escaped := _ESCAPED.match(text, at)):
        return escaped.end()
    if text[at] == "\\":
        return min(at + 2, len(text))
    if text[at] in "'`":
        end = text.find(text[at], at + 1)
        if end < 0:
            raise _open(text, at)
        return end + 1
    if text[at] == '"' or (text.startswith('$"', at) and not in_quotes):
        return _quote_end(text, text.index('"', at))
    return expansion_end(text, at) or at + 1


def _quote_end(text: str, begin: int) -> int:
    at = begin + 1
    while at < len(text) and text[at] != '"':
        at = at + 1 if text[at] == "'" else piece_end(text, at, in_quotes=True)
    if at >= len(text):
        raise _open(text, begin)
    return at + 1


def expansion_end(text: str, at: int) -> int:
    """The end of the expansion at a place; 0 if there is none.

    Raises:
        UserError: a quote or a bracket in it is open.
    """
    if text.startswith(("$(", "$[", "${"), at):
        return _closed(text, at + 1)
    match = _SIMPLE.match(text, at)
    return match.end() if match else 0


def _closed(text: str, begin: int) -> int:
    """The place behind the bracket that closes the one at a place."""
    opening, closing = text[begin], {"(": ")", "[": "]", "{": "}"}[text[begin]]
    depth, at = 1, begin + 1
    while at < len(text):
        if text[at] == "#" and opening == "(" and text[at - 1] in " \t\n(":  # a remark
            at = _line_end(text, at)
            continue
        depth += (text[at] == opening) - (text[at] == closing)
        if not depth:
            return at + 1
        at = piece_end(text, at) if text[at] in "\\'\"`$" else at + 1
    raise _open(text, begin)


def _open(text: str, at: int) -> UserError:
    line = text[text.rfind("\n", 0, at) + 1 :].strip().split("\n")[0]
    return UserError(f"{line[:60]}: No closing {'quotation' if text[at] in QUOTES else 'bracket'}")


QUOTES = "'\"`"


def pieces(word: str) -> list[tuple[str, str]]:
    """A word taken apart: each text with the expansion behind it, "" behind the last; an open bracket begins none."""
    found, last, at = [], 0, 0
    while at < len(word):
        try:
            end = expansion_end(word, at)
        except UserError:
            end = 0
        if end:
            found.append((word[last:at], word[at:end]))
            last = end
        at = end or at + 1
    return [*found, (word[last:], "")]


def left_to_the_shell(word: str) -> list[str]:
    """What stays in a word for the shell to fill in."""
    return [left for _, left in pieces(word) if left]


def quoted(word: str) -> str:
    """A word for the shell; its variables and its home folder stay for the shell to fill in."""
    if re.fullmatch(r"~?[\w@%+=:,./$\{\}\[\]-]+", word) and not _BRACES.search(word):
        return word
    if not left_to_the_shell(word):
        return shlex.quote(word)
    text = "".join(re.sub(r'(["\\`])', r"\\\1", before) + left for before, left in pieces(word))
    return f'"{text}"'
