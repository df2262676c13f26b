// The page: draws one frame of a Replay into the document, and moves between frames. Only what changed is redrawn.

const HUES = [212, 28, 142, 330, 268, 52, 186, 2];
// Of a page in this frame; a word as well as a colour.
const FLAGS = {
  taken: ["new", "newly taken"], copied: ["copy", "a copy, made before a write to a shared page"],
  freed: ["freed", "freed"], written: ["", "written by this step"],
};
const NOTABLE = new Set(["fork", "copy", "preempt", "resume"]);

const $ = (id) => document.getElementById(id);
const replay = new Replay(JSON.parse($("trace").textContent));
const numFrames = replay.frames.length;
// How much of a page there is room to show: its tokens, its number and fill, or its colour and count.
const poolStyle = replay.capacity <= 512 ? "tokens" : replay.numPages <= 400 ? "numbers" : "dots";
const tablesStyle = replay.mostLive <= 12 && replay.longestTable <= 12 && poolStyle === "tokens" ? "cards" : "rows";
const state = { frame: -1, timer: 0, addressTimer: 0, pinned: null, hovered: null, shown: null };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function colour(s) {
  const place = replay.colours[s];
  const hue = place < HUES.length ? HUES[place] : (place * 137.508 + 20) % 360;
  const shift = place < HUES.length ? 0 : (Math.floor(place / HUES.length) % 3 - 1) * 6;
  return `hsl(${hue.toFixed(0)} var(--sat) calc(var(--light) + ${shift}%))`;
}

function stripes(sequences) {
  const shown = sequences.slice(0, 8), step = 100 / shown.length;
  if (shown.length === 1) return colour(shown[0]);
  return `linear-gradient(100deg, ${shown.map((s, i) =>
    `${colour(s)} ${(i * step).toFixed(1)}% ${((i + 1) * step).toFixed(1)}%`).join(", ")})`;
}

// Text of a token in a place of its own: a space is shown where it is all there is, and line ends by their sign.
function shownPiece(token) {
  const text = replay.piece(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return text.trim() === "" ? text.replace(/ /g, "␣") || "∅" : text.trim();
}

// Pool

const cells = [];

function makePool() {
  const pool = $("pool");
  pool.className = poolStyle;
  pool.style.setProperty("--slots", Math.min(replay.pageSize, 4));
  for (let page = 1; page <= replay.numPages; page++) {
    const cell = element("div", "page free");
    cell.dataset.page = page;
    cell.tabIndex = -1;
    if (poolStyle !== "dots") cell.append(element("span", "id", replay.label(page)));
    cell.append(element("span", "count"), element("span", "glyph"));
    if (poolStyle === "tokens") {
      const slots = element("div", "slots");
      for (let k = 0; k < replay.pageSize; k++) slots.append(element("span", "slot"));
      cell.append(slots);
    } else cell.append(element("i", "fill"));
    cells[page] = { cell, signature: "" };
    pool.append(cell);
  }
}

function flagsOf(page, now, before, copies) {
  const count = now.pages.holders[page].length, was = before.pages.holders[page].length;
  if (copies.has(page)) return "copied";
  if (count && !was) return "taken";
  if (!count && was) return "freed";
  if (count && now.pages.filled[page] > before.pages.filled[page]) return "written";
  return "";
}

function drawPool(now, before, frame) {
  const copies = new Map();
  for (const [name, , source, copy] of frame.events || []) if (name === "copy") copies.set(copy, source);
  for (let page = 1; page <= replay.numPages; page++) {
    const holders = now.pages.holders[page], filled = now.pages.filled[page];
    const flag = flagsOf(page, now, before, copies);
    const old = flag === "copied" ? filled - 1 : before.pages.filled[page];  // what was filled before this frame
    const signature = `${holders.map(([s, i]) => `${s}.${i}`)}|${filled}|${old}|${flag}|${copies.get(page) || ""}`;
    if (cells[page].signature === signature) continue;
    cells[page].signature = signature;
    drawCell(cells[page].cell, page, now, holders, filled, old, flag, copies.get(page));
  }
}

function drawCell(cell, page, now, holders, filled, old, flag, source) {
  const sequences = holders.map(([s]) => s);
  cell.className = `page ${holders.length ? "used" : "free"} ${flag}`;
  cell.dataset.count = holders.length;
  cell.dataset.filled = filled;
  cell.style.background = holders.length ? stripes(sequences) : "";
  cell.querySelector(".count").textContent = holders.length > 1 ? `×${holders.length}` : "";
  cell.querySelector(".glyph").textContent =
    source !== undefined && poolStyle === "tokens" ? `copy of ${replay.label(source)}` : flag && FLAGS[flag][0];
  if (poolStyle === "tokens") drawSlots(cell, now, holders, filled, old);
  else cell.querySelector(".fill").style.width = `${100 * filled / replay.pageSize}%`;
}

function drawSlots(cell, now, holders, filled, old) {
  const [s, place] = holders.find(([s, i]) => now.state.slots[s] - i * replay.pageSize >= filled) || [];
  [...cell.querySelectorAll(".slot")].forEach((slot, k) => {
    const isFilled = holders.length > 0 && k < filled;
    slot.className = `slot ${isFilled ? "filled" : ""} ${isFilled && k >= old ? "new" : ""}`;
    slot.title = slot.textContent = isFilled ? shownPiece(replay.tokens[s][place * replay.pageSize + k]) : "";
  });
}

// Block tables

const rows = new Map();  // of each sequence shown: its element and what it was made from

function drawTables(now, before, frame) {
  const changed = changedEntries(frame);
  const gone = (frame.events || []).filter(([name]) => name === "finish").map(([, s, reason]) => [s, reason]);
  const shown = [...now.state.live.filter((s) => now.state.tables[s].length || now.state.status[s] === SWAPPED)
    .map((s) => [s, ""])].sort(([a], [b]) => sortKey(a) - sortKey(b)).concat(gone);
  for (const s of rows.keys()) if (!shown.some(([other]) => other === s)) { rows.get(s).made.remove(); rows.delete(s); }
  const tables = $("tables");
  let place = tables.firstChild;
  for (const [s, ended] of shown) {
    const marks = changed.get(s) || "";
    const shared = now.state.tables[s].map((page) => now.pages.holders[page].length);
    const signature = [now.state.tables[s], now.state.slots[s], now.state.known[s], now.state.status[s], ended,
      marks && [...marks].join(), shared].join("|");
    let row = rows.get(s);
    if (!row || row.signature !== signature) {
      const made = tablesStyle === "cards" ? makeCard(s, now, ended, marks, shared) : makeRow(s, now, ended, marks, shared);
      if (row) {
        if (place === row.made) place = made;
        row.made.replaceWith(made);
      }
      rows.set(s, row = { made, signature });
    }
    if (row.made !== place) tables.insertBefore(row.made, place);
    else place = place.nextSibling;
  }
  if (!shown.length) $("tables").dataset.empty = "No sequence holds pages.";
  else delete $("tables").dataset.empty;
}

function sortKey(s) { return replay.trace.sequences[s] * 1e6 + s; }

// sequence -> {place in its table: kind of change}
function changedEntries(frame) {
  const changed = new Map();
  const pages = new Map();
  for (const [name, s, ...rest] of frame.events || []) {
    if (name === "copy") pages.set(`${s}:${rest[1]}`, "copied");
    if (name === "fork") changed.set(s, new Map([["all", "forked"]]));
  }
  for (const [s, kept, , ...added] of frame.tables || []) {
    const marks = changed.get(s) || new Map();
    added.forEach((page, i) => marks.set(kept + i, pages.get(`${s}:${page}`) || "taken"));
    changed.set(s, marks);
  }
  return changed;
}

function entryFill(s, i, now) { return Math.min(replay.pageSize, now.state.slots[s] - i * replay.pageSize); }

function statusText(s, now, ended) {
  const known = now.state.known[s], slots = now.state.slots[s];
  if (ended) return { stop: "finished", length: "finished", dropped: "dropped", done: "search over" }[ended] || ended;
  if (now.state.status[s] === SWAPPED) return "in host memory";
  const next = replay.tokens[s].slice(slots, known);
  if (poolStyle !== "tokens" || next.length !== 1) return `${slots} filled`;
  return `${slots} filled, next: ${shownPiece(next[0])}`;
}

function makeHead(s, now, ended) {
  const head = element("div", "head");
  const name = element("b", "name", replay.names[s]);
  name.style.background = colour(s);
  head.append(name, element("span", "status", statusText(s, now, ended)));
  return head;
}

function makeCard(s, now, ended, marks, shared) {
  const card = element("div", `sequence card ${ended ? "ended" : ""} ${marks && marks.has("all") ? "forked" : ""}`);
  card.dataset.sequence = s;
  card.append(makeHead(s, now, ended));
  if (!now.state.tables[s].length) return card;
  const table = element("table");
  const head = table.createTHead().insertRow();
  for (const title of ["block", "tokens", "page", "# filled"]) head.append(element("th", "", title));
  const body = table.createTBody();
  now.state.tables[s].forEach((page, i) => {
    const row = body.insertRow();
    const filled = entryFill(s, i, now);
    row.className = (marks && marks.get(i)) || "";
    row.dataset.page = page;
    row.append(element("td", "block", i));
    const tokens = replay.tokens[s].slice(i * replay.pageSize, i * replay.pageSize + filled);
    row.append(element("td", "tokens", tokens.map(shownPiece).join(" ")));
    row.append(element("td", "entry", replay.label(page)), element("td", "filled", filled));
    if (shared[i] > 1) row.cells[2].append(element("span", "count", `×${shared[i]}`));
  });
  card.append(table);
  return card;
}

function makeRow(s, now, ended, marks, shared) {
  const row = element("div", `sequence row ${ended ? "ended" : ""} ${marks && marks.has("all") ? "forked" : ""}`);
  row.dataset.sequence = s;
  row.append(makeHead(s, now, ended));
  const entries = element("div", "entries");
  now.state.tables[s].forEach((page, i) => {
    const entry = element("span", `entry ${(marks && marks.get(i)) || ""} ${shared[i] > 1 ? "shared" : ""}`);
    entry.dataset.page = page;
    entry.append(replay.label(page), element("i", "", entryFill(s, i, now)));
    entries.append(entry);
  });
  row.append(entries);
  return row;
}

function drawQueue(now, i) {
  const waiting = new Set(), swapped = new Set(), finished = new Set(replay.trace.requests.keys());
  for (const s of now.state.live) {
    const request = replay.trace.sequences[s];
    finished.delete(request);
    if (now.state.status[s] === WAITING) waiting.add(request);
    if (now.state.status[s] === SWAPPED) swapped.add(request);
  }
  for (const [s, request] of replay.trace.sequences.entries()) {
    if (now.state.status[s] === UNBORN && !replay.trace.sequences.slice(0, s).includes(request)) finished.delete(request);
  }
  const queue = $("queue");
  queue.replaceChildren();
  for (const [title, requests] of [["Waiting", waiting], ["In host memory", swapped], ["Finished", finished]]) {
    if (!requests.size) continue;
    const names = [...requests].map((r) => replay.requestNames[r]);
    const text = names.length > 12 ? `${names.length} requests` : names.join(", ");
    queue.append(element("span", "", `${title}: ${text}`));
  }
}

// What happened, in words

function pageList(pages) {
  const labels = pages.map((page) => replay.label(page));
  const shown = labels.length > 12 ? [...labels.slice(0, 11), `${labels.length - 11} more`] : labels;
  const joined = shown.length > 1 ? `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}` : String(shown[0]);
  return `${labels.length > 1 ? "pages" : "page"} ${joined}`;
}

const SENTENCES = {
  admit: (r) => `Request ${replay.requestNames[r]} is admitted.`,
  append: (s, ...pages) => `${replay.names[s]} takes ${pageList(pages)}.`,
  copy: (s, source, copy) => `${replay.names[s]} is to write to page ${replay.label(source)}, which others hold: ` +
    `it is copied to page ${replay.label(copy)}.`,
  fork: (s, parent) => `${replay.names[s]} forks from ${replay.names[parent]}: the same pages, one more reference each.`,
  free: (...pages) => { const text = pageList(pages); return `${text[0].toUpperCase()}${text.slice(1)} ` +
    `${pages.length > 1 ? "are" : "is"} free.`; },
  preempt: (r, way) => `Request ${replay.requestNames[r]} gives way: its pages ` +
    (way === "swap" ? "go to host memory." : "are dropped, to be computed again."),
  resume: (r, way) => `Request ${replay.requestNames[r]} returns: its pages ` +
    (way === "swap" ? "come back from host memory." : "are computed again."),
  finish: (s, reason) => replay.names[s] +
    ({ dropped: " has no child and is dropped.", done: " ends with the search." }[reason] || " has finished."),
};

function writes(frame, now) {
  const grown = frame.grow || [];
  if (grown.length > 4) return [`${grown.length} sequences write to the last page they have.`];
  return grown.map((s) => {
    const place = now.state.slots[s] - 1, page = now.state.tables[s][Math.floor(place / replay.pageSize)];
    return `${replay.names[s]} writes “${shownPiece(replay.tokens[s][place])}” to page ${replay.label(page)}.`;
  });
}

// Where many sequences do the same, one line for all of them.
const SUMMARIES = {
  admit: "requests are admitted", preempt: "requests give way", resume: "requests return", append: "sequences take pages",
  copy: "sequences get a copy of a shared page", fork: "sequences fork", finish: "sequences end",
};

function drawEvents(frame, now) {
  const kinds = new Map(["preempt", "resume", "admit", "copy", "fork", "finish", "append", "free"].map((name) => [name, []]));
  for (const [name, ...rest] of frame.events || []) kinds.get(name).push(rest);
  const list = $("events");
  list.replaceChildren();
  for (const [name, all] of kinds) {
    if (all.length > 4) {
      const names = all.slice(0, 4).map(([of]) =>
        (["admit", "preempt", "resume"].includes(name) ? replay.requestNames : replay.names)[of]);
      list.append(element("li", name, `${all.length} ${SUMMARIES[name]}: ${names.join(", ")}, …`));
    } else for (const one of all) list.append(element("li", name, SENTENCES[name](...one)));
  }
  for (const text of writes(frame, now)) list.append(element("li", "write", text));
}

// Account

function drawAccount(sum) {
  const percent = (slots) => `${(100 * slots / replay.capacity).toFixed(1)} %`;
  const parts = [["own", "filled, in one table"], ["shared", "filled, shared"],
    ["unfilled", "unfilled in last pages"], ["free", "free"]];
  const bar = $("bar"), table = $("account");
  bar.replaceChildren();
  table.replaceChildren();
  const addRow = (name, title, slots, share) => {
    const row = table.insertRow();
    row.className = name;
    row.append(element("th", "", title), element("td", "", slots.toLocaleString("en")), element("td", "", share));
    row.dataset.slots = slots;
  };
  for (const [name, title] of parts) {
    const part = element("i", name);
    part.style.width = `${100 * sum[name] / replay.capacity}%`;
    bar.append(part);
    addRow(name, title, sum[name], percent(sum[name]));
  }
  addRow("total", `pool: ${replay.numPages} × ${replay.pageSize}`,
    sum.own + sum.shared + sum.unfilled + sum.free, "100 %");
  const logical = sum.saved / replay.pageSize + sum.pages;
  addRow("saved", "saved by sharing", sum.saved,
    logical ? `${(100 * sum.saved / replay.pageSize / logical).toFixed(1)} %` : "");
  table.rows[table.rows.length - 1].title = "Share of the pages that the tables would take without sharing";
}

function drawChart() {
  const canvas = $("chart"), width = canvas.clientWidth, height = 52, marks = 10, ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement), inset = 8, span = width - 2 * inset;
  const x = (i) => inset + (numFrames > 1 ? span * i / (numFrames - 1) : span / 2);
  const step = numFrames > 1 ? span / (numFrames - 1) : span;
  replay.accounts.forEach((sum, i) => {
    let y = height - marks;
    for (const name of ["own", "shared", "unfilled"]) {
      const size = (height - marks) * sum[name] / replay.capacity;
      draw.fillStyle = style.getPropertyValue(`--${name}`);
      draw.fillRect(x(i) - step / 2, y - size, step + 0.5, size);
      y -= size;
    }
    for (const [name] of replay.frames[i].events || []) {
      if (!NOTABLE.has(name)) continue;
      draw.fillStyle = style.getPropertyValue(`--${name}`);
      const lane = name === "preempt" || name === "resume" ? 0 : 1;
      draw.fillRect(x(i) - 1.5, height - marks + 1 + lane * 5, 3, 4);
    }
  });
  draw.strokeStyle = style.getPropertyValue("--line");
  draw.strokeRect(0.5, 0.5, width - 1, height - marks - 1);
  moveCursor();
}

function moveCursor() {
  const width = $("chart").clientWidth - 16;
  $("cursor").style.left = `${8 + (numFrames > 1 ? width * state.frame / (numFrames - 1) : width / 2)}px`;
}

// One frame

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
  drawTables(now, before, frame);
  drawQueue(now, i);
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
  const detail = $("detail");
  detail.textContent = "";
  if (!followed) return;
  const { holders, filled } = state.shown.pages;
  if (followed.sequence !== undefined) {
    const table = state.shown.state.tables[followed.sequence];
    for (const page of table) cells[page].cell.classList.add("lit");
    document.querySelector(`[data-sequence="${followed.sequence}"]`)?.classList.add("lit");
    const text = table.length ? `${pageList(table)}, ${state.shown.state.slots[followed.sequence]} positions filled` : "no pages";
    detail.textContent = `${replay.names[followed.sequence]}: ${text}.`;
    return;
  }
  const page = followed.page;
  cells[page].cell.classList.add("lit");
  for (const [s] of holders[page]) document.querySelector(`[data-sequence="${s}"]`)?.classList.add("lit");
  for (const entry of $("tables").querySelectorAll(`[data-page="${page}"]`)) entry.classList.add("lit");
  const names = holders[page].map(([s, i]) => `${replay.names[s]} (block ${i})`);
  const held = names.length > 10 ? `${names.length} tables` : names.join(", ");
  detail.textContent = `Page ${replay.label(page)}: ` +
    (names.length ? `held by ${held}; ${filled[page]} of ${replay.pageSize} filled.` : "free.");
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
}

function play() {
  if (state.frame === numFrames - 1) show(0);
  $("play").textContent = "⏸ Pause";
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
    else if (event.key === "Escape") { state.pinned = null; highlight(); }
    else if (KEYS[event.key]) { pause(); KEYS[event.key](); }
    else return;
    event.preventDefault();
  });
  window.addEventListener("hashchange", () => show(Number(location.hash.slice(1)) || 0));
  new ResizeObserver(drawChart).observe($("chart"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawChart);
}

function drawLegend() {
  for (const [name, [, meaning]] of Object.entries(FLAGS)) {
    if (name === "written" && poolStyle !== "tokens") continue;
    const item = element("span", `key ${name}`);
    item.append(element("i"), meaning);
    $("legend").append(item);
  }
  $("legend").append(element("span", "key", "×2: held by two tables, whose colours it has"));
}

document.title = `${replay.trace.title} – page pool`;
$("title").textContent = replay.trace.title;
$("note").textContent = replay.trace.note || "";
$("slider").max = numFrames - 1;
// Few tables fit beside the account, under the pool.
document.querySelector("main").classList.toggle("few", tablesStyle === "cards" && replay.mostLive <= 2);
makePool();
drawLegend();
follow();
listen();
show(Number(location.hash.slice(1)) || 0);
drawChart();
