// Where every token slot of the pool is: now, and over the run.

const NOTABLE = new Set(["fork", "copy", "preempt", "resume"]);

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
