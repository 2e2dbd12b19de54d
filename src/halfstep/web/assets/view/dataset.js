// A store of latents: what it is, its sequences, and single latents as pictures, channels and counts.

import { Picture, bytes, el, facts, get, line, number, table, url } from "/assets/dom.js";
import { bars } from "/assets/view/charts.js";
import { Channels, List, Slider, head, recall, remember, verifier } from "/assets/view/parts.js";

const STRIP = 8;

export async function show(main, place) {
  const at = place.at;
  const { button, answer } = verifier(at);
  const about = el("div", {}, el("p", { class: "soft" }, "Reading the index"));
  const viewer = new Viewer(at);
  const list = new List({
    label: "Filter by key or label",
    ask: (page) => get("/api/dataset/sequences", { at, ...page }),
    heads: [["sequence", true], ["frames"]],
    row: ({ key, length, label }) => el("tr", { class: "pick", "data-key": key, onclick: () => choose(key) },
      el("td", { class: "left" }, el("button", { class: "link" }, key), label === null ? null : el("span", { class: "sub" }, label)),
      el("td", {}, number(length))),
    loaded: (rows) => {
      if (viewer.key === null && rows.length) choose(recall("key") ?? rows[0].key, Number(recall("k") ?? 0));
      else list.choose([viewer.key]);
    },
  });
  const choose = (key, k = 0) => {
    viewer.open(key, k);
    list.choose([key]);
  };
  main.append(head(place, "store of latents", button), answer, about,
    el("div", { class: "columns" }, list.element, viewer.element));
  await Promise.all([list.load(0), describe(about, at)]);
}

async function describe(about, at) {
  let found;
  try {
    found = await get("/api/dataset", { at });
  } catch (error) {
    about.replaceChildren(line(error.message));
    return;
  }
  const parts = found.problems.map((problem) => line(problem));
  if (found.unfinished) parts.push(line(`being written, or was left so: ${found.unfinished} shards are not committed yet`, "quiet"));
  if (found.manifest) {
    const { spec, storage, policy, numerics, created_with: by } = found.manifest;
    const share = found.fp32_bytes ? `, ${number(found.bytes / found.fp32_bytes)} of fp32` : "";
    const pixels = spec.pixels ? `${spec.pixels.width}x${spec.pixels.height}, crop ${spec.pixels.crop}` : null;
    const clip = spec.pixels && spec.pixels.clip_length > 1 ? `${spec.pixels.clip_length} frames` : null;
    const counted = Object.entries(numerics).filter(([, count]) => count).map(([name, count]) => `${name} ${number(count)}`).join(", ");
    parts.push(facts([
      ["sequences", number(found.sequences)], ["frames", number(found.items)], ["latents", bytes(found.bytes) + share],
      ["stored as", storage], ["encoded in", policy],
      ["autoencoder", `${spec.autoencoder}${spec.revision ? ` ${spec.revision.slice(0, 8)}` : ""}`],
      ["weights", spec.weights_sha256 ? spec.weights_sha256.slice(0, 12) : "unknown"],
      ["geometry", `${spec.channels} channels, 1/${spec.spatial_factor}${spec.temporal_factor > 1 ? `, time 1/${spec.temporal_factor}` : ""}`],
      ["pixels", pixels], ["clips", clip], ["numerics", counted || null], ["made by", by || null],
    ]));
  }
  if (found.failed) parts.push(failures(found));
  about.replaceChildren(...parts);
}

function failures({ failures: named, failed }) {
  const rows = named.map(({ key, frame, reason }) => el("tr", {}, el("td", { class: "left" }, key),
    el("td", {}, frame === null ? "" : number(frame)), el("td", { class: "left" }, reason)));
  const more = failed > named.length ? [el("p", { class: "soft small" }, `and ${number(failed - named.length)} more in failures.jsonl`)] : [];
  return el("details", {}, el("summary", {}, `${number(failed)} could not be encoded`),
    el("div", { class: "wide" }, table([["sequence", true], ["frame"], ["reason", true]], rows)), ...more);
}

class Viewer {
  constructor(at) {
    this.at = at;
    this.key = null;
    this.asked = 0;
    this.decoded = null; // not known before the autoencoder is loaded
    this.title = el("h2", {});
    this.notes = el("div");
    this.frames = new Slider("frame", (k) => this.move(k));
    this.times = new Slider("time", () => this.draw());
    this.picture = new Picture("decoded");
    this.beside = el("div");
    this.strip = el("div", { class: "strip" });
    this.thumbs = Array.from({ length: STRIP }, (_, n) => this.thumb(n));
    this.channels = new Channels("/api/dataset/channel");
    this.values = el("div", { class: "charts" });
    this.element = el("section", { class: "viewer" }, this.title, this.notes, this.frames.element, this.times.element,
      el("div", { class: "stage" }, this.picture.element, this.beside), this.strip,
      el("h3", {}, "Channels, each from its least value to its greatest"), this.channels.element, this.values);
    this.element.hidden = true;
  }

  thumb(n) {
    const picture = new Picture("");
    picture.element.addEventListener("click", () => this.frames.set(this.first + n));
    this.strip.append(picture.element);
    return picture;
  }

  async open(key, k) {
    const asked = ++this.asked;
    this.key = key;
    this.element.hidden = false;
    this.title.textContent = key;
    try {
      const found = await get("/api/dataset/sequence", { at: this.at, key });
      if (asked !== this.asked) return;
      this.about = found;
      this.first = null;
      this.notes.replaceChildren();
      this.frames.range(found.length);
      this.times.range(found.shape.length > 3 ? found.shape[1] : 1);
      if (found.length) this.frames.set(Math.min(k, found.length - 1));
      if (this.decoded === null) await this.load();
      if (!this.decoded) this.notes.append(line(`Not decoded: ${this.why}`, "quiet"));
      else if (found.length) this.draw();
    } catch (error) {
      if (asked === this.asked) this.notes.replaceChildren(line(error.message));
    }
  }

  /** Channels are drawn while the autoencoder is loaded. */
  async load() {
    this.picture.caption.textContent = "loading the autoencoder";
    this.why = (await get("/api/dataset/decoding", { at: this.at })).why_not;
    this.decoded = this.why === null;
    this.picture.element.hidden = this.strip.hidden = !this.decoded;
  }

  move(k) {
    this.k = k;
    remember({ key: this.key, k });
    this.draw();
    this.count();
  }

  draw() {
    const query = { at: this.at, key: this.key, k: this.k };
    const t = this.times.value;
    if (this.decoded) {
      this.picture.show(url("/api/dataset/picture", { ...query, t }), `decoded, frame ${number(this.k)}`);
      this.page(query);
    }
    this.channels.show(this.about.shape[0], { ...query, t }, this.statistics);
  }

  page(query) {
    const first = Math.floor(this.k / STRIP) * STRIP;
    this.strip.hidden = this.about.length < 2;
    this.thumbs.forEach((thumb, n) => {
      const k = first + n;
      thumb.element.hidden = k >= this.about.length;
      thumb.element.classList.toggle("chosen", k === this.k);
      if (first !== this.first && k < this.about.length) thumb.show(url("/api/dataset/picture", { ...query, k, t: 0 }), number(k));
    });
    this.first = first;
  }

  async count() {
    const asked = this.asked, k = this.k;
    try {
      const found = await get("/api/dataset/frame", { at: this.at, key: this.key, k });
      if (asked !== this.asked || k !== this.k) return;
      this.notes.querySelectorAll(".damage").forEach((told) => told.remove());
      this.describe(found);
    } catch (error) {
      if (asked !== this.asked || k !== this.k) return;
      this.notes.querySelectorAll(".damage").forEach((told) => told.remove());
      const told = line(error.message);
      told.classList.add("damage");
      this.notes.append(told);
    }
  }

  describe(found) {
    const { all, limits, beside } = found;
    const places = Object.entries(beside).map(([name, value]) => [
      { frame: "frame in the source", position: "position, m", yaw: "yaw, rad" }[name] ?? name,
      Array.isArray(value) ? value.map(number).join(", ") : number(value),
    ]);
    this.beside.replaceChildren(facts([
      ["label", this.about.label], ["latent", this.about.shape.join(" x ")], ["arrays", this.about.arrays.join(", ")], ...places,
      ["stored values", `${number(all.min)} … ${number(all.max)}`], ["mean, deviation", `${number(all.mean)}, ${number(all.std)}`],
      [`headroom to ${limits.storage}'s largest`, limits.headroom === null ? null : `${number(limits.headroom)} times`],
      ["below its smallest normal", `${number(limits.subnormal)} of ${number(found.counts.reduce((a, b) => a + b, 0))}`],
      ["not finite", found.not_finite ? number(found.not_finite) : null],
    ]));
    this.statistics = found.channels;
    this.channels.pictures.forEach((picture, c) => {
      const known = found.channels[c];
      if (known && known.min !== null) picture.caption.textContent = `${c}: ${Number(known.min.toPrecision(3))} … ${Number(known.max.toPrecision(3))}`;
    });
    const { first, counts } = found.octaves;
    const power = (value) => `2^${Math.round(value)}`;
    this.values.replaceChildren(
      bars("Stored values", found.counts, found.edges),
      bars("Their magnitudes", counts, [first, first + counts.length], {
        tick: power,
        note: `limits of ${limits.storage}`,
        limits: [
          { x: limits.smallest_octave, text: "smallest" }, { x: limits.smallest_normal_octave, text: "smallest normal" },
          { x: limits.largest_octave, text: "largest", left: true },
        ],
      }),
    );
  }
}
