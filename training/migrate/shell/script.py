"""What a script does up to the programs that it starts: assignments, conditions, exports; nothing is run for that."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    uncounted,
)
from training.migrate.shell.grammar import (
    ASSIGNMENT,
    DECLARE,
    Body,
    Case,
    Chain,
    If,
    Node,
    Pipe,
    Simple,
    assigned_in,
    changed_in,
    jumps,
    parse,
)
from training.migrate.shell.words import LITERAL, NAME, Operator, left_to_the_shell, tokens
from training.utils.errors import UserError

BEFORE = ("nohup", "time", "exec", "env", "sudo", "command")  # of a command's own words
SHELLS = ("bash", "sh")
_TRUE = ("true", ":", "echo", "cd", "mkdir", "set", "printf", "pushd", "popd", "ulimit", "umask", "local", "shift")
_OUTPUT = (">", ">>", "&>", "&>>", ">|")
_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}
_EQUAL = ("=", "==", "!=")
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
    file: str = ""
    notes: list[str] = field(default_factory=list)
    empty: Mapping[str, str] = field(default_factory=dict)


class _EndedError(Exception):
    """The script ends here."""


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
        functions: name -> what it sets, as `assigned_in` has it.
        shaped: variables that make something else of what they are given, a sum or capitals: ``declare -i``.
        read: the files that are being read.
        ended: the command that ended a script before its last one.
        rounds: of loops that have been carried out.
    """

    def __init__(self) -> None:
        self.found: list[Run] = []
        self.notes: list[str] = []
        self.folder, self.inside, self.file = "", "", ""
        self.left, self.pushed = "", list[str]()
        self.taken: list[str] = []
        self.ended, self.rounds = "", 0
        self.read: list[Path] = []
        self.known = Variables()
        self.functions: dict[str, dict[str, bool]] = {}
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

        ``tested``: something hangs on that, so that no ``set -e`` ends the script.
        """
        status: bool | None = True
        for node in nodes:
            status = self.one(node)
            if status is False and self.known.ends_early and isinstance(node, Simple) and not (tested or self.inside):
                raise _EndedError(" ".join(node.words))
        return status

    def one(self, node: Node) -> bool | None:
        """Read one; whether it succeeds."""
        if isinstance(node, Simple):
            return self.simple(node)
        if isinstance(node, Chain):
            return self.chain(node.items)
        if isinstance(node, If):
            return self.branches(node)
        if isinstance(node, Case):
            return self.case(node)
        if isinstance(node, Pipe):
            if len(node.nodes) == 1:
                status = self.one(node.nodes[0])
                return None if status is None else not status
            for part in node.nodes:
                self.apart([part])
            return None
        assert isinstance(node, Body)
        return self.body(node)

    def body(self, node: Body) -> bool | None:
        """Read a loop's or a function's body, or a group."""
        if node.kind == "{":
            return self.all(node.nodes)
        if node.kind == "(":
            return self.apart(node.nodes)
        if node.condition and not jumps(node.nodes) and self.carried_out(node):
            return True
        names = assigned_in(node.nodes if node.kind == "function" else [node])
        if node.kind == "function":
            names.pop("@", None)  # its own arguments
        why = f"the loop {node.name!r}" if node.kind == "loop" else f"the function {node.name}()"
        outer, self.inside = self.inside, node.name if node.kind == "loop" else f"{node.name}()"
        self.apart([*node.condition, *node.nodes], dict.fromkeys(names, why))
        self.inside = outer
        if node.kind == "loop":
            self.leave_open(names, why)
        else:
            self.functions[node.name] = names
        return None

    def carried_out(self, node: Body) -> bool:
        """Go round a loop as its condition says, as of arguments; false, and nothing has changed, where that is not
        known, or where it starts programs."""
        known, folders, counts = self.known, (self.folder, self.left, self.pushed), (len(self.found), len(self.notes))
        self.known = known.copy()
        while self.rounds < _ROUNDS:
            self.rounds += 1
            status = self.all(node.condition, tested=True)
            if status is None or any(_starts_one(run.words) for run in self.found[counts[0] :]):
                break
            if status is node.name.startswith("until"):
                return True
            self.all(node.nodes)
        self.known, (self.folder, self.left, self.pushed) = known, folders
        del self.found[counts[0] :], self.notes[counts[1] :]
        return False

    def leave_open(self, names: Mapping[str, bool], why: str) -> None:
        """From here on these are not known, nor those that are exported."""
        for name, exported in names.items():
            self.known.leave_open(name, why)
            if exported:
                self.known.exported[name] = None

    def apart(self, nodes: Sequence[Node], undecided: dict[str, str] | None = None, taken: str = "") -> bool | None:
        """Read commands whose assignments do not last; those that are undecided are so from their beginning."""
        known, folders, conditions = self.known, (self.folder, self.left, self.pushed), self.taken
        self.known = known.copy()
        self.taken = [*conditions, taken] if taken else conditions
        for name, why in (undecided or {}).items():
            self.known.leave_open(name, why)
        try:
            return self.all(nodes)
        except _EndedError:
            return None
        finally:
            self.known, (self.folder, self.left, self.pushed), self.taken = known, folders, conditions

    def chain(self, items: Sequence[tuple[str, Node]]) -> bool | None:
        """Read commands joined by ``&&`` and ``||``."""
        status: bool | None = True
        for number, (operator, node) in enumerate(items):
            if operator and status is None:
                rest = [node for _, node in items[number:]]
                said = "" if operator == "&&" else f"{operator}: taken as if what stands before it had failed"
                self.apart([Chain([("", node), *items[number + 1 :]])], taken=said)
                self.leave_open(assigned_in(rest), repr(_said([items[number - 1][1]], "a command")))
                return None
            if not operator or status == (operator == "&&"):
                status = self.one(node)
        return status

    def branches(self, node: If) -> bool | None:
        """Read what follows the condition that holds; all that may hold where that is not known."""
        unknown = ""
        for condition, body in node.clauses:
            status = True if not condition else self.all(condition, tested=True)
            if status is False:
                continue
            if not unknown and status:
                return self.all(body)
            unknown = unknown or _said(condition, node.said)
            self.apart(body, taken=f"taken as if it were reached: {unknown!r} is not known here")
            if status:
                break
        if unknown:
            self.leave_open(assigned_in([node]), repr(unknown))
        return None if unknown else True

    def case(self, node: Case) -> bool | None:
        """Read what follows the pattern that fits."""
        word = in_environment(text(node.word, self.known), self.known)
        unknown = False
        for patterns, body in node.clauses:
            fits = [_fits(word, in_environment(pattern(one, self.known), self.known)) for one in patterns]
            if True in fits and not unknown:
                return self.all(body)
            if True in fits or None in fits:
                unknown = True
                self.apart(body, taken=f"taken as if it were reached: 'case {node.word}' is not known here")
        if unknown:
            self.leave_open(assigned_in([node]), f"'case {node.word}'")
        return None if unknown else True

    def simple(self, node: Simple) -> bool | None:
        """Read a command; whether it succeeds."""
        words = list(node.words)
        given: list[tuple[str, str]] = []
        while words and (match := ASSIGNMENT.match(words[0])):
            given.append((words[0], match[1]))
            words.pop(0)
        if not words:
            for word, _ in given:
                self.assign(word)
            self.leave_open(changed_in(node.words), " ".join(node.words))
            return True
        if words[0].startswith("(("):
            number = arithmetic(words[0][2:-2], self.known)
            self.leave_open(changed_in(words), words[0])
            return None if number is None else bool(number)
        if words[0] in ("[", "[[", "test"):
            return self.condition(words)
        made = [part for word in words for part in fields(word, self.known)]
        prefix = [f"{name}={text(word.partition('=')[2], self.known)}" for word, name in given]
        status = self.command(made, prefix, words, node) if made else True
        if made and made[0] != "eval":  # which has been read
            self.leave_open(changed_in(words), " ".join(words))
        return status

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
        found = _Condition(filled, number).value()
        self.leave_open(changed_in(words), " ".join(words))
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
        self.notes += _at_home(value)
        is_number = re.fullmatch(r"0|-?[1-9]\d*", value) and not match[3]
        if match[2] or (name in self.shaped and not is_number):
            self.known.leave_open(name, word)
        elif value.startswith("("):
            inner = [part for part in tokens(value[1:-1]) if not isinstance(part, Operator)]
            loose = uncounted(inner, self.known) or (bool(match[3]) and name in self.known.uncounted)
            self.known.set(name, [part for one in inner for part in fields(one, self.known)], add=bool(match[3]))
            self.known.uncounted = self.known.uncounted - {name} | ({name} if loose else set())
        else:
            self.known.set(name, text(value, self.known), add=bool(match[3]))

    def command(self, words: list[str], prefix: list[str], written: Sequence[str], node: Simple) -> bool | None:
        """Read a command that is no condition."""
        name = words[0]
        if name in DECLARE:
            self.declare(written)
        elif name == "unset":
            for one in words[1:]:
                if "[" in one:
                    self.known.leave_open(one.partition("[")[0], " ".join(words))
                self.known.values.pop(one, None)
                self.known.undecided.pop(one, None)
                self.known.exported.pop(one, None)
        elif name == "shift" and "@" in self.known.uncounted:
            self.known.leave_open("@", "shift")
        elif name == "shift" and self.known.arguments is not None:
            del self.known.arguments[: int(words[1]) if words[1:] and words[1].isdigit() else 1]
        elif name == "set":
            loose = uncounted(written, self.known)
            self.set(words[1:])
            if loose:
                self.known.uncounted |= {"@"}
        elif name in ("exit", "return"):
            raise _EndedError(" ".join(words))
        elif name == "false":
            return False
        elif name in ("cd", "pushd", "popd"):
            self.go(name, words[1:])
        elif name == "eval":
            said = " ".join(words[1:])
            if said.startswith("$"):
                self.notes.append(f"eval {said}: what the shell fills in may set variables, which is not known here")
                self.leave_open(changed_in(words), f"eval {said}")
            return self.all(parse(said.replace(LITERAL, "$")))
        elif name in ("source", "."):
            return self.source(words)
        elif name in self.functions:
            self.notes.append(f"{' '.join(words)} is the script's function, which is not carried out here")
            self.leave_open(self.functions[name], f"the function {name}()")
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
        exports = written[0] == "export" or any("x" in option for option in options)
        for word in (word for word in written[1:] if word not in options):
            match = ASSIGNMENT.match(word)
            name = match[1] if match else text(word, self.known)
            if written[0] not in ("export", "readonly") and any("n" in option for option in options):
                raise UserError(f"{' '.join(written)}: another name of a variable is not read here, write its own")
            if set("".join(options)) & set("ilu"):
                self.shaped.add(name)
            if match:
                self.assign(word)
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
            self.all(parse(path.read_text(encoding="utf-8", errors="replace")))
            self.read.pop()
        return True

    def path(self, name: str) -> Path | None:
        """A file that is named, from the folder that ``cd`` went to or from here."""
        return next((path for path in (Path(self.folder) / name, Path(name)) if path.is_file()), None)

    def another(self, words: Sequence[str], prefix: Sequence[str]) -> bool:
        """Read the script that a command starts, ``bash FILE ARGUMENTS``; false where it starts none.

        Raises:
            UserError: there is no such file.
        """
        rest = list(words)
        while rest and (rest[0] in BEFORE or ASSIGNMENT.match(rest[0])):
            rest.pop(0)
        called = rest[:1] and rest[0] in SHELLS
        if not rest or any(word.endswith(".py") for word in rest if called):
            return False  # a wrapper hands its arguments on
        if called:
            rest.pop(0)
            while rest and rest[0].startswith("-") and rest[0] != "-c":
                rest.pop(0)
        elif not rest[0].endswith(".sh"):
            return False
        if not rest:
            return False
        file = ""
        if rest[0] == "-c":
            source, arguments = "".join(rest[1:2]).replace(LITERAL, "$"), rest[3:]
        else:
            path = self.path(rest[0])
            if path is None:
                raise UserError(f'bash {rest[0]}: no such file here; give the command in it: "$(cat {rest[0]})"')
            source, arguments = path.read_text(encoding="utf-8", errors="replace"), rest[1:]
            file = str(path.resolve())
            if path.resolve() in self.read:
                raise UserError(f"{rest[0]} starts itself: give the command in it alone")
        self.read.append(Path(file))
        self.script(source, self.handed_on(arguments, [*prefix, *words]), file)
        self.read.pop()
        return True

    def handed_on(self, arguments: list[str], words: Sequence[str]) -> Variables:
        """What a script that this one starts knows at its beginning."""
        known = self.known.copy()
        known.values = {name: value for name, value in known.values.items() if name in known.exported}
        known.undecided = {name: why for name, why in known.undecided.items() if name in known.exported}
        known.arguments, known.all_exported, known.ends_early = list(arguments), False, False
        for word in words:
            if word in BEFORE:
                continue
            if not ASSIGNMENT.match(word):
                break
            name, _, value = word.partition("=")
            known.set(name, value)
            known.exported[name] = None
        return known

    def started(self, words: list[str], node: Simple) -> Run:
        """A command with what it is started with."""
        known, notes = self.known, [*self.taken, *(note for word in node.words for note in _at_home(word))]
        for operator, target in node.redirections:
            if operator in _OUTPUT:
                said = text(target, known)
                notes.append(f"{operator} {said} is left out: send the output of this command where you want it")
        environment = []
        for name in known.exported:
            if name in known.undecided:
                notes.append(f"{name} is not set here: {known.undecided[name]} decides it")
            elif (value := known.text(name)) is not None:
                environment.append(f"{name}={value}")
        empty = {before: word for before, word in itertools.pairwise(node.words) if not fields(word, known)}
        return Run(words, environment, self.folder, self.inside, known.copy(), self.file, notes, empty)


def _starts_one(words: Sequence[str]) -> bool:
    """Whether these may start a Python program."""
    return any(word.endswith(".py") or word in ("-m", "--module") for word in words)


def _at_home(word: str) -> list[str]:
    """What is to be said of a word whose tilde is quoted, for all programs here take it for the home folder."""
    quoted = re.search(r"(?:^|=)([\"'\\]~/.*)", word, re.DOTALL)
    return (
        [f"{quoted[1]} begins in the home folder here; there, as it is quoted, in a folder called ~"] if quoted else []
    )


def _said(condition: Sequence[Node], otherwise: str) -> str:
    """A condition in words."""
    last = condition[-1] if condition else None
    return " ".join(last.words) if isinstance(last, Simple) else otherwise


class _Condition:
    """What stands between ``[`` and ``]``: true, false, or None where it is not known."""

    def __init__(
        self, words: Sequence[tuple[str, str | None, str | None]], number: Callable[[str], int | None]
    ) -> None:
        self.words = list(words)  # as written; filled in, and as a pattern, None where that is not known
        self.number = number  # of a text, None where it is not known, a ValueError where it is none

    def value(self) -> bool | None:
        """Whether it holds; what a shell can not read does not."""
        try:
            found = self.either()
        except IndexError:
            return False
        return found if not self.words else False

    def next(self) -> str:
        """The next word as written, empty behind the last."""
        return self.words[0][0] if self.words else ""

    def either(self) -> bool | None:
        """Parts joined by ``||``."""
        found = self.both()
        while self.next() in ("||", "-o"):
            self.words.pop(0)
            other = self.both()
            found = True if found or other else None if None in (found, other) else False
        return found

    def both(self) -> bool | None:
        """Parts joined by ``&&``."""
        found = self.single()
        while self.next() in ("&&", "-a"):
            self.words.pop(0)
            other = self.single()
            found = False if False in (found, other) else None if None in (found, other) else True
        return found

    def single(self) -> bool | None:
        """A comparison, a question about one word, or a part in brackets."""
        word, value, _ = self.words.pop(0)
        if word == "!":
            found = self.single()
            return None if found is None else not found
        if word == "(":
            found = self.either()
            self.words.pop(0)
            return found
        if len(self.words) >= 2 and (self.next() in (*_EQUAL, *_NUMBERS, "=~", "<", ">", "-nt", "-ot", "-ef")):
            operator, (_, right, shape) = self.words.pop(0)[0], self.words.pop(0)
            if operator in _NUMBERS:
                return self.counted(value, operator, right)
            return _compared(value, operator, shape if operator in _EQUAL else right)
        if word.startswith("-") and len(word) == 2 and self.words and self.next() not in ("&&", "||", "-a", "-o", ")"):
            _, right, _ = self.words.pop(0)
            if word in ("-z", "-n"):
                return None if right is None else (right == "") == (word == "-z")
            return None
        return None if value is None else value != ""

    def counted(self, left: str | None, operator: str, right: str | None) -> bool | None:
        """A comparison of numbers."""
        if left is None or right is None:
            return None
        try:
            one, two = self.number(left), self.number(right)
        except ValueError:
            return False
        return None if one is None or two is None else _NUMBERS[operator](one, two)


def _whole(written: str) -> int:
    """A number as ``[`` takes it, which does not calculate.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"\s*[-+]?[0-9]+\s*", written):
        raise ValueError
    return int(written)


def _fits(word: str | None, shape: str | None) -> bool | None:
    if word is None or shape is None or EXTENDED.search(shape):
        return None
    return fnmatch.fnmatchcase(word, shape)


def _compared(left: str | None, operator: str, right: str | None) -> bool | None:
    fits = _fits(left, right) if operator in _EQUAL else None
    return None if fits is None else fits == (operator != "!=")
