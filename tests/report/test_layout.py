"""The pages of every profile in a real browser: what is on the first screen, what overlaps and how many sheets they fill."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

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
  document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>";
});
</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


def browse(tmp_path: Path, *arguments: str) -> str:
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [str(BROWSER), *fixed, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parent.name)
def test_first_screen_and_print(tmp_path: Path, path: Path) -> None:
    params, layout = config.load(path)
    report = page.assemble(params, run_records.load(params, layout), layout)
    written = tmp_path / "index.html"
    written.write_bytes(page.render(report)["index.html"])
    measured = tmp_path / "measured.html"
    measured.write_text(written.read_text("utf-8").replace("</body>", f"{MEASURE}</body>"), "utf-8")
    dumped = html.unescape(browse(tmp_path, "--window-size=1280,800", "--dump-dom", measured.as_uri()))
    seen = json.loads(re.findall(r"<pre>(.*?)</pre>", dumped)[0])
    assert seen["wide"] <= 1280
    assert seen["tables"][0][1] < 700, "the first table begins on the first screen"
    if report.result and report.figures:
        assert seen["result"][3] < seen["figures"][0][1] < seen["figures"][0][3] < seen["tables"][0][1]
    boxes = sorted(seen["tables"] + seen["figures"], key=lambda box: box[1])
    assert all(upper[3] <= lower[1] for upper, lower in pairwise(boxes)), "nothing overlaps"
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", written.as_uri())
    pages = re.findall(rb"/Type\s*/Pages\b.*?/Count (\d+)|/Count (\d+)", (tmp_path / "page.pdf").read_bytes(), flags=re.DOTALL)
    assert 1 <= max(int(one or other) for one, other in pages) <= 6
