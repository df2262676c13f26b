// What happened in a frame, in words.

function pageList(pages) {
  const labels = pages.map((page) => replay.label(page));
  const shown = labels.length > 12 ? [...labels.slice(0, 11), `${labels.length - 11} more`] : labels;
  const joined = shown.length > 1 ? `${shown.slice(0, -1).join(", ")} and ${shown.at(-1)}` : String(shown[0]);
  return `${labels.length > 1 ? "pages" : "page"} ${joined}`;
}

const SENTENCES = {
  admit: (r) => `Request ${replay.requestNames[r]} is admitted.`,
  find: (s, ...pages) => `${replay.names[s]} finds ${pageList(pages)}, known by ${pages.length > 1 ? "their" : "its"} ` +
    `tokens: nothing of ${pages.length > 1 ? "them" : "it"} is computed again.`,
  append: (s, ...pages) => `${replay.names[s]} takes ${pageList(pages)}.`,
  copy: (s, source, copy) => `${replay.names[s]} is to write to page ${replay.label(source)}, which others hold: ` +
    `it is copied to page ${replay.label(copy)}.`,
  fork: (s, parent) => `${replay.names[s]} forks from ${replay.names[parent]}: the same pages, one more reference each.`,
  cache: (...pages) => { const text = pageList(pages); return `${text[0].toUpperCase()}${text.slice(1)} ` +
    `${pages.length > 1 ? "stay" : "stays"} ${LOOKS.words.cached}: held by nobody, and kept until room is needed.`; },
  free: (...pages) => { const text = pageList(pages); return `${text[0].toUpperCase()}${text.slice(1)} ` +
    `${pages.length > 1 ? "are" : "is"} free.`; },
  preempt: (r, way) => `Request ${replay.requestNames[r]} gives way: its pages ` +
    (way === "swap" ? "go to host memory." : "are dropped, to be computed again."),
  resume: (r, way) => `Request ${replay.requestNames[r]} returns: its pages ` +
    (way === "swap" ? "come back from host memory." : "are computed again."),
  finish: (s, reason) => replay.names[s] +
    ({ dropped: " has no child and is dropped.", done: " ends with the search.", error: " cannot go on." }[reason] ||
      " has finished."),
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
  admit: "requests are admitted", preempt: "requests give way", resume: "requests return", append: "sequences take pages", find: "sequences find pages that are known by their tokens",
  copy: "sequences get a copy of a shared page", fork: "sequences fork", finish: "sequences end",
};

function drawEvents(frame, now) {
  const kinds = new Map(["preempt", "resume", "admit", "find", "copy", "fork", "finish", "append", "cache", "free"].map((name) => [name, []]));
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
