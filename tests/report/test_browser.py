"""The page in a real browser: it renders without a complaint, its own script runs and no other, tables sort."""

import json
import os
import re
import shutil
import subprocess

import pytest
from report_cases import SPEED, write_answers, write_workdir

from vlmprune_jax.report.build import build_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Clicks the parameters, then the model's name twice, and says what the first table then shows.
CLICKS = """
<script>
const table = document.querySelector("table.sortable"), told = [];
for (const column of [2, 2, 0]) {
  table.tHead.rows[0].cells[column].querySelector("button").click();
  const sorted = [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));
  told.push({ sorted, names: [...table.tBodies[0].rows].map((row) => row.cells[0].firstChild.textContent) });
}
const pre = document.createElement("pre");
pre.id = "told";
pre.textContent = JSON.stringify(told);
document.body.append(pre);
</script>
"""


def opened(page, profile):
    """(the page as the browser has it after scripts ran, what its console said)."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={profile}", "--disable-extensions", "--no-first-run", page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(profile)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_page_renders_and_sorts(tmp_path):
    write_workdir(tmp_path)
    write_answers(tmp_path)
    (tmp_path / "speed.json").write_text(json.dumps(SPEED))
    page = build_report(tmp_path)
    shown, console = opened(page, tmp_path / "profile")
    assert console == []
    assert shown.count("<svg") == 6
    assert shown.count('<button type="button">') > 20  # which our script made, under the page's own policy

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
    up, down, by_name = json.loads(re.search(r'<pre id="told">(.*?)</pre>', shown).group(1))
    names = ["width", "depth", "depth-sft", "unpruned"]
    assert set(up["names"]) == set(names)
    assert up["names"][-1] == down["names"][0] == "unpruned"  # the most parameters
    assert up["sorted"][2] == "ascending"
    assert down["sorted"][2] == "descending"
    assert by_name["sorted"] == ["ascending", *[None] * (len(up["sorted"]) - 1)]
    assert by_name["names"] == ["depth", "depth-sft", "unpruned", "width"]
