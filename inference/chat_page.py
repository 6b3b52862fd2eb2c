"""The page itself: layout, what each button does, and how answers grow side by side."""

from __future__ import annotations

import contextlib
import html
import logging
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from answer_rewards import AnswerRewards
from chat_models import ChatModel
from chat_sessions import LETTERS, SAME, Session, Turn
from chat_stream import Answer, SamplingArguments, checked_sampling, stream_answer, untrainable

from training.utils.data.formats.columns import convert
from training.utils.data.formats.conversations import Dropped
from training.utils.data.report import DataReport
from training.utils.data.template import RowError
from training.utils.data.tokenise import pair_rows
from training.utils.errors import UserError

EXAMPLES = (
    "Tell me a short story about a lost seal.",
    "How do I keep bread fresh for a few days?",
    "Why is the sky blue?",
    "Write a kind note to a leaving colleague.",
)
GONE_SECONDS = 5.0  # that a reload waits for the answers of before to end
REFRESH_SECONDS = 0.1  # between two updates of the browser, which take time from the models on a small machine
VISITORS_AT_ONCE = 2  # whose answers grow at the same time; the others queue

_HERE = Path(__file__).parent
# Fonts of the visitor's system: gradio's default theme fetches its own from the network.
_FONT = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "sans-serif"]
_MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]
# No request leaves for another host, whatever an answer contains: an image in Markdown would tell its owner.
_HEAD = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "connect-src 'self'; object-src 'none'; frame-src 'self'; form-action 'self'\">"
)
STYLE = {
    "theme": gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=_FONT, font_mono=_MONO),
    "css": (_HERE / "chat_page.css").read_text(encoding="utf-8"),
    "head": _HEAD + f"<script>{(_HERE / 'chat_page.js').read_text(encoding='utf-8')}</script>",
}
# A tab's own name for its conversation, which the server keeps: the tab finds it again after a reload
_TOKEN = "() => [tripodToken()]"
MOST_SESSIONS = 1000  # conversations that are kept; the one that was longest unused goes

Update = dict[Any, Any]  # widget -> its new value; the others keep theirs


_log = logging.getLogger(__name__)


@dataclass
class Widgets:
    """What the handlers write to."""

    session: gr.State
    shown: gr.State  # the number of the turn that a tab shows last; another tab may have gone on with its conversation
    headings: list[gr.Markdown]
    chats: list[gr.Chatbot]
    notice: gr.Markdown
    prompt: gr.Textbox
    send: gr.Button
    stop: gr.Button
    votes: list[gr.Button]
    unvote: gr.Button
    blind: gr.Checkbox
    download: gr.Textbox

    @property
    def outputs(self) -> list[Any]:
        """What a handler may change."""
        state = [self.session, self.shown, self.notice, self.prompt, self.send, self.stop, self.unvote, self.blind]
        return [*state, *self.headings, *self.chats, *self.votes]


class Page:
    """Models, reward model and vote file, and the handlers that the buttons call.

    A handler gets the visitor's `Session`, which never leaves the server, and returns or yields an `Update`.
    """

    widgets: Widgets  # set when the page has been laid out

    def __init__(
        self, models: Sequence[ChatModel], judge: AnswerRewards | None, votes: Path, *, blind: bool, system: str
    ) -> None:
        self.models = list(models)
        self.judge = judge
        self.votes = votes
        self.blind = blind and len(models) > 1
        self.system = system
        self.judging = threading.Lock()
        self.sessions: OrderedDict[str, Session] = OrderedDict()  # by the token of their tab
        self.answering: set[int] = set()  # visitors whose answers grow right now, by the identity of their session

    def new_session(self) -> Session:
        """A visitor's empty conversation."""
        return Session(tuple(model.name for model in self.models), blind=self.blind)

    def view(self, session: Session, notice: str = "", prompt: str | None = None) -> Update:
        """Everything that may have changed; ``prompt`` replaces what is in the box."""
        w = self.widgets
        update = self._chats(session) | {
            w.session: session,
            w.shown: session.last,
            w.notice: gr.update(value=without_markup(notice), visible=bool(notice)),
            w.send: gr.update(visible=not session.busy),
            w.stop: gr.update(visible=session.busy),
            w.unvote: gr.update(visible=session.can_unvote),
            w.blind: session.blind,
        }
        update |= {heading: session.heading(column) for column, heading in enumerate(w.headings)}
        update |= {button: gr.update(interactive=session.can_vote) for button in w.votes}
        return update if prompt is None else update | {w.prompt: prompt}

    def _chats(self, session: Session) -> Update:
        """The conversations alone, several times a second."""
        normalised = self.judge is not None and self.judge.stats is not None
        return {chat: _bubbles(session, column, normalised) for column, chat in enumerate(self.widgets.chats)}

    def start(self, token: str = "") -> Update:
        """A visitor opens the page, or loads it again; names come to the browser only here, and not in blind mode."""
        session = self.sessions.get(str(token)) or self.new_session()
        end = time.monotonic() + GONE_SECONDS
        while session.busy and time.monotonic() < end:  # answers that nobody waits for since the reload
            session.cancel = True
            time.sleep(0.05)
        if token:
            self.sessions[str(token)[:64]] = session
            self.sessions.move_to_end(str(token)[:64])
            while len(self.sessions) > MOST_SESSIONS:
                self.sessions.popitem(last=False)
        return self.view(session)

    def knock(self, session: Session | None) -> Update:
        """Tell a visitor at once that others are being answered first; `send` starts when a place is free."""
        others = len(self.answering - {id(session)})
        if others < VISITORS_AT_ONCE:
            return {self.widgets.notice: gr.skip()}
        said = f"{others} other visitors are being answered. Yours is next in line, it starts by itself."
        return {self.widgets.notice: gr.update(value=said, visible=True)}

    def send(self, session: Session | None, shown: int, prompt: str, system: str, *options: Any) -> Iterator[Update]:
        """A prompt goes to every model, after the turn that the tab shows last."""
        yield from self._turn(session, shown, lambda s: s.ask(str(prompt or ""), str(system or "")), options)

    def retry(self, session: Session | None, shown: int, *options: Any) -> Iterator[Update]:
        """The last prompt is answered again, where it is the one that the tab shows last."""
        yield from self._turn(session, shown, Session.retry, options)

    def _turn(
        self, session: Session | None, shown: int, begin: Callable[[Session], Turn], options: Sequence[Any]
    ) -> Iterator[Update]:
        session = session or self.new_session()
        if session.busy:
            yield self.view(session, "The last answers are still being written; stop them first.")
            return
        before = list(session.turns)
        try:
            self._check_shown(session, shown)
            sampling = checked_sampling(options)
            turn = begin(session)
        except UserError as error:
            yield self.view(session, str(error))
            return
        session.busy, session.cancel = True, False
        self.answering.add(id(session))
        try:
            yield self.view(session, prompt="")
            problem = notice = ""
            try:
                notice = yield from self._answer(session, turn, sampling)
            except UserError as error:
                problem = str(error)
            except Exception:  # out of memory, for example: the page must not be left waiting
                _log.exception("an answer failed")
                problem = "The model failed on this prompt; the terminal shows why."
            session.busy = False
            if problem and turn in session.turns:  # else it was cleared
                session.turns = before
            yield self.view(session, problem or notice, prompt=turn.prompt if problem else None)
        finally:  # also when the visitor has gone: gradio drops the generator
            session.busy = False
            self.answering.discard(id(session))
            for answer in turn.answers:
                if answer is not None and not answer.ended:
                    answer.ended = "cancelled"

    def _answer(self, session: Session, turn: Turn, sampling: SamplingArguments) -> Generator[Update, None, str]:
        """Every model in turn gives one token, so answers grow side by side and none slows the other's clock.

        Returns:
            What to tell the visitor, empty for nothing.
        """
        position = len(session.turns) - 1
        seed = (sampling.seed + session.attempts - 1) % 2**31
        sampling = SamplingArguments(**(vars(sampling) | {"seed": seed}))
        question = {"role": "user", "content": turn.prompt}
        growing: dict[int, Iterator[Answer]] = {
            c: stream_answer(self.models[m], [*session.history(c, position), question], sampling)
            for c, m in enumerate(session.order)
        }
        shown = 0.0
        while growing:
            for column, stream in list(growing.items()):
                answer = next(stream)
                turn.answers[column] = answer
                if session.cancel and not answer.ended:
                    answer.ended = "cancelled"
                if answer.ended:
                    del growing[column]
            if time.monotonic() - shown >= REFRESH_SECONDS:
                yield self._chats(session)
                shown = time.monotonic()
        if self.judge is not None and not session.cancel:  # Clear cancels, too
            yield self._chats(session)
            try:
                for column in range(len(session.order)):
                    with self.judging:
                        turn.rewards[column] = self.judge.score(session.history(column, reasoning=False))
            except Exception:  # out of memory, for example: the answers are whole without it
                _log.exception("a reward failed")
                return "The reward model failed on these answers; the terminal shows why."
        return ""

    def stop(self, session: Session | None) -> None:
        """Ask growing answers to end; the loop in `_answer` sees it at the next token."""
        if session is not None:
            session.cancel = True

    def clear(self, session: Session | None, shown: int, blind: bool | None = None) -> Update:
        """A new conversation in place of what the tab shows, also while answers grow: they end at their next token.

        Args:
            session: the visitor's.
            shown: the turn that the tab shows last.
            blind: as the new one is to be; None for as before.
        """
        session = session or self.new_session()
        try:
            self._check_shown(session, shown)
        except UserError as error:
            return self.view(session, str(error))
        session.cancel = True
        session.blind = session.blind if blind is None else blind
        session.restart()
        return self.view(session)

    def edit(self, session: Session | None, shown: int) -> Update:
        """The last prompt comes back into the box, and its turn goes, where the tab shows it last."""
        session = session or self.new_session()
        try:
            self._check_shown(session, shown)
            prompt = session.take_back()
        except UserError as error:
            return self.view(session, str(error))
        return self.view(session, prompt=prompt)

    def set_blind(self, session: Session | None, shown: int, blind: bool) -> Update:
        """Blind mode on: a new conversation with shuffled columns. Off: the names are shown."""
        if blind:
            return self.clear(session, shown, True)
        session = session or self.new_session()
        session.blind, session.revealed, session.seen = False, True, True
        return self.view(session)

    def _check_trainable(self, session: Session, winner: int) -> None:
        """Refuse a vote on what step 2 would refuse, such as texts that hold a token which ends a turn or a text.

        Raises:
            UserError: names the text, or what else is in the way.
        """
        said = [message for column in range(len(self.models)) for message in session.history(column)]
        said.append({"role": "system", "content": session.system})
        if token := untrainable(said, self.models):
            raise UserError(f"This conversation holds {token}, which training takes for a token of its own, so "
                            "the vote is not saved. Clear, and ask without it.")  # fmt: skip
        examples = []
        try:
            for row in [] if winner == SAME else session.preference_rows(winner):
                with contextlib.suppress(Dropped):  # step 2 leaves it out, and goes on
                    examples += convert(row)[1]
            for model in self.models:
                pair_rows(model.tokenizer, examples, sys.maxsize, DataReport("pairs"))
        except RowError as error:
            raise UserError(f"Step 2 would refuse this vote, so it is not saved: {error}. Clear, and vote on first "
                            "answers.") from error  # fmt: skip

    @staticmethod
    def _check_shown(session: Session, shown: int) -> None:
        """Refuse what a tab says of the last answers where it shows something else, as a duplicated one may.

        Raises:
            UserError: says so; the view that tells it shows them.
        """
        if shown != session.last:
            raise UserError("This conversation has gone on in another tab; this is how it stands now.")

    def vote(self, session: Session | None, winner: int, shown: int) -> Update:
        """Append the vote to the file and show the names; ``shown`` is the turn that the tab shows last."""
        session = session or self.new_session()
        try:
            self._check_shown(session, shown)
            if session.can_vote:
                self._check_trainable(session, winner)
            rows = session.vote(winner, self.votes)
        except UserError as error:
            return self.view(session, str(error))
        if winner == SAME:
            said = "Saved: about the same."
        elif rows:
            said = f"Saved: {session.heading(winner)} is better."
        else:
            said = "The answers are identical, so there is nothing to prefer."
        return self.view(session, said + (" Clear starts the next blind round." if session.blind else ""))

    def unvote(self, session: Session | None, shown: int) -> Update:
        """Take the last vote out of its file."""
        session = session or self.new_session()
        try:
            self._check_shown(session, shown)
            session.unvote(self.votes)
        except UserError as error:
            return self.view(session, str(error))
        return self.view(session, "The vote is taken back.")

    def export(self, session: Session | None) -> Update:
        """The conversation as JSON, for the browser to save."""
        w = self.widgets
        if session is None or not session.turns:
            said = "There is nothing to export yet."
            return {w.download: "", w.notice: gr.update(value=said, visible=True)}
        return {w.download: session.export(), w.notice: gr.update(value="", visible=False)}


def _bubbles(session: Session, column: int, normalised: bool) -> list[dict[str, Any]]:
    """A column for gr.Chatbot, a note under every answer; as dictionaries, since it would trim plain strings."""
    bubbles = []
    for turn in session.turns:
        answer = turn.answers[column]
        reasoning, text = ("", "") if answer is None else answer.parts
        if answer is not None and answer.ended and not text.strip():
            text = "*(an empty answer)*"
        # what was typed is shown as it was typed, which no Markdown does
        typed = f'<div class="typed">{html.escape(turn.prompt)}</div>'
        bubbles.append(_bubble("user", gr.HTML(typed, render=False)))
        if reasoning:  # gradio draws a bubble with a title as one that opens and closes
            title = {"title": "Reasoning", "status": "done" if text else "pending"}
            shown = {"type": "text", "text": without_markup(reasoning)}
            bubbles.append(_bubble("assistant", shown) | {"metadata": title})
        bubbles.append(_bubble("assistant", {"type": "text", "text": without_markup(text) or "…"}))
        note = session.note(turn, column, normalised)
        if note:  # a bubble of its own (drawn without one), since gradio can only copy a bubble of plain text
            markup = f'<span class="note">{html.escape(note)}</span>'
            bubbles.append(_bubble("assistant", gr.HTML(markup, render=False)))
    return bubbles


# code of Markdown: a fence up to its end, which may be still to come, or what stands between backticks; a fence of
# backticks has none behind it, and a backslash takes one's meaning away
_FENCED = r"^ {0,3}(`{3,}(?=[^`\n]*\n)|~{3,})[^\n]*\n.*?(?:^ {0,3}\1[`~]*[ \t]*$|\Z)"
_CODE = re.compile(_FENCED + r"|(?<![\\`])(`+)(?!`)[^\n]+?(?<!`)\2(?!`)", re.M | re.S)
_MARKUP = re.compile("<(?=[A-Za-z/!?])|&(?=[#A-Za-z])")
JOINER = "\u2060"  # an invisible character, which chat_page.js leaves out of what is copied


def without_markup(text: str) -> str:
    """Markdown whose HTML is shown as it stands: a page that hides `<b>` hides what a model says. Code stays code.

    What begins a tag or an entity gets a `JOINER` behind its first character, and begins none then.
    """
    shown, last = [], 0
    for code in _CODE.finditer(text):
        shown += [_MARKUP.sub(rf"\g<0>{JOINER}", text[last : code.start()]), code[0]]
        last = code.end()
    return "".join([*shown, _MARKUP.sub(rf"\g<0>{JOINER}", text[last:])])


def _bubble(role: str, part: Any) -> dict[str, Any]:
    return {"role": role, "content": [part]}


def build_page(
    models: Sequence[ChatModel],
    judge: AnswerRewards | None,
    sampling: SamplingArguments,
    votes: Path,
    *,
    blind: bool = False,
    system: str = "",
) -> gr.Blocks:
    """Lay the page out and connect it.

    Args:
        models: one column each; one alone gives a plain chat without votes.
        judge: scores every answer, if given.
        sampling: where the sliders start.
        votes: file that votes are appended to.
        blind: start in blind mode.
        system: where the system message starts.
    """
    page = Page(models, judge, votes, blind=blind, system=system)
    with gr.Blocks(title="Tripod chat", analytics_enabled=False, fill_width=True) as blocks:
        page.widgets, others = _layout(page, sampling)
        _connect(blocks, page, page.widgets, others)
    return blocks


def _layout(page: Page, sampling: SamplingArguments) -> tuple[Widgets, dict[str, Any]]:
    count = len(page.models)
    several = count > 1
    session, shown = gr.State(None, time_to_live=24 * 3600), gr.State(0)
    subtitle = "One prompt, answered side by side. Which answer is better?" if several else "Chat with a model."
    gr.Markdown(f"# Tripod\n{subtitle}", elem_id="title")
    headings, chats = [], []
    with gr.Row(equal_height=True, elem_id="columns"):
        for column in range(count):
            with gr.Column(min_width=320):
                headings.append(gr.Markdown("", elem_classes="heading", elem_id=f"heading-{column}"))
                chats.append(_chat(column))
    asked, votes = _ask(count)
    with gr.Row(elem_id="actions"):
        others: dict[str, Any] = {
            name: gr.Button(name.capitalize(), size="sm", min_width=70, elem_id=name)
            for name in ("retry", "edit", "clear", "export")
        }
        blind = gr.Checkbox(
            value=page.blind,
            label="Blind: hide and shuffle the names",
            visible=several,
            container=False,
            elem_id="blind",
            min_width=260,
        )
    gr.Examples(
        [[text] for text in EXAMPLES],
        inputs=[asked["prompt"]],
        label="Try one",
        elem_id="examples",
        api_visibility="private",
    )
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        others["system"] = gr.Textbox(
            value=page.system,
            label="System message",
            lines=2,
            elem_id="system",
            info="Taken with the first prompt of a conversation.",
        )
        others["options"] = _sliders(sampling)
    download = gr.Textbox(visible=False)
    others["token"] = gr.Textbox(visible=False)
    others["votes"] = votes
    return Widgets(session, shown, headings, chats, blind=blind, download=download, **asked), others


def _ask(count: int) -> tuple[dict[str, Any], list[tuple[int, gr.Button]]]:
    """Prompt, votes and notice below so many columns, as fields of `Widgets`; the votes also with what they are for."""
    votes = []
    with gr.Column(elem_id="ask"):
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                placeholder="Write a prompt; Enter sends it, Shift+Enter makes a new line",
                label="Prompt",  # for screen readers
                show_label=False,
                container=False,
                lines=1,  # with more, gradio sends on Shift+Enter
                max_lines=10,
                scale=8,
                autofocus=True,
                elem_id="prompt",
            )
            send = gr.Button("Send", variant="primary", scale=1, min_width=90, elem_id="send")
            stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="stop")
        with gr.Row(elem_id="votes", visible=count > 1):
            better = [(c, f"{LETTERS[c]} is {'better' if count == 2 else 'best'}") for c in range(count)]
            for column, label in [better[0], (SAME, "About the same"), *better[1:]] if count > 1 else []:
                elem_id = "vote-same" if column == SAME else f"vote-{column}"
                votes.append((column, gr.Button(label, interactive=False, elem_id=elem_id)))
            unvote = gr.Button("Undo vote", visible=False, elem_id="unvote")
        notice = gr.Markdown("", visible=False, elem_id="notice")
    buttons = [button for _, button in votes]
    fields = {"prompt": prompt, "send": send, "stop": stop, "votes": buttons, "unvote": unvote, "notice": notice}
    return fields, votes


def _chat(column: int) -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        height="46vh",
        min_height=260,
        buttons=["copy"],
        sanitize_html=True,
        allow_tags=False,
        allow_file_downloads=False,
        feedback_options=None,
        layout="bubble",
        autoscroll=False,  # gradio's pulls a reader down again; chat_page.js follows the answer until one scrolls up
        group_consecutive_messages=False,
        placeholder="The answer appears here.",
        elem_id=f"chat-{column}",
        elem_classes="chat",
    )


def _sliders(sampling: SamplingArguments) -> list[Any]:
    """In the order of the fields of `SamplingArguments`."""
    s = sampling  # a flag may go beyond what a slider usually offers
    with gr.Row():
        length = gr.Slider(1, max(1024, s.max_new_tokens), s.max_new_tokens, step=1, label="Longest answer, tokens")
        temperature = gr.Slider(
            0,
            max(2, s.temperature),
            s.temperature,
            step=0.05,
            label="Temperature",
            info="0: always the likeliest token",
        )
        top_p = gr.Slider(min(0.05, s.top_p), 1, s.top_p, step=0.05, label="Top-p", info="1 keeps all tokens")
    with gr.Row():
        top_k = gr.Slider(0, max(200, s.top_k), s.top_k, step=1, label="Top-k", info="0 keeps all tokens")
        penalty = gr.Slider(
            min(1, s.repetition_penalty),
            max(2, s.repetition_penalty),
            s.repetition_penalty,
            step=0.05,
            label="Repetition penalty",
            info="1 is none",
        )
        seed = gr.Number(s.seed, precision=0, label="Seed", info="The same seed repeats a conversation", elem_id="seed")
    return [length, temperature, top_p, top_k, penalty, seed]


def _connect(blocks: gr.Blocks, page: Page, w: Widgets, others: dict[str, Any]) -> None:
    """Buttons to handlers; none of them is a public API endpoint."""
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    long: dict[str, Any] = quiet | {"concurrency_limit": VISITORS_AT_ONCE, "concurrency_id": "answers"}
    options = others["options"]
    blocks.load(page.start, [others["token"]], w.outputs, js=_TOKEN, **quiet)
    # first: the browser starts the handlers of a click one after another, each when the one before is done
    asked, seen = [w.send.click, w.prompt.submit, others["retry"].click], [w.session, w.shown]
    gr.on(asked, page.knock, [w.session], [w.notice], queue=False, **quiet)
    gr.on([w.send.click, w.prompt.submit], page.send, [*seen, w.prompt, others["system"], *options], w.outputs, **long)
    others["retry"].click(page.retry, [*seen, *options], w.outputs, **long)
    w.stop.click(page.stop, [w.session], None, queue=False, **quiet)
    others["clear"].click(page.clear, seen, w.outputs, **quiet)
    # only a visitor's own click: the page sets the box at the start without starting a conversation anew
    w.blind.input(page.set_blind, [*seen, w.blind], w.outputs, **quiet)
    for column, button in others["votes"]:
        button.click(lambda session, shown, winner=column: page.vote(session, winner, shown), seen, w.outputs, **quiet)
    others["edit"].click(page.edit, seen, w.outputs, **quiet)
    w.unvote.click(page.unvote, seen, w.outputs, **quiet)
    others["export"].click(page.export, [w.session], [w.download, w.notice], **quiet).then(
        None, [w.download], None, js="(text) => tripodDownload(text)", **quiet
    )
