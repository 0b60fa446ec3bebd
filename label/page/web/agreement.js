// The page of agreement: two tables, and one answer with two marks between which a third person decides. Owns how a figure is written;
// the server has worked them out.

import { AnswerView } from "./answer.js";
import { annotatorInAddress, ask, hideToken, Refused } from "./api.js";
import { showText, turn } from "./math.js";

const $ = (id) => document.getElementById(id);
const NONE = "–";
const WORDS = { correct: "all correct", wrong: "an error", unplaced: "wrong, no place" };

const HINT = "Mark the first error first, or choose another verdict.";

const annotator = annotatorInAddress();
const answer = new AnswerView($("answer"), showMark);
let differences = [];
let current = null; // the difference that is open
let busy = false;

const say = (sentence) => {
  $("status").textContent = sentence;
};
const number = (value) => (value === null ? NONE : Number.isInteger(value) ? String(value) : value.toFixed(2));

function row(head, ...cells) {
  const element = document.createElement("tr");
  const first = document.createElement("th");
  first.scope = "row";
  first.textContent = head;
  element.append(first, ...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
  return element;
}

function pairRow(pair) {
  return row(
    `${pair.first} and ${pair.second}`,
    number(pair.num_items),
    `${Math.round(100 * pair.observed)} %`,
    pair.kappa === null ? NONE : pair.kappa.toFixed(2),
    number(pair.num_marked),
    pair.num_marked ? number(pair.num_same_token) : NONE,
    number(pair.median_distance),
    number(pair.mean_distance),
  );
}

function differenceRow(difference, index) {
  const { pair, item_id: item, first, second, distance, decided_by: decider } = difference;
  const says = (name, verdict) => `${name}: ${WORDS[verdict]}`;
  const element = row("", says(pair.first, first), says(pair.second, second), number(distance), decider ?? NONE);
  const look = document.createElement("button");
  look.type = "button";
  look.className = "quiet";
  look.textContent = item;
  look.addEventListener("click", () => attempt(() => open(index)));
  element.firstElementChild.append(look);
  return element;
}

function showTables({ pairs }) {
  say(pairs.length ? "" : "No answer has been labelled by two people yet. draftsmith label serve --shared 0.1 gives a tenth of them to two.");
  $("pairs").replaceChildren(...pairs.map(pairRow));
  differences = pairs.flatMap((pair) => pair.differences.map((difference) => ({ ...difference, pair })));
  $("differences").replaceChildren(...differences.map(differenceRow));
  $("differences-box").hidden = differences.length === 0;
  const total = pairs.reduce((sum, pair) => sum + pair.num_differences, 0);
  const undecided = pairs.reduce((sum, pair) => sum + pair.num_undecided, 0);
  const more = total > differences.length ? ` The first ${differences.length} are listed.` : "";
  $("differences-caption").textContent = `Answers on which they differ: ${total}, ${undecided} of them undecided.${more}`;
  $("found").hidden = pairs.length === 0;
}

// ---- one difference -----------------------------------------------------------------------------------------------------

async function open(index) {
  const { pair, item_id: item } = differences[index];
  const asked = { item, first: pair.first, second: pair.second };
  current = { ...(await ask("/api/compare", asked)), index };
  $("found").hidden = true;
  $("case").hidden = false;
  $("prompt").replaceChildren(...current.messages.map(turn));
  $("reference-box").hidden = current.reference === null;
  if (current.reference) showText($("reference"), current.reference.text, current.reference.blocks);
  $("drawn-box").hidden = current.blocks.length === 0;
  if (current.blocks.length) showText($("drawn"), "", current.blocks);
  $("cut").textContent = `in ${current.cut}`;
  $("where").textContent = `${current.source} · ${current.id}`;
  answer.show(current.segments);
  const [first, second] = current.labels;
  $("first-name").textContent = first.by;
  $("second-name").textContent = second.by;
  if (first.error) answer.shade(first.error, "by-first", first.by);
  if (second.error) answer.shade(second.error, "by-second", second.by);
  $("said").replaceChildren(saidBy(first, "first"), saidBy(second, "second"));
  $("note").value = "";
  showDecision();
  showMark();
  scrollTo(0, 0);
  answer.box.focus({ preventScroll: true });
}

function saidBy({ by, verdict, error, note }, side) {
  const line = document.createElement("li");
  line.className = side;
  const where = error ? `: “${answer.textOf(error)}”` : "";
  line.textContent = `${by}: ${WORDS[verdict]}${where}${note ? ` (${note})` : ""}`;
  return line;
}

// Who may decide: a third person who has given a name.
function showDecision() {
  const { decided, labels } = current;
  const isParty = labels.some(({ by }) => by === annotator);
  const reason = decided ? "" : !annotator ? "Give your name on the page Label first: a decision has a name to it."
    : isParty ? "You are one of the two: somebody else decides." : "";
  $("decide").hidden = decided !== null || reason !== "";
  $("may-not").hidden = reason === "";
  $("may-not").textContent = reason;
  $("decided").hidden = decided === null;
  $("reopen").hidden = decided === null || decided.by !== annotator;
  if (decided) {
    const where = decided.error ? `: “${answer.textOf(decided.error)}”` : "";
    $("decided").textContent = `${decided.by} has decided: ${WORDS[decided.verdict]}${where}${decided.note ? ` (${decided.note})` : ""}`;
    if (decided.error) answer.shade(decided.error, "by-third", decided.by);
  }
}

function showMark() {
  const span = answer.span();
  $("mark").classList.toggle("set", span !== null);
  $("mark").textContent = span === null ? "No error marked." : `First error: “${answer.text().replaceAll("\n", "⏎")}”`;
  for (const button of document.querySelectorAll("[data-action=wrong]")) button.setAttribute("aria-disabled", String(span === null));
  if (span !== null && $("status").textContent === HINT) say("");
}

function decide(verdict, error) {
  if ($("decide").hidden) return;
  if (verdict === "wrong" && error === null) {
    say(HINT);
    return;
  }
  attempt(async () => {
    await ask("/api/decide", { annotator, item: current.id, verdict, error, note: $("note").value.trim() });
    const from = current.index;
    await afterwards("Saved: your label counts", async () => {
      await refresh();
      const isOpen = ({ decided_by: decider }) => decider === null;
      const later = differences.findIndex((difference, index) => index >= from && isOpen(difference));
      const rest = later < 0 ? differences.findIndex(isOpen) : later;
      if (rest < 0) back();
      else await open(rest);
      say(rest < 0 ? "Saved. Nothing is left to decide." : "Saved: your label counts. Here is the next difference.");
    });
  });
}

function reopen() {
  if ($("reopen").hidden) return;
  attempt(async () => {
    const { id, decided } = current;
    await ask("/api/reopen", { annotator, entry: decided.entry });
    await afterwards("Taken back: the answer is open again", async () => {
      await refresh();
      const place = differences.findIndex(({ item_id: item }) => item === id);
      // One of the two may have changed a label meanwhile, or the list may be full.
      if (place < 0) back();
      else await open(place);
      say(place < 0 ? "Taken back: the answer is open again, but not among the differences listed here." : "Taken back: the answer is open again.");
    });
  });
}

// What is written stays written, also where the list cannot be fetched afterwards.
async function afterwards(done, work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(`${done}. The list could not be fetched again: ${error.message}. Reload the page.`);
  }
}

function back() {
  const at = current?.index ?? 0;
  current = null;
  $("case").hidden = true;
  $("found").hidden = false;
  $("differences").querySelectorAll("button")[at]?.focus();
}

async function refresh() {
  showTables(await ask("/api/agreement"));
  if (current) $("found").hidden = true;
}

async function attempt(work) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(`Not done: ${error.message}.`);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

const as = (index) => () => decide(current.labels[index].verdict, current.labels[index].error);
const ACTIONS = {
  first: as(0), second: as(1), wrong: () => decide("wrong", answer.span()), correct: () => decide("correct", null),
  unplaced: () => decide("unplaced", null), next: () => attempt(() => open((current.index + 1) % differences.length)),
  back, reopen, note: () => $("note").focus(), clear: () => (answer.marked() ? answer.clear() : back()),
};
const KEYS = {
  1: "first", 2: "second", Enter: "wrong", c: "correct", x: "unplaced", s: "next", u: "reopen", n: "note", Escape: "clear",
};

document.addEventListener("click", (event) => {
  const action = event.target.closest("[data-action]")?.dataset.action;
  if (action && current && !busy) ACTIONS[action]();
});
document.addEventListener("keydown", (event) => {
  if (!current || busy || event.altKey || event.metaKey) return;
  if (event.target.matches("input, textarea")) {
    if (event.key === "Escape") answer.box.focus();
    return;
  }
  if (event.key === "Enter" && event.target.matches("a, button")) return;
  let used = answer.moved(event);
  if (event.ctrlKey && !used) return;
  const action = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (!used && action && !event.repeat) {
    ACTIONS[action]();
    used = true;
  }
  if (used) event.preventDefault();
});

for (const link of document.querySelectorAll("[data-keep-name]")) {
  const address = new URL(link.href);
  if (annotator) address.searchParams.set("name", annotator);
  link.href = address.pathname + address.search;
}
hideToken();
await attempt(refresh);
