// Training runs: their logs as curves, over each other, and followed while they grow.

import { el, facts, get, line, number, table } from "/assets/dom.js";
import { Chart } from "/assets/view/charts.js";
import { COLORS, head, recall, remember } from "/assets/view/parts.js";

const POLL_MS = 2000;
const CURVES = [["loss", "Loss", true], ["grad_norm", "Gradient norm", true], ["loss_scale", "Loss scale", true],
  ["samples_per_second", "Samples a second", false], ["lr", "Learning rate", false], ["memory_mb", "Memory, MB", false]];

export async function show(main, place) {
  const found = await get("/api/places");
  const places = found.places.filter(({ kind }) => kind === "training");
  const wanted = new Set([place.at, ...(recall("with") ?? "").split(",")]);
  const runs = places.map((entry, n) => new Run(entry, COLORS[n % COLORS.length], wanted.has(entry.at)));
  if (!runs.some(({ at }) => at === place.at)) runs.unshift(new Run({ at: place.at, name: place.name }, COLORS[0], true));
  const follow = el("input", { type: "checkbox", checked: true });
  const charts = CURVES.map(([name, title, log]) => [name, new Chart(title, { log, integers: true })]);
  const about = el("div");
  const draw = () => {
    const shown = runs.filter((run) => run.shown);
    remember({ with: shown.map(({ at }) => at).join(",") });
    for (const [name, chart] of charts) {
      chart.draw(shown.map((run) => ({ name: run.name, color: run.color, xs: run.columns.step, ys: run.columns[name] })));
      chart.element.hidden = !shown.some((run) => run.columns[name].some((value) => value !== null));
    }
    shown.forEach((run) => run.tell());
  };
  const update = async () => {
    const changed = await Promise.all(runs.filter((run) => run.shown).map((run) => run.read()));
    if (changed.some(Boolean)) draw();
  };
  const rows = runs.map((run) => run.row(async () => {
    await run.read();
    draw();
  }));
  main.append(head(place, "training run", el("label", { class: "small tools" }, follow, "follow")), about,
    el("div", { class: "compared" }, table([["run", true], ["step"], ["loss"], ["gradient norm"], ["scale"], ["samples/s"], ["skipped"]], rows)),
    el("div", { class: "charts" }, charts.map(([, chart]) => chart.element)));
  describe(about, place.at);
  await update();
  draw();
  const poll = async () => {
    if (follow.checked && !document.hidden) await update();
    setTimeout(poll, POLL_MS);
  };
  setTimeout(poll, POLL_MS);
}

async function describe(about, at) {
  try {
    const { settings, checkpoints, newest } = await get("/api/training", { at });
    const named = ["model", "precision", "steps", "epochs", "global_batch_size", "batch_size", "lr", "data_path", "device"];
    const known = named.filter((name) => settings[name] !== null && settings[name] !== undefined
      && !(name === "epochs" && settings.steps)); // which end it instead
    const rows = Object.entries(settings).map(([name, value]) => el("tr", {}, el("td", { class: "left" }, name), el("td", { class: "left" }, told(value))));
    const all = table([], rows);
    all.classList.add("attributes");
    about.append(facts([...known.map((name) => [name.replaceAll("_", " "), told(settings[name])]),
      ["checkpoints", checkpoints ? `${number(checkpoints)}, newest ${newest}` : "none yet"]]),
    el("details", {}, el("summary", {}, "All settings"), el("div", { class: "wide" }, all)));
  } catch (error) {
    about.append(line(error.message));
  }
}

/** A setting in words: `network EqM, hidden size 128`. */
function told(value) {
  if (value === null || typeof value !== "object") return String(value);
  const parts = Array.isArray(value) ? value.map(told) : Object.entries(value).map(([name, inner]) => `${name.replaceAll("_", " ")} ${told(inner)}`);
  return parts.join(", ");
}

const empty = () => Object.fromEntries(["step", ...CURVES.map(([name]) => name), "skipped"].map((name) => [name, []]));

class Run {
  constructor({ at, name }, color, shown) {
    Object.assign(this, { at, name, color, shown, columns: empty(), next: 0, file: "", unreadable: 0, newest: null });
  }

  row(changed) {
    const swatch = el("span", { class: "swatch" });
    swatch.style.background = this.color;
    const box = el("input", { type: "checkbox", checked: this.shown, onchange: () => {
      this.shown = box.checked;
      changed();
    } });
    this.cells = Array.from({ length: 6 }, () => el("td"));
    this.note = el("span", { class: "soft small" });
    return el("tr", {}, el("td", { class: "left" }, el("label", {}, box, " ", swatch, this.name), " ", this.note), this.cells);
  }

  /** Reads what is new; whether there was any. */
  async read() {
    let changed = false;
    try {
      for (let more = true; more;) {
        const found = await get("/api/training/log", { at: this.at, start: this.next, file: this.file });
        if (found.again) Object.assign(this, { columns: empty(), unreadable: 0, newest: null });
        more = found.next > (found.again ? 0 : this.next) && found.next < found.size;
        changed ||= found.again || found.next !== this.next;
        Object.assign(this, { next: found.next, file: found.file, newest: found.newest ?? this.newest });
        this.unreadable += found.unreadable;
        for (const [name, values] of Object.entries(found.columns)) this.columns[name]?.push(...values);
      }
      this.note.textContent = this.unreadable ? `${this.unreadable} lines cannot be read` : "";
    } catch (error) {
      this.note.textContent = error.message;
    }
    return changed;
  }

  tell() {
    const newest = this.newest ?? {};
    ["step", "loss", "grad_norm", "loss_scale", "samples_per_second", "skipped"].forEach((name, n) => {
      this.cells[n].textContent = number(newest[name]);
    });
  }
}
