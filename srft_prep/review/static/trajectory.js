// One trajectory: its task, its steps with what came back folded, and the labels of each step.

import { ask, command } from "./api.js";
import { announce, chip, complain, h } from "./dom.js";
import { bind } from "./keys.js";
import { messageView, outlineOf } from "./messages.js";
import { go, showProgress, state } from "./state.js";
import { visible } from "./text.js";

const LABELS = ["good", "unnecessary", "harmful"];

let current = null;

export class TrajectoryView {
  /** Shows a trajectory at a step; without one, at the first that the annotator has not labelled. */
  static async open(main, row, step) {
    const data = await ask(`trajectories/${row}`, state.filter);
    const view = new TrajectoryView(data);
    current = view;
    state.place = data.place - 1;
    main.replaceChildren(view.head(), h("div", { class: "reading" }, view.rail(), view.content()));
    const open = state.session.read_only ? -1 : data.said.findIndex((said) => said.label === null);
    view.select(step ?? Math.max(0, open));
    return view;
  }

  constructor(data) {
    this.data = data;
    this.row = data.row;
    this.step = 0;
  }

  head() {
    const { data } = this;
    const about = [data.trajectory_id.includes(data.instance_id) ? "" : data.instance_id, data.format, data.model, data.exit_status && `ended: ${data.exit_status}`];
    const goTo = (row, key, title) => h(
      "button", { type: "button", disabled: row === null, "aria-keyshortcuts": key, "aria-label": title, title, onclick: () => go({ t: row }) },
      h("kbd", {}, key), key === "K" ? " before" : " next",
    );
    return h(
      "div", { class: "about" },
      h("h2", { title: visible(data.trajectory_id) }, visible(data.trajectory_id)),
      h("span", { class: `outcome ${data.outcome}` }, data.outcome),
      h("span", { class: "quiet cut" }, about.filter(Boolean).map(visible).join(" · ")),
      h("span", { class: "quiet" }, data.weighted_by_label ? "srft weighs its steps by label" : "srft weighs every step 1"),
      h("span", { class: "neighbours" },
        h("span", { class: "quiet" }, `${data.place.toLocaleString("en")} of ${data.total.toLocaleString("en")}`),
        goTo(data.previous, "K", "trajectory before"), goTo(data.next, "J", "next trajectory")),
    );
  }

  rail() {
    const actions = this.data.messages.filter((message) => message.kind === "action");
    this.railItems = actions.map((message, step) => {
      const mark = h("span", { class: "mark" });
      const button = h(
        "button", { type: "button", tabIndex: -1, onclick: () => this.select(step) },
        h("span", { class: "number" }, String(step)),
        h("span", { class: "outline" }, outlineOf(message)),
        mark,
      );
      return { button, mark };
    });
    this.railItems.forEach((_, step) => this.showMark(step));
    return h(
      "nav", { class: "rail", "aria-label": "Steps" },
      h("ol", {}, this.railItems.map(({ button }) => h("li", {}, button))),
    );
  }

  content() {
    const before = this.data.messages.filter((message) => message.step < 0);
    this.task = before.map((message, index) => messageView(this.row, message, { open: index === before.length - 1 }));
    this.cards = this.data.said.map((_, step) => this.card(step));
    this.scroller = h(
      "div", { class: "steps", tabIndex: -1 },
      before.length > 0 && h("section", { class: "task", "aria-label": "Task" }, this.task.map((view) => view.element)),
      this.cards.map((card) => card.element),
      this.cards.length === 0 && h("p", { class: "note" }, "This trajectory has no steps."),
      this.data.patch && h(
        "section", { class: "task", "aria-label": "Patch" },
        messageView(this.row, { number: -1, kind: "patch", role: "", step: -1, blocks: [{ part: "content", title: "", ...this.data.patch }] }, { open: false }).element,
      ),
    );
    return this.scroller;
  }

  card(step) {
    const messages = this.data.messages.filter((message) => message.step === step);
    const views = messages.map((message) => messageView(this.row, message, {
      open: message.kind === "action" || state.unfolded,
    }));
    const buttons = LABELS.map((label, index) => h(
      "button", {
        type: "button", class: `label-button ${label}`, "aria-pressed": "false", "aria-keyshortcuts": String(index + 1),
        onclick: () => { this.select(step); this.label(label); },
      },
      h("kbd", {}, String(index + 1)), ` ${label}`,
    ));
    const others = h("div", { class: "others" });
    const title = `step-title-${step}`;
    const element = h(
      "article", { class: "step", id: `step-${step}`, tabIndex: -1, "aria-labelledby": title },
      h(
        "header", {},
        h("h3", { id: title }, `Step ${step}`),
        !state.session.read_only && h("div", { class: "label-buttons", role: "group", "aria-label": `Your label of step ${step}` }, buttons),
        others,
      ),
      views.map((view) => view.element),
    );
    element.addEventListener("click", () => {
      if (this.step !== step && !String(getSelection())) this.select(step, { scroll: false });
    });
    const card = { element, buttons, others, views };
    this.showSaid(card, step);
    return card;
  }

  /** Shows what everybody said of a step, as far as the server tells. */
  showSaid(card, step) {
    const said = this.data.said[step];
    card.buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(said.label === LABELS[index])));
    card.element.dataset.label = said.label ?? "";
    const rationales = [];
    const chips = said.others.map((other) => chip(other.label, `${visible(other.name)}: `));
    for (const critic of said.critics) {
      const chance = critic.p_harmful === null ? "" : `, p(harmful) ${critic.p_harmful.toFixed(2)}`;
      chips.push(chip(critic.label, `${visible(critic.name)}: `, `, weight ${critic.weight}${chance}`));
      if (critic.rationale) rationales.push(h("p", { class: "rationale" }, h("b", {}, `${visible(critic.name)}: `), visible(critic.rationale)));
    }
    if (said.adjudicated) chips.push(h("span", { class: "quiet" }, "adjudicated"));
    if (said.hidden && (state.session.critics.length || state.session.blind)) {
      chips.push(h("span", { class: "quiet hidden-note" }, "others' labels are hidden until you label it"));
    }
    card.others.replaceChildren(...chips, ...rationales);
  }

  showMark(step) {
    const said = this.data.said[step];
    const label = said.label ?? (state.session.read_only ? said.others[0]?.label ?? said.critics[0]?.label : null);
    const { button, mark } = this.railItems[step];
    mark.className = `mark ${label ?? "none"}`;
    mark.textContent = label ?? "";
    button.setAttribute("aria-label", `Step ${step}, ${label ?? "no label"}`);
  }

  /** Makes a step the current one: the keys are about it, and it has the focus. */
  select(step, { scroll = true } = {}) {
    if (!this.cards.length) {
      this.scroller.focus();
      return;
    }
    const chosen = Math.max(0, Math.min(step, this.cards.length - 1));
    if (step > chosen) announce("This is the last step. J goes to the next trajectory.");
    const before = this.cards[this.step];
    before.element.classList.remove("current");
    before.element.removeAttribute("aria-current");
    this.railItems[this.step].button.removeAttribute("aria-current");
    this.railItems[this.step].button.tabIndex = -1;
    this.step = chosen;
    const { element } = this.cards[chosen];
    element.classList.add("current");
    element.setAttribute("aria-current", "step");
    const { button } = this.railItems[chosen];
    button.setAttribute("aria-current", "step");
    button.tabIndex = 0;
    button.scrollIntoView({ block: "nearest" });
    element.focus({ preventScroll: true });
    if (scroll) {
      const isFirst = chosen === 0 && this.data.said[0].label === null;
      if (isFirst) this.scroller.scrollTop = 0;
      const { top, bottom } = element.getBoundingClientRect();
      const frame = this.scroller.getBoundingClientRect();
      if (!isFirst || top > frame.bottom - 120) {
        if (top < frame.top || bottom > frame.bottom) element.scrollIntoView({ block: "start" });
      }
    }
  }

  /** Labels the current step; the label is shown when the server has it on the disk. */
  async label(label) {
    const { row, step } = this;
    if (await this.send("labels", { row, step, label })) announce(`Step ${step}: ${label}, saved.`);
  }

  /** Takes the last label back, wherever it was. */
  async undo() {
    const found = await this.send("undo", {});
    if (!found) return;
    if (found.row === undefined) announce("There is nothing to undo.");
    else if (found.row === this.row) {
      this.select(found.step);
      announce(`Step ${found.step}: back to ${found.said.label ?? "no label"}.`);
    } else await go({ t: found.row, s: found.step });
  }

  async send(path, body) {
    if (state.session.read_only) {
      complain("This page is for reading: start review without --read-only to label.");
      return null;
    }
    try {
      const found = await command(path, body);
      if (found.row === this.row) {
        this.data.said[found.step] = found.said;
        this.showSaid(this.cards[found.step], found.step);
        this.showMark(found.step);
      }
      if (found.progress) showProgress(found.progress);
      complain("");
      return found;
    } catch (error) {
      complain(error.message);
      return null;
    }
  }

  /** Folds or unfolds what came back in a step. */
  fold() {
    const folded = (this.cards[this.step]?.views ?? []).filter((view) => view.isFolding);
    const open = !folded.some((view) => view.element.open);
    folded.forEach((view) => { view.element.open = open; });
  }

  foldAll() {
    state.unfolded = !state.unfolded;
    const { step } = this;
    for (const card of this.cards) {
      for (const view of card.views) if (view.isFolding) view.element.open = state.unfolded;
    }
    requestAnimationFrame(() => this.cards[step]?.element.scrollIntoView({ block: "start" }));
  }

  foldTask() {
    const open = !this.task.some((view) => view.element.open);
    this.task.forEach((view) => { view.element.open = open; });
    if (open) this.scroller.scrollTop = 0;
  }

  /** Shows the codes of terminals as text, or colours again. */
  toggleRaw() {
    state.raw = !state.raw;
    const { step } = this;
    this.scroller.replaceWith(this.content());
    this.select(step);
    announce(state.raw ? "Terminal codes are shown as text." : "Terminal colours are shown.");
  }
}

const inView = (keys, help, hint, run) => bind(keys, { view: "trajectory", help, hint, run });
inView(["j"], "next step", "step", () => current.select(current.step + 1));
inView(["k"], "step before", "", () => current.select(current.step - 1));
LABELS.forEach((label, index) => inView([String(index + 1)], `label the step ${label}`, label, () => current.label(label)));
inView(["u"], "undo your last label, wherever it was", "undo", () => current.undo());
inView(["o", "Enter"], "fold or unfold what came back", "unfold", () => current.fold());
inView(["O"], "the same for all steps", "", () => current.foldAll());
inView(["t"], "fold or unfold the task", "", () => current.foldTask());
inView(["r"], "show terminal codes as text", "", () => current.toggleRaw());
inView(["J"], "next trajectory", "trajectory", () => (current.data.next === null ? announce("This is the last one.") : go({ t: current.data.next })));
inView(["K"], "trajectory before", "", () => (current.data.previous === null ? announce("This is the first one.") : go({ t: current.data.previous })));
inView(["Escape"], "all trajectories", "list", () => go());
