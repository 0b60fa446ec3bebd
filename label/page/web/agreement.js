// The page of agreement: two tables. Owns how a figure is written; the server has worked them out.

import { annotatorInAddress, ask, hideToken, Refused } from "./api.js";

const $ = (id) => document.getElementById(id);
const NONE = "–";
const WORDS = { correct: "all correct", wrong: "an error", unplaced: "wrong, no place" };

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

function differenceRow(pair, one) {
  const says = (name, verdict) => `${name}: ${WORDS[verdict]}`;
  return row(one.item_id, says(pair.first, one.first), says(pair.second, one.second), number(one.distance));
}

function show({ pairs }) {
  $("status").textContent = pairs.length
    ? ""
    : "No answer has been labelled by two people yet. draftsmith label serve --shared 0.1 gives a tenth of them to two.";
  $("found").hidden = pairs.length === 0;
  $("pairs").replaceChildren(...pairs.map(pairRow));
  const differences = pairs.flatMap((pair) => pair.differences.map((one) => differenceRow(pair, one)));
  $("differences").replaceChildren(...differences);
  $("differences-box").hidden = differences.length === 0;
}

for (const link of document.querySelectorAll("[data-keep-name]")) {
  const address = new URL(link.href);
  const name = annotatorInAddress();
  if (name) address.searchParams.set("name", name);
  link.href = address.pathname + address.search;
}
hideToken();
try {
  show(await ask("/api/agreement"));
} catch (error) {
  if (!(error instanceof Refused)) throw error;
  $("status").textContent = `${error.message}. Reload the page to try again.`;
}
