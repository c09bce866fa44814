// The keys of every view, in one table: what is pressed, what is shown in the help and at the foot.

import { byId, complain, h } from "./dom.js";

const bindings = [];

/**
 * Binds keys to what they do.
 * @param {string[]} keys as in KeyboardEvent.key
 * @param {{view: string, help: string, hint?: string, run: (event: KeyboardEvent) => unknown}} what
 *   `view`: where it works, "" everywhere; `hint`: shown at the foot of the page; `run` returns
 *   a promise where it takes time
 */
export function bind(keys, what) {
  bindings.push({ keys, ...what });
}

let currentView = "";
/** Keys act one after the other, each on what the one before left: none is lost, however fast. */
let turn = Promise.resolve();
let pending = 0;

/** Counts the keys that have not acted to their end; the page says whether there are any. */
function count(change) {
  pending += change;
  byId("main").toggleAttribute("data-has-keys", pending > 0);
}

/** Says which view's keys work now, and shows them at the foot. */
export function useKeys(view) {
  currentView = view;
  const shown = bindings.filter((each) => each.hint && (each.view === view || each.view === ""));
  byId("hints").replaceChildren(
    ...shown.map((each) => h("span", {}, each.keys.slice(0, 2).map((key) => h("kbd", {}, nameOf(key))), ` ${each.hint}`)),
  );
}

function nameOf(key) {
  return { ArrowDown: "↓", ArrowUp: "↑", Enter: "Enter", Escape: "Esc" }[key] ?? key;
}

/** Opens the help: all keys by view. */
export function showHelp() {
  const titles = { list: "In the list", trajectory: "In a trajectory", table: "In a table", "": "Everywhere" };
  const sections = Object.entries(titles).map(([view, title]) => {
    const rows = bindings.filter((each) => each.view === view && each.help);
    return rows.length && h(
      "section", {}, h("h3", {}, title),
      h("dl", {}, rows.map((each) => h(
        "div", {},
        h("dt", {}, each.keys.flatMap((key, index) => [index ? " " : "", h("kbd", {}, nameOf(key))])),
        h("dd", {}, each.help),
      ))),
    );
  });
  byId("help-keys").replaceChildren(...sections.filter(Boolean));
  const dialog = byId("help");
  if (!dialog.open) dialog.showModal();
}

/** Begins to listen. */
export function listen() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const dialog = byId("help");
    if (dialog.open) {
      if (event.key === "?") dialog.close();
      return;
    }
    const target = event.target;
    const isField = target.matches("input, select, textarea");
    if (isField && !(event.key === "Escape" || (event.key === "Enter" && target.matches("input")))) return;
    if (isField) target.blur(); // what is typed next is no part of the field's text
    // a focused control keeps what its keys mean
    if (["Enter", " "].includes(event.key) && target.matches("button, a, summary")) return;
    const binding = () => bindings.find((each) => each.keys.includes(event.key) && (each.view === currentView || each.view === ""));
    const mayBeBound = pending ? bindings.some((each) => each.keys.includes(event.key)) : binding();
    if (!mayBeBound) return;
    event.preventDefault();
    count(1);
    turn = turn.then(() => binding()?.run(event)).catch((error) => complain(error.message)).finally(() => count(-1));
  });
}
