// What all views share: the session, the filter, and the address, which holds both the filter and
// the place, so that a reload comes back to them.

import { byId, counted, h } from "./dom.js";

export const FILTERS = ["search", "outcome", "format", "model", "state", "label"];

export const state = {
  /** What api/session says. */
  session: null,
  /** The filter's values that are set, by name. */
  filter: {},
  /** Position of the last opened trajectory in the filtered list. */
  place: 0,
  /** Whether terminal codes are shown instead of obeyed as colours. */
  raw: false,
};

/** Returns the words of the address behind its #. */
export function words() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

/** Returns an address with the filter and more words. */
export function address(more = {}) {
  return `#${new URLSearchParams({ ...state.filter, ...more })}`;
}

const waiting = [];

/** Goes to an address of this page; what is returned is kept when its view is shown. */
export function go(more = {}) {
  const target = address(more);
  if (location.hash === (target === "#" ? "" : target)) return Promise.resolve(); // no change would be told
  return new Promise((resolve) => {
    waiting.push(resolve);
    location.hash = target;
  });
}

/** Says that the view of the address is shown. */
export function arrived() {
  waiting.splice(0).forEach((resolve) => resolve());
}

/** Shows how far the annotator is. */
export function showProgress(progress) {
  state.session.progress = progress;
  const { read_only: isReadOnly } = state.session;
  const labelled = progress.labelled_steps;
  byId("progress").replaceChildren(
    isReadOnly
      ? counted(progress.steps, "step")
      : h("span", {}, h("b", {}, labelled.toLocaleString("en")), ` of ${counted(progress.steps, "step")} labelled`),
  );
  byId("tab-disagreements").textContent = progress.disagreements
    ? `Disagreements (${progress.disagreements.toLocaleString("en")})`
    : "Disagreements";
}
