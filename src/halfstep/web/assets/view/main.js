// Which page this is: the address says the folder (`at`), the server says what lies there.

import { el, get, line } from "/assets/dom.js";

const PAGES = { dataset: "dataset.js", runs: "runs.js", training: "training.js", streamed: "streamed.js", folder: "folder.js" };

async function show() {
  const main = document.getElementById("main");
  const at = new URLSearchParams(location.search).get("at");
  try {
    const place = at === null ? await only() : await get("/api/place", { at });
    crumbs(place);
    const page = await import(`/assets/view/${PAGES[place.kind]}`);
    main.replaceChildren();
    await page.show(main, place);
  } catch (error) {
    main.append(line(error.message));
    main.querySelector(":scope > p.soft")?.remove();
  }
}

/** The one folder that was given, or the list of all that are. */
async function only() {
  const found = await get("/api/places");
  if (found.places.length === 1 && found.complete) {
    const at = found.places[0].at;
    history.replaceState(null, "", `/?${new URLSearchParams({ at })}`);
    return { at, ...(await get("/api/place", { at })) };
  }
  return { kind: "folder", crumbs: [], path: null, found };
}

function crumbs(place) {
  place.at ??= place.crumbs.at(-1)?.at;
  place.name = place.crumbs.at(-1)?.name ?? "";
  if (place.name) document.title = `${place.name} · halfstep view`;
  const links = place.crumbs.map(({ at, name }) => el("a", { href: `/?${new URLSearchParams({ at })}` }, name));
  document.getElementById("crumbs").replaceChildren(...links.flatMap((link, n) => (n ? [el("span", {}, "/"), link] : [link])));
}

show();
