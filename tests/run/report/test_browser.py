"""The page in a real browser: it renders without a complaint, its own script runs and no other, tables sort."""

import json
import os
import re
import shutil
import subprocess

import pytest
from msgspec.structs import replace
from report_cases import SPEED, write_answers, write_workdir
from sweep_cases import write_sweep

from vlmprune_jax.run.report.build import build_report, build_sweep_page
from vlmprune_jax.run.workdir.artefact import write_artefact
from vlmprune_jax.run.workdir.result import read_result

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Clicks the retention twice, then the model's name, filters, and says what the first table then shows.
CLICKS = """
<script>
const table = document.querySelector("table.sortable"), told = [];
const nameOf = (cell) => [...cell.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("");
const tell = () => {
  const sorted = [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));
  const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  told.push({ sorted, names: rows.map((row) => nameOf(row.cells[0]).replaceAll("\u00a0", " ")) });
};
for (const column of [1, 1, 0]) {
  table.tHead.rows[0].cells[column].querySelector("button").click();
  tell();
}
const filter = document.querySelector("input[type=search]");
filter.value = "DEPTH sft";
filter.dispatchEvent(new Event("input"));
tell();
const pre = document.createElement("pre");
pre.id = "told";
pre.textContent = JSON.stringify(told);
document.body.append(pre);
</script>
"""
# Says how high the page is in a frame of a width, which cells of the first row can be seen without scrolling, whether
# the first plot is whole, and which tables and plots that are not folded lie in part outside the frame.
FRAME = """<body><iframe src="{1}" style="width:{0}px;height:800px;border:0"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, pre = document.createElement("pre");
  const heads = [...page.querySelector("table.sortable").tHead.rows[0].cells];
  const seen = heads.filter((head) => head.getBoundingClientRect().width && head.getBoundingClientRect().right <= {0});
  const names = seen.map((head) => head.textContent);
  const plot = page.querySelector("section .plot svg").getBoundingClientRect();
  const whole = plot.width > 300 && plot.right <= {0};
  const parts = [...page.querySelectorAll("section .scroll, section .plot")];
  const wide = parts.filter((part) => part.scrollWidth > part.clientWidth);
  const cut = wide.map((part) => part.getAttribute("aria-label"));
  pre.id = "told";
  pre.textContent = JSON.stringify([page.documentElement.scrollHeight, names, whole, cut]);
  document.body.append(pre);
}});
</script>"""
WITH_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")


def opened(page, profile):
    """(the page as the browser has it after scripts ran, what its console said)."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={profile}", "--disable-extensions", "--no-first-run"]
    command += ["--allow-file-access-from-files", "--window-size=1500,900", page.as_uri()]
    environment = {**os.environ, "HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def told(shown):
    return re.search(r'<pre id="told">(.*?)</pre>', shown).group(1)


def report(workdir):
    """The page of six models with speeds."""
    write_workdir(workdir)
    write_answers(workdir)
    write_artefact(workdir / "speed.json", SPEED)
    result, speed = read_result(workdir), SPEED.medians()["depth"]
    more = [replace(result.runs[2], name=f"w{n}", recovery=f"sft_{n}", speed=speed) for n in range(3)]
    runs = [*(replace(run, speed=speed) for run in result.runs), *more]
    write_artefact(workdir / "result.json", replace(result, runs=runs))
    return build_report(workdir)


def sweep_page(workdir):
    """The page of twenty runs with four evaluation sets."""
    write_sweep(workdir)
    return build_sweep_page(workdir)


@pytest.mark.slow
@WITH_BROWSER
@pytest.mark.usefixtures("drawn")
def test_page_renders_and_sorts(tmp_path):
    page = report(tmp_path)
    shown, console = opened(page, tmp_path / "profile")
    assert console == []
    assert shown.count("<svg") == 6
    assert shown.count('<button type="button">') > 15  # which our script made, under the page's own policy

    text = page.read_text()
    other = page.with_name("other.html")
    other.write_text(text.replace("</body>", f"{CLICKS}</body>"))
    shown, console = opened(other, tmp_path / "profile")
    assert 'id="told"' not in shown.split("<script>const table")[0]
    assert any("Content Security Policy" in line for line in console)  # no script but ours

    clicking = re.sub(r"script-src &#39;[^&]+&#39;", "script-src &#39;unsafe-inline&#39;", text)
    other.write_text(clicking.replace("</body>", f"{CLICKS}</body>"))
    shown, console = opened(other, tmp_path / "profile")
    assert console == []
    best, worst, by_name, filtered = json.loads(told(shown))
    widths = ["width 30 %", *(f"width 30 %, sft_{n}" for n in range(3))]
    assert best["names"] == ["unpruned", "depth 30 %, SFT", *widths, "depth 30 %"]  # best first, unpruned stays
    assert worst["names"] == ["unpruned", "depth 30 %", *widths, "depth 30 %, SFT"]
    assert (best["sorted"][1], worst["sorted"][1]) == ("descending", "ascending")
    assert by_name["sorted"] == ["ascending", *[None] * (len(best["sorted"]) - 1)]
    assert by_name["names"] == ["unpruned", "depth 30 %", "depth 30 %, SFT", *widths]
    assert filtered["names"] == ["unpruned", "depth 30 %, SFT"]


@pytest.mark.slow
@WITH_BROWSER
@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("make", [report, sweep_page])
def test_what_is_seen_without_scrolling(tmp_path, make, width):
    """Plots and tables are whole; a phone shows a table of four columns, a desktop every column, and a short page."""
    page = make(tmp_path)
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width, page.name))
    shown, _ = opened(frame, tmp_path / "profile")
    height, heads, whole, cut = json.loads(told(shown))
    assert cut == []
    assert "<td></td>" not in page.read_text()
    if make is report:
        assert whole
        assert heads == ["model", "retained, %", "size, %", "accuracy, %"] if width == 390 else heads[-1] == "run"
        assert width == 390 or height < 6000
