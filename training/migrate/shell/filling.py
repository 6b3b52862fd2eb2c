"""Words of a script with the variables filled in that are known; what is not stays for the shell."""

from __future__ import annotations

import ast
import codecs
import fnmatch
import glob
import math
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from training.migrate.shell.words import LITERAL, NAME, UNREAD, expansion_end, left_to_the_shell, piece_end, pieces
from training.utils.errors import UserError

Value = str | list[str]
_BRACED = re.compile(r"([A-Za-z_]\w*|\d+|[@*#?$!])(\[[^\]]*\])?(.*)", re.DOTALL)
_DEFAULT = re.compile(r"(:?[-=+?])(.*)", re.DOTALL)
_CUT = re.compile(r"(##?|%%?|//?)(.*)", re.DOTALL)
_BRACES = re.compile(r"\{[^{}\s]*(,|\.\.)[^{}\s]*\}")  # of which a shell makes several words
_NAME_ALONE = re.compile(r"\$\{?\w+\}?")
_GLOB = re.compile(r"[*?\[]")
_ESCAPE = re.compile(r"\\(x[\da-fA-F]{2}|u[\da-fA-F]{4}|[0-7]{1,3}|[abfnrtv\\'\"])")
EXTENDED = re.compile(r"[?*+@!]\(")  # patterns in patterns, which are not read here
_OPEN_NAME = re.compile(r"\$([A-Za-z_]\w*)$")
_PLAIN = re.compile(r"[\w@%+=:,./-]*")
_OPERATIONS: dict[type, Callable[[int, int], float]] = {  # of whole numbers; a quotient loses what is behind the point
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: math.fmod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass
class Variables:
    """What a script knows at one place.

    Attributes:
        values: variable -> text, in which what is not known stands as the shell has it, or the texts of an array.
        arguments: of the script; None where it is a text without any.
        exported: variables that the programs get, which have a value here or in ``undecided``.
        undecided: variable -> what decides its value, which can not be known here.
        all_exported: what is set is exported, ``set -a``.
        ends_early: a command that fails ends the script, ``set -e``.
        any_case: ``case`` and ``[[ = ]]`` see no capitals, ``shopt -s nocasematch``.
        fixed: variables that can not be set again, ``readonly``.
    """

    values: dict[str, Value] = field(default_factory=dict)
    arguments: list[str] | None = None
    exported: dict[str, None] = field(default_factory=dict)
    undecided: dict[str, str] = field(default_factory=dict)
    all_exported: bool = False
    ends_early: bool = False
    any_case: bool = False
    fixed: set[str] = field(default_factory=set)

    def set(self, name: str, value: Value, *, add: bool = False) -> None:
        """Give a variable a value, or add it to the one it has."""
        before = self.values.get(name)
        if add and before is None:
            if name in self.undecided:
                return
            before = [] if isinstance(value, list) else f"${name}" if name in os.environ else ""
        if isinstance(before, list) and isinstance(value, str):  # its first place
            value = [joined(before[0], value) if add and before else value, *before[1:]]
        elif add and isinstance(before, list):
            value = [*before, *value]
        elif add and isinstance(before, str):
            value = [before, *value] if isinstance(value, list) else joined(before, value)
        self.values[name] = value
        self.undecided.pop(name, None)
        if name in os.environ or self.all_exported:
            self.exported[name] = None

    def leave_open(self, name: str, why: str) -> None:
        """A variable's value, or with ``@`` the arguments, can not be known from here on."""
        self.values.pop(name, None)
        self.arguments = None if name == "@" else self.arguments
        self.undecided[name] = why

    def changed(self, later: Variables) -> dict[str, bool]:
        """The variables, ``@`` for the arguments, that are others in later ones -> whether they are exported there."""

        def of(known: Variables, name: str) -> tuple[object, ...]:
            """All that is known of a variable."""
            value = known.arguments if name == "@" else known.values.get(name)
            return value, name in known.undecided, name in known.exported

        names = dict.fromkeys(name for known in (self, later) for name in (*known.values, *known.undecided,
                                                                          *known.exported, "@"))  # fmt: skip
        return {name: name in later.exported for name in names if of(self, name) != of(later, name)}

    def text(self, name: str) -> str | None:
        """A variable or an argument as one text; None where it is not known."""
        if name in self.values:
            value = self.values[name]
            return value if isinstance(value, str) else (value[0] if value else "")
        if self.arguments is None:
            return "0" if name == "#" and "@" not in self.undecided else None
        if self.counted("@") is None:
            return None
        if name == "#":
            return str(len(self.arguments))
        if name.isdigit() and name != "0":
            return self.arguments[int(name) - 1] if int(name) <= len(self.arguments) else ""
        return None

    def knows(self, name: str) -> bool:
        """Whether the script says what a variable or an argument is."""
        return self.text(name) is not None or (bool(self.arguments) and (name in "@*#" or name.isdigit()))

    def texts(self, name: str) -> list[str] | None:
        """All elements of an array, or with ``@`` or ``*`` all arguments; None if they are not known."""
        if name in ("@", "*"):
            return None if "@" in self.undecided else self.arguments or []
        value = self.values.get(name)
        return [value] if isinstance(value, str) else value

    def counted(self, name: str) -> list[str] | None:
        """The same, None also where the shell may make several words of one of them."""
        found = self.texts(name)
        lefts = (left for one in found or () for left in left_to_the_shell(one))
        return found if all(map(_NAME_ALONE.fullmatch, lefts)) else None


def fields(word: str, known: Variables) -> list[str]:
    """A word as it is written -> the words that a shell makes of it."""
    if word.startswith(UNREAD):
        return [word]
    made = _Fields(known.text("IFS"))
    _read(word, known, made, split=True)
    return made.words


def text(word: str, known: Variables) -> str:
    """A word as it is written -> one text, as a shell takes what follows ``NAME=``."""
    made = _Fields()
    _read(word, known, made, split=False)
    return " ".join(made.words)


def pattern(word: str, known: Variables) -> str:
    """A word as ``case`` and ``[[ = ]]`` compare with it: what is quoted in it stands for itself."""
    found, at = "", 0
    while at < len(word):
        end = piece_end(word, at)
        piece = text(word[at:end], known)
        found += glob.escape(piece) if word[at] in "'\"\\" or word.startswith(("$'", '$"'), at) else piece
        at = end
    return found.replace("[^", "[!")


def joined(word: str, part: str) -> str:
    """A word that goes on with a part, which makes no longer name of a variable that stays for the shell."""
    return (_OPEN_NAME.sub(r"${\1}", word) if re.match(r"\w", part) else word) + part


class _Written(str):
    """A word as it is written in place of a value: its quotes count."""


class _Fields:
    """Words in the making; ``separators`` (``IFS``) are what a value is taken apart at."""

    def __init__(self, separators: str | None = None) -> None:
        self.separators = " \t\n" if separators is None else separators
        self.words: list[str] = []
        self.open = False

    def add(self, part: str) -> None:
        """A part of the word that is open, or the first of a new one."""
        if self.open:
            self.words[-1] = joined(self.words[-1], part)
        else:
            self.words.append(part)
        self.open = True

    def add_split(self, part: str) -> None:
        """A value, of which a shell makes several words; what stays in it for the shell is a part of one."""
        between = f"[{re.escape(self.separators)}]+" if self.separators else "(?!)"
        for before, left in pieces(part):
            for number, piece in enumerate(re.split(between, before)):
                if number:
                    self.open = False
                if piece:
                    self.add(piece)
            if left:
                self.add(left)


def _read(word: str, known: Variables, made: _Fields, *, split: bool) -> None:
    at = 0
    while at < len(word):
        end = piece_end(word, at)
        piece = word[at:end]
        if piece.startswith('$"'):  # a text that a shell may translate
            piece = piece[1:]
        if piece.startswith("$'"):
            made.add(_literal(_ESCAPE.sub(lambda code: codecs.decode(code[0], "unicode_escape"), piece[2:-1])))
        elif piece.startswith("'"):
            made.add(_literal(piece[1:-1]))
        elif piece.startswith("\\"):
            made.add(_literal(piece[1:]))
        elif piece.startswith('"'):
            _read_quoted(piece[1:-1], known, made)
        elif piece.startswith("`") or expansion_end(word, at):
            _expand(piece, known, made, split=split)
        elif split and _BRACES.match(word, at):
            made.add(UNREAD + piece)
        elif split and isinstance(word, _Written):
            made.add_split(piece)
        else:
            made.add(piece)
        at = end


def _read_quoted(inner: str, known: Variables, made: _Fields) -> None:
    if not re.fullmatch(r"\$\{?[@\w]+(\[@\])?(:[\d:]+)?\}?", inner) or "@" not in inner:
        made.add("")  # a word even where nothing is in it
    at = 0
    while at < len(inner):
        end = at + 1 if inner[at] in "'\"" else piece_end(inner, at, in_quotes=True)
        piece = inner[at:end]
        if piece.startswith("\\"):
            made.add(_literal(piece[1:]) if piece[1:] in ("$", "`", '"', "\\") else piece)
        elif piece.startswith("`") or expansion_end(inner, at):
            _expand(piece, known, made, split=False, in_quotes=True)
        else:
            made.add(piece)
        at = end


def _literal(part: str) -> str:
    return part.replace("$", LITERAL)


def _expand(piece: str, known: Variables, made: _Fields, *, split: bool, in_quotes: bool = False) -> None:
    """Add what an expansion is; as it is written where that is not known."""
    name, part = _all_of(piece)
    a_text = isinstance(known.values.get(name), str) and part != slice(None)  # of which letters are meant
    if name and not a_text and (found := known.texts(name)) is not None:
        found = found[part]
        for number, one in enumerate([" ".join(found)] if "*" in piece else found):
            made.open = made.open and not number
            made.add_split(one) if split else made.add(one)
        return
    value = _value(piece, known)
    if value is None:
        made.add(_as_left(piece, known))
    elif isinstance(value, _Written) and in_quotes:
        _read_quoted(re.sub(r'(\\.)|"', r"\1", value), known, made)
    elif isinstance(value, _Written):
        _read(value, known, made, split=split)
    elif split:
        made.add_split(value)
    else:
        made.add(value)


def _all_of(piece: str) -> tuple[str, slice]:
    """The name in ``$@``, ``${NAME[@]:1}`` and the like, empty in others, and which of its texts are meant."""
    if piece in ("$@", "$*"):
        return piece[1], slice(None)
    match = re.fullmatch(r"\$\{(?:([@*])|(\w+)\[[@*]\])(?::(\d+)(?::(\d+))?)?\}", piece)
    begin = int(match[3] or 0) - (match[1] is not None and match[3] is not None) if match else -1
    if match is None or begin < 0:  # ${@:0} has the script's own name, too
        return "", slice(None)
    return match[1] or match[2], slice(begin, begin + int(match[4]) if match[4] else None)


def _value(piece: str, known: Variables) -> str | None:
    """What an expansion is, None where that is not known."""
    if piece.startswith(("$((", "$[")):
        number = arithmetic(piece[3:-2] if piece[1] == "(" else piece[2:-1], known)
        return None if number is None else str(number)
    if piece.startswith(("$(", "`")):
        return None
    if not piece.startswith("${"):
        return known.text(piece[1:])
    inner = piece[2:-1]
    if inner.startswith("#") and (match := re.fullmatch(r"#(\w+)(\[[@*]\])?", inner)):
        return _length(match[1], bool(match[2]), known)
    match = _BRACED.fullmatch(inner)
    if match is None:
        return None
    name, index, form = match[1], match[2], match[3]
    if form and ((index not in (None, "[0]") and known.texts(name) is not None) or (name in "@*" and known.arguments)):
        return None
    if default := _DEFAULT.fullmatch(form):
        return _with_default(name, default[1], default[2], known)
    value = known.text(name)
    if index and index not in ("[@]", "[*]"):
        items, at = known.counted(name), arithmetic(index[1:-1], known)
        value = None if items is None or at is None else items[at] if -len(items) <= at < len(items) else ""
    if value is None or not form:
        return value
    cut = _CUT.fullmatch(form)
    if cut is None or left_to_the_shell(value):
        return None
    return _cut(value, cut[1], cut[2], known)


def _length(name: str, whole: bool, known: Variables) -> str | None:
    if whole:
        items = known.counted(name)
        return None if items is None else str(len(items))
    value = known.text(name)
    return None if value is None or left_to_the_shell(value) else str(len(value))


def _with_default(name: str, form: str, word: str, known: Variables) -> str | None:
    """``${NAME:-word}`` and its like; None where the shell that starts the command has the variable."""
    value = known.text(name)
    if name.isdigit() and known.arguments is not None and int(name) > len(known.arguments):
        value = None  # which text() has as empty
    if value is None and (name in known.undecided or (name in os.environ and (os.environ[name] or ":" not in form))):
        return None
    empty = value is None or (not value and ":" in form)
    if value is not None and left_to_the_shell(value) and ":" in form:
        there = in_environment(value, known)
        if there is None:
            return None
        empty = not there
    if form[-1] == "+":
        return "" if empty else _Written(word)
    if form[-1] == "?" and empty:
        return None
    if not empty:
        return value
    if form[-1] == "=":
        known.set(name, text(word, known))
    return _Written(word)


def _cut(value: str, form: str, shape: str, known: Variables) -> str | None:
    """``${NAME%pattern}`` and its like; None for what is not read here."""
    if form in ("/", "//"):
        old, _, new = shape.partition("/")
        if not old or _GLOB.search(old) or old[0] in "#%\\" or left_to_the_shell(old):
            return None
        return value.replace(text(old, known), text(new, known), -1 if form == "//" else 1)
    found = pattern(shape, known)
    if EXTENDED.search(found):
        return None
    lengths = range(len(value) + 1) if len(form) == 1 else range(len(value), -1, -1)
    for length in lengths:
        part = value[:length] if form[0] == "#" else value[len(value) - length :]
        if fnmatch.fnmatchcase(part, found):
            return value[length:] if form[0] == "#" else value[: len(value) - length]
    return value


def arithmetic(written: str, known: Variables) -> int | None:
    """The number that ``$((...))`` is; None where it is not of known whole numbers alone."""

    def number(match: re.Match[str]) -> str:
        """A variable's value in brackets, without them where it has a ``$``; ``unknown`` if it is not known."""
        name = match[0].strip("${}")
        value = (known.text(name) if name not in known.undecided else None) or "unknown"
        return value if match[0].startswith("$") else f"({value})"

    source = NAME.sub(number, re.sub(r"\$\{?(\w+|#)\}?", number, written)) or "0"
    if "#" in source:  # a base before it; to Python a remark
        return None
    try:
        return _computed(ast.parse(source.strip(), mode="eval").body)
    except (SyntaxError, ValueError, LookupError, ArithmeticError, RecursionError):
        return None


def _computed(node: ast.expr) -> int:
    """A shell's arithmetic of whole numbers; a LookupError where something else is in it."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_computed(node.operand)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return int(_OPERATIONS[type(node.ops[0])](_computed(node.left), _computed(node.comparators[0])))
    if isinstance(node, ast.BinOp):
        return int(_OPERATIONS[type(node.op)](_computed(node.left), _computed(node.right)))
    raise LookupError


def _as_left(piece: str, known: Variables) -> str:
    """An expansion for the shell that starts the command, which does not have the script's variables."""
    if piece.startswith("`"):
        piece = f"$({piece[1:-1]})"
    if piece.startswith(("$(", "$[")):
        return _command(piece, known)
    match = _BRACED.fullmatch(re.sub(r"^[!#](?=\w)", "", piece[2:-1]) if piece.startswith("${") else piece[1:])
    if match and known.knows(match[1]):
        return UNREAD + piece
    if match and (default := _DEFAULT.fullmatch(match[3])) and not default[1].endswith("?"):
        return f"${match[1]}"
    return piece


def _command(piece: str, known: Variables) -> str:
    """``$(...)`` or a sum with the values of the script's variables that need no quotes there."""
    made, at, in_quotes = piece[:2], 2, False
    while at < len(piece):
        end = expansion_end(piece, at)
        if end:
            value = text(piece[at:end], known)
            made += value if _PLAIN.fullmatch(value) else _as_left(piece[at:end], known)
        else:
            single = piece[at] == "'" and not in_quotes and "'" in piece[at + 1 :]
            end = piece_end(piece, at) if single or piece[at] == "\\" else at + 1
            in_quotes ^= piece[at] == '"'
            made += piece[at:end]
        at = end
    if not piece.startswith(("$((", "$[")):
        return made
    return NAME.sub(lambda name: value if _PLAIN.fullmatch(value := known.text(name[0]) or "$") else name[0], made)


def in_environment(word: str, known: Variables) -> str | None:
    """A word with what it leaves to the shell as the environment here has it; None where that is not known."""
    found = ""
    for before, left in pieces(word):
        match = re.fullmatch(r"\$\{?(\w+)\}?", left)
        name = match[1] if match else ""
        if left and (not name or {name, "@" if name.isdigit() else ""} & known.undecided.keys() or UNREAD in word):
            return None
        found += before + os.environ.get(name, "")
    return found.replace(LITERAL, "$")


def final(word: str) -> str:
    """A word of a command that is read: what stays in it is what a shell can fill in.

    Raises:
        UserError: it has a form that is not read here, or a dollar that no shell is to take for its own.
    """
    if UNREAD in word:
        before, form = next(piece for piece in pieces(word) if UNREAD in "".join(piece))
        if UNREAD in before[:-1] or not form:
            form = word[word.index(UNREAD) :]
        raise UserError(f"{form.replace(UNREAD, '')} is not read here: write its value in its place")
    plain = word.replace(LITERAL, "$")
    if LITERAL in word and len(left_to_the_shell(plain)) > len(left_to_the_shell(word)):
        raise UserError(f"{plain}: a dollar that is not the shell's can not be written here: give it in a file")
    return plain
