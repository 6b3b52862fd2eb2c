// The page on which people judge: an order of the answers, which is a list of places, each a list of answers that are
// tied. Answers have the letters in which they were drawn; which model has written them is on the server alone.
"use strict";

const $ = (id) => document.getElementById(id);
const store = { // a browser may forbid it; then a reload loses what has not been saved
  get(kind, key) { try { return window[kind].getItem(key); } catch { return null; } },
  set(kind, key, value) { try { window[kind].setItem(key, value); } catch { /* nothing is kept */ } },
  remove(kind, key) { try { window[kind].removeItem(key); } catch { /* nothing was kept */ } },
};

let judge = "";      // their name
let item = null;     // {id, digest, prompt, answers, pair}; the digest tells answers of another file apart
let order = [];      // [["C"], ["A", "B"]]: C is best, A and B are tied
let touched = false; // the order is the judge's own, not the one that was drawn
let mine = 0;        // judgements of theirs that are shown
let busy = false;    // a request is on its way

// ---------------------------------------------------------------- orders: each gives a new one

const placeOf = (order, letter) => order.findIndex((place) => place.includes(letter));
const without = (order, letter) => order.map((p) => p.filter((l) => l !== letter)).filter((p) => p.length);
const insert = (order, at, letter) => [...order.slice(0, at), [letter], ...order.slice(at)];

function move(order, letter, by) { // one place up (-1) or down (+1); out of a tie first
  const at = placeOf(order, letter), tied = order[at].length > 1;
  const to = tied ? at + (by > 0 ? 1 : 0) : at + by;
  return to < 0 || (!tied && to >= order.length) ? order : insert(without(order, letter), to, letter);
}

function tie(order, letter) { // with the answer above; out of a tie where it is in one
  const at = placeOf(order, letter);
  if (order[at].length > 1) return move(order, letter, 1);
  return at ? order.slice(0, at - 1).concat([[...order[at - 1], letter]], order.slice(at + 1)) : order;
}

const toPlace = (order, letter, place) => insert(without(order, letter), Math.max(place - 1, 0), letter);

function drop(order, letter, target, where) { // before or after another answer, or onto it
  const rest = without(order, letter), at = placeOf(rest, target);
  if (where === "onto") return rest.map((place, i) => (i === at ? [...place, letter] : place));
  const inside = rest[at].indexOf(target) + (where === "after" ? 1 : 0);
  if (inside > 0 && inside < rest[at].length) { // between two that are tied
    return rest.map((place, i) => (i === at ? [...place.slice(0, inside), letter, ...place.slice(inside)] : place));
  }
  return insert(rest, at + (where === "after" ? 1 : 0), letter);
}

const letters = () => item.answers.map((_, i) => String.fromCharCode(65 + i));
const places = () => letters().map((letter) => placeOf(order, letter) + 1);
const fromPlaces = (found) => [...new Set(found)].sort((a, b) => a - b)
  .map((place) => letters().filter((_, i) => found[i] === place));

// ---------------------------------------------------------------- the server

async function ask(path, content) {
  const given = content ? { method: "POST", headers: { "Content-Type": "application/json" },
                            body: JSON.stringify(content) } : {};
  let answer;
  try {
    answer = await fetch(path, given);
  } catch {
    waitForServer();
    throw new Error("");
  }
  let found;
  try {
    found = await answer.json();
  } catch {
    throw new Error(`The server answers with status ${answer.status}; load the page again.`);
  }
  if (found.error) throw new Error(found.error);
  return found;
}

let waiting = null;
function waitForServer() {
  tell("The server of this page does not answer. What you have done is kept in this browser; " +
       "when the server is back, save again.");
  waiting ??= setInterval(async () => {
    try {
      if (!(await fetch("api/ping")).ok) return;
    } catch {
      return;
    }
    clearInterval(waiting);
    waiting = null;
    tell("");
    say("The server is back.");
  }, 1500);
}

const tell = (text) => { if ($("problem").textContent !== text) $("problem").textContent = text; };
const say = (text) => { $("live").textContent = ""; setTimeout(() => { $("live").textContent = text; }, 30); };

async function act(path, content, done) { // one request at a time
  if (busy) return;
  busy = true;
  try {
    const found = await ask(path, { judge, ...content });
    if (path === "api/save") store.remove("localStorage", draftKey());
    tell(found.warning ? `Your judgement is saved, a file for training is not: ${found.warning}` : "");
    show(found, done);
  } catch (error) {
    if (error.message) tell(error.message);
  } finally {
    busy = false;
  }
}

const next = () => act("api/next", {}, "");

function save(act_, what) {
  const content = { item: item.id, digest: item.digest, act: act_, note: $("note").value, better: $("better").value };
  if (act_ === "ranked") content.places = places();
  return act("api/save", content, what);
}

function saveOrder() {
  if (!item || item.pair) return;
  if (!touched) {
    touched = true;
    tell("This is the order in which the answers were drawn. If it is yours, save once more.");
    return;
  }
  save("ranked", "Saved. ");
}

function choose(found) { // of two answers
  if (!item?.pair) return;
  order = found;
  save("ranked", order.length === 1 ? "Saved: about the same. " : `Saved: ${order[0][0]} is better. `);
}

// ---------------------------------------------------------------- what is shown

function show(found, said) {
  const { done, asked, judges } = found.progress;
  mine = found.progress.mine;
  $("bar").max = asked;
  $("bar").value = done;
  $("count").textContent = `${done} of ${asked} judgements` + (judges > 1 ? ` by ${judges} judges` : "") + `, ${mine} yours`;
  $("undo").disabled = $("undo-done").disabled = !mine;
  item = found.item;
  $("work").hidden = !item;
  $("done").hidden = !!item;
  if (!item) {
    say(`${said}Nothing is left for you to judge.`);
    $("done").querySelector("h2").focus();
    return;
  }
  order = letters().map((letter) => [letter]);
  touched = false;
  const before = found.before || JSON.parse(store.get("localStorage", draftKey()) || "{}");
  $("note").value = before.note || "";
  $("better").value = before.better || "";
  if (before.act !== "skipped" && before.act !== "all_bad" && before.places?.length === item.answers.length) {
    order = fromPlaces(before.places);
    touched = before.touched ?? true;
  }
  drawPrompt();
  drawHelp();
  draw();
  fit();
  window.scrollTo(0, 0);
  $("prompt-title").focus({ preventScroll: true });
  const choice = item.pair && order.length === 1 ? "about the same" : item.pair ? `${order[0][0]} is better` : "your order";
  const was = before.act && { ranked: choice, all_bad: "all bad", skipped: "skipped" }[before.act];
  const taken = was ? `Your last judgement is taken back, it was: ${was}. ` : "";
  if (taken) $("how").textContent = taken;
  if (found.before) keep(); // the server has it no more
  say(`${said}${taken}` +
      `${item.answers.length} answers to: ${item.prompt.at(-1).content.slice(0, 300)}`);
}

function drawPrompt() {
  const names = { user: "User", assistant: "Assistant", system: "System message", tool: "Tool" };
  $("prompt").replaceChildren(...item.prompt.map((turn) => {
    const shown = element("div", "turn", turn.content);
    if (item.prompt.length > 1) shown.prepend(element("b", "", names[turn.role] || turn.role));
    return shown;
  }));
}

function element(tag, class_, text) {
  const made = document.createElement(tag);
  if (class_) made.className = class_;
  made.textContent = text; // never markup: answers are shown as they were written
  return made;
}

function button(text, class_, label, press) {
  const made = element("button", class_, text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.title = label;
  made.addEventListener("click", press);
  return made;
}

function card(letter, place, i) {
  const made = element("li", "card", ""), bar = element("div", "bar", ""), tied = order[place].length > 1;
  made.dataset.letter = letter;
  made.tabIndex = 0;
  if (!item.pair) {
    const where = tied ? `place ${place + 1}, tied` : `place ${place + 1} of ${order.length}`;
    made.setAttribute("aria-label", `Answer ${letter}, ${where}`);
    if (i) made.classList.add("tied");
    if (i < order[place].length - 1) made.classList.add("joins");
    const grip = button("⋮⋮", "grip", `Drag answer ${letter}`, () => {});
    grip.tabIndex = -1; // keys and the other buttons do the same
    grip.setAttribute("aria-hidden", "true");
    grip.addEventListener("pointerdown", (event) => startDrag(event, letter, made));
    bar.append(element("span", "place", `${place + 1}${tied ? "=" : ""}`), element("span", "letter", letter),
      button("=", "tie", tied ? `Untie answer ${letter}` : `Tie answer ${letter} with the one above`,
        () => change(tie(order, letter), letter, ".tie")),
      button("↑", "up", `Move answer ${letter} up`, () => change(move(order, letter, -1), letter, ".up")),
      button("↓", "down", `Move answer ${letter} down`, () => change(move(order, letter, 1), letter, ".down")), grip);
  } else {
    made.setAttribute("aria-label", `Answer ${letter}`);
    bar.append(element("span", "place", letter));
  }
  made.append(bar, element("div", "text", item.answers[letter.charCodeAt(0) - 65]));
  return made;
}

function draw() {
  document.body.classList.toggle("pair", item.pair);
  $("order-actions").hidden = item.pair;
  $("pair-actions").hidden = !item.pair;
  $("bad").textContent = item.pair ? "Both bad" : "All bad";
  $("copy").textContent = item.pair ? "Begin with answer A" : "Begin with the answer on top";
  $("answers-title").textContent = item.pair ? "Which answer is better?" : "Answers, the best on top";
  $("how").textContent = item.pair ? "" : "Drag an answer by its dots, onto another one for a tie, or use the buttons or keys.";
  const shown = item.pair ? letters().map((letter) => card(letter, placeOf(order, letter), 0))
    : order.flatMap((place, at) => place.map((letter, i) => card(letter, at, i)));
  $("answers").replaceChildren(...shown);
}

function change(changed, letter, focus) {
  touched = true;
  tell("");
  const moved = changed !== order;
  order = changed;
  draw();
  const drawn = document.querySelector(`.card[data-letter="${letter}"]`);
  (focus ? drawn.querySelector(focus) : drawn).focus({ preventScroll: true });
  drawn.scrollIntoView({ block: "nearest" });
  if (moved) drawn.classList.add("moved");
  const at = placeOf(order, letter), others = order[at].filter((other) => other !== letter);
  say(`Answer ${letter}: place ${at + 1} of ${order.length}` + (others.length ? `, tied with ${others.join(" and ")}` : "") +
      (moved ? "" : ", as before"));
  keep();
}

// ---------------------------------------------------------------- a reload in the middle of a prompt

const draftKey = () => `tripod-draft ${judge} ${item.id} ${item.digest}`;
function keep() {
  if (!item) return;
  const draft = { places: places(), touched, note: $("note").value, better: $("better").value };
  store.set("localStorage", draftKey(), JSON.stringify(draft));
}

function fit() {
  for (const area of [$("note"), $("better")]) {
    area.style.height = "auto";
    if (area.value) area.style.height = `${Math.min(area.scrollHeight + 2, 400)}px`;
  }
}

// ---------------------------------------------------------------- dragging, with a mouse or a finger

let drag = null;

function startDrag(event, letter, node) {
  if (event.button) return;
  event.preventDefault();
  drag = { letter, node, y: event.clientY, from: event.clientY + window.scrollY, target: null };
  node.classList.add("dragged");
  requestAnimationFrame(scrollWhileDragged);
}

function dragTo(event) {
  if (!drag) return;
  drag.y = event.clientY;
  drag.node.style.transform = `translateY(${event.clientY + window.scrollY - drag.from}px)`;
  mark(null);
  for (const other of document.querySelectorAll(".card")) {
    const box = other.getBoundingClientRect();
    if (other === drag.node || drag.y < box.top || drag.y > box.bottom) continue;
    const share = (drag.y - box.top) / box.height;
    drag.target = { node: other, where: share < 0.3 ? "before" : share > 0.7 ? "after" : "onto" };
    mark(drag.target);
    return;
  }
  const cards = [...document.querySelectorAll(".card")].filter((other) => other !== drag.node);
  const middle = (node) => { const box = node.getBoundingClientRect(); return (box.top + box.bottom) / 2; };
  const below = cards.find((other) => middle(other) > drag.y);
  drag.target = below ? { node: below, where: "before" } : { node: cards.at(-1), where: "after" };
  mark(drag.target);
}

function mark(target) {
  document.querySelectorAll(".before, .after, .onto").forEach((n) => n.classList.remove("before", "after", "onto"));
  if (target) target.node.classList.add(target.where);
}

function scrollWhileDragged() {
  if (!drag) return;
  const edge = 70;
  if (drag.y < edge) window.scrollBy(0, -10);
  if (drag.y > window.innerHeight - edge) window.scrollBy(0, 10);
  requestAnimationFrame(scrollWhileDragged);
}

function endDrag(event) {
  if (!drag) return;
  const { letter, node, target } = drag;
  drag = null;
  node.classList.remove("dragged");
  node.style.transform = "";
  mark(null);
  if (event.type === "pointerup" && target) change(drop(order, letter, target.node.dataset.letter, target.where), letter);
}

// ---------------------------------------------------------------- keys

const KEYS = {
  order: [["↑ ↓", "choose an answer"], ["Shift+↑ Shift+↓", "move it"], ["1 to 9", "put it in this place"],
    ["=", "tie it with the one above, or untie it"], ["Enter", "save the order"]],
  pair: [["←", "A is better"], ["→", "B is better"], ["=", "about the same"]],
  both: [["b", "all bad"], ["s", "skip"], ["u", "undo"], ["n", "write a note"], ["w", "write a better answer"],
    ["Esc", "out of a text field"], ["Ctrl+Enter", "save the order, from anywhere"]],
};

function drawHelp() {
  $("keys").replaceChildren(...[...KEYS[item.pair ? "pair" : "order"], ...KEYS.both].flatMap(([keys, what]) => {
    const name = element("dt", "", "");
    name.append(element("kbd", "", keys));
    return [name, element("dd", "", what)];
  }));
}

function focusCard(by) {
  const cards = [...document.querySelectorAll(".card")], at = cards.indexOf(document.activeElement.closest(".card"));
  cards[at < 0 ? (by > 0 ? 0 : cards.length - 1) : Math.min(Math.max(at + by, 0), cards.length - 1)].focus();
}

function pressed(event) {
  if ($("work").hidden || event.isComposing) return;
  const in_text = event.target.matches("textarea, input:not([type=checkbox])");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return done(saveOrder);
  if (event.key === "Escape" && in_text) return done(() => document.querySelector(".card").focus());
  if (in_text || event.ctrlKey || event.metaKey || event.altKey || !$("shortcuts").checked) return;
  const chosen = document.activeElement.closest?.(".card")?.dataset.letter;
  const commands = { b: () => save("all_bad", "Saved: all bad. "), s: () => save("skipped", "Skipped. "), u: undo,
    n: () => $("note").focus(), w: () => $("better").focus() };
  if (commands[event.key]) return done(commands[event.key]);
  if (item.pair) {
    const choices = { ArrowLeft: [["A"], ["B"]], ArrowRight: [["B"], ["A"]], "=": [["A", "B"]] };
    if (choices[event.key]) done(() => choose(choices[event.key]));
    return;
  }
  const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (by && event.shiftKey && chosen) return done(() => change(move(order, chosen, by), chosen));
  if (by && !event.shiftKey) return done(() => focusCard(by));
  if (event.key === "=" && chosen) return done(() => change(tie(order, chosen), chosen));
  if (/^[1-9]$/.test(event.key) && chosen) return done(() => change(toPlace(order, chosen, +event.key), chosen));
  if (event.key === "Enter" && !event.target.closest("button, a, summary, input")) done(saveOrder);

  function done(what) {
    event.preventDefault();
    if (!event.repeat || by) what();
  }
}

const undo = () => act("api/undo", { mine }, "");

// ---------------------------------------------------------------- results

async function results() {
  const open = $("results").hidden;
  $("show-results").setAttribute("aria-expanded", open);
  $("results").hidden = !open;
  if (!open) return;
  try {
    const found = await ask("api/results");
    drawResults(found);
    $("results").scrollIntoView();
  } catch (error) {
    if (error.message) tell(error.message);
  }
}

function drawResults({ progress, agreement, win_rates, rows }) {
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const agreed = agreement.prompts === 0 ? "Judges agree: no prompt has two judges yet."
    : `Judges agree: the same said of ${agreement.same === null ? "-" : percent(agreement.same)} of pairs of answers, ` +
      `Krippendorff's alpha ${agreement.alpha === null ? "-" : agreement.alpha.toFixed(2)}, over ${agreement.prompts} prompts.`;
  const table = element("table", "", "");
  const line = (cells, tag) => { const made = element("tr", "", ""); made.append(...cells.map((c) => element(tag, "", c)));
    return made; };
  if (win_rates.length) {
    table.append(line(["Preferred", "to", "of prompts, ties half", "95% interval", "ties", "prompts"], "th"));
    for (const { models, share, interval, ties, prompts } of win_rates) {
      table.append(line([...models, percent(share), interval.map(percent).join(" to "), percent(ties), prompts], "td"));
    }
  }
  $("found").replaceChildren(element("p", "", `${progress.done} of ${progress.asked} judgements.`),
    element("p", "", agreed), table);
  $("exports").replaceChildren(...Object.entries(rows).map(([name, count]) => {
    if (!count) return element("span", "faint", `${name}: nothing in it yet. `);
    const link = element("a", "", `${name} (${count})`);
    link.href = `export/${name}`;
    link.download = name;
    return link;
  }));
}

// ---------------------------------------------------------------- names, and the start

function start(name) {
  judge = name.trim().replace(/\s+/g, " ");
  store.set("sessionStorage", "tripod-judge", judge);
  store.set("localStorage", "tripod-judge", judge);
  $("enter").hidden = true;
  $("leave").hidden = false;
  $("leave").textContent = judge;
  $("leave").title = $("leave").ariaLabel = `You judge as ${judge}. Change the name`;
  next();
}

$("enter").addEventListener("submit", (event) => { event.preventDefault(); start($("judge").value); });
$("leave").addEventListener("click", () => {
  store.remove("sessionStorage", "tripod-judge");
  location.reload();
});
$("save").addEventListener("click", saveOrder);
$("left").addEventListener("click", () => choose([["A"], ["B"]]));
$("right").addEventListener("click", () => choose([["B"], ["A"]]));
$("same").addEventListener("click", () => choose([["A", "B"]]));
$("bad").addEventListener("click", () => save("all_bad", "Saved: all bad. "));
$("skip").addEventListener("click", () => save("skipped", "Skipped. "));
$("undo").addEventListener("click", undo);
$("undo-done").addEventListener("click", undo);
$("show-results").addEventListener("click", results);
$("copy").addEventListener("click", () => {
  $("better").value = item.answers[order[0][0].charCodeAt(0) - 65];
  fit();
  keep();
  $("better").focus();
});
for (const area of [$("note"), $("better")]) area.addEventListener("input", () => { fit(); keep(); });
$("shortcuts").checked = store.get("localStorage", "tripod-keys") !== "off";
$("shortcuts").addEventListener("change", () => store.set("localStorage", "tripod-keys", $("shortcuts").checked ? "on" : "off"));
document.addEventListener("keydown", pressed);
document.addEventListener("pointermove", dragTo);
document.addEventListener("pointerup", endDrag);
document.addEventListener("pointercancel", endDrag);

const known = store.get("sessionStorage", "tripod-judge");
if (known) start(known);
else $("judge").value = store.get("localStorage", "tripod-judge") || "";
