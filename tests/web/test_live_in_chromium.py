"""Walking through the shipped world in a real browser."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.networks import tiny_autoencoder, tiny_stable_diffusion
from tests.support.web import served

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=60_000)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served("--port", 0, "--steps", 1, verb="live") as (_, found):
        yield found


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    wrong: list[str] = []
    made = chromium.new_page(viewport={"width": 1200, "height": 800})
    made.set_default_timeout(60_000)
    made.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("request", lambda asked: wrong.append(asked.url) if "//127.0.0.1:" not in asked.url else None)
    yield made
    made.close()
    assert wrong == []


def pixels(page: Any) -> list[int]:
    """Of the picture."""
    found: list[int] = page.locator("#picture").evaluate(
        """made => {
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [made.width, made.height];
            const context = copy.getContext("2d", { willReadFrequently: true });
            context.drawImage(made, 0, 0);
            return [...context.getImageData(0, 0, copy.width, copy.height).data];
        }"""
    )
    return found


def hold(page: Any, key: str, until: int) -> None:
    """A key, until so many frames were made since the seed."""
    page.keyboard.down(key)
    number = page.locator("#number")
    while int(number.inner_text()) < until:
        page.wait_for_timeout(20)
    page.keyboard.up(key)


def test_a_walk(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#role")).to_have_text("you play")
    expect(page.locator("#number")).to_have_text("0")
    begun = pixels(page)
    assert len(set(begun)) > 30  # a picture
    hold(page, "w", 4)
    walked = pixels(page)
    assert walked != begun
    expect(page.locator("#latency")).to_contain_text("ms")
    page.get_by_role("button", name="bf16").click()
    hold(page, "ArrowLeft", 20)
    expect(page.locator("#precision-line")).to_contain_text("of 255 from the fp32 frame")
    page.get_by_role("button", name="fp32").click()
    page.get_by_label("seed").fill("0")
    page.get_by_role("button", name="begin again").click()
    expect(page.locator("#number")).to_have_text("0")
    assert pixels(page) == begun  # the same seed, the same bits


def test_a_film_of_it(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#role")).to_have_text("you play")
    page.get_by_role("button", name="record").click()
    expect(page.locator("#record")).to_contain_text("stop")
    seen = int(page.locator("#number").inner_text())
    hold(page, "d", seen + 5)
    page.locator("#record").click()
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "halfstep.mp4"


def test_a_second_window_watches_and_plays_when_the_first_is_closed(page: Any, chromium: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#role")).to_have_text("you play")
    second = chromium.new_page()
    second.set_default_timeout(60_000)
    second.goto(url)
    expect(second.locator("#role")).to_contain_text("somebody else plays")
    expect(second.get_by_role("button", name="begin again")).to_be_disabled()
    page.goto("about:blank")
    expect(second.locator("#role")).to_have_text("you play")
    second.close()


@pytest.fixture(scope="module")
def camera_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(tiny_autoencoder((4, 8)), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    with served("--port", 0, "--pipeline", folder, "--size", "32x16", "--steps", 1, verb="live") as (_, found):
        yield found


def test_a_camera_whose_pictures_come_back(chromium: Any, camera_url: str) -> None:
    for granted in (False, True):
        context = chromium.new_context(permissions=["camera"] if granted else [])
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(camera_url)
        expect(page.locator("#role")).to_have_text("you play")
        page.get_by_role("button", name="use my camera").click()
        if granted:
            while int(page.locator("#number").inner_text()) < 3:
                page.wait_for_timeout(20)
            assert len(set(pixels(page))) > 3
        else:
            expect(page.locator("#camera-line")).to_contain_text("the camera was refused")
        context.close()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_it_and_it_says_what_it_did(name: str) -> None:
    with served("--port", 0, verb="live") as (process, _):
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "1 frames\n", "")


def test_keys_walk_again_after_a_number_was_typed(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#role")).to_have_text("you play")
    page.get_by_label("seed").fill("7")
    page.get_by_role("button", name="begin again").click()
    expect(page.locator("#number")).to_have_text("0")
    page.get_by_label("steps").fill("2")
    page.keyboard.press("Tab")  # to the seed: a letter there is a step, and no number
    page.keyboard.down("w")
    while int(page.locator("#number").inner_text()) < 2:
        page.wait_for_timeout(20)
    page.keyboard.up("w")
    expect(page.get_by_label("seed")).to_have_value("7")
    page.get_by_label("steps").fill("3")
    page.keyboard.press("Enter")
    at = int(page.locator("#number").inner_text())
    page.keyboard.down("ArrowUp")
    while int(page.locator("#number").inner_text()) < at + 2:
        page.wait_for_timeout(20)
    page.keyboard.up("ArrowUp")
    expect(page.get_by_label("steps")).to_have_value("3")


def test_steps_that_are_none_are_told_and_cost_nothing(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#role")).to_have_text("you play")
    for steps in ("0", "9", "2.5", ""):
        page.get_by_label("steps").fill(steps)
        page.keyboard.press("Enter")
        assert not page.get_by_label("steps").evaluate("field => field.validity.valid")
    expect(page.locator("#line")).to_have_text("")


def test_a_seed_that_is_none_is_told_and_costs_nothing(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("#role")).to_have_text("you play")
    for seed in ("-1", "99999999999", "1.5", ""):
        page.get_by_label("seed").fill(seed)
        page.get_by_role("button", name="begin again").click()
        assert not page.get_by_label("seed").evaluate("field => field.validity.valid")
    page.wait_for_timeout(200)
    expect(page.locator("#role")).to_have_text("you play")
