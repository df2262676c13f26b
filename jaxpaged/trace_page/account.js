// Where every token slot of the pool is: now, and over the run.

const NOTABLE = new Set(["fork", "copy", "preempt", "resume", "find"]);
const PARTS = ["own", "shared", "unfilled", "cached", "free"];  // from the bottom of the chart to its top
// What an event is called under the chart, and in which of its lanes it has its mark.
const MARKS = { fork: ["fork", 1], copy: ["copy", 1], find: ["found", 1], preempt: ["gives way", 0], resume: ["returns", 0] };

function drawAccount(sum) {
  const percent = (slots) => `${(100 * slots / replay.capacity).toFixed(1)} %`;
  const bar = $("bar"), table = $("account");
  bar.replaceChildren();
  table.replaceChildren(element("caption", "unseen", "Token slots of the pool in this step"));
  const addRow = (name, title, slots, share) => {
    const row = table.insertRow(), head = element("th", "", title);
    head.scope = "row";
    row.className = name;
    row.append(head, element("td", "", slots.toLocaleString("en")), element("td", "", share));
    row.dataset.slots = slots;
    return row;
  };
  for (const name of PARTS) {
    const part = element("i", name);
    part.style.width = `${100 * sum[name] / replay.capacity}%`;
    bar.append(part);
    addRow(name, LOOKS.words[name], sum[name], percent(sum[name]));
  }
  for (const name of ["reserved", "rounding"]) {
    addRow(name, LOOKS.words[name], 0, "0.0 %").title = "Paging reserves nothing ahead, and any free page will do";
  }
  addRow("total", `pool: ${replay.numPages} × ${replay.pageSize}`, PARTS.reduce((all, name) => all + sum[name], 0), "100 %");
  const logical = sum.saved / replay.pageSize + sum.pages;
  addRow("saved", "saved by sharing", sum.saved,
    logical ? `${(100 * sum.saved / replay.pageSize / logical).toFixed(1)} %` : "")
    .title = "Share of the pages that the tables would take without sharing";
}

// The chart's own legend, scale and summary.

function labelChart() {
  const events = new Set(replay.frames.flatMap((frame) => (frame.events || []).map(([name]) => name)));
  const keys = $("chart-keys");
  for (const name of PARTS.filter((name) => name !== "free" && replay.accounts.some((sum) => sum[name]))) {
    const key = element("span", `key part ${name}`);
    key.append(element("i"), LOOKS.words[name]);
    keys.append(key);
  }
  for (const name of Object.keys(MARKS).filter((name) => events.has(name))) {
    const key = element("span", `key mark ${name}`);
    key.append(element("i"), MARKS[name][0]);
    keys.append(key);
  }
  const held = replay.accounts.map((sum) => sum.own + sum.shared + sum.unfilled), most = Math.max(...held);
  $("chart").setAttribute("aria-label", "Share of the pool that is held, over the run: at most " +
    `${Math.round(100 * most / replay.capacity)} %, in step ${replay.frames[held.indexOf(most)].step}`);
}

function chartPlace(i, width) {
  const inset = 8;  // as the slider's handle has it
  return inset + (numFrames > 1 ? (width - 2 * inset) * i / (numFrames - 1) : (width - 2 * inset) / 2);
}

function drawTicks(width) {
  const last = replay.frames[numFrames - 1].step, most = Math.max(2, Math.floor(width / 90));
  const apart = [1, 2, 5].flatMap((one) => [0, 1, 2, 3, 4, 5].map((power) => one * 10 ** power))
    .sort((a, b) => a - b).find((size) => last / size <= most) || last;
  const ticks = $("ticks");
  ticks.replaceChildren();
  const shown = new Set();
  replay.frames.forEach(({ step }, i) => {
    if (shown.has(step) || (step !== 1 && step % apart)) return;
    shown.add(step);
    const tick = element("span", "", step === 1 ? "step 1" : step);
    tick.style.left = `${chartPlace(i, width)}px`;
    ticks.append(tick);
  });
}

function drawChart() {
  const canvas = $("chart"), width = canvas.clientWidth, height = 64, marks = 12, ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const draw = canvas.getContext("2d");
  draw.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const step = numFrames > 1 ? (width - 16) / (numFrames - 1) : width - 16;
  replay.accounts.forEach((sum, i) => {
    let y = height - marks;
    for (const name of PARTS.slice(0, -1)) {
      const size = (height - marks) * sum[name] / replay.capacity;
      draw.fillStyle = style.getPropertyValue(`--${name}`);
      draw.fillRect(chartPlace(i, width) - step / 2, y - size, step + 0.5, size);
      y -= size;
    }
    for (const [name] of replay.frames[i].events || []) {
      if (!NOTABLE.has(name)) continue;
      draw.fillStyle = style.getPropertyValue(`--${name}`);
      draw.fillRect(chartPlace(i, width) - 1.5, height - marks + 2 + MARKS[name][1] * 5, 3, 4);
    }
  });
  draw.strokeStyle = style.getPropertyValue("--line");
  draw.strokeRect(0.5, 0.5, width - 1, height - marks - 1);
  drawTicks(width);
  moveCursor();
}

function moveCursor() {
  $("cursor").style.left = `${chartPlace(state.frame, $("chart").clientWidth)}px`;
}
