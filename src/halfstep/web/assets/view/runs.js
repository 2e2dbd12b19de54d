// Recorded runs: a list, and one or two runs side by side at the step that a slider says.

import { Picture, el, get, line, number, table, url } from "/assets/dom.js";
import { Chart } from "/assets/view/charts.js";
import { COLORS, Channels, List, Slider, head, recall, remember, verifier } from "/assets/view/parts.js";

export async function show(main, place) {
  const at = place.at;
  const { button, answer } = verifier(at);
  const viewer = new Viewer(at);
  const list = new List({
    label: "Filter by name, prompt, seed, label",
    ask: (page) => get("/api/runs/rows", { at, ...page }),
    heads: [["run", true], ["seed"], [""]],
    row: (entry) => row(entry, choose),
    loaded: (rows) => {
      const kept = [recall("run"), recall("beside")].filter((key) => key !== null);
      if (!viewer.cards.length && (kept.length || rows.length)) choose(kept.length ? kept : [rows[0].key]);
      else list.choose(viewer.keys);
    },
  });
  const choose = (keys) => {
    const wanted = typeof keys === "string" ? [viewer.keys[0], keys].filter((key, n) => n === 1 || (key && key !== keys)) : keys;
    viewer.open(wanted);
    list.choose(wanted);
  };
  const reports = el("p", { class: "small" });
  main.append(head(place, "recorded runs", button), answer, reports,
    el("div", { class: "columns" }, list.element, viewer.element));
  await Promise.all([list.load(0), link(reports, at)]);
}

async function link(element, at) {
  try {
    const { reports } = await get("/api/runs", { at });
    reports.forEach(({ at: where, name }) => element.append("Analysis: ", el("a", { href: url("/report", { at: where }), target: "_blank", rel: "noopener" }, `${name}/report.html`), " "));
    if (!reports.length) element.append(el("span", { class: "soft" }, "No analysis lies beside these runs; halfstep analyze writes one."));
  } catch (error) {
    element.replaceChildren(line(error.message));
  }
}

function row(entry, choose) {
  const { key, prompt, label, seed, complete, problems, problem } = entry;
  const state = problem ?? (complete ? (problems ? `${problems} problems` : "") : "incomplete");
  const beside = el("button", { title: "Show beside the first", "aria-label": `Show ${key} beside`, onclick: (event) => {
    event.stopPropagation();
    choose(key);
  } }, "+");
  return el("tr", { class: "pick", "data-key": key, onclick: () => choose([key]) },
    el("td", { class: "left" }, el("button", { class: "link" }, key), el("span", { class: "sub" }, [prompt ?? (label ? `label ${label}` : null), state].filter(Boolean).join(" · "))),
    el("td", {}, seed === null || seed === undefined ? "" : String(seed)), el("td", {}, beside));
}

class Viewer {
  constructor(at) {
    this.at = at;
    this.asked = 0;
    this.cards = [];
    this.keys = [];
    this.steps = new Slider("step", (k) => this.move(k));
    this.times = new Slider("time", () => this.move(this.steps.value));
    this.row = el("div", { class: "runs" });
    this.charts = [new Chart("Norm of the state, rms", { integers: true, moved: (x) => this.steps.set(Math.round(x)) }),
      new Chart("Change from the last, rms", { log: true, integers: true, moved: (x) => this.steps.set(Math.round(x)) })];
    this.element = el("section", {}, this.steps.element, this.times.element, this.row,
      el("div", { class: "charts" }, this.charts.map((chart) => chart.element)), (this.more = el("div", { class: "runs more" })));
  }

  async open(keys) {
    const asked = ++this.asked;
    const first = this.keys.length === 0;
    this.keys = keys;
    remember({ run: keys[0], beside: keys[1] ?? null });
    const cards = await Promise.all(keys.map((key, n) => Card.open(this.at, key, COLORS[n])));
    if (asked !== this.asked) return;
    this.cards = cards;
    this.row.replaceChildren(...cards.map((card) => card.element));
    this.more.replaceChildren(...cards.map((card) => el("div", {}, card.parts, card.more)));
    const counts = cards.map((card) => card.count);
    this.steps.range(Math.max(...counts));
    this.times.range(Math.max(...cards.map((card) => card.times)));
    const last = Math.max(...counts) - 1;
    if (last >= 0) this.steps.set(Math.min(first ? Number(recall("step") ?? Math.floor(last / 2)) : this.steps.value, last));
    cards.forEach((card) => card.decode());
    await Promise.all(cards.map((card) => card.measure()));
    if (asked === this.asked) this.plot();
  }

  move(k) {
    remember({ step: k });
    this.cards.forEach((card) => card.move(k, this.times.value));
    this.charts.forEach((chart) => chart.at(k));
  }

  plot() {
    for (const [n, name] of ["norm", "change"].entries()) {
      const series = this.cards.filter((card) => card.metrics).map((card) => ({ name: card.key, color: card.color,
        xs: card.metrics[name].map((_, k) => k), ys: card.metrics[name] }));
      this.charts[n].draw(series, this.steps.value);
    }
  }
}

class Card {
  static async open(at, key, color) {
    try {
      return new Card(at, key, color, await get("/api/runs/run", { at, key }));
    } catch (error) {
      return new Card(at, key, color, null, error.message);
    }
  }

  constructor(at, key, color, run, problem = null) {
    Object.assign(this, { at, key, color, run, metrics: null });
    this.count = run === null ? 0 : run.steps.length;
    this.times = run !== null && run.shape.length > 3 ? run.shape[1] : 1;
    const swatch = el("span", { class: "swatch" });
    swatch.style.background = color;
    this.element = el("article", { class: "run" }, el("h2", {}, swatch, key));
    this.element.style.borderColor = color;
    this.more = el("details", {});
    this.parts = el("details", { open: true }, el("summary", {}, `Channels of ${key}`));
    this.parts.hidden = run === null;
    if (run === null) {
      this.element.append(line(problem));
      return;
    }
    this.element.append(el("p", { class: "prompt" }, run.prompt ?? el("span", { class: "soft" }, "no prompt")));
    run.problems.forEach((told) => this.element.append(line(told)));
    this.pictures = ["at", "ahead", "last"].map((state) => [state, new Picture(state)]);
    this.three = el("div", { class: "three" }, this.pictures.map(([, picture]) => picture.element));
    this.decoded = false;
    this.said = el("p", { class: "soft small" }, "Loading the autoencoder");
    this.channels = new Channels("/api/runs/channel");
    this.level = el("p", { class: "small" });
    this.parts.append(this.channels.element);
    this.parts.addEventListener("toggle", () => this.see());
    this.element.append(this.level, this.three, this.said);
    const noted = Object.entries(run.attributes).map(([name, value]) => el("tr", {}, el("td", { class: "left" }, name),
      el("td", { class: "left" }, typeof value === "string" ? value : JSON.stringify(value))));
    const made = table([], noted);
    made.classList.add("attributes");
    this.more.append(el("summary", {}, `What was noted of ${key}`), el("div", { class: "wide" }, made));
  }

  move(k, t) {
    if (!this.count) return;
    const at = Math.min(k, this.count - 1), { sigmas, steps, timesteps } = this.run;
    this.level.textContent = `step ${steps[at]}, noise level ${number(sigmas[at])}, timestep ${number(timesteps[at])}`;
    const query = { at: this.at, key: this.key, t };
    const told = { at: `state ${at}`, ahead: "straight on", last: "last state" };
    this.last = [k, t];
    if (this.decoded) {
      for (const [state, picture] of this.pictures) {
        const place = state === "last" ? this.count - 1 : at;
        const source = url("/api/runs/picture", { ...query, k: place, state });
        if (picture.source !== source) picture.show((picture.source = source), told[state]);
      }
    }
    this.query = { ...query, k: at };
    this.see();
  }

  /** The channels, while they are open. */
  see() {
    if (this.parts.open && this.query) this.channels.show(this.run.shape[0], this.query);
  }

  /** Loads the autoencoder, and draws the pictures then. */
  async decode() {
    if (!this.count) return;
    try {
      const { decoded_as: said, why_not: why } = await get("/api/runs/decoding", { at: this.at, key: this.key });
      this.decoded = why === null;
      this.three.hidden = !this.decoded;
      this.said.textContent = this.decoded ? `Decoded as ${said}.` : `Not decoded: ${why}`;
      if (this.last) this.move(...this.last);
    } catch (error) {
      this.said.replaceWith(line(error.message));
    }
  }

  async measure() {
    if (!this.count) return;
    try {
      this.metrics = await get("/api/runs/metrics", { at: this.at, key: this.key });
    } catch (error) {
      this.element.append(line(error.message));
    }
  }
}
