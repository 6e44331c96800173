"""The page, in a real browser: every task is clicked through, wide and narrow. Canvases, without one."""

import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, xla_flags

from mmada_jax.serve import canvas
from tests.api_toys import untrained_model  # noqa: F401

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_a_text_shows_what_is_hidden_and_what_is_new(model):
    v, encode = model.vocab, model.tokenizer.encode
    said = encode("<think>3 < 4</think>7")
    ids = np.array([*said[:3], *[v.mask] * (len(said) - 3), v.mask])
    now = np.array([*said, v.mask])
    first = canvas.text(model, ids)
    assert first.count(canvas.HIDDEN) == len(said) - 2
    assert "<mark>" not in first
    assert '<b class="tag">thinks</b>' in first
    second = canvas.text(model, now, ids)
    assert second.count(canvas.HIDDEN) == 1
    marked = "".join(re.findall("<mark>(.*?)</mark>", second))
    assert '<b class="tag">says</b>7' in marked
    assert "3" not in marked  # it was there before
    assert "&lt; 4" in re.sub("<[^>]*>", "", second)
    ended = canvas.text(model, np.array([*said, v.end_turn, v.mask]))
    assert canvas.HIDDEN not in ended


def test_what_is_typed_is_shown_and_not_run(model):
    ids = np.array(model.tokenizer.encode("<script>alert(1)</script>"))
    assert "<script>" not in canvas.text(model, ids)


def test_a_drawing_can_be_saved_when_it_is_done(model):
    codes = np.zeros((4, 8), int)
    hidden = np.where(np.arange(8) < 4, codes, -1)
    assert "download" not in canvas.drawing(model, hidden)
    done = canvas.drawing(model, codes, hidden, "seven")
    assert 'download="seven.png"' in done
    # New codes have a frame.
    assert done != canvas.drawing(model, codes, codes, "seven")


@pytest.fixture(name="address", scope="module")
def page_of_a_model(model_workdir):
    pytest.importorskip("gradio", reason="needs the extra page")
    pytest.importorskip("playwright", reason="needs the extra page")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, ROOT / "launch" / "page.py", "--model", model_workdir, "--port", str(port)]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "", "XLA_FLAGS": xla_flags(1), "HOME": "/tmp"},
    ) as process:
        assert any(str(port) in line for line in iter(process.stdout.readline, ""))
        print(f"open after {time.monotonic() - began:.1f} s")
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_every_task_in_a_browser(address, width, tmp_path):
    from playwright.sync_api import sync_playwright

    wrong = []

    def look(request):
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(f"asks elsewhere: {request.url}")

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", look)
        # Steps are faster than the eye; what is shown in between is noted by the page itself.
        page.add_init_script(
            "new MutationObserver(() => { for (const c of ['hidden', 'drawing']) "
            "if (document.querySelector('.said .' + c + ', img.' + c)) window['saw_' + c] = true; })"
            ".observe(document, {childList: true, subtree: true})"
        )
        page.goto(address)
        shots = pathlib.Path(tmp_path)

        def open_tab(name):
            tab = page.get_by_role("tab", name=name, exact=True)
            if not tab.is_visible():  # narrow pages keep some in a menu
                page.locator(".overflow-menu > button").click()
                page.locator(".overflow-dropdown button", has_text=name).click()
            else:
                tab.click()

        def run(name, done):
            page.click(f"#{name}_go")
            page.wait_for_selector(f"#{name}_out {done}", timeout=90_000)
            page.screenshot(path=shots / f"{name}_{width}.png", full_page=True)

        page.wait_for_selector("#chat_go")
        run("chat", ".turn:not(.user)")
        assert page.evaluate("window.saw_hidden")
        open_tab("Draw")
        run("draw", "a[download]")
        open_tab("Chat")
        page.click("#chat_clear")
        page.wait_for_selector("#chat_out .turn", state="detached")
        page.click("#chat_take")
        page.wait_for_selector("#chat_in img")
        run("chat", ".turn:not(.user)")
        open_tab("Extend")
        page.click("#extend_go")
        page.get_by_text("take the last drawing", exact=False).last.wait_for()
        page.click("#extend_take")
        page.wait_for_selector("#extend_in img")
        run("extend", "a[download]")
        open_tab("Think, then draw")
        run("think", "a[download]")
        open_tab("Inpaint")
        page.click("#inpaint_take")
        paper = page.locator("#inpaint_in canvas").first
        paper.wait_for()
        page.wait_for_timeout(2000)
        page.click("#inpaint_go")
        page.get_by_text("nothing is painted over", exact=False).first.wait_for()
        box = paper.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] / 2, steps=20)
        page.mouse.up()
        run("inpaint", "a[download]")
        assert not wrong
        # Nothing is wider than the page.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
