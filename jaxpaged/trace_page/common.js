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

// Text of a token in a place of its own: a space is shown where it is all there is, and line ends by their sign.
function shownPiece(token) {
  const text = replay.piece(token).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return text.trim() === "" ? text.replace(/ /g, "␣") || "∅" : text.trim();
}
