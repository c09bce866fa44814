// Elements from words. Text goes into text nodes and attributes of ours alone: no string of a
// trajectory is ever read as markup.

/**
 * Returns an element with properties and children; strings become text nodes.
 * `on...` are listeners, `class` and names with a dash are attributes, others are properties.
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class" || name === "role" || name.includes("-")) element.setAttribute(name, value === true ? "" : value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Returns the element of an id, which must be there. */
export function byId(id) {
  return document.getElementById(id);
}

/** Returns a label as a chip: its word, never colour alone; "no label" where there is none. */
export function chip(label, before = "", after = "") {
  return h("span", { class: `chip ${label ?? "none"}` }, `${before}${label ?? "no label"}${after}`);
}

/** Says something to those who hear the page. */
export function announce(text) {
  byId("status").textContent = text;
}

/** Shows what went wrong, until the next thing that works. */
export function complain(text) {
  const box = byId("problem");
  box.textContent = text;
  box.hidden = !text;
}

/**
 * Returns what makes listeners of functions: of all of them, one runs at a time, and a press while
 * one is under way does nothing. (A button that is disabled would lose the focus.)
 */
export function takingTurns() {
  let isBusy = false;
  return (run) => async (event) => {
    event.stopPropagation();
    if (isBusy) return;
    isBusy = true;
    const button = event.currentTarget;
    button.setAttribute("aria-disabled", "true");
    try {
      await run();
    } catch (error) {
      complain(error.message);
    } finally {
      isBusy = false;
      button.removeAttribute("aria-disabled");
    }
  };
}

/** Returns a count with its noun: "1 step", "2 steps". */
export function counted(number, noun, plural = `${noun}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? noun : plural}`;
}
