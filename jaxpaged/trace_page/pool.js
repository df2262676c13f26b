// The pool as a grid of pages: who holds them, how far they are filled, and what this frame did to them.

// Of a page in this frame; a word as well as a colour.
const FLAGS = {
  taken: ["new", "newly taken"], copied: ["copy", "a copy, made before a write to a shared page"],
  found: ["found", "found by its tokens"], written: ["", "written by this step"],
  cached: [LOOKS.words.cached, "held by nobody, kept for who begins with its tokens"], freed: ["freed", "freed"],
};
// So many free pages in a row, which nothing happens to, are one cell.
const LEAST_FREE = 3;

const cells = [];
let runs = "";       // what the cells of free pages in a row were made from
let showsFree = false;
let reachPool = () => {};

function makePool() {
  const pool = $("pool");
  pool.className = poolStyle;
  pool.style.setProperty("--slots", Math.min(replay.pageSize, 4));
  for (let page = 1; page <= replay.numPages; page++) {
    const cell = element("div", "page free");
    cell.dataset.page = page;
    cell.tabIndex = -1;
    cell.setAttribute("role", "button");
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
  reachPool = roam(pool, ".page", (all) => {
    const top = all[0].offsetTop, next = all.findIndex((one) => one.offsetTop > top);
    return next < 0 ? all.length : next;
  });
}

function flagsOf(page, now, before, copies, found) {
  const count = now.pages.holders[page].length, was = before.pages.holders[page].length;
  if (copies.has(page)) return "copied";
  if (now.state.cached.has(page)) return "cached";
  if (count && !was) return before.state.cached.has(page) && found.has(page) ? "found" : "taken";
  if (!count && (was || before.state.cached.has(page))) return "freed";
  if (count && now.pages.filled[page] > before.pages.filled[page]) return "written";
  return "";
}

function drawPool(now, before, frame) {
  const copies = new Map(), found = new Set();
  for (const [name, , ...pages] of frame.events || []) {
    if (name === "copy") copies.set(pages[1], pages[0]);
    if (name === "find") pages.forEach((page) => found.add(page));
  }
  for (let page = 1; page <= replay.numPages; page++) {
    const flag = flagsOf(page, now, before, copies, found);
    const rests = flag === "cached", holders = now.pages.holders[page];
    const filled = rests ? replay.pageSize : now.pages.filled[page];
    const old = rests || flag === "found" ? filled : flag === "copied" ? filled - 1 : before.pages.filled[page];  // what was filled before this frame
    const signature = `${holders.map(([s, i]) => `${s}.${i}`)}|${filled}|${old}|${flag}|${copies.get(page) || ""}`;
    if (cells[page].signature === signature) continue;
    cells[page].signature = signature;
    drawCell(cells[page].cell, page, now, holders, filled, old, flag, copies.get(page));
  }
  drawRuns();
  reachPool();
}

// Free pages in a row become one cell that says which they are.
function drawRuns() {
  const found = [];
  for (let page = 1, first = 1; page <= replay.numPages + 1; page++) {
    if (page <= replay.numPages && cells[page].cell.classList.contains("quiet")) continue;
    if (page - first >= LEAST_FREE && !showsFree) found.push([first, page - 1]);
    first = page + 1;
  }
  $("free-pages").style.visibility = found.length || showsFree ? "visible" : "hidden";
  if (runs === JSON.stringify(found)) return;
  runs = JSON.stringify(found);
  for (const old of $("pool").querySelectorAll(".run")) old.remove();
  for (const { cell } of cells.slice(1)) cell.hidden = false;
  for (const [first, last] of found) {
    const run = element("div", "run");
    run.append(element("b", "", `${replay.label(first)}–${replay.label(last)}`), element("span", "", `${last - first + 1} free`));
    for (let page = first; page <= last; page++) cells[page].cell.hidden = true;
    cells[first].cell.before(run);
  }
}

// What a screen reader says of a page.
function spoken(page, holders, filled, flag, source) {
  const said = [`Page ${replay.label(page)}`];
  if (flag === "cached") said.push(LOOKS.words.cached, FLAGS.cached[1]);
  else if (!holders.length) said.push(flag === "freed" ? "freed" : LOOKS.words.free);
  else {
    said.push(`held by ${nameList(holders.map(([s]) => replay.names[s]))}`, `${filled} of ${replay.pageSize} filled`);
    if (source !== undefined) said.push(`a copy of page ${replay.label(source)}`);
    else if (flag) said.push(FLAGS[flag][1]);
  }
  return said.join(", ");
}

function drawCell(cell, page, now, holders, filled, old, flag, source) {
  const sequences = holders.map(([s]) => s);
  cell.className = `page ${holders.length ? "used" : flag === "cached" ? "" : `free ${flag ? "" : "quiet"}`} ${flag}`;
  cell.setAttribute("aria-label", spoken(page, holders, filled, flag, source));
  cell.dataset.count = holders.length;
  cell.dataset.filled = holders.length ? filled : 0;
  cell.style.background = holders.length ? stripes(sequences) : "";
  cell.querySelector(".count").textContent = holders.length > 1 ? `×${holders.length}` : "";
  cell.querySelector(".glyph").textContent =
    source !== undefined && poolStyle === "tokens" ? `copy of ${replay.label(source)}`
      : flag ? FLAGS[flag][0] : holders.length || poolStyle !== "tokens" ? "" : LOOKS.words.free;
  if (poolStyle === "tokens") drawSlots(cell, now, holders, filled, old);
  else cell.querySelector(".fill").style.width = `${100 * filled / replay.pageSize}%`;
}

function drawSlots(cell, now, holders, filled, old) {
  const rests = now.state.cached.get(Number(cell.dataset.page));
  const [s, place] = rests || holders.find(([s, i]) => now.state.slots[s] - i * replay.pageSize >= filled) || [];
  [...cell.querySelectorAll(".slot")].forEach((slot, k) => {
    const isFilled = k < filled && (holders.length > 0 || rests !== undefined);
    slot.className = `slot ${isFilled ? "filled" : ""} ${isFilled && k >= old ? "new" : ""}`;
    slot.title = slot.textContent =
      isFilled && s !== undefined ? shownPiece(replay.tokens[s][place * replay.pageSize + k]) : "";
  });
}

function drawLegend() {
  for (const [name, [, meaning]] of Object.entries(FLAGS)) {
    if (name === "written" && poolStyle !== "tokens") continue;
    if ((name === "found" || name === "cached") && !replay.accounts.some((sum) => sum.cached) &&
      !replay.trace.cached) continue;
    const item = element("span", `key ${name}`);
    item.append(element("i"), meaning);
    $("legend").append(item);
  }
  $("legend").append(element("span", "key", "×2: held by two tables, whose colours it has"));
  const button = $("free-pages");
  button.addEventListener("click", () => {
    showsFree = !showsFree;
    button.setAttribute("aria-pressed", showsFree);
    drawRuns();
  });
}
