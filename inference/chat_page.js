// What the chat page does in the browser alone: keys, prompts of before, and whether the server is there.
"use strict";

const tripodStore = (key, value) => { // of this tab; a browser may forbid it, then nothing is kept
  try {
    if (value === undefined) return sessionStorage.getItem(key);
    sessionStorage.setItem(key, value);
  } catch { /* nothing is kept */ }
  return null;
};

function tripodToken() { // this tab's name for its conversation on the server
  const known = tripodStore("tripod-token");
  if (known) return known;
  const made = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  tripodStore("tripod-token", made);
  return made;
}

function tripodDownload(text) { // a conversation, to be saved
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

(() => {
  // chat_page.py puts an invisible character into answers, so that their markup is shown: a copy is without it
  const copy = navigator.clipboard?.writeText?.bind(navigator.clipboard);
  if (copy) navigator.clipboard.writeText = (text) => copy(text.replaceAll("\u2060", ""));

  // An answer that grows is followed, until its reader scrolls up and while they stay there.
  const left = new WeakSet(), was = new WeakMap(); // columns that are not followed; where they stood
  document.addEventListener("scroll", ({ target }) => {
    if (!target.matches?.(".chat .bubble-wrap")) return;
    if (target.scrollHeight - target.scrollTop - target.clientHeight < 40) left.delete(target);
    else if (target.scrollTop < (was.get(target) ?? 0)) left.add(target);
    was.set(target, target.scrollTop);
  }, true);
  let drawn = false;
  new MutationObserver(() => {
    if (drawn) return;
    drawn = true;
    requestAnimationFrame(() => {
      drawn = false;
      for (const column of document.querySelectorAll(".chat .bubble-wrap")) {
        if (!left.has(column)) column.scrollTop = column.scrollHeight;
      }
    });
  }).observe(document.documentElement, { childList: true, characterData: true, subtree: true });

  const box = () => document.querySelector("#prompt textarea");
  const prompts = JSON.parse(tripodStore("tripod-prompts") || "[]");
  let at = prompts.length; // which of them is in the box

  function write(text) { // as if it had been typed
    Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(box(), text);
    box().dispatchEvent(new Event("input", { bubbles: true }));
  }

  function remember() {
    const text = box().value;
    document.querySelectorAll(".chat .bubble-wrap").forEach((column) => left.delete(column));
    if (text.trim() && text !== prompts.at(-1)) prompts.push(text);
    prompts.splice(0, prompts.length - 50);
    at = prompts.length;
    tripodStore("tripod-prompts", JSON.stringify(prompts));
  }

  document.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      const stop = document.querySelector("#stop");
      if (stop?.checkVisibility()) stop.click();
    }
    if (event.target !== box()) return;
    if (event.key === "Enter" && !event.shiftKey) remember();
    const recalled = box().value === "" || box().value === prompts[at];
    const to = at + { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (recalled && to >= 0 && to <= prompts.length) {
      event.preventDefault();
      at = to;
      write(prompts[at] ?? "");
    }
  }, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#send")) remember();
  }, true);

  // A server that is gone is said where the buttons are. One that was started anew has no conversation of this tab:
  // the page is loaded again, and what was typed stays.
  const SECONDS = 2;
  let instance = null, missed = 0;

  function tell(text) {
    let gone = document.querySelector("#gone");
    if (!text) return gone?.remove();
    if (!gone) {
      gone = document.createElement("div");
      gone.id = "gone";
      gone.setAttribute("role", "alert");
      document.querySelector("#ask")?.prepend(gone);
    }
    if (gone.textContent !== text) gone.textContent = text;
  }

  async function look() {
    try {
      const answer = await fetch("alive", { cache: "no-store", signal: AbortSignal.timeout(10000) });
      if (!answer.ok) return;
      const found = await answer.text();
      if (instance && found !== instance) {
        tripodStore("tripod-typed", box()?.value || "");
        location.reload();
        return;
      }
      instance = found;
      missed = 0;
      tell("");
    } catch {
      missed += 1;
      if (missed > 1) tell("The server of this page does not answer. What you type stays here; the page goes on when it is back.");
    }
  }
  setInterval(look, 1000 * SECONDS);
  look();

  const typed = tripodStore("tripod-typed");
  if (typed) {
    const wait = setInterval(() => {
      if (!box()) return;
      clearInterval(wait);
      tripodStore("tripod-typed", "");
      write(typed);
    }, 200);
  }
})();
