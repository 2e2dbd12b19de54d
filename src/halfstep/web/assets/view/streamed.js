// A streamed run: its books, its events, and frames with the peaks that were found.

import { Picture, bytes, el, facts, get, line, number, table, url } from "/assets/dom.js";
import { head, recall, remember } from "/assets/view/parts.js";

const ROWS = 50;

export async function show(main, place) {
  const at = place.at;
  const about = el("div"), notes = el("div"), body = el("div", { class: "wide" }), told = el("span");
  const viewer = new Viewer(at);
  const images = el("input", { type: "checkbox", checked: true, onchange: () => load(0) });
  const back = el("button", { "aria-label": "Page before", onclick: () => load(start - ROWS) }, "‹");
  const next = el("button", { "aria-label": "Next page", onclick: () => load(start + ROWS) }, "›");
  let start = 0;
  const load = async (from) => {
    try {
      const found = await get("/api/streamed/events", { at, start: from, count: ROWS, images: images.checked ? "yes" : "no" });
      start = from;
      const last = Math.min(from + ROWS, found.matching);
      told.textContent = found.matching ? `${number(from + 1)}–${number(last)} of ${number(found.matching)}` : "none";
      [back.disabled, next.disabled] = [from === 0, last >= found.matching];
      body.replaceChildren(table([["source", true], ["event", true], ["number"], ["peaks"], ["image"]], found.rows.map((row) => event(row, choose))));
      notes.replaceChildren(...found.problems.slice(0, 5).map((problem) => line(problem)));
      const kept = recall("part");
      if (viewer.row === null && found.rows.length) {
        const first = found.rows.find(({ file }) => file !== null) ?? found.rows[0];
        choose(kept === null ? first : { part: kept, place: Number(recall("place")) });
      } else mark();
    } catch (error) {
      body.replaceChildren(line(error.message));
    }
  };
  const mark = () => body.querySelectorAll("tr[data-key]").forEach((row) => row.classList.toggle("chosen", row.dataset.key === viewer.name));
  const choose = (row) => {
    viewer.open(row);
    mark();
  };
  const list = el("section", { class: "list" }, el("label", { class: "tools" }, images, "only those with an image"), notes, body,
    el("div", { class: "pager" }, back, told, next));
  main.append(head(place, "streamed run"), about, el("div", { class: "columns" }, list, viewer.element));
  await Promise.all([load(0), describe(about, at)]);
}

function event(row, choose) {
  const { source, event: name, sequence, n_peaks: peaks, file, part, place } = row;
  return el("tr", { class: "pick", "data-key": `${part}/${place}`, onclick: () => choose(row) },
    el("td", { class: "left" }, source), el("td", { class: "left" }, el("button", { class: "link" }, name || `${part}/${place}`)),
    el("td", {}, sequence < 0 ? "" : number(sequence)), el("td", {}, number(peaks)), el("td", {}, file === null ? "" : "yes"));
}

async function describe(about, at) {
  let found;
  try {
    found = await get("/api/streamed", { at });
  } catch (error) {
    about.replaceChildren(line(error.message));
    return;
  }
  const { report } = found;
  const parts = found.problems.map((problem) => line(problem));
  if (report.guarantee === undefined) parts.push(line("running, or ended without a report: these are the numbers of its tables", "quiet"));
  else if (!report.held) parts.push(line(`${report.guarantee}: did not hold; ${[report.why ?? "no reason is noted"].flat().join("; ")}`));
  const balance = Object.entries(report.balance ?? {}).map(([name, count]) => `${name.replaceAll("_", " ")} ${number(count)}`).join(", ");
  const latency = report.latency_ms?.whole;
  parts.push(facts([
    ["events on disk", number(found.events)], ["with an image", number(found.images)], ["parts", number(found.parts)],
    ["balance", balance], ["guarantee", report.guarantee === undefined ? null : `${report.guarantee}, ${report.held ? "held" : "NOT held"}`],
    ["peaks", known(report.peaks)], ["events a second", known(report.events_per_second)], ["frames a second", known(report.frames_per_second)],
    ["latency, ms", latency ? Object.entries(latency).map(([name, value]) => `${name} ${number(value)}`).join(", ") : null],
    ["seconds", known(report.seconds)], ["received", report.bytes_in === undefined ? null : bytes(report.bytes_in)],
    ["written", report.written_bytes === undefined ? null : bytes(report.written_bytes)], ["network", report.network], ["precision", report.policy],
    ["device", report.device], ["ended by", report.ended_by], ["missing", report.missing ? number(report.missing) : null],
    ["not used", found.dead_letters ? `${bytes(found.dead_letters)} in dead_letters.jsonl` : null],
  ]));
  (report.notes ?? []).forEach((note) => parts.push(line(note, "quiet")));
  about.replaceChildren(...parts);
}

const known = (value) => (value === undefined ? null : number(value));

class Viewer {
  constructor(at) {
    Object.assign(this, { at, row: null, asked: 0 });
    this.title = el("h2");
    this.notes = el("div");
    this.peaks = el("svg", { class: "peaks" });
    this.rings = el("input", { type: "checkbox", checked: true, onchange: () => this.peaks.toggleAttribute("hidden", !this.rings.checked) });
    this.picture = new Picture("frame");
    this.picture.element.querySelector(".frame").append(this.peaks);
    this.about = el("div");
    this.element = el("section", {}, this.title, el("label", { class: "tools" }, this.rings, "rings around peaks"), this.notes,
      this.picture.element, this.about);
  }

  get name() {
    return this.row && `${this.row.part}/${this.row.place}`;
  }

  async open(row) {
    const asked = ++this.asked;
    this.row = row;
    remember({ part: row.part, place: row.place });
    const query = { at: this.at, part: row.part, place: row.place };
    try {
      const found = await get("/api/streamed/event", query);
      if (asked !== this.asked) return;
      this.notes.replaceChildren();
      this.draw(found);
      this.picture.show(url("/api/streamed/frame", query), `${found.size.join(" x ")} pixels, ${found.dtype}; dark is strong`);
    } catch (error) {
      if (asked === this.asked) this.notes.replaceChildren(line(error.message));
    }
  }

  draw(found) {
    this.title.textContent = `Event ${found.event || this.name}`;
    const [width, height] = found.size, radius = Math.max(4, Math.max(width, height) / 90);
    this.peaks.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.peaks.replaceChildren(...found.peaks.map(([x, y, intensity]) => el("circle", { cx: x + 0.5, cy: y + 0.5, r: radius, "stroke-width": radius / 4 },
      el("title", {}, `x ${number(x)}, y ${number(y)}, intensity ${number(intensity)}`))));
    this.about.replaceChildren(facts([["peaks", number(found.n_peaks)], ["run", found.run], ["source", found.source],
      ["number", found.sequence < 0 ? null : number(found.sequence)], ["panels", number(found.panels)],
      ["photon energy, eV", found.photon_energy_eV === null ? null : number(found.photon_energy_eV)],
      ["again in fp32", found.retried_in_fp32 ? "yes" : null], ["file", found.file]]));
  }
}
