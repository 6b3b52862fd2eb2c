"""A shell's text as a tree: commands, what joins them, and what decides about them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from training.migrate.shell.words import NAME, REDIRECTIONS, Operator, tokens
from training.utils.errors import UserError

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\[[^\]]*\])?(\+?)=")
LOOPS = ("for", "while", "until", "select")
_SETTERS = ("read", "mapfile", "readarray", "getopts")
_CALCULATED = re.compile(r"([A-Za-z_]\w*)(?:\[[^\]]*\])?\s*(?:(?:[-+*/%&^|]|<<|>>)?=(?!=)|\+\+|--)|(?:\+\+|--)\s*(\w+)")
_ENDS = ("then", "elif", "else", "fi", "do", "done", "esac", "}", ")", ";;", ";&", ";;&")


@dataclass
class Simple:
    """A command: its words as they are written, and where its output goes: operator and target."""

    words: list[str]
    redirections: list[tuple[str, str]]


@dataclass
class Chain:
    """Commands joined by ``&&`` and ``||``, or by ``|``; the first has an empty operator, or ``!``."""

    items: list[tuple[str, Node]]


@dataclass
class If:
    """Conditions with what follows each; the last, of ``else``, has none."""

    clauses: list[tuple[list[Node], list[Node]]]
    said: str


@dataclass
class Case:
    """A word, and patterns with what follows each."""

    word: str
    clauses: list[tuple[list[str], list[Node]]]


@dataclass
class Body:
    """What stands in a loop, a function, ``{ }`` or ``( )``.

    Attributes:
        kind: "loop", "function", "{" or "(".
        name: a loop's first words, a function's name.
        condition: of ``while`` and ``until``.
    """

    kind: str
    name: str
    nodes: list[Node] = field(default_factory=list)
    condition: list[Node] = field(default_factory=list)


Node = Simple | Chain | If | Case | Body


def changed_in(words: Sequence[str]) -> list[str]:
    """The variables that a command sets in another way than by ``NAME=value``: by arithmetic, by a built-in."""
    name, *rest = [*itertools.dropwhile(ASSIGNMENT.match, words), ""]
    sums = rest if name == "let" else [part for word in words for part in re.findall(r"\(\((.*)\)\)", word, re.DOTALL)]
    found = [one or other for part in sums for one, other in _CALCULATED.findall(part)]
    if name in _SETTERS or (name == "printf" and "-v" in rest):
        found += filter(NAME.fullmatch, rest)
    return found


def parse(text: str) -> list[Node]:
    """The commands of a text.

    Raises:
        UserError: a quote or a bracket is open, or a word of the shell's has no other end.
    """
    parser = _Parser(tokens(text))
    nodes = parser.commands()
    if parser.peek():
        raise UserError(f"{parser.peek()!r} stands there without a beginning: give whole commands")
    return nodes


class _Parser:
    """Reads tokens from the first to the last."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.at = words, 0

    def peek(self) -> str:
        """The next token, empty behind the last."""
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self) -> str:
        """The next token, which is one less."""
        self.at += 1
        return self.words[self.at - 1]

    def is_operator(self, *operators: str) -> bool:
        """Whether the next token is one of these, and no word."""
        return isinstance(self.peek(), Operator) and self.peek() in operators

    def since(self, begin: int) -> str:
        """What has been read from a place on, in words."""
        return " ".join(self.words[begin : self.at]).strip("; \n")

    def skip(self, *operators: str) -> None:
        """Read over separators."""
        while self.is_operator(*operators):
            self.at += 1

    def expect(self, *ends: str) -> str:
        """Take one of these, and refuse anything else."""
        if self.peek() not in ends:
            before = repr(self.peek()) if self.peek() else "the end"
            raise UserError(f"{' or '.join(ends)} is missing before {before}: give whole commands")
        return self.take()

    def commands(self) -> list[Node]:
        """All commands up to a word that ends what they stand in, such as ``done``."""
        nodes: list[Node] = []
        while True:
            self.skip(";", "\n")
            if not self.peek() or self.peek() in _ENDS:
                return nodes
            node = self.chain()
            nodes.append(Body("(", "", [node]) if self.is_operator("&") else node)  # a shell of its own does it
            self.skip("&")

    def joined(self, part: Callable[[], Node], *operators: str) -> Node:
        """Parts with operators between them; a single one as it is."""
        items = [("", part())]
        while self.is_operator(*operators):
            operator = self.take()
            self.skip("\n")
            items.append((operator, part()))
        return Chain(items) if len(items) > 1 else items[0][1]

    def chain(self) -> Node:
        """Up to what separates commands."""
        return self.joined(self.pipe, "&&", "||")

    def pipe(self) -> Node:
        """Commands of which each reads the last one's output."""
        return Chain([(self.take(), self.pipe())]) if self.peek() == "!" else self.joined(self.command, "|", "|&")

    def command(self) -> Node:
        """One command: a simple one, or a compound such as ``if ... fi``."""
        first = self.peek()
        node: Node
        if first == "if":
            node = self.branches()
        elif first == "case":
            node = self.case()
        elif first in LOOPS:
            node = self.loop()
        elif first == "function":
            self.take()
            node = self.function(self.take() if self.peek() else "")
        elif first == "{" or self.is_operator("("):
            node = Body(str(self.take()), "", self.commands())
            self.expect("}", ")")
        else:
            return self.simple()
        while self.is_operator(*REDIRECTIONS):
            self.redirection()
        return node

    def branches(self) -> If:
        """``if``, ``elif`` and ``else``."""
        begin, node = self.at, If([], "")
        word = self.take()
        while word != "fi":
            condition: list[Node] = []
            if word != "else":
                condition = self.commands()
                node.said = node.said or self.since(begin)
                self.expect("then")
            node.clauses.append((condition, self.commands()))
            word = self.expect("elif", "else", "fi") if word != "else" else self.expect("fi")
        return node

    def loop(self) -> Body:
        """A loop."""
        begin = self.at
        kind = self.take()
        condition: list[Node] = []
        if kind in ("for", "select"):
            while self.peek() and self.peek() not in (";", "\n", "do"):
                self.take()
        else:
            condition = self.commands()
        said = self.since(begin)
        self.skip(";", "\n")
        self.expect("do")
        node = Body("loop", said, self.commands(), condition)
        self.expect("done")
        return node

    def case(self) -> Case:
        """``case WORD in PATTERN) ... ;; esac``."""
        self.take()
        node = Case(self.take() if self.peek() else "", [])
        self.skip("\n")
        self.expect("in")
        self.skip("\n")
        while self.peek() != "esac":
            self.skip("(")
            patterns = [str(self.take())] if self.peek() else []
            while self.peek() == "|":
                self.take()
                patterns.append(self.take())
            self.expect(")")
            node.clauses.append((patterns, self.commands()))
            if self.peek() in (";&", ";;&"):
                raise UserError(f"case {node.word}: {self.peek()} is not read here: end each branch with ;;")
            if self.peek() != "esac":
                self.expect(";;")
            self.skip("\n")
        self.take()
        return node

    def redirection(self) -> tuple[str, str]:
        """An operator and its target."""
        operator = str(self.take())
        return operator, self.take() if self.peek() and not isinstance(self.peek(), Operator) else ""

    def function(self, name: str) -> Body:
        """What follows a function's name."""
        self.skip("(", ")", "\n")
        return Body("function", name, [self.command()])

    def simple(self) -> Node:
        """A command's words, or a function."""
        node = Simple([], [])
        while self.peek():
            if self.is_operator(*REDIRECTIONS):
                node.redirections.append(self.redirection())
            elif not isinstance(self.peek(), Operator):
                node.words.append(self.take())
            else:
                break
        if self.peek() == "(" and len(node.words) == 1:
            return self.function(node.words[0])
        if not node.words and not node.redirections:
            raise UserError(f"{self.peek()!r} stands there without a command: give whole commands")
        return node
