// The labelling page: what is shown, what a key or button does, and what happens when the server refuses.
// Knows nothing of how the mark moves (answer.js) or of HTTP (api.js).

import { annotatorInAddress, ask, hideToken, Refused } from "./api.js";
import { AnswerView } from "./answer.js";
import { showText, turn } from "./math.js";
import { clockTime, Stopwatch } from "./stopwatch.js";

const $ = (id) => document.getElementById(id);
const KEYS = {
  Enter: "wrong", c: "correct", x: "unplaced", s: "skip", u: "undo", n: "note", "?": "help", Escape: "clear",
  1: "first_number", 2: "last_token", 3: "whole",
};
const SAID = { wrong: "an error", correct: "no error", unplaced: "an error, and not where" };
const SAVED = { wrong: "Saved: the first error is marked.", correct: "Saved: all correct.", unplaced: "Saved: wrong, without a place." };
const HINT = { token: "Mark the first wrong token first, or press c if all is correct.", word: "Mark the first wrong word first, or press c if all is correct." };

const answer = new AnswerView($("answer"), () => {
  showMark();
  keepDraft();
});
const stopwatch = new Stopwatch();
let annotator = "";
let item = null;
let progress = null;
let again = null; // what "Try again" does
let busy = false;
let drawn = []; // the lines of the answer with their formulas, if it has any

// ---- what was marked but not saved yet outlives a reload --------------------------------------------------------------

const draftKey = () => `draft ${annotator} ${item.id}`;

function keepDraft() {
  if (!item) return;
  const draft = { error: answer.span(), note: $("note").value, seconds: stopwatch.seconds() };
  sessionStorage.setItem(draftKey(), JSON.stringify(draft));
}

function takeDraft() {
  try {
    return JSON.parse(sessionStorage.getItem(draftKey())) ?? {};
  } catch {
    return {};
  }
}

// ---- showing ------------------------------------------------------------------------------------------------------------

function show(part) {
  for (const id of ["login", "done", "work"]) $(id).hidden = id !== part;
}

function showItem() {
  const draft = takeDraft();
  show("work");
  $("prompt").replaceChildren(...item.messages.map(turn));
  $("cut").textContent = `in ${item.cut}`;
  for (const place of document.querySelectorAll("[data-unit]")) place.textContent = unit();
  $("where").textContent = `${item.source} · ${item.id}`;
  $("reference-box").hidden = item.reference === null;
  if (item.reference) showText($("reference"), item.reference.text, item.reference.blocks);
  $("drawn-box").hidden = item.blocks.length === 0;
  drawn = item.blocks.length ? showText($("drawn"), "", item.blocks) : [];
  answer.show(item.segments);
  showImported();
  $("note").value = draft.note ?? "";
  stopwatch.reset(draft.seconds ?? 0);
  if (draft.error) answer.markSpan(draft.error);
  showMark();
  scrollTo(0, 0);
  const shaded = item.imported.find(({ error }) => error);
  if (!draft.error && shaded) answer.beginAt(shaded.error);
  answer.box.focus({ preventScroll: true });
}

// What was imported and leaves something to find out. Where it is a step, one key says what of it is wrong.
function showImported() {
  $("imported").hidden = item.imported.length === 0;
  const lines = item.imported.map(({ by, verdict, error, steps, note }) => {
    const line = document.createElement("p");
    const what = steps ? "the shaded step is wrong. What of it?" : error ? "what is shaded is wrong." : `${SAID[verdict]}.`;
    line.textContent = `${by} says: ${what}${note ? ` (${note})` : ""}`;
    return line;
  });
  $("imported-text").replaceChildren(...lines);
  for (const { error } of item.imported) if (error) answer.shade(error, "step");
  const steps = refinable();
  $("refine").hidden = steps === null;
  for (const name of ["first_number", "last_token"]) {
    const quote = document.querySelector(`[data-action=${name}] q`);
    quote.textContent = steps?.[name] ? textOf(steps[name]) : "none";
    enable(name, Boolean(steps?.[name]));
  }
}

const refinable = () => item?.imported.find(({ steps }) => steps)?.steps ?? null;
const textOf = ([start, end]) =>
  item.segments.filter(([, from, to]) => from >= start && to <= end).map(([text]) => text).join("").trim();

const unit = () => (item?.cut === "words" ? "word" : "token");

function showMark() {
  const marked = answer.marked();
  const one = unit();
  const total = answer.pieces.length;
  $("mark").classList.toggle("set", marked !== null);
  if (marked === null) $("mark").textContent = "No error marked.";
  else {
    const many = marked.first !== marked.last;
    const quoted = document.createElement("q");
    quoted.textContent = answer.text().replaceAll("\n", "⏎");
    const place = many ? `${one}s ${marked.first + 1} to ${marked.last + 1}` : `${one} ${marked.first + 1}`;
    $("mark").replaceChildren(`First error: ${place} of ${total}, `, quoted);
  }
  for (const action of ["wrong", "shorter", "longer", "clear"]) enable(action, marked !== null);
  // It is no longer true.
  if (marked !== null && Object.values(HINT).includes($("status").textContent)) say("");
  showLineOfMark();
}

function showLineOfMark() {
  const span = answer.span();
  for (const { element, start, end } of drawn) {
    element.classList.toggle("here", span !== null && start < span[1] && span[0] < Math.max(end, start + 1));
  }
}

function showProgress() {
  const { num_labelled: done, num_released: skipped, num_waiting: waiting, mean_seconds: mean, num_withheld: withheld } = progress;
  $("bar").max = Math.max(1, done + waiting);
  $("bar").value = done;
  $("bar").textContent = `${done} of ${done + waiting}`;
  $("counts").textContent = `${done} labelled by you, ${waiting} still to go${skipped ? `, ${skipped} skipped` : ""}`;
  $("pace").textContent = mean === null ? "" : `, ${clockTime(mean)} on average`;
  $("done-text").textContent = `You have labelled ${done}${skipped ? ` and skipped ${skipped}` : ""}. Nothing else is free now.${
    withheld ? ` ${withheld} answers do not fit the target and are not served; the server's terminal lists them.` : ""
  }`;
  enable("undo", progress.last_entry !== null);
}

// aria-disabled rather than disabled: a button that loses the focus while it is used loses the person's place.
function enable(action, able) {
  for (const button of document.querySelectorAll(`[data-action=${action}]`)) {
    button.setAttribute("aria-disabled", String(!able));
  }
}

function say(sentence) {
  $("status").textContent = sentence;
}

function showTrouble(sentence, retry) {
  again = retry;
  $("trouble").hidden = false;
  $("trouble-text").textContent = sentence;
  $("retry").hidden = retry === null;
}

// ---- asking the server --------------------------------------------------------------------------------------------------

// One thing at a time. What was marked stays where it is unless the work is done.
async function attempt(work, retry = () => attempt(work)) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  $("trouble").hidden = true;
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    await told(error, retry);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

async function told(error, retry) {
  const sentence = item ? `Not saved: ${error.message}.` : `The server says: ${error.message}.`;
  if (error.mayPass) {
    if (item) keepDraft();
    showTrouble(item ? `${sentence} What you marked is kept.` : sentence, retry);
    return;
  }
  // The item went another way, in a second tab say: go on with what is open now.
  if (error.status === 409) await goOn().catch(() => undefined);
  showTrouble(sentence, null);
}

async function goOn() {
  const found = await ask("/api/next", { annotator });
  ({ item, progress } = found);
  showProgress();
  if (item) showItem();
  else {
    show("done");
    $("done-title").focus();
  }
}

const start = () => attempt(goOn);

// Saving and fetching the next are tried again apart: what is saved must not be sent for another item.
async function save(path, fields, sentence) {
  const key = draftKey();
  ({ progress } = await ask(path, fields));
  sessionStorage.removeItem(key);
  item = null;
  showProgress();
  say(sentence);
  await goOn().catch((error) => {
    if (!(error instanceof Refused)) throw error;
    showTrouble(`Saved, but the next answer could not be fetched: ${error.message}.`, start);
  });
}

function label(verdict) {
  if (!item) return;
  const error = verdict === "wrong" ? answer.span() : null;
  if (verdict === "wrong" && error === null) {
    say(HINT[unit()]);
    return;
  }
  const fields = { annotator, item: item.id, verdict, error, note: $("note").value.trim(), seconds: stopwatch.seconds() };
  // Tried again, it is what is marked then: the mark may have been moved meanwhile.
  attempt(() => save("/api/label", fields, `${SAVED[verdict]} u takes it back.`), () => label(verdict));
}

// One key marks what of the imported step is wrong, and saves it.
function refine(name) {
  const steps = refinable();
  if (!steps) return;
  if (!steps[name]) {
    say("This step states no number. Mark what is wrong, or choose another part.");
    return;
  }
  answer.markSpan(steps[name]);
  label("wrong");
}

async function undo() {
  const found = await ask("/api/undo", { annotator, entry: progress.last_entry });
  ({ progress } = found);
  showProgress();
  if (found.label) {
    const draft = { error: found.label.error, note: found.label.note };
    sessionStorage.setItem(`draft ${annotator} ${found.item}`, JSON.stringify(draft));
  }
  say("Taken back. Here it is again, as you had marked it.");
  await goOn();
}

function askSkip() {
  if (!item) return;
  $("reason").value = "";
  $("skip").returnValue = "";
  $("skip").showModal();
}

// ---- what keys and buttons do -------------------------------------------------------------------------------------------

const ACTIONS = {
  wrong: () => label("wrong"),
  correct: () => label("correct"),
  unplaced: () => label("unplaced"),
  first_number: () => refine("first_number"),
  last_token: () => refine("last_token"),
  whole: () => refine("whole"),
  skip: askSkip,
  undo: () => (progress?.last_entry === null ? say("There is nothing to take back.") : attempt(undo)),
  note: () => $("note").focus(),
  help: () => $("help").showModal(),
  clear: () => answer.clear(),
  longer: () => answer.marked() && answer.mark(answer.marked().first, answer.marked().last + 1),
  shorter: () => answer.marked() && answer.mark(answer.marked().first, Math.max(answer.marked().first, answer.marked().last - 1)),
};

document.addEventListener("click", (event) => {
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action && !busy) ACTIONS[action]();
});

document.addEventListener("keydown", (event) => {
  if (!annotator || busy || event.altKey || event.metaKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape") answer.box.focus();
    return;
  }
  if (event.key === "Enter" && event.target.matches("a, button")) return;
  const open = item !== null && !$("work").hidden;
  let used = false;
  if (open) used = answer.moved(event);
  if (event.ctrlKey && !used) return;
  const action = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  // A key that is held down moves the mark on, but must not label one answer after the other.
  if (!used && action && !event.repeat && (open || action === "undo" || action === "help")) {
    ACTIONS[action]();
    used = true;
  }
  if (used) event.preventDefault();
});

$("skip").addEventListener("close", () => {
  if ($("skip").returnValue !== "skip" || !item) return;
  const fields = { annotator, item: item.id, reason: $("reason").value.trim() };
  attempt(() => save("/api/skip", fields, "Skipped: somebody else gets it."));
});
$("drawn").addEventListener("click", (event) => {
  const line = drawn.find(({ element }) => element.contains(event.target));
  if (line && !busy && answer.touched([line.start, line.end]).length) answer.mark(answer.touched([line.start, line.end])[0]);
});
$("stay").addEventListener("click", () => $("skip").close());
$("retry").addEventListener("click", () => again?.());
$("look-again").addEventListener("click", start);
$("note").addEventListener("input", keepDraft);
addEventListener("pagehide", keepDraft);
setInterval(() => {
  $("clock").textContent = clockTime(stopwatch.seconds());
}, 500);

// ---- who labels: the name is in the address, so that a reload or a bookmark goes on --------------------------------------

function enter(name) {
  annotator = name;
  $("person").hidden = name === "";
  $("person-name").textContent = name;
  for (const link of document.querySelectorAll("[data-keep-name]")) {
    const address = new URL(link.href);
    if (name) address.searchParams.set("name", name);
    link.href = address.pathname + address.search;
  }
  if (name) start();
  else {
    show("login");
    $("name").value = localStorage.getItem("name") ?? "";
    $("name").focus();
  }
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (!name) return;
  localStorage.setItem("name", name);
  history.pushState(null, "", `?${new URLSearchParams({ name })}`);
  enter(name);
});
$("leave").addEventListener("click", () => {
  location.href = "/";
});
addEventListener("popstate", () => location.reload());

hideToken();
enter(annotatorInAddress());
