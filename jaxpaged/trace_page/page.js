// Moves between frames, and draws what a frame changed.

const state = { frame: -1, timer: 0, addressTimer: 0, pinned: null, hovered: null, shown: null };

function show(i) {
  i = Math.max(0, Math.min(numFrames - 1, i));
  if (i === state.frame) return;
  const previous = state.frame === i - 1 && state.shown ? state.shown.state : replay.at(i - 1);
  const before = { state: previous, pages: pagesOf(previous, replay) };
  const after = previous.copy();
  const frame = replay.frames[i];
  after.apply(frame, replay);
  const now = state.shown = { state: after, pages: pagesOf(after, replay) };
  state.frame = i;
  drawPool(now, before, frame);
  drawTables(now, frame);
  drawQueue(now);
  drawEvents(frame, now);
  drawAccount(replay.accounts[i]);
  const total = replay.frames[numFrames - 1].step;
  $("step").textContent = frame.kind === "commit" ? `After step ${frame.step} of ${total}`
    : `Step ${frame.step} of ${total}: ${frame.kind}, ${frame.computed} token${frame.computed === 1 ? "" : "s"}`;
  $("slider").value = i;
  $("slider").setAttribute("aria-valuetext", $("step").textContent);
  clearTimeout(state.addressTimer);  // browsers allow few changes of the address in a short time
  state.addressTimer = setTimeout(() => history.replaceState(null, "", `#${i}`), 300);
  moveCursor();
  highlight();
}

// Following a page or a sequence

function target(node) {
  const page = node.closest("[data-page]"), sequence = node.closest("[data-sequence]");
  if (page) return { page: Number(page.dataset.page) };
  return sequence ? { sequence: Number(sequence.dataset.sequence) } : null;
}

function highlight() {
  const followed = state.hovered || state.pinned;
  document.body.classList.toggle("following", Boolean(followed));
  for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
  for (const pressed of document.querySelectorAll('.page[aria-pressed="true"], .name[aria-pressed="true"]')) {
    pressed.removeAttribute("aria-pressed");
  }
  if (state.pinned) {
    const { page, sequence } = state.pinned;
    const pinned = page ? cells[page].cell : document.querySelector(`[data-sequence="${sequence}"] .name`);
    pinned?.setAttribute("aria-pressed", "true");
  }
  const detail = $("detail");
  detail.textContent = "";
  if (!followed) return;
  const { holders, filled } = state.shown.pages;
  if (followed.sequence !== undefined) {
    const table = state.shown.state.tables[followed.sequence];
    for (const page of table) cells[page]?.cell.classList.add("lit");
    document.querySelector(`[data-sequence="${followed.sequence}"]`)?.classList.add("lit");
    const text = table.length ? `${pageList(table.filter(Boolean))}, ${state.shown.state.slots[followed.sequence]} positions filled` : "no pages";
    detail.textContent = `${replay.names[followed.sequence]}: ${text}.`;
    return;
  }
  const page = followed.page;
  cells[page].cell.classList.add("lit");
  for (const [s] of holders[page]) document.querySelector(`[data-sequence="${s}"]`)?.classList.add("lit");
  for (const entry of $("tables").querySelectorAll(`[data-page="${page}"]`)) entry.classList.add("lit");
  const names = holders[page].map(([s, i]) => `${replay.names[s]} (block ${i})`);
  const held = nameList(names);
  const unheld = state.shown.state.cached.has(page) ? `${LOOKS.words.cached}, ${FLAGS.cached[1]}.` : "free.";
  detail.textContent = `Page ${replay.label(page)}: ` +
    (names.length ? `held by ${held}; ${filled[page]} of ${replay.pageSize} filled.` : unheld);
}

function follow() {
  for (const box of [$("pool"), $("tables")]) {
    box.addEventListener("mouseover", (event) => { state.hovered = target(event.target); highlight(); });
    box.addEventListener("mouseleave", () => { state.hovered = null; highlight(); });
    box.addEventListener("click", (event) => {
      const clicked = target(event.target);
      state.pinned = JSON.stringify(clicked) === JSON.stringify(state.pinned) ? null : clicked;
      state.hovered = null;
      highlight();
    });
    box.addEventListener("keydown", (event) => {
      if (!event.target.matches(".page, .name") || (event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      event.stopPropagation();
      event.target.click();
    });
  }
}

// Moving

function nextNotable() {
  for (let i = state.frame + 1; i < numFrames; i++) {
    if ((replay.frames[i].events || []).some(([name]) => NOTABLE.has(name))) return i;
  }
  return numFrames - 1;
}

function pause() {
  clearTimeout(state.timer);
  state.timer = 0;
  $("play").textContent = "▶ Play";
  $("events").setAttribute("aria-live", "polite");
}

function play() {
  if (state.frame === numFrames - 1) show(0);
  $("play").textContent = "⏸ Pause";
  $("events").setAttribute("aria-live", "off");  // what happens is too quick to be read out
  const advance = () => {
    show(state.frame + 1);
    if (state.frame === numFrames - 1) pause();
    else state.timer = setTimeout(advance, delay());
  };
  state.timer = setTimeout(advance, delay() / 2);
}

// A short run is told slowly; a long one takes about a minute.
function delay() { return Math.max(16, Math.min(1200, 60000 / numFrames) / Number($("speed").value)); }

function toggleTheme() {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  drawChart();
}

const ACTIONS = {
  first: () => show(0), back: () => show(state.frame - 1), forward: () => show(state.frame + 1),
  last: () => show(numFrames - 1), next: () => show(nextNotable()),
};
const KEYS = {
  ArrowLeft: ACTIONS.back, ArrowRight: ACTIONS.forward, Home: ACTIONS.first, End: ACTIONS.last, n: ACTIONS.next,
  PageUp: () => show(state.frame - 10), PageDown: () => show(state.frame + 10),
};

function listen() {
  for (const [id, action] of Object.entries(ACTIONS)) $(id).addEventListener("click", () => { pause(); action(); });
  $("play").addEventListener("click", () => state.timer ? pause() : play());
  $("slider").addEventListener("input", (event) => { pause(); show(Number(event.target.value)); });
  $("theme").addEventListener("click", toggleTheme);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    if (event.key === " " && event.target.tagName !== "BUTTON") state.timer ? pause() : play();
    else if (event.key === "t") toggleTheme();
    else if (event.key === "f") $("free-pages").click();
    else if (event.key === "Escape") { state.pinned = null; highlight(); }
    else if (KEYS[event.key]) { pause(); KEYS[event.key](); }
    else return;
    event.preventDefault();
  });
  window.addEventListener("hashchange", () => show(Number(location.hash.slice(1)) || 0));
  new ResizeObserver(drawChart).observe($("chart"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawChart);
}


document.title = `${replay.trace.title} – page pool`;
$("title").textContent = replay.trace.title;
$("note").textContent = replay.trace.note || "";
$("slider").max = numFrames - 1;
makePool();
reachTables = roam($("tables"), ".name");
drawLegend();
labelChart();
follow();
listen();
show(Number(location.hash.slice(1)) || 0);
drawChart();
