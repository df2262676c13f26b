// The pool as a grid of pages: who holds them, how far they are filled, and what this frame did to them.

// Of a page in this frame; a word as well as a colour.
const FLAGS = {
  taken: ["new", "newly taken"], copied: ["copy", "a copy, made before a write to a shared page"],
  freed: ["freed", "freed"], written: ["", "written by this step"],
};

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

function drawLegend() {
  for (const [name, [, meaning]] of Object.entries(FLAGS)) {
    if (name === "written" && poolStyle !== "tokens") continue;
    const item = element("span", `key ${name}`);
    item.append(element("i"), meaning);
    $("legend").append(item);
  }
  $("legend").append(element("span", "key", "×2: held by two tables, whose colours it has"));
}
