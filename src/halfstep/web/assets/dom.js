// Small helpers of all pages: elements, answers of the server, numbers as people read them.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "text", "rect", "g", "circle", "title", "polyline"]);

/** An element with attributes, `on...` handlers and children; texts become text, never HTML. */
export function el(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function url(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined);
  return given.length ? `${path}?${new URLSearchParams(given)}` : path;
}

/** The JSON that the server answers; an Error with its one line otherwise. */
export async function get(path, query = {}, options = {}) {
  let answer;
  try {
    answer = await fetch(url(path, query), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer; is it still running?");
  }
  if (!answer.ok) throw new Error((await answer.text()).trim() || `the server answered ${answer.status}`);
  return answer.json();
}

export const line = (text, kind = "") => el("p", { class: `line ${kind}` }, text);

/** 12,345 with thin groups; small and large reals with four digits. */
export function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${unit ? value.toFixed(value < 10 ? 2 : 1) : value} ${units[unit]}`;
}

/** Named facts as cells; those that are null are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", { class: "facts" }, known.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

export function table(heads, rows) {
  const head = heads.map(([name, left]) => el("th", { class: left ? "left" : null }, name));
  return el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows));
}

/** Calls `then` once nothing was asked for `wait` milliseconds. */
export function later(then, wait = 150) {
  let timer = 0;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => then(...given), wait);
  };
}

/** An image whose picture changes: one request at a time, the newest wish wins, and a picture that cannot be had is a
 * line in its place. */
export class Picture {
  constructor(label, { small = false } = {}) {
    this.image = el("img", { alt: label, class: small ? "small" : null });
    this.why = el("span", { class: "why" });
    this.caption = el("figcaption", {}, label);
    this.element = el("figure", { class: "picture" }, el("div", { class: "frame" }, this.image, this.why), this.caption);
    this.busy = false;
    this.wanted = null;
  }

  show(source, caption) {
    this.wanted = source;
    if (caption !== undefined) this.caption.textContent = caption;
    this.element.setAttribute("aria-busy", "true");
    if (!this.busy) this.load();
  }

  async load() {
    this.busy = true;
    while (this.wanted !== null) {
      const source = this.wanted;
      this.wanted = null;
      try {
        const answer = await fetch(source);
        if (!answer.ok) throw new Error((await answer.text()).trim());
        const made = URL.createObjectURL(await answer.blob());
        const before = this.image.src;
        this.image.src = made;
        await this.image.decode();
        if (before) URL.revokeObjectURL(before);
        this.image.classList.toggle("sharp", this.image.naturalWidth < 400);
        this.tell("");
      } catch (error) {
        this.tell(error.message || "no picture");
      }
    }
    this.busy = false;
    this.element.setAttribute("aria-busy", "false");
  }

  tell(why) {
    this.why.textContent = why;
    this.image.hidden = why !== "";
  }
}
