"""What a script does up to the programs that it starts: assignments, conditions, exports; nothing is run for that."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import itertools
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from training.migrate.shell.filling import (
    EXTENDED,
    Variables,
    arithmetic,
    fields,
    in_environment,
    pattern,
    text,
)
from training.migrate.shell.grammar import ASSIGNMENT, Body, Case, Chain, If, Node, Simple, changed_in, parse
from training.migrate.shell.words import LITERAL, NAME, UNREAD, Operator, left_to_the_shell, tokens
from training.utils.errors import UserError, refusals

BEFORE = ("nohup", "time", "exec", "env", "sudo", "command")  # of a command's own words
SHELLS = ("bash", "sh")
_IS_TEXT = re.compile("-[a-z]*c")  # bash -lc TEXT
_TRUE = ("true", ":", "echo", "cd", "mkdir", "set", "printf", "pushd", "popd", "ulimit", "umask", "local", "shift")
_OUTPUT = (">", ">>", "&>", "&>>", ">|")
_DECLARE = ("export", "declare", "typeset", "readonly")  # not "local": what it sets ends with its function
_NUMBERS = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_EQUAL = ("=", "==", "!=")
_OPEN = ("=~", "<", ">", "-nt", "-ot", "-ef")  # comparisons that are not made here
_PLACED = re.compile(r"\[[^\]]*\]\+?=")  # an array's text with its place, or its name
_ROUNDS = 1000  # of all loops of a text


@dataclass
class Run:
    """A command that a script gets to.

    Attributes:
        words: with what is known filled in.
        environment: ``NAME=value`` that the script has exported before it.
        folder: that ``cd`` went to.
        inside: the loop or the function that it stands in, in words; empty for neither.
        known: the variables at its place.
        file: the script that it stands in, a whole path; empty for the text itself.
        notes: what was read over, a line each.
        empty: what is empty in it, by what stands before that, both as they are written.
    """

    words: list[str]
    environment: list[str]
    folder: str
    inside: str
    known: Variables
    file: str
    notes: list[str]
    empty: Mapping[str, str]


class _EndedError(Exception):
    """The script ends here."""


class _LeftError(Exception):
    """A loop that is carried out is left here, or a round of it."""


def read_script(source: str) -> tuple[list[Run], list[str], str]:
    """The commands that a text gets to, in order, what was read over, and the ``exit`` that ends it, if one does.

    Raises:
        UserError: it is no whole text of a shell's, or names a script that is not here.
    """
    reader = _Reader()
    reader.script(source, Variables())
    return reader.found, list(dict.fromkeys(reader.notes)), reader.ended


class _Reader:
    """Goes through a script as a shell does, and through what it can not decide, too, but for its assignments.

    Attributes:
        found, notes: as `read_script` returns them.
        folder, known, inside, file, taken: of the place that is read; ``taken`` are conditions that are not known.
        left, pushed: the folders that ``cd -`` and ``popd`` go back to.
        functions: by name.
        shaped: variables that make something else of what they are given, a sum or capitals: ``declare -i``.
        read: the files that are being read.
        ended: the command that ended a script before its last one.
        tested: something depends on whether what is read succeeds.
        rounds: of loops that have been carried out.
        carried: loops that are being carried out.
    """

    def __init__(self) -> None:
        self.found: list[Run] = []
        self.notes: list[str] = []
        self.folder, self.inside, self.file = "", "", ""
        self.left, self.pushed = "", list[str]()
        self.taken: list[str] = []
        self.ended, self.rounds, self.carried = "", 0, 0
        self.tested = False
        self.read: list[Path] = []
        self.known = Variables()
        self.functions: dict[str, Body] = {}
        self.shaped: set[str] = set()

    def script(self, source: str, known: Variables, file: str = "") -> None:
        """Read a whole text; what it sets ends with it."""
        before = self.known, self.folder, self.functions, self.file
        self.known, self.file = known, file or self.file
        if file:
            known.values |= {"0": file, "BASH_SOURCE": file}
        try:
            self.all(parse(source))
        except _EndedError as error:
            self.ended = str(error)
        finally:
            self.known, self.folder, self.functions, self.file = before

    def all(self, nodes: Sequence[Node], *, tested: bool = False) -> bool | None:
        """Read commands one after another; whether the last one succeeds, None where that is not known.

        ``tested``: something depends on that, so that no ``set -e`` ends the script, whatever fails in them.
        """
        status: bool | None = True
        outer, self.tested = self.tested, self.tested or tested
        try:
            for node in nodes:
                status = self.one(node)
        finally:
            self.tested = outer
        return status

    def one(self, node: Node) -> bool | None:
        """Read one; whether it succeeds."""
        if isinstance(node, Simple):
            status = self.simple(node)
            self.leave_open(dict.fromkeys(changed_in(node.words), False), " ".join(node.words))
            if status is False and self.known.ends_early and not (self.tested or self.inside):
                raise _EndedError(" ".join(node.words))
            return status
        if isinstance(node, Chain):
            return self.chain(node.items)
        if isinstance(node, If):
            return self.first_of((self.all(condition, tested=True) if condition else True, body,
                                  _said(condition, node.said)) for condition, body in node.clauses)  # fmt: skip
        return self.first_of(self.cases(node)) if isinstance(node, Case) else self.body(node)

    def body(self, node: Body) -> bool | None:
        """Read a loop's body or a group; a function's is read where it is called."""
        if node.kind == "{":
            return self.all(node.nodes)
        if node.kind == "(":
            with self.aside():
                return self.all(node.nodes)
        elif node.kind == "function":
            self.functions[node.name] = node
        elif not (node.condition and self.carried_out(node)):
            kind, _, counted = node.name.partition(" ")
            names = [] if kind not in ("for", "select") else changed_in([counted]) or counted.split()[:1]
            why = f"the loop {node.name!r}"
            self.leave_open(self.may_repeat(node, node.name, dict.fromkeys(names, False), why), why)
        return None

    def carried_out(self, node: Body) -> bool:
        """Go round a loop as its condition says, as of arguments; false, and nothing has changed, where that is not
        known, or where it starts programs."""
        state, counts = (self.known, self.folder, self.left, self.pushed), (len(self.found), len(self.notes))
        self.known = deepcopy(self.known)
        self.carried += 1
        done = False
        with contextlib.suppress(_LeftError):
            while not done and self.rounds < _ROUNDS:
                self.rounds += 1
                status = self.all(node.condition, tested=True)
                if status is None or any(_starts_one(run.words) for run in self.found[counts[0] :]):
                    break
                done = status is node.name.startswith("until")
                self.all([] if done else node.nodes)
        self.carried -= 1
        if not done:
            self.known, self.folder, self.left, self.pushed = state
            del self.found[counts[0] :], self.notes[counts[1] :]
        return done

    def leave_open(self, names: Mapping[str, bool], why: str) -> None:
        """The values of ``names`` are unknown from here on; each says whether programs that are started see that."""
        for name, exported in names.items():
            self.known.leave_open(name, why)
            if exported:
                self.known.exported[name] = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within, assignments do not last, and what ends the script ends this alone."""
        state = self.known, self.folder, self.left, self.pushed, self.taken
        self.known = deepcopy(self.known)
        try:
            with contextlib.suppress(_EndedError):
                yield
        finally:
            self.known, self.folder, self.left, self.pushed, self.taken = state

    def may_run(
        self, nodes: Sequence[Node], taken: str = "", undecided: Mapping[str, bool] | None = None, why: str = ""
    ) -> dict[str, bool]:
        """Read commands that the script may or may not run; the variables that they change, as of `leave_open`.

        ``taken`` is a note for what is found in them: what has been assumed. ``undecided`` are variables whose values
        are unknown when they begin, and ``why`` that is so.
        """
        before, changed = self.known, dict[str, bool]()
        with self.aside():
            self.taken = [*self.taken, taken] if taken else self.taken
            self.leave_open(undecided or {}, why)
            try:
                self.all(nodes)
            finally:
                changed = before.changed(self.known)
        return changed

    def may_repeat(self, node: Body, inside: str, names: dict[str, bool], why: str) -> dict[str, bool]:
        """`may_run` of what stands in a loop or a function, any number of times.

        The values of ``names`` are unknown in each round; so are those that the rounds change. All of them come back.
        """
        outer, self.inside = self.inside, inside
        while True:
            counts = len(self.found), len(self.notes)
            more = names | self.may_run([*node.condition, *node.nodes], "", names, why)
            if more == names:
                break
            del self.found[counts[0] :], self.notes[counts[1] :]
            names = more
        self.inside = outer
        return names

    def call(self, name: str) -> None:
        """Leave open what a function may change, whatever its arguments are."""
        body, why = self.functions.pop(name), f"the function {name}()"  # which may call itself
        names = self.may_repeat(body, f"{name}()", {"@": False}, why)
        self.functions[name] = body
        self.leave_open({one: exported for one, exported in names.items() if one != "@"}, why)

    def chain(self, items: Sequence[tuple[str, Node]]) -> bool | None:
        """Read commands joined by ``&&`` and ``||``, by ``|``, or one behind ``!``."""
        if items[-1][0] in ("|", "|&"):
            for _, node in items:
                with self.aside():
                    self.one(node)
            return None
        status: bool | None = True
        for number, (joint, node) in enumerate(items):
            if joint and status is None:
                said = "" if joint == "&&" else f"{joint}: taken as if what stands before it had failed"
                names = self.may_run([rest for _, rest in items[number:]], said)
                self.leave_open(names, repr(_said([items[number - 1][1]], "a command")))
                return None
            if joint in ("", "!") or status == (joint == "&&"):
                status = self.all([node], tested=joint == "!" or number < len(items) - 1)
        return not status if status is not None and items[0][0] == "!" else status

    def first_of(self, clauses: Iterable[tuple[bool | None, Sequence[Node], str]]) -> bool | None:
        """Read what follows the first condition that holds; all that may hold where that is not known.

        ``clauses`` are whether it holds, what follows it, and the condition in words.
        """
        unknown, changes = "", []
        for status, body, said in clauses:
            if status and not unknown:
                return self.all(body)
            if status is not False:
                unknown = unknown or said
                changes.append(self.may_run(body, f"taken as if it were reached: {unknown!r} is not known here"))
            if status:
                break
        for names in changes:
            self.leave_open(names, repr(unknown))
        return None if unknown else True

    def cases(self, node: Case) -> Iterator[tuple[bool | None, Sequence[Node], str]]:
        """The patterns of ``case`` as clauses of `first_of`."""
        word = in_environment(text(node.word, self.known), self.known)
        for patterns, body in node.clauses:
            shapes = [in_environment(pattern(one, self.known), self.known) for one in patterns]
            fits = [_fits(word, shape, self.known.any_case) for shape in shapes]
            yield True if True in fits else None if None in fits else False, body, f"case {node.word}"

    def simple(self, node: Simple) -> bool | None:
        """Read a command; whether it succeeds."""
        words = list(node.words)
        given: list[tuple[str, str]] = []
        while words and (match := ASSIGNMENT.match(words[0])):
            given.append((words.pop(0), match[1]))
        if not words:
            for word, _ in given:
                self.assign(word)
            return True
        if words[0].startswith("(("):
            number = arithmetic(words[0][2:-2], self.known)
            return None if number is None else bool(number)
        if words[0] in ("[", "[[", "test"):
            return self.condition(words)
        made = [part for word in words for part in fields(word, self.known)]
        prefix = [f"{name}={text(word.partition('=')[2], self.known)}" for word, name in given]
        return self.command(made, prefix, words, node) if made else True

    def condition(self, words: Sequence[str]) -> bool | None:
        """Whether ``[ ... ]`` holds; what is neither set by the script nor an argument is as it is here."""
        if words[0] == "[[":
            made = [(word, text(word, self.known), pattern(word, self.known)) for word in words]
        else:  # which has no patterns, and does not see what is quoted
            made = [(part, part, glob.escape(part)) for word in words for part in fields(word, self.known)]
        made = made[1:] if words[0] == "test" else made[1:-1]
        known = self.known
        filled = [(word, in_environment(part, known), in_environment(shape, known)) for word, part, shape in made]
        number = partial(arithmetic, known=known) if words[0] == "[[" else _whole
        if words[0] == "[[" and known.any_case:
            filled = [(word, part and part.lower(), shape and shape.lower()) for word, part, shape in filled]
        found = _holds(filled, number)
        for left in [] if found is None else [left for _, part, _ in made for left in left_to_the_shell(part)]:
            name = left.strip("${}")
            said = "as it is set here" if name in os.environ else "as empty, it is not set here"
            said = 'as empty: "bash FILE ARGUMENTS" fills it in' if name.isdigit() else said
            self.notes.append(f"{left} in {' '.join(words)} is taken {said}")
        return found

    def assign(self, word: str) -> None:
        """``NAME=value``, ``NAME+=value``, ``NAME=(values)``; an array's one place is not followed."""
        match = ASSIGNMENT.match(word)
        assert match
        name, value = match[1], word[match.end() :]
        if name in self.known.fixed:
            self.notes.append(f"{word} is left out: {name} is readonly there")
            return
        self.notes += _at_home(value)
        is_number = re.fullmatch(r"0|-?[1-9]\d*", value) and not match[3]
        if match[2] or (name in self.shaped and not is_number):
            self.known.leave_open(name, word)
        elif value.startswith("("):
            inner = [part for part in tokens(value[1:-1]) if not isinstance(part, Operator)]
            made = [[UNREAD + one] if _PLACED.match(one) else fields(one, self.known) for one in inner]
            self.known.set(name, [part for parts in made for part in parts], add=bool(match[3]))
        else:
            self.known.set(name, text(value, self.known), add=bool(match[3]))

    def command(self, words: list[str], prefix: list[str], written: Sequence[str], node: Simple) -> bool | None:
        """Read a command that is no condition."""
        name = words[0]
        if name in _DECLARE:
            self.declare(written)
        elif name == "unset":
            for one in words[1:]:
                if "[" in one:
                    self.known.leave_open(one.partition("[")[0], " ".join(words))
                for known in (self.known.values, self.known.undecided, self.known.exported):
                    known.pop(one, None)
        elif name == "shift" and self.known.counted("@") is None:
            self.known.leave_open("@", "shift")
        elif name == "shift" and self.known.arguments is not None:
            del self.known.arguments[: int(words[1]) if words[1:] and words[1].isdigit() else 1]
        elif name == "set":
            self.set(words[1:])
        elif name == "shopt" and "nocasematch" in words:
            self.known.any_case = "-s" in words
        elif name in ("exit", "return"):
            raise _EndedError(" ".join(words))
        elif name in ("break", "continue") and self.carried:
            raise _LeftError
        elif name == "false":
            return False
        elif name in ("cd", "pushd", "popd"):
            self.go(name, words[1:])
        elif name == "eval":
            said = " ".join(words[1:])
            if said.startswith("$"):
                self.notes.append(f"eval {said}: what the shell fills in may set variables, which is not known here")
                self.leave_open(dict.fromkeys(re.findall(r"([A-Za-z_]\w*)\+?=", said), False), f"eval {said}")
            return self.all(parse(said.replace(LITERAL, "$")))
        elif name in ("source", "."):
            return self.source(words)
        elif name in self.functions:
            self.notes.append(f"{' '.join(words)} is the script's function, which is not carried out here")
            self.call(name)
        elif not self.another(words, prefix):
            self.found.append(self.started(prefix + words, node))
            return True if name in _TRUE else None
        return True

    def set(self, words: Sequence[str]) -> None:
        """``set`` with arguments for the script, with what exports all that follows, or with what ends it early."""
        rest = list(words)
        while rest and re.fullmatch(r"[-+]\w*", rest[0]) and rest[0] != "--":
            option = rest.pop(0)
            named = rest.pop(0) if option.endswith("o") and rest else ""
            if "a" in option or named == "allexport":
                self.known.all_exported = option[0] == "-"
            if "e" in option or named == "errexit":
                self.known.ends_early = option[0] == "-"
        if rest:
            self.known.arguments = rest[rest[0] == "--" :]

    def go(self, name: str, words: Sequence[str]) -> None:
        """``cd``, ``pushd`` and ``popd``."""
        before = self.folder
        if name == "pushd":
            self.pushed = [*self.pushed, before]
        if name == "popd":
            *self.pushed, self.folder = [*self.pushed] or [before]
        elif words[-1:] == ["-"]:
            self.folder = self.left
        elif words and words[-1][0:1] not in ("+", ""):
            self.folder = str(PurePosixPath(before) / words[-1])
        self.left = before

    def declare(self, written: Sequence[str]) -> None:
        """``export`` and its like."""
        options = [word for word in written[1:] if word.startswith("-")]
        letters = "".join(options)
        exports = written[0] == "export" or "x" in letters
        for word in (word for word in written[1:] if word not in options):
            match = ASSIGNMENT.match(word)
            name = match[1] if match else text(word, self.known)
            if written[0] not in ("export", "readonly") and "n" in letters:
                raise UserError(f"{' '.join(written)}: another name of a variable is not read here, write its own")
            if set(letters) & set("ilu"):
                self.shaped.add(name)
            if match:
                self.assign(word)
            if written[0] == "readonly" or "r" in letters:
                self.known.fixed.add(name)
            if exports and not NAME.fullmatch(name):
                self.notes.append(f"{written[0]} {word} is left out: what it sets is not known here")
            elif exports and "-n" in options:
                self.known.exported.pop(name, None)
            elif exports:
                self.known.exported[name] = None

    def source(self, words: Sequence[str]) -> bool | None:
        """A script of assignments, which last."""
        path = self.path(words[1]) if len(words) > 1 else None
        if path is None:
            self.notes.append(f"{' '.join(words)} is left out: there is no such file here")
            return True
        if "activate" not in path.name and path.resolve() not in self.read:
            self.read.append(path.resolve())
            self.all(parse(_text_of(path)))
            self.read.pop()
        return True

    def path(self, name: str) -> Path | None:
        """A file that is named, from the folder that ``cd`` went to or from here."""
        return next((path for path in (Path(self.folder) / name, Path(name)) if path.is_file()), None)

    def another(self, words: Sequence[str], prefix: Sequence[str]) -> bool:
        """Read the script that a command starts, ``bash FILE ARGUMENTS``; false where it starts none."""
        rest = list(words)
        while rest and (rest[0] in BEFORE or ASSIGNMENT.match(rest[0])):
            rest.pop(0)
        if rest[:1] and rest[0] in SHELLS:
            rest.pop(0)
            while rest and rest[0].startswith("-") and not _IS_TEXT.fullmatch(rest[0]):
                rest.pop(0)
            if not rest or (not _IS_TEXT.fullmatch(rest[0]) and any(word.endswith(".py") for word in rest)):
                return False  # a wrapper hands its arguments on
        elif not (rest and rest[0].endswith(".sh")):
            return False
        file = ""
        if _IS_TEXT.fullmatch(rest[0]):
            source, arguments = "".join(rest[1:2]).replace(LITERAL, "$"), rest[3:]
        else:
            path = self.path(rest[0])
            if path is None:
                raise UserError(f'bash {rest[0]}: no such file here; give the command in it: "$(cat {rest[0]})"')
            source, arguments = _text_of(path), rest[1:]
            file = str(path.resolve())
            if path.resolve() in self.read:
                raise UserError(f"{rest[0]} starts itself: give the command in it alone")
        self.read.append(Path(file))
        self.script(source, self.handed_on(arguments, [*prefix, *words]), file)
        self.read.pop()
        return True

    def handed_on(self, arguments: list[str], words: Sequence[str]) -> Variables:
        """What a script that this one starts knows at its beginning."""
        exported = self.known.exported
        values = {name: value for name, value in self.known.values.items() if name in exported}
        undecided = {name: why for name, why in self.known.undecided.items() if name in exported}
        known = Variables(values, list(arguments), dict(exported), undecided)
        own = (word for word in words if word not in BEFORE)
        for word in itertools.takewhile(ASSIGNMENT.match, own):
            name, _, value = word.partition("=")
            known.set(name, value)
            known.exported[name] = None
        return known

    def started(self, words: list[str], node: Simple) -> Run:
        """A command with what it is started with."""
        known, notes = self.known, [*self.taken, *(note for word in node.words for note in _at_home(word))]
        for sign, target in node.redirections:
            if sign in _OUTPUT:
                said = text(target, known)
                notes.append(f"{sign} {said} is left out: send the output of this command where you want it")
        environment = []
        for name in known.exported:
            if name in known.undecided:
                notes.append(f"{name} is not set here: {known.undecided[name]} decides it")
            elif (value := known.text(name)) is not None:
                environment.append(f"{name}={value}")
        empty = {before: word for before, word in itertools.pairwise(node.words) if not fields(word, known)}
        return Run(words, environment, self.folder, self.inside, deepcopy(known), self.file, notes, empty)


def _text_of(path: Path) -> str:
    with refusals(str(path)):
        return path.read_text(encoding="utf-8", errors="replace")


def _starts_one(words: Sequence[str]) -> bool:
    """Whether these may start a Python program."""
    return any(word.endswith(".py") or word in ("-m", "--module") for word in words)


def _at_home(word: str) -> list[str]:
    """What is to be said of a word whose tilde is quoted, for all programs here take it for the home folder."""
    quoted = re.findall(r"(?:^|=)([\"'\\]~/.*)", word, re.DOTALL)
    return [f"{one} begins in the home folder here; there, as it is quoted, in a folder called ~" for one in quoted]


def _said(condition: Sequence[Node], otherwise: str) -> str:
    """A condition in words."""
    last = condition[-1] if condition else None
    return " ".join(last.words) if isinstance(last, Simple) else otherwise


_Word = tuple[str, str | None, str | None]  # as written; filled in, and as a pattern, None where that is not known
_VALUES = {True: "true", False: "", None: None}


def _holds(words: list[_Word], number: Callable[[str], int | None]) -> bool | None:
    """What stands between ``[`` and ``]``: true, false, or None where it is not known.

    What a shell can not read does not hold. ``number`` is of a text, None where it is not known, a ValueError where it
    is none.
    """
    while ("(" in (names := [word for word, _, _ in words])) and ")" in names:
        end = names.index(")")
        begin = end - names[end::-1].index("(")
        value = _VALUES[_holds(words[begin + 1 : end], number)]
        words = [*words[:begin], ("", value, value), *words[end + 1 :]]
    if len(words) == 3 and names[1] in (*_EQUAL, *_NUMBERS, *_OPEN):
        return _compared(words[0][1], names[1], words[2][2 if names[1] in _EQUAL else 1], number)
    for joints, deciding in ((("||", "-o"), True), (("&&", "-a"), False)):
        if at := next((i for i, name in enumerate(names) if name in joints), 0):
            found = [_holds(words[:at], number), _holds(words[at + 1 :], number)]
            return deciding if deciding in found else None if None in found else not deciding
    if names[:1] == ["!"]:
        holds = _holds(words[1:], number)
        return None if holds is None else not holds
    if len(words) == 2 and names[0] in ("-z", "-n"):
        return None if words[1][1] is None else (words[1][1] == "") == (names[0] == "-z")
    if len(words) == 2 and re.fullmatch("-[a-zA-Z]", names[0]):
        return None
    return False if len(words) != 1 else None if words[0][1] is None else words[0][1] != ""


def _compared(left: str | None, joint: str, right: str | None, number: Callable[[str], int | None]) -> bool | None:
    """A comparison of two texts or numbers."""
    if joint in _EQUAL:
        fits = _fits(left, right)
        return None if fits is None else fits == (joint != "!=")
    if joint in _OPEN or left is None or right is None:
        return None
    try:
        one, two = number(left), number(right)
    except ValueError:
        return False
    return None if one is None or two is None else _NUMBERS[joint](one, two)


def _whole(written: str) -> int:
    """A number as ``[`` takes it, which does not calculate; a ValueError where it is none."""
    if not re.fullmatch(r"\s*[-+]?[0-9]+\s*", written):
        raise ValueError
    return int(written)


def _fits(word: str | None, shape: str | None, any_case: bool = False) -> bool | None:
    if word is None or shape is None or EXTENDED.search(shape):
        return None
    return fnmatch.fnmatchcase(*((word.lower(), shape.lower()) if any_case else (word, shape)))
