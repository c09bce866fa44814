// Text that others wrote, shown as text: what does not print as itself is an escape that can be
// seen, colours of a terminal become styles, no other terminal code does anything, lines of diffs
// and of code are marked.

import { h } from "./dom.js";

/** What does not print as itself, as in hostile_text.py: all but letters, marks, signs and spaces. */
const UNSEEN = /(?![ \t\n])[\p{C}\p{Z}]/gu;
const COLOUR = /\x1b\[([0-9;:]*)m/g;
const DIFF_START = /^(diff --git |--- \S|@@ -\d+(,\d+)? \+\d+(,\d+)? @@)/;
const DIFF_META = /^(diff --git |index |--- |\+\+\+ |new file|deleted file|old mode|new mode|rename |similarity |Binary )/;

/** Returns a character's escape, as Python writes it. */
function escapeOf(character) {
  const code = character.codePointAt(0);
  if (code === 13) return "\\r";
  const [letter, digits] = code > 0xffff ? ["U", 8] : code > 0xff ? ["u", 4] : ["x", 2];
  return `\\${letter}${code.toString(16).padStart(digits, "0")}`;
}

/** Returns text as one line that can stand anywhere: in a title, a cell, an attribute. */
export function visible(text) {
  return text.replace(/[\n\t]/g, " ").replace(UNSEEN, escapeOf);
}

/** Paints text, a piece after the other; what a piece begins, the next goes on with. */
export class Painter {
  /**
   * @param {string} part what the text is: "content", "old", "new", "call", ...
   * @param {{terminal?: boolean, fences?: boolean, raw?: boolean}} how
   */
  constructor(part, { terminal = false, fences = false, raw = false } = {}) {
    this.part = part;
    this.terminal = terminal && !raw;
    this.fences = fences;
    this.inDiff = false;
    this.inCode = false;
    this.style = new Set();
  }

  /** Returns the painted text. */
  paint(text) {
    const piece = h("div", { class: "chunk" });
    const lines = text.replaceAll("\r\n", "\n").split("\n");
    lines.forEach((line, index) => {
      const isLast = index === lines.length - 1;
      if (isLast && line === "") return;
      const kind = this.#kindOf(line, lines[index + 1] ?? "");
      const end = isLast ? "" : "\n";
      if (kind) {
        const element = h("span", { class: `line ${kind}` });
        this.#paintLine(element, line + end);
        piece.append(element);
      } else {
        this.#paintLine(piece, line + end);
      }
    });
    return piece;
  }

  /** Returns what a line is: of a diff, of code, or nothing of the kind. */
  #kindOf(line, next) {
    if (this.part === "old") return "gone marked";
    if (this.part === "new") return "come marked";
    const plain = this.terminal ? line.replace(COLOUR, "") : line;
    if (DIFF_START.test(plain) && !(plain.startsWith("--- ") && !next.replace(COLOUR, "").startsWith("+++ "))) this.inDiff = true;
    if (this.inDiff) {
      if (DIFF_META.test(plain)) return "meta";
      if (plain.startsWith("@@")) return "hunk";
      if (plain.startsWith("+")) return "come";
      if (plain.startsWith("-")) return "gone";
      if (plain !== "" && !/^[ \\]/.test(plain)) this.inDiff = false;
    }
    if (this.fences && /^\s*```/.test(plain)) {
      this.inCode = !this.inCode;
      return "fence";
    }
    return this.inCode ? "code" : "";
  }

  #paintLine(parent, line) {
    if (!this.terminal || !(this.style.size || line.includes("\x1b["))) {
      paintPlain(parent, line);
      return;
    }
    let place = 0;
    for (const match of line.matchAll(COLOUR)) {
      this.#paintStyled(parent, line.slice(place, match.index));
      restyle(this.style, match[1]);
      place = match.index + match[0].length;
    }
    this.#paintStyled(parent, line.slice(place));
  }

  #paintStyled(parent, text) {
    if (!text) return;
    if (!this.style.size) {
      paintPlain(parent, text);
      return;
    }
    const span = h("span", { class: [...this.style].join(" ") });
    paintPlain(span, text);
    parent.append(span);
  }
}

function paintPlain(parent, text) {
  let place = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > place) parent.append(text.slice(place, match.index));
    parent.append(h("b", { class: "escape" }, escapeOf(match[0])));
    place = match.index + match[0].length;
  }
  if (place < text.length) parent.append(text.slice(place));
}

const MODES = { 1: "bold", 2: "faint", 3: "italic", 4: "underline", 7: "inverse", 9: "struck" };
const ENDS = { 22: ["bold", "faint"], 23: ["italic"], 24: ["underline"], 27: ["inverse"], 29: ["struck"] };

/** Applies the numbers of a colour code to a set of classes; hidden and blinking text is not. */
function restyle(style, numbers) {
  const codes = numbers.split(/[;:]/).map((word) => Number(word || 0));
  const replace = (prefix, name) => {
    for (const each of [...style]) if (each.startsWith(prefix)) style.delete(each);
    if (name) style.add(name);
  };
  for (let index = 0; index < codes.length; index += 1) {
    const code = codes[index];
    const [ground, offset] = code >= 40 && code < 50 ? ["bg", 40] : code >= 100 ? ["bg", 100] : code >= 90 ? ["fg", 90] : ["fg", 30];
    if (code === 0) style.clear();
    else if (MODES[code]) style.add(MODES[code]);
    else if (ENDS[code]) ENDS[code].forEach((name) => style.delete(name));
    else if (code === 38 || code === 48) {
      // 5;N is a colour of a table, 2;R;G;B one of millions: the first eight have a name here
      const isTable = codes[index + 1] === 5;
      const number = codes[index + 2];
      replace(`${ground}-`, isTable && number < 16 ? `${ground}-${number % 8}` : "");
      index += isTable ? 2 : 4;
    } else if (code === 39 || code === 49) replace(`${ground}-`, "");
    else if (code >= 30 && code - offset >= 0 && code - offset < 8) replace(`${ground}-`, `${ground}-${code - offset}`);
  }
}
