"""The page of a trace in a real browser: it opens quietly, the slider moves it, and it shows what the trace says."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from chromium import find_chromium, visit
from paths import ROOT
from scripted_device import PoolModel, make_group
from trace_replay import Replay, make_scheduler, record_random_load

from jaxpaged.config import CacheConfig, PreemptionConfig
from jaxpaged.host.account.trace import TraceRecorder
from jaxpaged.looks.palette import PARTS
from jaxpaged.trace_page import dump_trace, example_names, example_trace, make_page

CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (on Debian: apt-get install chromium)")

#: Moves the slider as a hand would and reads the document, not the page's variables.
READ_ALL_FRAMES = """
const slider = document.getElementById("slider");
function look() {
  const pages = [...document.querySelectorAll("#pool .page")].map((cell) => [
    Number(cell.dataset.page), Number(cell.dataset.count), Number(cell.dataset.filled || 0),
    (cell.querySelector(".count").textContent || "").replace("×", ""), cell.className]);
  const account = Object.fromEntries([...document.querySelectorAll("#account tr")].map((row) =>
    [row.className, Number(row.dataset.slots)]));
  const tables = Object.fromEntries([...document.querySelectorAll(".sequence")].map((box) => [box.dataset.sequence,
    [...box.querySelectorAll("[data-page]")].map((entry) => [Number(entry.dataset.page),
      Number(entry.querySelector("i, td.filled").textContent)])]));
  const free = [...document.querySelectorAll("#pool .run")].map((run) => run.querySelector("b").textContent);
  const hidden = [...document.querySelectorAll("#pool .page[hidden]")].map((cell) => Number(cell.dataset.page));
  const cached = [...document.querySelectorAll("#pool .page.cached")].map((cell) => Number(cell.dataset.page));
  return { pages, account, tables, free, hidden, cached, step: document.getElementById("step").textContent };
}
window.result = [];
for (let i = 0; i <= Number(slider.max); i++) {
  slider.value = i;
  slider.dispatchEvent(new Event("input"));
  window.result.push(look());
}
"""


def check_frames(trace: dict, seen: list) -> None:
    """Every page's count and fill, the account and every table entry, against the other reader of traces."""
    replay, size, num_pages = Replay(trace), trace["page_size"], trace["num_pages"] - 1
    assert len(seen) == len(trace["frames"])
    for frame, shown in zip(trace["frames"], seen, strict=True):
        replay.apply(frame)
        counts, filled = replay.ref_counts, replay.filled
        assert len(shown["pages"]) == num_pages
        for page, count, fill, text, _ in shown["pages"]:
            assert (count, fill) == (counts[page], filled.get(page, 0))
            assert text == (str(count) if count > 1 else "")
        tables = {
            str(s): [[page, min(size, replay.num_slots[s] - i * size)] for i, page in enumerate(table)]
            for s, table in enumerate(replay.tables)
            if table
        }
        assert {s: table for s, table in shown["tables"].items() if table} == tables
        account = shown["account"]
        held = len(counts)
        assert account["own"] + account["shared"] == sum(filled.values())
        assert account["shared"] == sum(filled[page] for page, count in counts.items() if count > 1)
        assert account["unfilled"] == held * size - sum(filled.values())
        assert set(shown["cached"]) == replay.cached
        assert account["cached"] == len(replay.cached) * size
        assert account["free"] == (num_pages - held - len(replay.cached)) * size
        assert account["reserved"] == account["rounding"] == 0
        in_runs = [page for run in shown["free"] for page in range(*map(int, run.split("–")))]
        last = [int(run.split("–")[1]) for run in shown["free"]]
        assert sorted(in_runs + last) == shown["hidden"] and not {*shown["hidden"]} & (counts.keys() | replay.cached)
        assert account["saved"] == (counts.total() - held) * size
        assert account["total"] == num_pages * size


@needs_chromium
def test_every_frame_of_a_run_with_preemption_shows_what_the_trace_says(tmp_path):
    scheduler = make_scheduler(num_pages=50, page_size=4, preemption=PreemptionConfig("swap", swap_pages=10))
    trace = record_random_load(0, 24, scheduler).trace("A load", "with </script> and {{script}} in its <note>")
    visited = visit(CHROMIUM, make_page(trace), READ_ALL_FRAMES, tmp_path)
    assert visited.console == []
    check_frames(trace, visited.result)
    assert any(shown["cached"] for shown in visited.result) and any(shown["free"] for shown in visited.result)


@needs_chromium
def test_a_large_pool_is_shown_in_small_and_says_the_same(tmp_path):
    scheduler = make_scheduler(num_pages=601, page_size=8, preemption=PreemptionConfig(), max_num_seqs=256)
    trace = record_random_load(1, 60, scheduler).trace("A larger load")
    visited = visit(CHROMIUM, make_page(trace), READ_ALL_FRAMES, tmp_path, size="390,800")
    assert visited.console == []
    check_frames(trace, visited.result)


KEYS = """
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const step = () => document.getElementById("step").textContent;
const cell = (page) => document.querySelector(`#pool [data-page="${page}"]`);
window.result = [step()];
for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home", "n", "PageDown", "t"]) {
  press(key);
  window.result.push(step());
}
press("Home");
press("ArrowRight");
cell(7).click();
window.result.push(document.getElementById("detail").textContent);
window.result.push([...document.querySelectorAll(".sequence.lit")].map((box) => box.dataset.sequence));
window.result.push([1, 3].map((page) => cell(page).className.trim().split(/\\s+/).at(-1)));
window.result.push([...document.querySelectorAll("#events li")].map((line) => line.textContent));

// By keyboard alone: into the pool, past the free pages, and the page that is reached is followed.
const focused = () => document.activeElement;
const keyOn = (key) => focused().dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
press("Escape");
const stops = (box) => [...document.querySelectorAll(`${box} [tabindex="0"]`)];
window.result.push([stops("#pool").length, stops("#tables").length]);
stops("#pool")[0].focus();
["Home", "ArrowRight", "ArrowRight", "Enter"].forEach(keyOn);
window.result.push([step(), focused().getAttribute("aria-label"), focused().getAttribute("aria-pressed"),
  document.getElementById("detail").textContent]);
stops("#tables")[0].focus();
["ArrowDown", "Enter"].forEach(keyOn);
window.result.push([focused().getAttribute("aria-label"), document.getElementById("detail").textContent]);
press("f");
window.result.push([document.querySelectorAll("#pool .page[hidden]").length,
  document.getElementById("free-pages").getAttribute("aria-pressed")]);
// Whatever takes the focus has a name.
const named = "button, select, input, [role=button], [role=img], table";
window.result.push([...document.querySelectorAll(named)].filter((one) =>
  !(one.getAttribute("aria-label") || one.textContent.trim() || one.closest("label"))).map((one) => one.outerHTML));
window.result.push([...document.querySelectorAll("#ticks span, .scale span")].map((one) => one.textContent));
"""


@needs_chromium
def test_keys_move_it_a_click_follows_a_page_and_a_copy_is_said_in_words(tmp_path):
    visited = visit(CHROMIUM, make_page(example_trace("parallel-sampling")), KEYS, tmp_path)
    assert visited.console == []
    steps, (detail, lit, flags, events, *by_keys) = visited.result[:9], visited.result[9:]
    first, second, third, end = (
        "Step 1 of 6: prefill, 7 tokens", "Step 2 of 6: decode, 2 tokens", "Step 3 of 6: decode, 2 tokens",
        "After step 6 of 6",
    )  # fmt: skip
    assert steps == [first, second, third, second, end, first, second, end, end]
    assert detail == "Page 7: held by A1 (block 0), A2 (block 0); 4 of 4 filled."
    assert lit == ["0", "1"]
    assert flags == ["written", "copied"]
    assert events == [
        "A1 is to write to page 1, which others hold: it is copied to page 3.",
        "A2 writes “mothers” to page 1.",
    ]
    stops, page, sequence, free, nameless, labels = by_keys
    assert stops == [1, 1]  # Tab stops once at each; the arrow keys go on from there
    copied = "Page 3, held by A1, 4 of 4 filled, a copy of page 1"
    assert page == [second, copied, "true", "Page 3: held by A1 (block 1); 4 of 4 filled."]
    assert sequence == ["A2, 8 filled, next: saw: follow", "A2: pages 7 and 1, 8 positions filled."]
    assert free == [0, "true"] and nameless == []
    assert labels[:4] == ["100 %", "of slots", "0 %", "events"] and labels[4:6] == ["step 1", "2"]


CACHED = """
const slider = document.getElementById("slider");
const go = (i) => { slider.value = i; slider.dispatchEvent(new Event("input")); };
const look = () => [...document.querySelectorAll("#pool .page:not([hidden])")].map((cell) => [
  cell.getAttribute("aria-label"),
  [...cell.querySelectorAll(".slot.filled")].map((slot) => slot.textContent).join(" ")]);
const texts = () => [...document.querySelectorAll("#events li")].map((line) => line.textContent);
go(4); window.result = [look(), texts()];
go(5); window.result.push(look(), texts());
window.result.push(document.documentElement.scrollWidth <= document.documentElement.clientWidth);
"""


@needs_chromium
def test_cached_pages_are_coloured_named_and_show_what_they_keep(tmp_path):
    scheduler = make_scheduler(num_pages=20, page_size=4, preemption=PreemptionConfig())
    recorder, pool = TraceRecorder(scheduler.cache), PoolModel(4)
    for _ in range(2):  # the same prompt of 9 tokens, one after the other
        scheduler.add(make_group(9, 4))
        while (plan := scheduler.schedule()) is not None:
            recorder.planned(plan, scheduler)
            scheduler.commit(plan, pool.run(plan))
            recorder.committed(scheduler)
    trace = recorder.trace("Twice")
    for i, request in enumerate(trace["requests"]):
        request["id"] = str(i)
    visited = visit(CHROMIUM, make_page(trace), CACHED, tmp_path, size="390,800")
    assert visited.console == []
    kept, kept_text, found, found_text, fits_a_phone = visited.result
    assert fits_a_phone
    waits = "cached, held by nobody, kept for who begins with its tokens"
    assert kept[:2] == [[f"Page 1, {waits}", "1000 1001 1002 1003"], [f"Page 2, {waits}", "1004 1005 1006 1007"]]
    assert "Pages 1, 2 and 3 stay cached: held by nobody, and kept until room is needed." in " ".join(kept_text)
    assert [name for name, _ in found[:2]] == [
        f"Page {page}, held by B, 4 of 4 filled, found by its tokens" for page in (1, 2)
    ]
    assert "B finds pages 1 and 2, known by their tokens: nothing of them is computed again." in found_text


def test_the_page_has_the_words_and_colours_of_the_figures():
    page = make_page(example_trace("one-request"))
    for part in ("used", "internal", "cached", "free", "reserved", "rounding"):
        look = PARTS[part]
        assert f'"{look.word}"' in page and page.count(look.colour) >= 1 and page.count(look.dark) == 2


@pytest.mark.parametrize("name", ["one-request", "two-requests", "parallel-sampling", "beam-search", "preemption"])
def test_a_page_is_one_file_that_asks_for_nothing_else(name):
    assert name in example_names()
    page = make_page(example_trace(name))
    assert not re.search(r"""https?:|\b(src|href)=|@import|url\(""", page)
    assert "default-src 'none'" in page
    assert len(page) < 65_000


def test_a_trace_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no steps"):
        make_page(TraceRecorder(CacheConfig(4, 9)).trace("nothing"))


def test_every_file_of_the_page_is_installed_with_the_package():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["jaxpaged.trace_page"]
    package = ROOT / "jaxpaged" / "trace_page"
    data = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert data == {file for pattern in patterns for file in package.glob(pattern)} and len(data) == 14


def test_a_trace_cannot_leave_its_place_in_the_page():
    trace = example_trace("one-request") | {"note": "</script><script>{{style}}{{script}}{{trace}}"}
    page = make_page(trace)
    embedded = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert embedded is not None and json.loads(embedded[1]) == trace
    assert json.loads(dump_trace(trace)) == trace
