// Curves and bars as SVG, drawn anew when their values change.

import { el, number } from "/assets/dom.js";

const WIDTH = 460, HEIGHT = 170, LEFT = 52, RIGHT = 8, TOP = 8, BOTTOM = 22;
const MOST_POINTS = 600; // of a curve: of more, the least and the greatest of each stretch are drawn

export class Chart {
  /** `moved(x)` is called when the chart is clicked at x. */
  constructor(title, { log = false, integers = false, moved = null } = {}) {
    this.log = log;
    this.integers = integers;
    this.told = el("span");
    this.svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
    this.element = el("div", { class: "chart" }, el("h3", {}, title, this.told), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    if (moved) this.svg.addEventListener("click", (event) => this.x && moved(this.x.back(this.place(event))));
    this.series = [];
    this.cursor = null;
  }

  place(event) {
    const box = this.svg.getBoundingClientRect();
    return ((event.clientX - box.left) / box.width) * WIDTH;
  }

  /** `series`: [{name, color, xs, ys}], where ys may be null; `cursor`: an x to mark. */
  draw(series, cursor = this.cursor) {
    this.series = series;
    this.cursor = cursor;
    const known = series.map(({ xs, ys }) => xs.map((x, n) => [x, ys[n]]).filter(([, y]) => usable(y, this.log)));
    const all = known.flat();
    if (!all.length) {
      this.svg.replaceChildren(el("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no values"));
      this.x = null;
      return;
    }
    this.x = scale(extent(all, 0), LEFT, WIDTH - RIGHT, false);
    this.y = scale(extent(all, 1), HEIGHT - BOTTOM, TOP, this.log);
    const parts = axes(this.x, this.y, this.integers);
    known.forEach((points, n) => {
      const d = thinned(points).map(([x, y], i) => `${i ? "L" : "M"}${this.x.to(x).toFixed(1)} ${this.y.to(y).toFixed(1)}`).join("");
      parts.push(el("path", { class: "curve", d, stroke: series[n].color }));
      if (points.length === 1) parts.push(el("circle", { cx: this.x.to(points[0][0]), cy: this.y.to(points[0][1]), r: 2.5, fill: series[n].color }));
    });
    this.mark = el("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.svg.replaceChildren(...parts, this.mark);
    this.at(this.cursor);
  }

  /** Marks x and tells the values there; null marks nothing. */
  at(x) {
    this.cursor = x;
    this.tell(x);
  }

  point(event) {
    if (this.x) this.tell(event === null ? this.cursor : this.x.back(this.place(event)));
  }

  tell(x) {
    if (!this.mark || !this.x) return;
    if (x === null) {
      this.mark.setAttribute("visibility", "hidden");
      this.told.textContent = this.series.length === 1 ? number(this.series[0].ys.findLast((y) => y !== null)) : "";
      return;
    }
    const nearest = this.series.map(({ xs, ys }) => {
      let best = -1;
      xs.forEach((value, n) => {
        if (ys[n] !== null && (best < 0 || Math.abs(value - x) < Math.abs(xs[best] - x))) best = n;
      });
      return best;
    });
    const first = nearest.findIndex((n) => n >= 0);
    if (first < 0) return;
    const where = this.series[first].xs[nearest[first]];
    this.mark.setAttribute("x1", this.x.to(where));
    this.mark.setAttribute("x2", this.x.to(where));
    this.mark.setAttribute("visibility", "visible");
    const values = this.series.map(({ ys }, n) => (nearest[n] < 0 ? "–" : number(ys[nearest[n]]))).slice(0, 4);
    this.told.textContent = `${number(where)}: ${values.join(" | ")}`;
  }
}

const usable = (y, log) => typeof y === "number" && (!log || y > 0);

function extent(points, axis) {
  let [low, high] = [Infinity, -Infinity];
  for (const point of points) [low, high] = [Math.min(low, point[axis]), Math.max(high, point[axis])];
  return [low, high];
}

function scale([low, high], from, to, log) {
  const f = log ? Math.log10 : (v) => v;
  let [a, b] = [f(low), f(high)];
  if (a === b) [a, b] = [a - (log ? 0.5 : Math.abs(a) * 0.05 || 0.5), b + (log ? 0.5 : Math.abs(b) * 0.05 || 0.5)];
  const back = (place) => {
    const value = a + ((place - from) / (to - from)) * (b - a);
    return log ? 10 ** value : value;
  };
  return { low: log ? 10 ** a : a, high: log ? 10 ** b : b, log, to: (v) => from + ((f(v) - a) / (b - a)) * (to - from), back };
}

/** Round values between two numbers. */
function ticks({ low, high, log }, most, integers = false) {
  if (log) {
    const first = Math.ceil(Math.log10(low)), last = Math.floor(Math.log10(high));
    if (last - first >= 1) {
      const every = Math.ceil((last - first + 1) / most);
      return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, n) => 10 ** (first + n * every));
    }
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  let width = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  if (integers) width = Math.max(1, width);
  const found = [];
  for (let n = Math.ceil(low / width); n * width <= high + width * 1e-9; n++) found.push(Number((n * width).toPrecision(12)));
  return found.filter((value) => !log || value > 0);
}

function axes(x, y, integers) {
  const parts = [];
  const values = ticks(y, 4), labels = apart(values);
  for (const [n, value] of values.entries()) {
    const place = y.to(value);
    parts.push(el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: place, y2: place }));
    parts.push(el("text", { x: LEFT - 6, y: place + 4, "text-anchor": "end" }, labels[n]));
  }
  for (const value of ticks(x, 6, integers)) {
    parts.push(el("text", { x: x.to(value), y: HEIGHT - 6, "text-anchor": "middle" }, brief(value)));
  }
  return parts;
}

/** Short words for numbers, with as many digits as tell them apart. */
function apart(values) {
  for (let digits = 4; digits < 12; digits++) {
    const words = values.map((value) => brief(value, digits));
    if (new Set(words).size === values.length) return words;
  }
  return values.map(String);
}

function brief(value, digits = 4) {
  const size = Math.abs(value);
  if (size >= 1e9 || (size !== 0 && size < 1e-3)) {
    const [mantissa, power] = value.toExponential(digits - 1).split("e");
    return `${Number(mantissa)}e${Number(power)}`;
  }
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(digits))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(digits))}k`;
  return String(Number(value.toPrecision(digits)));
}

function thinned(points) {
  if (points.length <= 2 * MOST_POINTS) return points;
  const size = Math.ceil(points.length / MOST_POINTS), kept = [];
  for (let at = 0; at < points.length; at += size) {
    const stretch = points.slice(at, at + size);
    const low = stretch.reduce((a, b) => (b[1] < a[1] ? b : a)), high = stretch.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(low === high ? [low] : low[0] < high[0] ? [low, high] : [high, low]));
  }
  return kept;
}

/** Bars of `counts` from x = low to high; `limits`: [{x, text}] as lines where they lie within. */
export function bars(title, counts, [low, high], { limits = [], tick = brief, note = "" } = {}) {
  const x = scale([low, high], LEFT, WIDTH - RIGHT, false);
  const most = Math.max(1, ...counts);
  const y = scale([0, most], HEIGHT - BOTTOM, TOP + 12, false);
  const width = (x.high - x.low) / counts.length;
  const parts = ticks(y, 3, true).map((value) => el("g", {},
    el("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.to(value), y2: y.to(value) }),
    el("text", { x: LEFT - 6, y: y.to(value) + 4, "text-anchor": "end" }, brief(value))));
  counts.forEach((count, n) => {
    if (!count) return;
    const left = x.to(x.low + n * width), right = x.to(x.low + (n + 1) * width);
    const bar = el("rect", { class: "bar", x: left + 0.5, width: Math.max(1, right - left - 1), y: y.to(count), height: y.to(0) - y.to(count) });
    bar.append(el("title", {}, `${tick(x.low + n * width)} to ${tick(x.low + (n + 1) * width)}: ${number(count)}`));
    parts.push(bar);
  });
  for (const value of ticks(x, 6)) parts.push(el("text", { x: x.to(value), y: HEIGHT - 6, "text-anchor": "middle" }, tick(value)));
  for (const { x: at, text, left } of limits) {
    if (at < x.low || at > x.high) continue;
    parts.push(el("line", { class: "limit", x1: x.to(at), x2: x.to(at), y1: TOP, y2: HEIGHT - BOTTOM }));
    parts.push(el("text", { class: "limit", x: x.to(at) + (left ? -4 : 4), y: TOP + 8, "text-anchor": left ? "end" : "start" }, text));
  }
  const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title }, parts);
  return el("div", { class: "chart" }, el("h3", {}, title, el("span", {}, note)), svg);
}
