"""The mixing desk in a real browser: load, ask, move a slider, bad input, export, load the zip with PEFT."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile

import pytest
from PIL import Image

from tests import ROOT
from tests.evaluation.test_eval import make_run

pytest.importorskip("nicegui", reason="the extra `page` is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

CAMERA = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")

PEFT = """
import sys, torch, transformers, peft
base = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2])
print(sum(bool(p.abs().sum() > 0) for n, p in model.named_parameters() if "lora_B" in n), "moa" in sys.modules)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def status(url: str, **options) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, **options), timeout=600).status
    except urllib.error.HTTPError as error:
        return error.code


def status_or_none(url: str) -> int | None:
    try:
        return status(url)
    except OSError:
        return None


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A run's page in a process of its own: the run, the address."""
    folder = tmp_path_factory.mktemp("page")
    run, port = make_run(folder), free_port()
    spool = folder / "tmp"
    spool.mkdir()
    command = [sys.executable, "-m", "scripts.playground", f"run={run}", f"port={port}", "device=cpu"]
    with open(folder / "log", "w") as log:
        # a test's process has pytest in its environment, which NiceGUI takes for a test of itself
        env = {k: v for k, v in os.environ.items() if "PYTEST" not in k} | {"TMPDIR": str(spool)}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        while status_or_none(url) != 200:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield run, url, spool
    finally:
        process.terminate()
        process.wait(60)
    assert not list(spool.glob("moa-desk-*")), "the zips are removed with the desk"


def test_a_visitor_asks_moves_a_slider_and_takes_the_mix_home(served, tmp_path):
    run, url, spool = served
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *CAMERA])
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(url)
        answers, ask = page.locator(".answer"), page.get_by_role("button", name="Ask")

        def complains(text: str) -> None:
            sync_api.expect(page.get_by_text(text)).to_be_visible(timeout=600_000)

        def wait_for_answers() -> list[str]:
            done = "[...document.querySelectorAll('.answer')].every(e => e.textContent && e.textContent != '...')"
            page.wait_for_function(done)
            return answers.all_text_contents()

        ask.click()
        complains("choose an image first")
        page.get_by_role("button", name="Camera").click()
        shown = page.locator("img:not(.q-img__image)")  # not those of the samples
        camera = shown.get_attribute("src")
        upload = page.locator("input[type=file]")
        upload.set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
        complains("broken image")
        Image.new("1", (6000, 6000)).save(tmp_path / "huge.png")
        upload.set_input_files(tmp_path / "huge.png")
        complains("at most 25,000,000 pixels")
        upload.set_input_files(run.parent / "0.png")
        sync_api.expect(shown).not_to_have_attribute("src", camera, timeout=600_000)
        page.locator("textarea").fill("x" * 10_000)
        ask.click()
        complains("at most 2,000 characters, got 10,000")
        page.locator("textarea").fill("what is in the image?")
        ask.click()
        first = wait_for_answers()
        assert len(first) == 4
        slider = page.locator(".q-slider").first
        place = slider.bounding_box()
        slider.click(position={"x": place["width"] / 4, "y": place["height"] / 2})
        sync_api.expect(page.get_by_text("-0.50")).to_be_visible(timeout=600_000)
        assert wait_for_answers()[:3] == first[:3]  # the others have their answers
        export, expert = page.get_by_role("button", name="Export this mix"), run / "checkpoints/step-000001/experts/vqa"
        expert.rename(expert.with_name("gone"))
        export.click()
        complains("export: ")
        expert.with_name("gone").rename(expert)
        with page.expect_download() as found:
            export.click()
        found.value.save_as(tmp_path / "mix.zip")
        page.get_by_text("reloaded in a fresh process by plain PEFT").wait_for()
        browser.close()
    with zipfile.ZipFile(tmp_path / "mix.zip") as stored:
        stored.extractall(tmp_path / "mix")
    report = json.loads((tmp_path / "mix" / "export_report.json").read_text())
    assert report["comparisons"]["live_mixture"]["max_abs_logit_diff"] < 1e-4
    command = [sys.executable, "-c", PEFT, str(run.parent / "base"), str(tmp_path / "mix")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    layers = int(done.stdout.split()[0]) if done.stdout else 0
    assert layers > 0 and done.stdout.split()[1] == "False", done.stderr


def test_no_other_file_host_or_large_body_is_served(served):
    run, url, spool = served
    secret = run.parent / "run.yaml"
    for path in ("/etc/passwd", "/../../etc/passwd", f"/_nicegui/static/..%2f..%2f..%2f{secret}", str(secret)):
        assert status(url + path) == 404
    assert status(url, headers={"Host": "evil.example"}) == 400
    for header in (("Content-Length", str(21 * 2**20)), ("Transfer-Encoding", "chunked")):  # refused before the body
        client = http.client.HTTPConnection("127.0.0.1", int(url.rsplit(":", 1)[1]), timeout=600)
        client.putrequest("POST", "/_nicegui/client/x/upload/1")
        client.putheader(*header)
        client.endheaders()
        assert client.getresponse().status == 413
        client.close()
    assert status(url) == 200
