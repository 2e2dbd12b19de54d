// Parts that several pages have: what the address remembers, lists with a filter and pages, sliders, channels, verify.

import { Picture, el, get, later, line, number, table, url } from "/assets/dom.js";

const ROWS = 50;
export const COLORS = ["#2f5fd0", "#c2571a", "#2a8a5f", "#8a4fb5", "#a87b00", "#c23b6b", "#3a8ba0", "#5d6778"];

export const recall = (name) => new URLSearchParams(location.search).get(name);

/** Keeps what is looked at in the address, so that it can be opened again. */
export function remember(values) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(values)) {
    if (value === null || value === "" || value === undefined) query.delete(name);
    else query.set(name, value);
  }
  history.replaceState(null, "", `/?${query}`);
}

export function head(place, kind, ...more) {
  return el("div", { class: "head" }, el("h1", {}, place.name), el("span", { class: "soft" }, kind), ...more);
}

/** A list that the server filters and cuts into pages. `row(entry)` makes a row of the table. */
export class List {
  constructor({ ask, heads, row, label, loaded = () => {} }) {
    Object.assign(this, { ask, heads, row, loaded });
    this.start = 0;
    this.asked = 0;
    this.filter = el("input", { type: "search", placeholder: label, "aria-label": label, value: recall("filter") ?? "" });
    this.filter.addEventListener("input", later(() => this.load(0)));
    this.body = el("div", { class: "wide" });
    this.told = el("span");
    this.back = el("button", { onclick: () => this.load(this.start - ROWS) }, "‹");
    this.next = el("button", { onclick: () => this.load(this.start + ROWS) }, "›");
    this.back.setAttribute("aria-label", "Page before");
    this.next.setAttribute("aria-label", "Next page");
    this.element = el("section", { class: "list" }, this.filter, this.body,
      el("div", { class: "pager" }, this.back, this.told, this.next));
  }

  async load(start = this.start) {
    const asked = ++this.asked;
    try {
      const found = await this.ask({ filter: this.filter.value, start, count: ROWS });
      if (asked !== this.asked) return;
      this.start = start;
      remember({ filter: this.filter.value });
      const last = Math.min(start + ROWS, found.matching);
      this.told.textContent = found.matching ? `${number(start + 1)}–${number(last)} of ${number(found.matching)}` : "nothing matches";
      if (found.total === 0) this.told.textContent = "none yet";
      this.back.disabled = start === 0;
      this.next.disabled = last >= found.matching;
      this.body.replaceChildren(table(this.heads, found.rows.map(this.row)));
      this.loaded(found.rows);
    } catch (error) {
      this.body.replaceChildren(line(error.message));
    }
  }

  choose(keys) {
    for (const row of this.body.querySelectorAll("tr[data-key]")) row.classList.toggle("chosen", keys.includes(row.dataset.key));
  }
}

/** A slider with its number and buttons for single steps. */
export class Slider {
  constructor(label, moved) {
    this.input = el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": label });
    this.output = el("output");
    this.moved = moved;
    this.input.addEventListener("input", () => this.change());
    const step = (by) => () => this.set(this.value + by);
    const buttons = [["‹", -1, "before"], ["›", 1, "after"]].map(([text, by, what]) =>
      el("button", { onclick: step(by), "aria-label": `${label} ${what}` }, text));
    this.element = el("div", { class: "slider" }, el("span", {}, label), this.input, this.output, el("div", { class: "steps" }, buttons));
  }

  get value() {
    return Number(this.input.value);
  }

  range(count) {
    this.input.max = Math.max(0, count - 1);
    this.element.hidden = count < 2;
    this.told();
  }

  set(value) {
    this.input.value = value;
    this.change();
  }

  change() {
    this.told();
    this.moved(this.value);
  }

  told() {
    this.output.textContent = `${this.value} / ${this.input.max}`;
  }
}

/** The channels of a latent as small grey pictures. */
export class Channels {
  constructor(path) {
    this.path = path;
    this.pictures = [];
    this.element = el("div", { class: "channels" });
  }

  show(count, query, statistics = []) {
    while (this.pictures.length < count) {
      const made = new Picture(`channel ${this.pictures.length}`);
      this.pictures.push(made);
      this.element.append(made.element);
    }
    this.pictures.splice(count).forEach((extra) => extra.element.remove());
    this.pictures.forEach((picture, c) => {
      const known = statistics[c];
      const caption = known ? `${c}: ${short(known.min)} … ${short(known.max)}` : String(c);
      picture.show(url(this.path, { ...query, c }), caption);
    });
  }
}

const short = (value) => (value === null ? "–" : Number(value.toPrecision(3)).toString());

/** A button that holds every byte against its checksum, and where its answer goes. */
export function verifier(at) {
  const answer = el("div");
  const button = el("button", {
    onclick: async () => {
      button.disabled = true;
      answer.replaceChildren(line("reading every byte ...", "quiet"));
      try {
        const found = await get("/api/verify", { at }, { method: "POST" });
        const told = found.problems.slice(0, 20).map((problem) => line(problem));
        if (found.problems.length > 20) told.push(line(`and ${found.problems.length - 20} more`));
        answer.replaceChildren(line(`${found.ok ? "ok" : "NOT ok"}, ${found.line}`, found.ok ? "good" : ""), ...told);
      } catch (error) {
        answer.replaceChildren(line(error.message));
      }
      button.disabled = false;
    },
  }, "Verify");
  return { button, answer };
}
