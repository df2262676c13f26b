"use strict";
// The state of the pool at any frame of a trace (its format: jaxpaged/host/account/trace.py), from snapshots and differences.

const SNAPSHOT_EVERY = 32;
const UNBORN = 0, WAITING = 1, RUNNING = 2, SWAPPED = 3, FINISHED = 4;

class State {
  constructor(numSequences) {
    this.tables = new Array(numSequences).fill([]);  // arrays of page ids, replaced and never changed
    this.slots = new Int32Array(numSequences);       // positions filled
    this.known = new Int32Array(numSequences);       // tokens known
    this.status = new Uint8Array(numSequences);
    this.live = [];                                  // sequences that have not finished, in order of appearance
    this.cached = new Map();                         // pages that rest: the last [sequence, place in its table], or null
  }

  copy() {
    const other = new State(0);
    other.tables = this.tables.slice();
    other.slots = this.slots.slice();
    other.known = this.known.slice();
    other.status = this.status.slice();
    other.live = this.live.slice();
    other.cached = new Map(this.cached);
    return other;
  }

  apply(frame, replay) {
    const left = new Map();  // pages that a table lets go of, and where it had them
    for (const [s, count] of frame.gone || []) {
      this.tables[s].forEach((page, i) => { if (i < count) left.set(page, [s, i]); });
      this.tables[s] = this.tables[s].map((page, i) => (i < count ? 0 : page));
    }
    for (const s of frame.grow || []) this.slots[s]++;
    for (const [s, kept, slots, ...pages] of frame.tables || []) {
      if (frame.cached) this.tables[s].forEach((page, i) => { if (i >= kept) left.set(page, [s, i]); });
      this.tables[s] = this.tables[s].slice(0, kept).concat(pages);
      this.slots[s] = slots;
    }
    for (const [s, ...tokens] of frame.tokens || []) {
      this.open(s, WAITING);
      this.known[s] += tokens.length;
    }
    for (const [s, parent, kept, ...tokens] of frame.forks || []) {
      this.open(s, RUNNING);
      this.tables[s] = this.tables[parent];
      this.slots[s] = this.slots[parent];
      this.known[s] = kept + tokens.length;
    }
    for (const page of frame.cached || []) this.cached.set(page, left.get(page) || null);
    for (const page of frame.uncached || []) this.cached.delete(page);
    for (const [name, of, way] of frame.events || []) {
      if (name === "admit" || name === "resume") this.setRequest(replay, of, RUNNING);
      else if (name === "preempt") this.setRequest(replay, of, way === "swap" ? SWAPPED : WAITING);
      else if (name === "finish") {
        this.status[of] = FINISHED;
        this.live = this.live.filter((s) => s !== of);
      }
    }
  }

  open(s, status) {
    if (this.status[s] !== UNBORN) return;
    this.status[s] = status;
    this.live.push(s);
  }

  setRequest(replay, request, status) {
    for (const s of this.live) if (replay.trace.sequences[s] === request) this.status[s] = status;
  }
}

class Replay {
  constructor(trace) {
    this.trace = trace;
    this.frames = trace.frames;
    this.numPages = trace.num_pages - 1;  // page 0 is never handed out
    this.pageSize = trace.page_size;
    this.capacity = this.numPages * this.pageSize;
    this.tokens = trace.sequences.map(() => []);  // of each sequence, at the end of the trace
    this.colours = new Int32Array(trace.sequences.length);
    this.accounts = [];
    this.mostLive = this.longestTable = 0;
    this.snapshots = [];
    this.nameSequences();
    this.prepare();
  }

  label(page) { return page ? page - 1 + this.trace.first_label : "–"; }  // 0: given back

  nameSequences() {
    const { requests, sequences } = this.trace;
    const byLetter = requests.length <= 26 && requests.every((r, i) => r.id === String(i));
    this.requestNames = requests.map((r, i) => byLetter ? String.fromCharCode(65 + i) : r.id);
    const born = requests.map(() => 0);
    this.names = sequences.map((r) => {
      const place = ++born[r];
      if (requests[r].width === 1) return this.requestNames[r];
      return this.requestNames[r] + (/\d$/.test(this.requestNames[r]) ? "." : "") + place;
    });
  }

  // One pass over the run: snapshots, accounts, tokens, and colours such that no two live sequences share one early.
  prepare() {
    const state = this.start(), used = [];
    this.frames.forEach((frame, i) => {
      if (i % SNAPSHOT_EVERY === 0) this.snapshots.push(state.copy());
      const before = new Set(state.live);
      state.apply(frame, this);
      for (const [s, ...tokens] of frame.tokens || []) this.tokens[s].push(...tokens);
      for (const [s, parent, kept, ...tokens] of frame.forks || []) {
        this.tokens[s] = this.tokens[parent].slice(0, kept).concat(tokens);
      }
      for (const s of state.live) {
        if (before.has(s)) { before.delete(s); continue; }
        let colour = used.indexOf(undefined);
        if (colour < 0) colour = used.length;
        used[colour] = s;
        this.colours[s] = colour;
      }
      for (const s of before) used[this.colours[s]] = undefined;
      this.accounts.push(account(this, pagesOf(state, this), state.cached.size));
      this.mostLive = Math.max(this.mostLive, state.live.length);
      for (const s of state.live) this.longestTable = Math.max(this.longestTable, state.tables[s].length);
    });
  }

  // Before the first frame.
  start() {
    const state = new State(this.trace.sequences.length);
    for (const page of this.trace.cached || []) state.cached.set(page, null);
    return state;
  }

  // The state after frame i; -1 is before the first.
  at(i) {
    if (i < 0) return this.start();
    const nearest = Math.floor(i / SNAPSHOT_EVERY);
    const state = this.snapshots[nearest].copy();
    for (let j = nearest * SNAPSHOT_EVERY; j <= i; j++) state.apply(this.frames[j], this);
    return state;
  }

  piece(token) {
    const pieces = this.trace.pieces;
    return pieces && pieces[token] !== undefined ? pieces[token] : String(token);
  }
}

// What every page holds: holders[page] lists [sequence, place in its table]; filled[page] counts positions.
function pagesOf(state, replay) {
  const size = replay.pageSize;
  const holders = Array.from({ length: replay.numPages + 1 }, () => []);
  const filled = new Int32Array(replay.numPages + 1);
  for (const s of state.live) {
    const table = state.tables[s];
    for (let i = 0; i < table.length; i++) {
      if (table[i] === 0) continue;  // given back
      holders[table[i]].push([s, i]);
      filled[table[i]] = Math.max(filled[table[i]], Math.min(size, state.slots[s] - i * size));
    }
  }
  return { holders, filled };
}

// Token slots of the pool, each counted once: own + shared + unfilled + cached + free is the pool. `saved` is what copies
// of the shared pages would take on top.
function account(replay, { holders, filled }, numCached) {
  const size = replay.pageSize;
  const sum = { own: 0, shared: 0, unfilled: 0, cached: numCached * size, free: -numCached * size, saved: 0, pages: 0 };
  for (let page = 1; page <= replay.numPages; page++) {
    const count = holders[page].length;
    if (count === 0) { sum.free += size; continue; }
    sum.pages++;
    sum[count > 1 ? "shared" : "own"] += filled[page];
    sum.unfilled += size - filled[page];
    sum.saved += (count - 1) * size;
  }
  return sum;
}
