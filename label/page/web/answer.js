// The answer as a row of pieces, and the mark on it. Owns which pieces are marked; knows nothing of the server.
//
// A list box for screen readers: the box has the focus, the piece where the mark's moving end stands is its active option.
// Text is only ever set as text. Positions in the response are the server's: JavaScript counts characters otherwise.

const SHOWN_SPACE = { "\n": "line break", "\t": "tab", " ": "space" };

export class AnswerView {
  constructor(box, onChange) {
    this.box = box;
    this.onChange = onChange;
    this.pieces = [];
    this.gaps = []; // text that no token covers, with the number of pieces before it
    this.anchor = null; // index of the piece where the mark began
    this.focus = null; // index of the piece where it ends now
    box.addEventListener("click", (event) => this.clicked(event));
    box.addEventListener("mousedown", (event) => {
      if (event.shiftKey) event.preventDefault(); // else the browser selects text up to here
    });
  }

  show(segments) {
    this.pieces = [];
    this.gaps = [];
    this.anchor = this.focus = null;
    const nodes = segments.map(([text, start, end]) => {
      const element = document.createElement("span");
      element.textContent = text;
      if (start === undefined) {
        element.setAttribute("role", "presentation");
        this.gaps.push({ element, before: this.pieces.length });
        return element;
      }
      element.id = `piece-${this.pieces.length}`;
      element.className = "piece";
      element.setAttribute("role", "option");
      if (text.trim() === "") {
        element.classList.add(text.includes("\n") ? "line-break" : "blank");
        const name = SHOWN_SPACE[text] ?? (text.includes("\n") ? "line breaks" : "spaces");
        element.setAttribute("aria-label", name);
      }
      this.pieces.push({ element, start, end });
      return element;
    });
    this.box.replaceChildren(...nodes);
    this.paint();
  }

  // First and last marked piece, or null.
  marked() {
    if (this.anchor === null) return null;
    return { first: Math.min(this.anchor, this.focus), last: Math.max(this.anchor, this.focus) };
  }

  // The marked characters of the response, or null.
  span() {
    const marked = this.marked();
    return marked && [this.pieces[marked.first].start, this.pieces[marked.last].end];
  }

  text() {
    return [...this.box.children].filter((element) => element.classList.contains("marked")).map((one) => one.textContent).join("");
  }

  markSpan([start, end]) {
    const touched = this.pieces.flatMap((piece, index) => (piece.end > start && piece.start < end ? [index] : []));
    if (touched.length) this.mark(touched[0], touched[touched.length - 1]);
  }

  mark(anchor, focus = anchor) {
    if (!this.pieces.length) return;
    const inside = (index) => Math.max(0, Math.min(this.pieces.length - 1, index));
    this.anchor = inside(anchor);
    this.focus = inside(focus);
    this.paint();
    this.pieces[this.focus].element.scrollIntoView({ block: "nearest" });
    this.onChange();
  }

  clear() {
    this.anchor = this.focus = null;
    this.paint();
    this.onChange();
  }

  // `key` is that of a keyboard event; returns whether it was one of ours.
  moved(key, extend) {
    const goal = this.goal(key);
    if (goal === null) return false;
    this.mark(extend && this.anchor !== null ? this.anchor : goal, goal);
    return true;
  }

  goal(key) {
    const last = this.pieces.length - 1;
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(key)) return null;
    if (this.focus === null) return key === "ArrowLeft" || key === "ArrowUp" ? last : 0;
    if (key === "ArrowLeft") return this.focus - 1;
    if (key === "ArrowRight") return this.focus + 1;
    return this.onOtherLine(key === "ArrowDown" ? 1 : -1);
  }

  // The piece of the nearest line above or below that is nearest to the one where the mark ends.
  onOtherLine(direction) {
    const place = (piece) => piece.element.getClientRects()[0] ?? piece.element.getBoundingClientRect();
    const here = place(this.pieces[this.focus]);
    const away = (piece) => (place(piece).top - here.top) * direction;
    const beyond = this.pieces.filter((piece) => away(piece) > here.height / 2);
    if (!beyond.length) return this.focus;
    const line = Math.min(...beyond.map(away));
    const aside = (piece) => Math.abs(place(piece).left - here.left);
    const onLine = beyond.filter((piece) => away(piece) < line + here.height / 2);
    return this.pieces.indexOf(onLine.reduce((best, piece) => (aside(piece) < aside(best) ? piece : best)));
  }

  clicked(event) {
    const index = this.pieces.findIndex((piece) => piece.element === event.target);
    if (index < 0) return;
    if (event.shiftKey && this.anchor !== null) this.mark(this.anchor, index);
    else if (this.anchor === index && this.focus === index) this.clear();
    else this.mark(index);
  }

  paint() {
    const marked = this.marked();
    this.pieces.forEach(({ element }, index) => {
      const chosen = marked !== null && marked.first <= index && index <= marked.last;
      element.setAttribute("aria-selected", String(chosen));
      element.classList.toggle("marked", chosen);
      element.classList.toggle("first", chosen && index === marked.first);
      element.classList.toggle("last", chosen && index === marked.last);
      element.classList.toggle("behind", marked !== null && index > marked.last);
    });
    for (const { element, before } of this.gaps) {
      element.classList.toggle("marked", marked !== null && marked.first < before && before <= marked.last);
    }
    if (this.focus === null) this.box.removeAttribute("aria-activedescendant");
    else this.box.setAttribute("aria-activedescendant", this.pieces[this.focus].element.id);
  }
}
