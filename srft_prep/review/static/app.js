// The page's start: who is here, which view the address asks for, and the keys of all views.

import { ask } from "./api.js";
import { byId, complain, h } from "./dom.js";
import { bind, listen, showHelp, useKeys } from "./keys.js";
import { ListView } from "./list.js";
import { FILTERS, address, arrived, go, showProgress, state, words } from "./state.js";
import { showAgreement, showDisagreements } from "./tables.js";
import { visible } from "./text.js";
import { TrajectoryView } from "./trajectory.js";

const main = byId("main");
let view = null;
let newest = 0;
let shown = Promise.resolve();

/** Shows the view that the address asks for, after the one under way and instead of all between. */
function route() {
  const turn = ++newest;
  main.setAttribute("aria-busy", "true");
  shown = shown.then(async () => {
    if (turn !== newest) return;
    await show();
    if (turn !== newest) return;
    main.dataset.shown = location.hash;
    main.setAttribute("aria-busy", "false");
    arrived();
  });
  return shown;
}

async function show() {
  const given = words();
  state.filter = Object.fromEntries(FILTERS.filter((name) => given[name]).map((name) => [name, given[name]]));
  byId("home").href = byId("tab-list").href = address();
  const name = given.t !== undefined ? "trajectory" : given.view ?? "list";
  const tab = { disagreements: "tab-disagreements", agreement: "tab-agreement" }[name] ?? "tab-list";
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.id === tab) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    if (name === "trajectory") {
      const step = given.s === undefined ? null : Number(given.s);
      view = await TrajectoryView.open(main, Number(given.t), step);
      // a reload goes on at the first step without a label, not where somebody came in
      history.replaceState(null, "", address({ t: given.t }));
    } else if (name === "disagreements") {
      view = await showDisagreements(main);
    } else if (name === "agreement") {
      view = await showAgreement(main);
    } else {
      view = await ListView.open(main);
    }
    useKeys(name === "trajectory" || name === "list" ? name : "table");
    complain("");
  } catch (error) {
    complain(error.message);
  }
}

/** Goes to the next step without a label, or whose labels differ, after the one that is shown. */
async function goToNext(kind, none) {
  try {
    const here = view instanceof TrajectoryView ? { row: view.row, step: view.step } : {};
    const found = await ask("next", { kind, ...state.filter, ...here });
    if (found.row === undefined) complain(none);
    else if (view instanceof TrajectoryView && found.row === view.row) view.select(found.step);
    else await go({ t: found.row, s: found.step });
  } catch (error) {
    complain(error.message);
  }
}

bind(["n"], {
  view: "",
  help: "next step without a label of yours",
  hint: "next unlabelled",
  run: () => goToNext("unlabelled", "Every step that fits the filter is labelled."),
});
bind(["d"], {
  view: "",
  help: "next step whose labels differ",
  run: () => goToNext("disagreement", "No labels that you may see differ."),
});
bind(["g"], { view: "", help: "all trajectories", run: () => go() });
bind(["?"], { view: "", help: "this help", hint: "keys", run: showHelp });

async function start() {
  listen();
  byId("help-button").addEventListener("click", showHelp);
  try {
    const session = await ask("session");
    state.session = session;
    byId("dataset").textContent = visible(session.name);
    document.title = `${visible(session.name)} - srft-prep review`;
    const mode = session.read_only ? "reading only" : session.adjudicates ? "adjudicating" : session.blind ? "blind" : "not blind";
    byId("who").replaceChildren(
      session.read_only ? "" : h("b", {}, visible(session.annotator)),
      h("span", { class: "mode" }, mode),
    );
    byId("help-note").textContent = session.read_only
      ? "This page is for reading: no label is written."
      : `Every label is appended to ${visible(session.gold)} before it is shown as saved.`
        + (session.blind ? " What others said of a step is not sent to this page until you have labelled it." : "");
    showProgress(session.progress);
    const stale = session.critics.filter((critic) => critic.stale);
    window.addEventListener("hashchange", route);
    await route();
    if (stale.length) {
      complain(`Labels of other versions of these trajectories are not shown: ${stale.map((each) => `${each.stale} of ${visible(each.name)}`).join(", ")}.`);
    }
  } catch (error) {
    main.setAttribute("aria-busy", "false");
    complain(error.message);
  }
}

start();
