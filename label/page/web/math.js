// Text with formulas, from the server's blocks. Owns how a tree of names, attributes and text becomes MathML: node by node, never as HTML.

const MATHML = "http://www.w3.org/1998/Math/MathML";

function mathNode(tree) {
  if (typeof tree === "string") return document.createTextNode(tree);
  const [name, attributes, children] = tree;
  const element = document.createElementNS(MATHML, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.map(mathNode));
  return element;
}

function partNode(part) {
  if (typeof part === "string") return document.createTextNode(part);
  const formula = mathNode(part.tree);
  formula.setAttribute("aria-label", part.tex);
  const box = document.createElement("span");
  box.className = part.display ? "formula display" : "formula";
  box.title = part.tex;
  box.append(formula);
  return box;
}

// Fills an element with a text; without blocks, as it stands.
export function showText(element, text, blocks) {
  if (!blocks.length) {
    element.textContent = text;
    return [];
  }
  const lines = blocks.map((block) => {
    const line = document.createElement("div");
    line.className = "drawn-line";
    line.append(...block.parts.map(partNode));
    return { element: line, start: block.start, end: block.end };
  });
  element.replaceChildren(...lines.map((line) => line.element));
  return lines;
}

// One turn of a prompt: who speaks, and the text.
export function turn({ role, content, blocks, others = [] }) {
  const element = document.createElement("div");
  const name = document.createElement("p");
  const text = document.createElement("div");
  element.className = `turn ${role}`;
  name.className = "role";
  name.textContent = role;
  text.className = "text";
  showText(text, content, blocks);
  element.append(name, text);
  if (others.length) {
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = `The model also got what this page does not show: ${others.join(", ")}.`;
    element.append(hint);
  }
  return element;
}
