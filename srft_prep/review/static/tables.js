// Where labels differ, and how far each two agree.

import { ask } from "./api.js";
import { chip, h, takingTurns } from "./dom.js";
import { bind } from "./keys.js";
import { address, go } from "./state.js";
import { visible } from "./text.js";

const PAGE = 200;

/** Shows the queue of steps whose labels differ. */
export async function showDisagreements(main) {
  const found = await ask("disagreements", { offset: 0, limit: PAGE });
  const body = h("tbody", {}, found.rows.map(rowOf));
  const more = h("button", { type: "button", hidden: found.total <= PAGE }, "Show more");
  more.addEventListener("click", takingTurns()(async () => {
    const next = await ask("disagreements", { offset: body.children.length, limit: PAGE });
    body.append(...next.rows.map(rowOf));
    more.hidden = body.children.length >= next.total;
  }));
  main.replaceChildren(h(
    "section", { class: "page" },
    h("h2", { tabIndex: -1 }, "Disagreements"),
    h("p", { class: "note" }, found.total
      ? `${found.total.toLocaleString("en")} steps have labels that differ, among those that you may see. A label by --adjudicate settles one.`
      : "No labels that you may see differ."),
    found.total > 0 && h(
      "div", { class: "scroll" },
      h("table", {}, h("thead", {}, h("tr", {}, ["Trajectory", "Step", "Labels"].map((name) => h("th", { scope: "col", class: name === "Step" ? "number" : "" }, name)))), body),
    ),
    more,
  ));
  main.querySelector("tbody a, h2").focus();
  return null;
}

function rowOf(row) {
  return h(
    "tr", {},
    h("td", { class: "id" }, h("a", { href: address({ t: row.row, s: row.step }) }, visible(row.trajectory_id))),
    h("td", { class: "number" }, String(row.step)),
    h("td", { class: "said" }, row.said.map(([name, label]) => chip(label, `${visible(name)}: `))),
  );
}

/** Shows how far each two agree, and what to do with the gold file. */
export async function showAgreement(main) {
  const found = await ask("agreement");
  const number = (value, digits) => (value === null ? "-" : value.toFixed(digits));
  main.replaceChildren(h(
    "section", { class: "page" },
    h("h2", { tabIndex: -1 }, "Agreement"),
    h("p", { class: "note" }, "Of the steps that both labelled, as far as you may see their labels. Kappa is the agreement beyond chance (Cohen): 0 is chance, 1 is always."),
    found.pairs.length
      ? h(
        "div", { class: "scroll" },
        h(
          "table", { id: "pairs" },
          h("thead", {}, h("tr", {}, ["", "Steps", "Agreement", "Kappa"].map((name) => h("th", { scope: "col", class: "number" }, name)))),
          h("tbody", {}, found.pairs.map((pair) => h(
            "tr", {},
            h("th", { scope: "row" }, `${visible(pair.one)} and ${visible(pair.other)}`),
            h("td", { class: "number" }, pair.steps.toLocaleString("en")),
            h("td", { class: "number" }, pair.agreement === null ? "-" : `${(100 * pair.agreement).toFixed(1)}%`),
            h("td", { class: "number" }, number(pair.kappa, 3)),
          ))),
        ),
      )
      : h("p", {}, "There is nobody to compare with yet: give critics' labels (--labels), or let a second annotator label."),
    found.num_foreign > 0 && h("p", { class: "note" }, `${found.num_foreign.toLocaleString("en")} lines of the gold file are of other trajectories, or of other versions of these: they are not counted here.`),
    ...found.pairs.filter((pair) => pair.steps).map((pair) => confusionOf(pair, found.labels)),
    found.command && h("h3", {}, "Measure the critics by these labels"),
    found.command && h("pre", { class: "command" }, visible(found.command)),
  ));
  main.querySelector("h2").focus();
  return null;
}

function confusionOf(pair, labels) {
  return h(
    "details", { class: "confusion" },
    h("summary", {}, `${visible(pair.one)} (rows) against ${visible(pair.other)} (columns)`),
    h(
      "table", {},
      h("thead", {}, h("tr", {}, h("th", {}, ""), labels.map((label) => h("th", { scope: "col", class: `number ${label}` }, label)))),
      h("tbody", {}, labels.map((label, row) => h(
        "tr", {}, h("th", { scope: "row", class: label }, label),
        pair.confusion[row].map((count) => h("td", { class: "number" }, String(count))),
      ))),
    ),
  );
}

/** Moves the focus to the next link of a table, or the one before. */
function move(by) {
  const links = [...document.querySelectorAll("main tbody a")];
  const here = links.indexOf(document.activeElement);
  links[Math.max(0, Math.min(links.length - 1, here + by))]?.focus();
}

bind(["j", "ArrowDown"], { view: "table", help: "next row", hint: "row", run: () => move(1) });
bind(["k", "ArrowUp"], { view: "table", help: "row before", run: () => move(-1) });
bind(["Escape"], { view: "table", help: "all trajectories", hint: "list", run: () => go() });
