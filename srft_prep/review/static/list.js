// The list of trajectories: a filter, and as many rows as the window shows; the others are fetched
// when they come into sight.

import { ask } from "./api.js";
import { complain, counted, h } from "./dom.js";
import { bind } from "./keys.js";
import { FILTERS, address, go, state } from "./state.js";
import { visible } from "./text.js";

const ROW_HEIGHT = 30;
const PAGE = 100;
const SPARE = 20;
const TYPING_PAUSE = 150;
const LONGEST_ID = 48;

const by = (label) => `steps that anybody, you, other annotators or critics, labelled ${label}, of those whose labels you may see; a step that was labelled differently counts under each of its labels`;
const HEAD = [
  ["Trajectory", ""],
  ["Outcome", ""],
  ["Format", ""],
  ["Model", ""],
  ["Steps", "steps of the trajectory"],
  ["Labelled", "steps that you labelled"],
  ["Good", by("good")],
  ["Unnec.", by("unnecessary")],
  ["Harmful", by("harmful")],
  ["Differ", "steps whose labels differ and that nobody adjudicated, of those whose labels you may see"],
];

let current = null;

export class ListView {
  /** Shows the list in an element, the row that was opened last in its middle. */
  static async open(main) {
    const view = new ListView();
    current = view;
    await view.load(0);
    main.replaceChildren(view.form(), view.table());
    view.choose(Math.min(state.place, Math.max(0, view.total - 1)), "center");
    view.grid.focus({ preventScroll: true });
    return view;
  }

  constructor() {
    /** Each page that was asked for: `rows`, empty until they come, and `isWanted`, which tells when. */
    this.pages = new Map();
    this.total = 0;
    this.chosen = 0;
    /** Kept when the rows are those of the filter. */
    this.filtered = Promise.resolve();
  }

  /** Fetches a page of rows, once; returns false where another filter was chosen before they came. */
  load(page) {
    if (!this.pages.has(page)) {
      const entry = { rows: [] };
      this.pages.set(page, entry);
      entry.isWanted = this.fill(entry, page);
    }
    return this.pages.get(page).isWanted;
  }

  async fill(entry, page) {
    const { pages } = this;
    try {
      const found = await ask("trajectories", { ...state.filter, offset: page * PAGE, limit: PAGE });
      if (pages !== this.pages) return false;
      entry.rows = found.rows;
      this.total = found.total;
      return true;
    } catch (error) {
      if (pages !== this.pages) return false;
      pages.delete(page);
      throw error;
    }
  }

  form() {
    const { facets, read_only: isReadOnly } = state.session;
    const choice = (name, title, options) => h(
      "label", {}, title,
      h(
        "select", { id: `filter-${name}`, onchange: () => this.refilter() },
        h("option", { value: "" }, "any"),
        options.map(([value, text]) => h("option", { value, selected: state.filter[name] === value }, text)),
      ),
    );
    const facet = (name) => facets[name].map(([value, count]) => [value, `${visible(value)} (${count.toLocaleString("en")})`]);
    const states = [["unlabelled", "not all labelled"], ["begun", "begun"], ["labelled", "all labelled"]];
    const labels = ["good", "unnecessary", "harmful"].map((label) => [label, label]);
    this.search = h("input", {
      id: "filter-search", type: "search", value: state.filter.search ?? "", placeholder: "part of an id",
      autocomplete: "off", spellcheck: false,
      oninput: () => {
        clearTimeout(this.typing);
        this.typing = setTimeout(() => this.refilter(), TYPING_PAUSE);
      },
    });
    this.found = h("output", { class: "quiet" });
    this.filterForm = h(
      "form", { class: "filters", role: "search", "aria-label": "Filter", onsubmit: (event) => event.preventDefault() },
      h("label", {}, "Search", this.search),
      choice("outcome", "Outcome", facet("outcome")),
      choice("format", "Format", facet("format")),
      choice("model", "Model", facet("model")),
      choice("state", "State", [...(isReadOnly ? [] : states), ["disagreement", "labels differ"]]),
      choice("label", "Has label", labels),
      this.found,
    );
    return this.filterForm;
  }

  table() {
    this.rows = h("div", { class: "rows", role: "rowgroup" });
    this.grid = h(
      "div", {
        class: "grid", role: "grid", tabIndex: 0, id: "list", "aria-label": "Trajectories",
        onscroll: () => this.draw(),
      },
      h("div", { class: "row head", role: "row" }, HEAD.map(([name, title], index) => h("span", { role: "columnheader", class: index > 3 ? "number" : "", title }, name))),
      this.rows,
    );
    new ResizeObserver(() => this.draw()).observe(this.grid);
    return this.grid;
  }

  /** Takes the filter's new values: a new list, the same form. */
  refilter() {
    clearTimeout(this.typing);
    this.typing = null;
    this.filtered = this.takeFilter();
  }

  async takeFilter() {
    for (const name of FILTERS) {
      const { value } = this.filterForm.querySelector(`#filter-${name}`);
      if (value) state.filter[name] = value;
      else delete state.filter[name];
    }
    history.replaceState(null, "", address());
    this.pages = new Map();
    state.place = 0;
    try {
      if (!(await this.load(0))) return;
      this.grid.scrollTop = 0;
      this.choose(0);
      complain("");
    } catch (error) {
      complain(error.message);
    }
  }

  /** Makes a row the chosen one, and brings it into sight. */
  choose(index, place = "nearest") {
    this.chosen = Math.max(0, Math.min(index, this.total - 1));
    const top = this.chosen * ROW_HEIGHT;
    const height = this.grid.clientHeight - ROW_HEIGHT;
    if (place === "center") this.grid.scrollTop = Math.max(0, top - height / 2);
    else if (top < this.grid.scrollTop) this.grid.scrollTop = top;
    else if (top + ROW_HEIGHT > this.grid.scrollTop + height) this.grid.scrollTop = top + ROW_HEIGHT - height;
    this.draw();
  }

  /** Draws the rows that are in sight, and fetches what is missing of them. */
  draw() {
    const first = Math.max(0, Math.floor(this.grid.scrollTop / ROW_HEIGHT) - SPARE);
    const last = Math.min(this.total, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / ROW_HEIGHT) + SPARE);
    const drawn = [];
    for (let index = first; index < last; index += 1) {
      const page = this.pages.get(Math.floor(index / PAGE));
      drawn.push(this.rowOf(index, page?.rows[index % PAGE]));
      if (page === undefined) this.fetch(Math.floor(index / PAGE));
    }
    this.rows.style.height = `${this.total * ROW_HEIGHT}px`;
    this.rows.replaceChildren(...drawn);
    this.grid.setAttribute("aria-rowcount", String(this.total + 1));
    if (this.total) this.grid.setAttribute("aria-activedescendant", `row-${this.chosen}`);
    else this.grid.removeAttribute("aria-activedescendant");
    this.found.textContent = this.total ? counted(this.total, "trajectory", "trajectories") : "nothing fits";
  }

  fetch(page) {
    this.load(page).then((isWanted) => isWanted && current === this && this.draw(), (error) => complain(error.message));
  }

  rowOf(index, row) {
    const properties = {
      class: "row", role: "row", id: `row-${index}`, "aria-rowindex": String(index + 2),
      "aria-selected": index === this.chosen ? "true" : "false",
    };
    const element = h("div", properties);
    element.style.top = `${index * ROW_HEIGHT}px`;
    if (!row) return element;
    element.addEventListener("click", () => this.openRow(index));
    const cell = (content, name = "") => h("span", { role: "gridcell", class: name }, content);
    const number = (value, name = "") => cell(value ? value.toLocaleString("en") : "·", `number ${value ? name : "quiet"}`);
    const id = visible(row.trajectory_id);
    element.append(
      h("span", { role: "gridcell", class: "id", title: id }, shortened(id)),
      cell(h("span", { class: `outcome ${row.outcome}` }, row.outcome)),
      cell(visible(row.format), "quiet"),
      h("span", { role: "gridcell", class: "quiet cut", title: visible(row.model ?? "") }, visible(row.model ?? "")),
      number(row.num_steps),
      cell(row.labelled ? (row.labelled === row.num_steps ? "all" : String(row.labelled)) : "·", `number ${row.labelled ? "" : "quiet"}`),
      number(row.labels[0], "good"),
      number(row.labels[1], "unnecessary"),
      number(row.labels[2], "harmful"),
      number(row.differing),
    );
    return element;
  }

  /** Goes back to the rows; they are those of the filter when `filtered` is kept. */
  goToRows() {
    if (this.typing) this.refilter();
    this.grid.focus();
  }

  /** Opens a row's trajectory, once the row is here. */
  async openRow(index) {
    const page = Math.floor(index / PAGE);
    const row = (await this.load(page)) && this.pages.get(page)?.rows[index % PAGE];
    if (!row) return undefined;
    state.place = index;
    return go({ t: row.row });
  }
}

/** Returns a long id without its middle: ids of one run begin alike. */
function shortened(id) {
  return id.length <= LONGEST_ID ? id : `${id.slice(0, LONGEST_ID / 2 - 4)}…${id.slice(-LONGEST_ID / 2 - 4)}`;
}

const choosing = (place) => async () => {
  await current.filtered;
  current.choose(place());
};
const step = (by) => choosing(() => current.chosen + by);
bind(["j", "ArrowDown"], { view: "list", help: "next row", hint: "row", run: step(1) });
bind(["k", "ArrowUp"], { view: "list", help: "row before", run: step(-1) });
bind(["PageDown"], { view: "list", help: "a page down", run: step(20) });
bind(["PageUp"], { view: "list", help: "a page up", run: step(-20) });
bind(["Home"], { view: "list", help: "first row", run: choosing(() => 0) });
bind(["End"], { view: "list", help: "last row", run: choosing(() => current.total - 1) });
bind(["Enter", "o"], { view: "list", help: "open the trajectory", hint: "open", run: async () => {
  current.goToRows();
  await current.filtered;
  return current.openRow(current.chosen);
} });
bind(["/"], { view: "list", help: "search", hint: "search", run: () => current.search.focus() });
bind(["Escape"], { view: "list", help: "back to the rows", run: () => current.goToRows() });
