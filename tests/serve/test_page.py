"""The web page in a real browser: upload an image, generate completions, download a file."""

import base64
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import KEY, Place, picture, probe_head, serving, tiny_release, until

from igpt_ray.serve.middleware import Keys

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
SAME_COMPLETION = """async () => {
    const headers = {'Content-Type': 'application/json'};
    const body = JSON.stringify({tokens: state.tokens, rows: 4, seed: 1});
    const answer = await fetch('/v1/completions', {method: 'POST', headers, body});
    return (await answer.json()).data[0].b64_png;
}"""
UNNAMED = """() => [...document.querySelectorAll('button, input, select, canvas:not([aria-hidden])')]
    .filter((e) => !(e.innerText || e.getAttribute('aria-label') || e.closest('button[aria-label]')))
    .filter((e) => !(e.labels && e.labels.length)).map((e) => e.outerHTML)"""
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 860}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server whose model needs a second or more per image, so that a test can observe it half done."""
    folder = tmp_path_factory.mktemp("served")
    release = tiny_release(str(folder / "watched"), n_px=16, n_layer=4, n_embd=192)
    head = probe_head(str(folder / "pets"), release, ["cat", "dog", "bird"])
    with serving({"watched": release}, {"pets": head}) as place:
        yield place


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no chromium on this machine: THE PAGE IS NOT TESTED")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, place: Place) -> Iterator[Any]:
    """The open page. The test fails if it logs an error or sends a request to another server."""
    context = browser.new_context(viewport=DESKTOP, accept_downloads=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    ours = (place.url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(ours) else errors.append(request.url))
    page.goto(place.url)
    page.wait_for_selector("#samples button")
    yield page
    context.close()
    assert errors == []


def upload(page: Any, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(picture(3, 64))
    page.set_input_files("#file", str(tmp_path / "picture.png"))
    page.wait_for_selector("#boundary:visible")


def shot(page: Any, name: str) -> None:
    """Save a screenshot if IGPT_SCREENSHOTS names a folder."""
    if folder := os.environ.get("IGPT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_upload_drag_complete_watch_rows_arrive_and_download(page: Any, tmp_path: Path) -> None:
    upload(page, tmp_path)
    box = page.locator("#viewer").bounding_box()
    x, top, height = box["x"] + box["width"] / 2, box["y"], box["height"]
    page.mouse.move(x, top + height / 2)
    page.mouse.down()
    page.mouse.move(x, top + height / 4, steps=5)
    page.mouse.up()
    assert page.get_attribute("#boundary", "aria-valuenow") == "4"
    page.click("#generate")
    until(lambda: page.evaluate("+document.getElementById('results').dataset.rows >= 3"))
    assert page.locator("#stop").is_visible(), "the first rows came only at the end"
    assert 0 < page.evaluate("document.getElementById('progress').value") < 1
    shot(page, "desktop-generating")
    page.wait_for_selector("#download:visible", timeout=60_000)
    assert page.locator("#results figure").count() == 5
    assert "4 completions, 768 pixels generated" in page.inner_text("#status")
    shot(page, "desktop")
    with page.expect_download() as saved:
        page.click("#results figure:first-child button")
    assert saved.value.suggested_filename == "igpt-seed-1.png"
    downloaded = np.asarray(Image.open(saved.value.path()).convert("RGB").resize((16, 16), Image.Resampling.NEAREST))
    expected = page.evaluate(SAME_COMPLETION)
    assert (downloaded == np.asarray(Image.open(io.BytesIO(base64.b64decode(expected))))).all()
    with page.expect_download() as saved:
        page.click("#download")
    assert Image.open(saved.value.path()).width > 5 * 256


def test_only_the_brushed_pixels_are_generated(page: Any, tmp_path: Path) -> None:
    upload(page, tmp_path)
    page.click("#mask-mode")
    assert page.locator("#generate").is_disabled()  # the mask is empty
    box = page.locator("#viewer").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.6)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] * 0.6, steps=4)
    page.mouse.up()
    page.fill("#n", "1")
    page.click("#generate")
    page.wait_for_selector("#download:visible", timeout=60_000)
    shot(page, "desktop-mask")
    unchanged, changed = page.evaluate(
        """() => {
        const data = (canvas) => canvas.getContext('2d').getImageData(0, 0, 16, 16).data;
        const [a, b] = state.canvases.map(data), same = (i) => a[4*i] === b[4*i] && a[4*i+1] === b[4*i+1];
        return [state.mask.every((on, i) => !on || same(i)), state.mask.some((on, i) => !on && !same(i))]; }"""
    )
    assert unchanged
    assert changed


def test_the_page_works_with_the_keyboard_alone(page: Any) -> None:
    page.keyboard.press("Tab")  # the skip link
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first sample
    page.wait_for_selector("#boundary:visible")
    page.focus("#boundary")
    for key in ("End", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    assert page.get_attribute("#boundary", "aria-valuetext") == "14 of 16 rows"
    page.focus("#generate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#download:visible", timeout=60_000)
    unnamed = page.evaluate(UNNAMED)
    assert unnamed == []


def test_classes_and_surprisal_are_shown(page: Any, tmp_path: Path) -> None:
    upload(page, tmp_path)
    page.click("#classify")
    page.wait_for_selector("#classes li")
    assert page.locator("#classes li").count() == 3
    page.click("#show-surprisal")
    assert page.locator("#surprisal").is_visible()
    assert "bits per pixel" in page.inner_text("#score")
    shot(page, "desktop-surprisal")


def test_stop_frees_the_slots(page: Any, place: Place, tmp_path: Path) -> None:
    upload(page, tmp_path)
    page.focus("#boundary")
    page.keyboard.press("Home")
    page.click("#generate")
    until(lambda: page.evaluate("+document.getElementById('results').dataset.rows >= 1"))
    page.click("#stop")
    until(lambda: page.evaluate("document.getElementById('status').textContent === 'Stopped.'"))
    until(lambda: place.replica.loop.engine.slots_in_use == 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_horizontal_scrolling(
    browser: Any, place: Place, tmp_path: Path, scheme: str
) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(place.url)
    page.wait_for_selector("#samples button")
    shot(page, f"phone-{scheme}-empty")
    page.tap("#samples button:nth-child(2)")
    page.wait_for_selector("#boundary:visible")
    page.tap("#generate")
    page.wait_for_selector("#download:visible", timeout=60_000)
    shot(page, f"phone-{scheme}")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select')]
        .filter((e) => e.offsetParent && e.type !== 'file' && e.getBoundingClientRect().height < 36).map((e) => e.id)"""
    )
    assert small == []
    context.close()


def test_the_page_requires_a_valid_key(browser: Any, tmp_path: Path) -> None:
    release = tiny_release(str(tmp_path / "tiny"))
    with serving({"tiny": release}, keys=Keys([hashlib.sha256(KEY.encode()).digest()])) as place:
        page = browser.new_page(viewport=PHONE)
        page.goto(place.url)
        page.wait_for_selector("#login:visible")
        shot(page, "phone-login")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        until(lambda: page.evaluate("document.getElementById('model-info').textContent.includes('is not valid')"))
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#samples button")
        assert page.locator("#login").is_hidden()
        page.close()
