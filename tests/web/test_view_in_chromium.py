"""The pages in a real browser: they load, filter, choose, and draw another picture when the slider moves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfstep.store import DatasetStore, TrajectoryFormat, TrajectoryStore
from tests.support.arrays import walk
from tests.support.web import served
from tests.web.test_view_streamed import stream_to
from tests.web.test_view_training import line

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=60_000)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    root = tmp_path_factory.mktemp("house")
    shutil.copytree(latents, root / "latents")
    store = TrajectoryStore.create(root / "runs")
    for seed in range(3):
        states = walk(6, seed, (16, 4, 4))
        prompt = f"a {'blue' if seed == 2 else 'red'} car"
        store.add(f"car-{seed}", states, sigmas=np.linspace(1, 0, 6).tolist(), prompt=prompt, seed=seed,
                  format=TrajectoryFormat(storage="fp32"))  # fmt: skip
    for name in ("one", "two"):
        folder = root / "results" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model": "EqM-S/8"}))
        (folder / "log.jsonl").write_text("".join(line(step) for step in range(1, 30)))
    stream_to(root / "streamed")
    return root


@pytest.fixture(scope="module")
def url(house: Path) -> Iterator[str]:
    with served(house, "--port", 0) as (_, found):
        yield found


@pytest.fixture(params=[1280, 400])
def page(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page in a wide or a narrow window, on which nothing may go wrong: no error, no request that leads elsewhere,
    nothing wider than the window."""
    wrong: list[str] = []
    made = chromium.new_page(viewport={"width": request.param, "height": 800})
    made.set_default_timeout(30_000)
    made.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("request", lambda asked: wrong.append(asked.url) if "//127.0.0.1:" not in asked.url else None)
    yield made
    assert made.evaluate("document.documentElement.scrollWidth <= innerWidth")
    made.close()
    assert [text for text in wrong if "status of 500" not in text] == []  # as for a store that is damaged


def picture(page: Any, where: str) -> list[int]:
    """The pixels of a picture once it is drawn and no other is asked for."""
    image = page.locator(where).first
    image.wait_for()
    while not image.evaluate("made => made.naturalWidth && made.closest('figure').ariaBusy === 'false'"):
        page.wait_for_timeout(20)
    pixels: list[int] = page.evaluate(
        """where => {
            const image = document.querySelector(where), canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
        }""",
        where,
    )
    return pixels


def move(page: Any, label: str, value: int) -> None:
    page.get_by_label(label, exact=True).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_the_list_leads_to_a_store_whose_frames_are_drawn(page: Any, url: str, house: Path) -> None:
    page.goto(url)
    expect(page.get_by_role("link", name="latents")).to_have_count(1)
    page.get_by_role("link", name="latents").click()
    keys = DatasetStore.open(house / "latents").keys()
    page.get_by_role("heading", name=keys[0]).wait_for()
    first = picture(page, ".stage img")
    move(page, "frame", 5)
    page.get_by_text("decoded, frame 5").wait_for()
    assert picture(page, ".stage img") != first
    assert "k=5" in page.url
    expect(page.locator(".channels img")).to_have_count(16)
    expect(page.locator(".strip img")).to_have_count(8)
    page.locator("rect.bar").nth(10).wait_for()
    page.get_by_placeholder("Filter by key or label").fill(keys[2])
    expect(page.locator("tr[data-key]")).to_have_count(1)
    page.locator("tr[data-key]").click()
    page.get_by_role("heading", name=keys[2]).wait_for()
    assert picture(page, ".stage img") != first
    page.reload()  # the address keeps what is looked at
    page.get_by_role("heading", name=keys[2]).wait_for()
    page.get_by_role("button", name="Verify").click()
    page.get_by_text("ok, 30 items in 1 shards").wait_for()


def test_runs_side_by_side_follow_one_slider(page: Any, url: str) -> None:
    page.goto(f"{url}/?at=0/runs")
    page.get_by_placeholder("Filter by name").fill("red")
    expect(page.locator("tr[data-key]")).to_have_count(2)
    page.get_by_label("Show car-1 beside").click()
    page.get_by_role("heading", name="car-1").wait_for()
    expect(page.locator("article.run")).to_have_count(2)
    move(page, "step", 0)
    page.get_by_text("noise level 1,").first.wait_for()
    before = [picture(page, f"article.run:nth-child({n}) .three figure:nth-child(1) img") for n in (1, 2)]
    last = picture(page, "article.run .three figure:nth-child(3) img")
    move(page, "step", 5)
    page.get_by_text("noise level 0,").first.wait_for()
    after = [picture(page, f"article.run:nth-child({n}) .three figure:nth-child(1) img") for n in (1, 2)]
    assert before[0] != after[0] and before[1] != after[1] and after[0] == last
    expect(page.locator(".charts path.curve")).to_have_count(4)


def test_curves_lie_over_each_other_and_a_run_is_followed(page: Any, url: str, house: Path) -> None:
    page.goto(f"{url}/?at=0/results/one")
    expect(page.locator(".chart:first-child path.curve")).to_have_count(1)
    page.get_by_label("results/two").check()
    expect(page.locator(".chart:first-child path.curve")).to_have_count(2)
    newest = int(json.loads((house / "results" / "one" / "log.jsonl").read_text().splitlines()[-1])["step"])
    with (house / "results" / "one" / "log.jsonl").open("a") as file:
        file.write(line(newest + 1))
    page.get_by_role("cell", name=str(newest + 1), exact=True).wait_for()


def test_frames_have_rings_around_their_peaks(page: Any, url: str) -> None:
    page.goto(f"{url}/?at=0/streamed")
    page.locator("tr[data-key]").nth(1).click()
    page.get_by_role("heading", name="Event e3").wait_for()
    expect(page.locator("svg.peaks circle")).to_have_count(3)
    assert len(set(picture(page, ".columns figure img"))) > 10
    page.get_by_label("only those with an image").uncheck()
    page.get_by_text("1\u201350 of 50").wait_for()


def test_a_picture_that_cannot_be_had_is_a_line(page: Any, url: str, house: Path) -> None:
    shutil.copytree(house / "latents", house / "broken", dirs_exist_ok=True)
    (house / "broken" / "index" / "00000.parquet").write_bytes(b"short")
    page.goto(f"{url}/?at=0/broken")
    page.get_by_text("halfstep store repair").first.wait_for()
    expect(page.get_by_text("dct8")).to_have_count(1)  # the rest is there


def test_a_foreign_name_gets_nothing(chromium: Any, url: str) -> None:
    """As DNS rebinding would have it: a foreign name that leads to this server."""
    port = url.rsplit(":", 1)[1]
    context = chromium.new_context()
    answer = context.request.get(f"{url}/api/places", headers={"host": f"evil.example:{port}"})
    assert answer.status == 403 and "places" not in answer.text()
    page = context.new_page()
    page.goto("data:text/html,<p>another page</p>")
    told = page.evaluate(
        "url => fetch(url, {mode: 'no-cors'}).then(() => 'loaded', () => 'refused')", f"{url}/api/places"
    )
    assert told == "refused"
    context.close()
