// The block tables: a card each with the tokens where there are few and short ones, a line each otherwise.

let reachTables = () => {};
const rows = new Map();  // of each sequence shown: its element and what it was made from

function drawTables(now, frame) {
  const changed = changedEntries(frame);
  const gone = (frame.events || []).filter(([name]) => name === "finish").map(([, s, reason]) => [s, reason]);
  const shown = [...now.state.live.filter((s) => now.state.tables[s].length || now.state.status[s] === SWAPPED)
    .map((s) => [s, ""])].sort(([a], [b]) => sortKey(a) - sortKey(b)).concat(gone);
  const kept = new Set(shown.map(([s]) => s));
  for (const [s, row] of rows) {
    if (kept.has(s)) continue;
    row.made.remove();
    rows.delete(s);
  }
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
  reachTables();
  if (shown.length) delete tables.dataset.empty;
  else tables.dataset.empty = "No sequence holds pages.";
}

function sortKey(s) { return replay.trace.sequences[s] * 1e6 + s; }

// sequence -> {place in its table: kind of change}
function changedEntries(frame) {
  const changed = new Map();
  const pages = new Map();
  for (const [name, s, ...rest] of frame.events || []) {
    if (name === "copy") pages.set(`${s}:${rest[1]}`, "copied");
    if (name === "find") rest.forEach((page) => pages.set(`${s}:${page}`, "found"));
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
  const name = element("button", "name", replay.names[s]);
  name.type = "button";
  name.tabIndex = -1;
  name.setAttribute("aria-label", `${replay.names[s]}, ${statusText(s, now, ended)}: follow`);
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
  table.setAttribute("aria-label", `Block table of ${replay.names[s]}`);
  const head = table.createTHead().insertRow();
  for (const title of ["block", "tokens", "page", "# filled"]) {
    const cell = element("th", "", title);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  now.state.tables[s].forEach((page, i) => {
    const row = body.insertRow();
    const filled = entryFill(s, i, now);
    row.className = (marks && marks.get(i)) || "";
    if (page) row.dataset.page = page;
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
    if (page) entry.dataset.page = page;
    entry.append(replay.label(page), element("i", "", entryFill(s, i, now)));
    entries.append(entry);
  });
  row.append(entries);
  return row;
}

function drawQueue(now) {
  const waiting = new Set(), swapped = new Set(), finished = new Set();
  replay.trace.sequences.forEach((request, s) => { if (now.state.status[s] !== UNBORN) finished.add(request); });
  for (const s of now.state.live) {
    const request = replay.trace.sequences[s];
    finished.delete(request);
    if (now.state.status[s] === WAITING) waiting.add(request);
    if (now.state.status[s] === SWAPPED) swapped.add(request);
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
