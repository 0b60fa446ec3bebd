// The answer as a row of pieces, and the mark on it. Owns which pieces are marked; knows nothing of the server.
//
// A list box for screen readers: the box has the focus, the piece where the mark's moving end stands is its active option.
// Jumps go by the browser's own rules for words and sentences; a step is a line. Text is only ever set as text. Positions in the response are the server's: JavaScript counts characters otherwise.

// What a key jumps by, and whether forwards. The letters are for layouts and systems that keep Ctrl + arrows for themselves.
const JUMPS = {
  w: ["word", true], b: ["word", false], "Ctrl+ArrowRight": ["word", true], "Ctrl+ArrowLeft": ["word", false],
  ".": ["sentence", true], ",": ["sentence", false], "Ctrl+ArrowDown": ["sentence", true], "Ctrl+ArrowUp": ["sentence", false],
  j: ["step", true], k: ["step", false], PageDown: ["step", true], PageUp: ["step", false],
};
// With Shift, these keys give other signs. A letter is what it is, wherever a layout has it.
const OF_CODE = { Period: ".", Comma: "," };
const LETTER = /^\p{L}$/u;
const SHOWN_SPACE = { "\n": "line break", "\t": "tab", " ": "space" };

export class AnswerView {
  constructor(box, onChange) {
    this.box = box;
    this.onChange = onChange;
    this.pieces = [];
    this.gaps = []; // text that no token covers, with the number of pieces before it
    this.anchor = null; // index of the piece where the mark began
    this.focus = null; // index of the piece where it ends now
    this.home = null; // index of the piece where marking begins, if not at the first
    this.starts = {}; // indices of the pieces where words, sentences and steps begin
    box.addEventListener("click", (event) => this.clicked(event));
    box.addEventListener("mousedown", (event) => {
      if (event.shiftKey) event.preventDefault(); // else the browser selects text up to here
    });
  }

  show(segments) {
    this.pieces = [];
    this.gaps = [];
    this.anchor = this.focus = this.home = null;
    let at = 0; // in JavaScript's own count
    const nodes = segments.map(([text, start, end]) => {
      const element = document.createElement("span");
      element.textContent = text;
      const from = at;
      at += text.length;
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
      this.pieces.push({ element, start, end, from, to: at });
      return element;
    });
    this.box.replaceChildren(...nodes);
    const whole = segments.map(([text]) => text).join("");
    this.starts = {
      word: this.at(units(whole, "word")), sentence: this.at(units(whole, "sentence")), step: this.at(lines(whole)),
    };
    this.paint();
  }

  // The pieces that stand at these places of the text, ascending.
  at(places) {
    const indices = new Set();
    let index = 0;
    for (const place of places) {
      while (index < this.pieces.length && this.pieces[index].to <= place) index += 1;
      if (index < this.pieces.length) indices.add(index);
    }
    return [...indices];
  }

  touched([start, end]) {
    return this.pieces.flatMap((piece, index) => (piece.end > start && piece.start < end ? [index] : []));
  }

  textOf(span) {
    return this.touched(span).map((index) => this.pieces[index].element.textContent).join("").trim();
  }

  // Shades a span that somebody else has marked. `by` stands before it, where it is given.
  shade(span, className, by = "") {
    const touched = this.touched(span);
    for (const index of touched) this.pieces[index].element.classList.add(className);
    if (!touched.length || !by) return;
    const { element } = this.pieces[touched[0]];
    element.classList.add("tagged");
    element.dataset.by = element.dataset.by ? `${element.dataset.by}, ${by}` : by;
  }

  // Where marking begins, and what is in sight first.
  beginAt(span) {
    const [first = null] = this.touched(span);
    this.home = first;
    if (first !== null) this.pieces[first].element.scrollIntoView({ block: "nearest" });
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

  markSpan(span) {
    const touched = this.touched(span);
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

  // Returns whether the keyboard event was one of ours.
  moved(event) {
    const extend = event.shiftKey && this.anchor !== null;
    const goal = this.jump(event, extend) ?? (event.ctrlKey ? null : this.goal(event.key));
    if (goal === null) return false;
    this.mark(extend ? this.anchor : goal, goal);
    return true;
  }

  jump(event, extend) {
    const sign = LETTER.test(event.key) ? event.key.toLowerCase() : OF_CODE[event.code] ?? event.key;
    const key = event.key.length === 1 ? sign : event.key;
    const jump = JUMPS[event.ctrlKey ? `Ctrl+${key}` : key];
    if (!jump || !this.pieces.length) return null;
    const [unit, forwards] = jump;
    const starts = this.starts[unit];
    const last = this.pieces.length - 1;
    if (this.focus === null) return this.home ?? (forwards ? starts[0] ?? 0 : starts[starts.length - 1] ?? last);
    if (!forwards) return starts.findLast((start) => start < this.focus) ?? 0;
    if (!extend) return starts.find((start) => start > this.focus) ?? last;
    const ends = [...starts.slice(1).map((start) => this.lastSeen(start - 1)), this.lastSeen(last)];
    return ends.find((end) => end > this.focus) ?? last;
  }

  // That piece, or the one before it that is more than white space.
  lastSeen(index) {
    while (index > 0 && this.pieces[index].element.textContent.trim() === "") index -= 1;
    return index;
  }

  goal(key) {
    const last = this.pieces.length - 1;
    if (key === "Home") return 0;
    if (key === "End") return last;
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(key)) return null;
    if (this.focus === null) return this.home ?? (key === "ArrowLeft" || key === "ArrowUp" ? last : 0);
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

// Where the words or sentences of a text begin.
function units(text, granularity) {
  const parts = new Intl.Segmenter(undefined, { granularity }).segment(text);
  return [...parts].flatMap(({ segment, index, isWordLike }) => {
    const ink = segment.search(/\S/);
    return ink < 0 || (granularity === "word" && !isWordLike) ? [] : [index + ink];
  });
}

// Where the lines of a text begin that are not empty.
function lines(text) {
  return [...text.matchAll(/^[^\S\n]*(?=\S)/gm)].map((match) => match.index + match[0].length);
}
