// What all parts of the page need: the run, how much of it there is room to show, and the colours of its sequences.

const HUES = [212, 28, 142, 330, 268, 52, 186, 2];

const $ = (id) => document.getElementById(id);
const replay = new Replay(JSON.parse($("trace").textContent));
const numFrames = replay.frames.length;
// How much of a page there is room to show: its tokens, its number and fill, or its colour and count.
const poolStyle = replay.capacity <= 512 ? "tokens" : replay.numPages <= 400 ? "numbers" : "dots";
const tablesStyle = replay.mostLive <= 12 && replay.longestTable <= 12 && poolStyle === "tokens" ? "cards" : "rows";

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

// Text of a token in a place of its own, as in a code editor: line ends and tabs by their signs, and spaces where they
// are all there is.
function shownPiece(token) {
  const text = replay.piece(token).replace(/\n/g, "↵").replace(/\t/g, "→");
  return text.trim() === "" ? text.replace(/ /g, "·") || "∅" : text.trim();
}

function nameList(names) {
  return names.length > 10 ? `${names.length} tables` : names.join(", ");
}

// One of many things that are alike can be reached by Tab, and the arrow keys go on from there.
function roam(box, selector, columns) {
  const shown = () => [...box.querySelectorAll(selector)].filter((one) => !one.hidden);
  const reach = (one) => {
    for (const other of box.querySelectorAll(`${selector}[tabindex="0"]`)) other.tabIndex = -1;
    one.tabIndex = 0;
  };
  box.addEventListener("focusin", (event) => { if (event.target.matches(selector)) reach(event.target); });
  box.addEventListener("keydown", (event) => {
    if (!event.target.matches(selector) || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = shown(), at = all.indexOf(event.target), down = columns ? columns(all) : 1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - down, ArrowDown: at + down,
      Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();  // outside of the box these keys move through the run
    const next = all[Math.max(0, Math.min(all.length - 1, to))];
    reach(next);
    next.focus();
  });
  return () => {  // whatever was drawn anew: one of them stays within reach of Tab
    const within = box.querySelector(`${selector}[tabindex="0"]`);
    if (within && !within.hidden) return;
    const first = shown()[0];
    if (first) reach(first);
  };
}
