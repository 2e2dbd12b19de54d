// A folder that holds several places, or none.

import { el, get, line, table, url } from "/assets/dom.js";

const KINDS = { dataset: "store of latents", runs: "recorded runs", training: "training run", streamed: "streamed run" };

export async function show(main, place) {
  const found = place.found ?? (await get("/api/places", { at: place.at }));
  main.append(el("h1", {}, place.name || "What lies in these folders"));
  found.nothing.forEach((text) => main.append(line(text, "quiet")));
  if (!found.complete) main.append(line("more folders lie here than are looked at; name one further down to see what is in it", "quiet"));
  if (!found.places.length) return;
  const rows = found.places.map(({ at, name, kind }) =>
    el("tr", {}, el("td", { class: "left" }, el("a", { href: url("/", { at }) }, name)), el("td", { class: "left soft" }, KINDS[kind])));
  const made = table([["folder", true], ["holds", true]], rows);
  made.classList.add("places");
  main.append(el("div", { class: "wide" }, made));
  const runs = found.places.filter(({ kind }) => kind === "training");
  if (runs.length > 1) {
    main.append(el("p", {}, el("a", { href: url("/", { at: runs[0].at, with: runs.slice(0, 8).map(({ at }) => at).join(",") }) },
      `Compare the ${Math.min(runs.length, 8) < runs.length ? "first 8" : runs.length} training runs`)));
  }
}
