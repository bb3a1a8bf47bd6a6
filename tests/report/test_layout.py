"""The pages of every profile in a real browser: what is on the first screen, what overlaps and how many sheets they fill."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from isd_repro.config import reader as config
from isd_repro.report import page, run_records

ROOT = Path(__file__).parents[2]
PROFILES = [ROOT / "params.yaml", *sorted(ROOT.glob("pipelines/*/params.yaml"))]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
function boxes(what) {
  var found = Array.from(document.querySelectorAll(what)).filter(function (element) { return element.checkVisibility(); });
  return found.map(function (element) { var r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; });
}
addEventListener("load", function () {
  var seen = { tables: boxes("main table"), figures: boxes("figure img"), result: boxes(".lead")[0] };
  seen.wide = document.documentElement.scrollWidth;
  seen.drawn = Array.from(document.images).every(function (image) { return image.naturalWidth > 0; });
  seen.paper = getComputedStyle(document.body).backgroundColor;
  var cell = document.querySelector("a.cell");
  if (cell) {
    cell.focus();
    seen.focused = document.activeElement === cell;
    cell.click();
    seen.dialog = document.querySelector("dialog[open]").innerText;
  }
  var said = JSON.stringify(seen);
  if (parent === window) document.body.innerHTML = "<pre>" + said + "</pre>";
  else parent.postMessage(said, "*");
});
</script>"""
PHONE = """<body><iframe width="390" height="844" src="measured.html"></iframe><script>
addEventListener("message", function (event) { document.body.innerHTML = "<pre>" + event.data + "</pre>"; });
</script></body>"""
DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


def browse(tmp_path: Path, *arguments: str) -> str:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [str(BROWSER), *fixed, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def measure(tmp_path: Path, path: Path, *arguments: str, phone: bool = False) -> tuple[page.Report, dict[str, Any]]:
    """A profile's report, and what a browser says of its page, which is left as `index.html`."""
    params, layout = config.load(path)
    report = page.assemble(params, run_records.load(params, layout), layout)
    written = page.render(report)["index.html"]
    (tmp_path / "index.html").write_bytes(written)
    (tmp_path / "measured.html").write_text(written.decode().replace("</body>", f"{MEASURE}</body>"), "utf-8")
    (tmp_path / "phone.html").write_text(PHONE, "utf-8")
    shown = tmp_path / ("phone.html" if phone else "measured.html")
    fixed = ("--window-size=1280,900", "--virtual-time-budget=5000", "--dump-dom")
    dumped = html.unescape(browse(tmp_path, *fixed, *arguments, shown.as_uri()))
    return report, json.loads(re.findall(r"<pre>(.*?)</pre>", dumped, flags=re.DOTALL)[0])


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_first_screen_and_print(tmp_path: Path, path: Path) -> None:
    report, seen = measure(tmp_path, path)
    assert seen["drawn"], "every chart is drawn"
    assert seen["wide"] <= 1280
    assert seen["tables"][0][1] < 700, "the first table begins on the first screen"
    if report.result and report.blocks[0].figures:
        assert seen["result"][3] < seen["figures"][0][1] < seen["figures"][0][3] < seen["tables"][0][1]
    boxes = sorted(seen["tables"] + seen["figures"], key=lambda box: box[1])
    assert all(upper[3] <= lower[1] for upper, lower in pairwise(boxes)), "nothing overlaps"
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", (tmp_path / "index.html").as_uri())
    pages = re.findall(rb"/Type\s*/Pages\b.*?/Count (\d+)|/Count (\d+)", (tmp_path / "page.pdf").read_bytes(), flags=re.DOTALL)
    assert 1 <= max(int(one or other) for one, other in pages) <= 6


def test_a_phone_a_dark_screen_and_a_keyboard(tmp_path: Path) -> None:
    """The page is no wider than a phone, follows the reader's colours, and a focused number opens its provenance."""
    _, seen = measure(tmp_path, ROOT / "params.yaml", *DARK, phone=True)
    assert seen["wide"] <= 390
    assert seen["tables"][0][1] < 844, "the first table begins on the first screen of a phone"
    assert seen["paper"] == "rgb(22, 25, 29)"
    assert seen["focused"]
    title, facts = seen["dialog"].split("\n", 1)
    assert re.fullmatch(r"[^,]+, All \(n = 1,000\), 1-NN", title)
    assert "Made by" in facts
