"""The report in a headless Chromium: no errors in its console, curves and outlines, and a mesh that can be rotated.

Skipped where no browser is found. `apt-get install chromium` brings one, or CHROMIUM names it:

    CHROMIUM=/usr/bin/chromium pytest tests/medical/evaluation/test_browser.py
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlora.medical.evaluation.report import render
from fastlora.medical.evaluation.results import document
from tests.support.eval_run import evaluate_home, read_runs, shared_home
from tests.support.processes import TIME_LIMIT_S

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (or CHROMIUM=path)")

# Runs before the page's own scripts: collects what would go to the console.
LISTEN = """<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push("error: " + (event.message || event.target)), true);
window.addEventListener("unhandledrejection", (event) => problems.push("rejected: " + event.reason));
for (const level of ["error", "warn"]) {
  const write = console[level];
  console[level] = (...words) => { problems.push(level + ": " + words.join(" ")); write(...words); };
}
</script>"""

# Runs after them: turns the mesh, and leaves what it saw in the page.
LOOK = """<script>
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
(async () => {
  const viewer = document.getElementById("viewer");
  for (let n = 0; n < 100 && !viewer._fullLayout; n++) await pause(100);
  const shot = () => Plotly.toImage("viewer", {format: "png", width: 600, height: 300});
  const before = await shot();
  await Plotly.relayout("viewer", {"scene.camera": {eye: {x: -1.9, y: 1.2, z: 0.4}}});
  await pause(300);
  const after = await shot();
  const curves = (id) => [...document.querySelectorAll("#" + id + " .scatterlayer path.js-line")]
    .map((path) => path.getTotalLength());
  const found = {
    loss: curves("loss-chart"), validation: curves("validation-chart"),
    marks: document.querySelectorAll("#dice-chart .points path").length,
    slices: [...document.querySelectorAll("#slices img")].map((img) => [img.complete, img.naturalWidth]),
    triangles: viewer.data.map((trace) => (trace.i || []).length),
    cameras: ["scene", "scene2", "scene3"].map((name) => viewer._fullLayout[name].camera.eye.x),
    before, after,
  };
  const select = document.getElementById("region");
  select.value = "1";
  select.dispatchEvent(new Event("change"));
  await pause(500);
  const cameras = () => ["scene", "scene2", "scene3"].map((name) => viewer._fullLayout[name].camera.eye.x);
  found.kept = cameras();
  await Plotly.relayout("viewer", {"scene3.camera": {eye: {x: 0.5, y: -2.2, z: 0.7}}});
  await pause(300);
  found.turned = cameras();
  const boxes = (query) => [...viewer.querySelectorAll(query)].map((each) => {
    const box = each.getBoundingClientRect();
    return [box.left, box.top, box.right, box.bottom];
  });
  found.boxes = [...boxes(".annotation-text"), ...boxes(".modebar-group"), ...boxes(".colorbar")];
  found.widths = [document.documentElement.scrollWidth, window.innerWidth];
  found.unnamed = [...document.querySelectorAll(".chart, #viewer, .scroll, .tabs, nav, img")]
    .filter((each) => !each.getAttribute("aria-label") && !each.alt).map((each) => each.outerHTML.slice(0, 80));
  found.problems = [...problems];
  console.error("on purpose");  // checks that the listener works
  found.heard = problems.slice(found.problems.length);
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})().catch((error) => {
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify({failed: String(error), problems});
  document.body.append(out);
});
</script>"""


def browse(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--use-gl=angle",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1200,900",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = shared_home(tmp_path_factory.getbasetemp())
    evaluation, facts = evaluate_home(home)
    runs = read_runs(home)
    return render(document(evaluation, facts, runs, "python eval_medical.py"), evaluation, runs)


def pixels(url: str) -> np.ndarray:
    data = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def look(page: str, folder: Path, width: int = 1200) -> dict:
    file = folder / "report.html"
    file.write_text(
        page.replace("<head>", "<head>" + LISTEN, 1).replace("</body>", LOOK + "</body>", 1)
    )
    size = f"--window-size={width},900"  # the last one counts
    done = browse(file, folder, size, "--virtual-time-budget=60000", "--dump-dom")
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.S)
    assert seen, done.stderr[-2000:]
    return json.loads(unescape(seen[1]))


def test_the_report_works_in_a_browser(page, tmp_path):
    seen = look(page, tmp_path)
    assert "failed" not in seen, seen
    assert seen["problems"] == [] and seen["heard"] == ["error: on purpose"]
    assert len(seen["loss"]) == 4 and all(length > 20 for length in seen["loss"])
    assert len(seen["validation"]) == 2 and all(length > 20 for length in seen["validation"])
    assert seen["marks"] >= 4
    assert seen["slices"] and all(done and width > 500 for done, width in seen["slices"])
    assert len(seen["triangles"]) == 3 and min(seen["triangles"]) > 100
    assert seen["cameras"] == [-1.9] * 3  # the three views move together
    before, after = pixels(seen["before"]), pixels(seen["after"])
    assert (np.abs(before - 255).sum(-1) > 60).mean() > 0.02  # something is drawn
    assert (np.abs(before - after).sum(-1) > 60).mean() > 0.02  # and it was rotated


@pytest.mark.parametrize("width", [500, 1000, 1280])
def test_the_report_on_a_narrow_and_a_wide_page(page, tmp_path, width):
    """The three views move together after a change of region, and keep their camera; no two titles overlap; everything has a name."""
    seen = look(page, tmp_path, width)
    assert "failed" not in seen, seen
    assert seen["kept"] == [-1.9] * 3 and seen["turned"] == [0.5] * 3
    assert seen["widths"][0] <= seen["widths"][1]  # only tables scroll sideways
    assert seen["unnamed"] == []
    assert len(seen["boxes"]) >= 5
    for a, b in itertools.combinations(seen["boxes"], 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (a, b)


def test_the_report_prints(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page)
    pdf = tmp_path / "report.pdf"
    browse(file, tmp_path, "--virtual-time-budget=20000", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF") and len(content) > 100_000
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 2
