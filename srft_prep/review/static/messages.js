// A message of a trajectory: its blocks of text, folded or open, long ones cut.

import { ask } from "./api.js";
import { counted, h, takingTurns } from "./dom.js";
import { state } from "./state.js";
import { Painter, visible } from "./text.js";

const OUTLINE_CHARACTERS = 160;

/**
 * Returns a message's element and whether it is one that folds.
 * An action is open and cannot be folded; the text of anything else is painted when it opens.
 */
export function messageView(row, message, { open }) {
  if (message.kind === "action") {
    const element = h("div", { class: "message action" });
    element.append(...blockViews(row, message));
    return { element, isFolding: false };
  }
  const body = h("div", { class: "blocks" });
  const element = h("details", { class: `message ${message.kind}` }, h("summary", {}, summaryOf(message)), body);
  element.addEventListener("toggle", () => {
    if (element.open && !body.firstChild) body.append(...blockViews(row, message));
  });
  if (open) {
    body.append(...blockViews(row, message));
    element.open = true;
  }
  return { element, isFolding: true };
}

function summaryOf(message) {
  const total = message.blocks.reduce((sum, block) => sum + block.total, 0);
  const isWhole = message.blocks.every((block) => block.end === block.total);
  const lines = message.blocks.reduce((sum, block) => sum + block.text.trimEnd().split("\n").length, 0);
  const size = total === 0 ? "empty" : isWhole && lines > 1 ? counted(lines, "line") : counted(total, "character");
  const who = [message.kind, message.role && message.role !== "tool" ? `(${visible(message.role)})` : "", message.name ? visible(message.name) : ""];
  return [
    h("span", { class: "what" }, who.filter(Boolean).join(" ")),
    h("span", { class: "size" }, size),
    h("span", { class: "preview" }, outlineOf(message)),
  ];
}

/** Returns the first words of what a message does or says. */
export function outlineOf(message) {
  const call = message.blocks.findIndex((block) => block.part === "call");
  let text = message.blocks.map((block) => block.text).join("\n");
  if (call >= 0) {
    const { title } = message.blocks[call];
    const words = message.blocks.slice(call + 1, call + 3).map((block) => block.text.trim().split("\n", 1)[0]);
    text = [/bash|shell|terminal|python/i.test(title) ? "" : title, ...words].join(" ") || title;
  } else if (message.kind === "action") text = /```[\w.+-]*\n([\s\S]*?)(```|$)/.exec(text)?.[1] ?? text;
  const plain = text.slice(0, 40 * OUTLINE_CHARACTERS).replace(/\x1b\[[0-9;:]*m/g, "").trim();
  const lines = message.kind === "action" ? plain.split("\n", 1) : plain.split(/\s*\n\s*/, 8);
  return visible(lines.join(" ⏎ ").slice(0, OUTLINE_CHARACTERS));
}

function blockViews(row, message) {
  if (!message.blocks.length) return [h("p", { class: "note" }, "(empty)")];
  return message.blocks.flatMap((block, index) => blockView(row, message, block, index));
}

function blockView(row, message, block, index) {
  const parts = [];
  const before = message.blocks[index - 1];
  const name = before?.part === "call" && h("span", { class: "call" }, visible(before.title || "call"), " ");
  if (block.part === "call") {
    const hasArguments = ["argument", "old", "new"].includes(message.blocks[index + 1]?.part);
    if (!hasArguments) parts.push(h("div", { class: "block-title call" }, visible(block.title || "call")));
  } else if (name) parts.push(h("div", { class: "block-title" }, name, visible(block.title)));
  else if (block.part === "reasoning") parts.push(h("div", { class: "block-title" }, "reasoning"));
  else if (block.title) parts.push(h("div", { class: "block-title" }, visible(block.title)));
  if (block.total === 0) return parts;
  const isWritten = ["action", "prompt", "demo"].includes(message.kind);
  const painter = new Painter(block.part, {
    terminal: !isWritten, fences: isWritten && block.part === "content", raw: state.raw,
  });
  const text = h("pre", { class: `text part-${block.part}`, dir: "ltr" });
  text.append(painter.paint(block.text));
  parts.push(text);
  if (block.end < block.total) parts.push(moreOf(row, message, block, index, text, painter));
  return parts;
}

/** Returns the controls that fetch the rest of a long text, a piece at a time or all of it. */
function moreOf(row, message, block, index, text, painter) {
  let { end } = block;
  const bar = h("div", { class: "more" });
  const left = h("span", { class: "quiet" });
  const tell = () => {
    left.textContent = `${end.toLocaleString("en")} of ${block.total.toLocaleString("en")} characters are shown. `;
  };
  const fetchPiece = async () => {
    const piece = await ask(`trajectories/${row}/text`, { message: message.number, block: index, start: end });
    text.append(painter.paint(piece.text));
    end = piece.end;
    if (end >= block.total) {
      text.setAttribute("tabindex", "-1");
      text.focus({ preventScroll: true });
      bar.remove();
    } else tell();
  };
  const inTurn = takingTurns();
  const button = (words, run) => h("button", { type: "button", onclick: inTurn(run) }, words);
  bar.append(
    left,
    button("Show more", fetchPiece),
    button(`Show all ${block.total.toLocaleString("en")} characters`, async () => {
      while (end < block.total) await fetchPiece();
    }),
  );
  tell();
  return bar;
}
