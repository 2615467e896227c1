"""The page in a real browser: type, draw, watch, edit, paint, stop; and what it refuses."""

import json
import re
import shutil
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
expect = playwright.expect

from latentdiff.inference import serve  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no chromium and no google-chrome on PATH (Debian: apt-get install chromium)", allow_module_level=True)
# Nothing of its own goes out, and it runs as root and without a graphics card.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
PATIENCE = 60_000  # ms; a machine may be slow, and a test never waits for longer than it must


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page on the shipped checkpoint; uploads of up to 1 MB, one drawing that waits."""
    options = serve.Serve(checkpoint=str(ROOT / "checkpoints" / "emoji64"), max_upload_mb=1, max_queue=1, device="cpu")
    studio = serve.open_studio(options)
    blocks = serve.launch(studio, options, tmp_path_factory.mktemp("drawn"))
    yield blocks
    studio.close()
    blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(server, browser):
    """The page in a session of its own; nothing may be asked of anybody else, nothing may fail in the browser."""
    opened = browser.new_page(viewport={"width": 1280, "height": 1100})
    opened.set_default_timeout(PATIENCE)
    faults, requests = [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.on("response", lambda response: faults.append(response.url) if not response.ok else None)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.goto(server.local_url)
    yield opened
    opened.close()
    assert faults == []
    assert requests
    assert [url for url in requests if not url.startswith((server.local_url, "data:", "blob:"))] == []


def ask(page, prompt: str, steps: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps").fill(str(steps))


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def wait_for_status(page, status: str) -> None:
    expect(page.locator("#status")).to_contain_text(re.compile(status))


def wait_for_drawing(page, count: int) -> None:
    """Until so many pictures have been drawn in this session."""
    expect(page.locator("#gallery img")).to_have_count(count)
    wait_for_status(page, "Drawn")


def shown_file(page) -> bytes:
    """The file behind the picture that is shown."""
    source = page.locator("#picture img").get_attribute("src")
    return page.request.get(source).body()


def shown(page) -> np.ndarray:
    """What the browser has drawn of the picture: (H, W, 3) in [0, 1]."""
    image = page.locator("#picture img")
    expect(image).to_be_visible()
    pixels = image.evaluate(
        """async image => {
            await image.decode();
            const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
            const pen = canvas.getContext("2d");
            pen.drawImage(image, 0, 0);
            const {data} = pen.getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, ...data];
        }"""
    )
    height, width, *values = pixels
    return np.reshape(values, (height, width, 4))[..., :3] / 255


def test_draw_edit_and_paint(page):
    """Else the page does not do what it is for."""
    ask(page, "a red apple", 30)
    page.evaluate(
        """() => {
            window.seen = [];
            const look = () => window.seen.push(
                [document.querySelector("#status").innerText, document.querySelector("#picture img")?.src]);
            new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    press(page, "Draw")
    wait_for_drawing(page, 1)
    drawn = shown(page)
    assert drawn.shape == (64, 64, 3) and drawn.std() > 0.1
    seen = page.evaluate("window.seen")
    final = page.locator("#picture img").evaluate("image => image.src")
    assert any(re.match(r"Step \d+ of 30", status) for status, _ in seen)
    assert len({source for _, source in seen} - {None, final}) >= 2, "no preview was shown before the end"

    expect(page.locator("#recipe")).to_contain_text("a red apple")
    recipe = json.loads(Image.open(BytesIO(shown_file(page))).text["latentdiff"])
    assert recipe["prompt"] == "a red apple" and recipe["num_inference_steps"] == 30
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(recipe["seed"]))

    press(page, "Start from this picture")
    expect(page.locator("#source img")).to_be_visible()
    ask(page, "a green apple", 10)
    press(page, "Draw from this picture")
    wait_for_drawing(page, 2)
    edited = shown(page)
    assert np.abs(edited - drawn).mean() > 0.01
    expect(page.locator("#recipe")).to_contain_text("strength")

    press(page, "Paint on this picture")
    paint_over_the_top(page)
    ask(page, "a red apple", 10)
    press(page, "Draw where it is painted")
    wait_for_drawing(page, 3)
    change = np.abs(shown(page) - edited).mean(axis=-1)
    assert change[:32].mean() > 2 * change[40:].mean(), "the change is not where it was painted"
    expect(page.locator("#recipe")).to_contain_text("inpaint")
    expect(page.locator("#files")).to_contain_text("mask-")

    page.get_by_role("tab", name="Interpolate").click()
    page.get_by_label("Prompt at the end").fill("a cat")
    page.get_by_label("Frames").first.fill("5")
    press(page, "Draw the film")
    wait_for_drawing(page, 4)
    with Image.open(BytesIO(shown_file(page))) as film:
        assert (film.format, film.n_frames, film.size) == ("GIF", 5, (64, 64))
    expect(page.locator("#recipe")).to_contain_text("interpolate")
    expect(page.locator("#files")).to_contain_text(".png")

    page.locator("#gallery img").last.click()
    expect(page.locator("#recipe")).not_to_contain_text("strength")
    expect(page.locator("#picture img")).to_have_attribute("src", re.compile(re.escape(Path(final).name)))


def paint_over_the_top(page) -> None:
    """One stroke across the upper half of the picture on the canvas."""
    canvas = page.locator("#canvas canvas").first
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    wait_until_it_shows(canvas, lambda rgb: (rgb.min(axis=-1) < 200).mean() > 0.02)  # the picture
    page.mouse.move(x - 90, y - 70)
    page.mouse.down()
    page.mouse.move(x + 90, y - 70, steps=10)
    page.mouse.up()
    wait_until_it_shows(canvas, lambda rgb: (rgb[..., 2] > rgb[..., :2].max(axis=-1) + 40).mean() > 0.02)  # the brush


def wait_until_it_shows(canvas, condition) -> None:
    """Look at an element until `condition`, of its (H, W, 3) from 0 to 255, is met."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not condition(np.asarray(Image.open(BytesIO(canvas.screenshot())).convert("RGB")).astype(int)):
        assert time.monotonic() < deadline, "it never showed"


def test_a_picture_is_drawn_while_its_prompt_is_typed(page):
    """Else a model that draws at once is no faster to use than one that does not; or old prompts are drawn first."""
    ask(page, "a cat", 2)
    press(page, "Draw")
    wait_for_drawing(page, 1)
    page.get_by_label("Draw while typing").check()
    page.get_by_label("Prompt", exact=True).press_sequentially(" and a dog", delay=20)
    wait_for_status(page, "Drawn while typing")
    expect(page.locator("#recipe")).to_contain_text("a cat and a dog")
    assert page.locator("#gallery img").count() == 1
    # It is no file that one could start from; of the one before it, nothing is left.
    expect(page.get_by_role("button", name="Start from this picture")).to_be_disabled()
    page.get_by_label("Scheduler").click()
    page.get_by_role("option", name="Consistency (LCM)").click()
    page.get_by_label("Steps").fill("60")
    page.get_by_label("Prompt", exact=True).press_sequentially("s", delay=20)
    expect(page.get_by_text("num_inference_steps is 60; it must lie in 1 … 50")).to_be_visible()


def test_stop(page):
    """Else somebody who has seen enough would have to wait, and all others too."""
    ask(page, "a cat", 1000)
    press(page, "Draw")
    wait_for_status(page, r"Step \d+ of 1000")
    press(page, "Stop")
    wait_for_status(page, r"Stopped after step \d+ of 1000")
    assert int(re.search(r"step (\d+)", page.locator("#status").inner_text())[1]) < 900
    ask(page, "a cat", 2)
    press(page, "Draw")
    wait_for_drawing(page, 1)


def test_a_closed_tab_holds_nobody_up(page, browser, server):
    """Else a drawing of 1000 steps would go on for nobody, and the next in the queue wait for it."""
    other = browser.new_page()
    other.goto(server.local_url)
    ask(other, "a cat", 1000)
    press(other, "Draw")
    wait_for_status(other, r"Step \d+ of 1000")
    ask(page, "a dog", 2)
    press(page, "Draw")
    wait_for_status(page, "Waiting")
    other.close()
    wait_for_drawing(page, 1)


def test_the_queue_is_limited(browser, server):
    """Else any number of drawings could be asked for, and the last of them wait for hours."""
    first, second, third = pages = [browser.new_page() for _ in range(3)]
    for opened in pages:
        opened.goto(server.local_url)
        ask(opened, "a cat", 1000)
    press(first, "Draw")
    wait_for_status(first, r"Step \d+ of 1000")
    press(second, "Draw")
    wait_for_status(second, "Waiting")
    press(third, "Draw")
    expect(third.get_by_test_id("toast-body")).to_contain_text("This application is currently busy")
    wait_for_status(third, "Not drawn")
    for opened in pages:
        opened.close()


def test_a_mistake_is_one_line(page):
    """Else a traceback, or silence, would answer it."""
    press(page, "Draw")
    message = page.get_by_test_id("toast-body")
    expect(message).to_contain_text("the prompt is empty: say in a few words what to draw")
    assert "Traceback" not in message.inner_text()
    page.get_by_role("tab", name="Image to image").click()
    ask(page, "a cat", 2)
    press(page, "Draw from this picture")
    expect(message.filter(has_text="there is no picture to start from")).to_be_visible()


def test_oversize_uploads_are_refused(page, tmp_path):
    """Else a huge file would fill the disk, and a small one that unpacks to a huge picture the memory."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "heavy.png")
    Image.new("1", (5000, 4000)).save(tmp_path / "wide.png")
    Image.fromarray(noise[:64, :64]).save(tmp_path / "fine.png")
    page.get_by_role("tab", name="Image to image").click()
    message = page.get_by_test_id("toast-body")
    upload = page.locator("#source input[type=file]")
    for name, complaint in (("heavy.png", "maximum allowed size"), ("wide.png", "5000 x 4000 pixels")):
        upload.set_input_files(tmp_path / name)
        expect(message.filter(has_text=complaint)).to_be_visible()
        expect(page.locator("#source img")).to_have_count(0)
    upload.set_input_files(tmp_path / "fine.png")
    expect(page.locator("#source img")).to_be_visible()
