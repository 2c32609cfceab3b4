// The swarm's page: draws what the coordinator tells through /events. All that comes from peers is text, never HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");

// ---------------------------------------------------------------- words

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

function significant(x, digits = 3) {
  if (!isNumber(x)) return "–";
  if (x !== 0 && (Math.abs(x) >= 1e6 || Math.abs(x) < 1e-3)) return x.toExponential(1);
  return x.toLocaleString("en", { maximumSignificantDigits: digits, minimumSignificantDigits: Math.min(digits, 3) });
}

const whole = (x) => (isNumber(x) ? Math.round(x).toLocaleString("en") : "–");
const nats = (x) => (!isNumber(x) ? "–" : Math.abs(x) >= 100 ? significant(x) : x.toFixed(3));


// What a loss is measured in, and of tokens how much that is of their text.
const unit = () => last?.loss_unit ?? "nats";
const bits = (x) => (isNumber(x) && last?.bytes_per_token ? `${(x / Math.LN2 / last.bytes_per_token).toFixed(3)} bits/byte` : "");

function scaled(x, step, units) {
  if (!isNumber(x)) return "–";
  let at = 0;
  while (x >= step * 0.9995 && at < units.length - 1) [x, at] = [x / step, at + 1];
  const text = at === 0 ? Math.round(x) : x >= 100 ? x.toFixed(0) : x.toFixed(1);
  return units[at] ? `${text} ${units[at]}` : `${text}`;
}

const bytes = (x) => scaled(x, 1000, ["B", "kB", "MB", "GB", "TB"]);
const count = (x) => scaled(x, 1000, ["", "k", "M", "G", "T"]).replace(" ", "");

function seconds(s) {
  if (!isNumber(s)) return "–";
  if (s < 0.0995) return `${(s * 1000).toFixed(s < 0.00995 ? 1 : 0)} ms`;
  if (s < 9.95) return `${s.toFixed(2)} s`;
  return s < 100 ? `${s.toFixed(1)} s` : `${whole(s)} s`;
}

function ago(ms) {
  const s = Math.max(0, Math.round((now() - ms) / 1000));
  if (s < 1) return "just now";
  if (s < 60) return `${s} s ago`;
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`;
  return `${Math.floor(s / 86400)} d ago`;
}

function span(s) {
  if (s < 90) return `${Math.max(1, Math.round(s))} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}

const plural = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;

// ---------------------------------------------------------------- what is known

let skew = 0; // the coordinator's clock less ours, in ms
const now = () => Date.now() + skew;
let last = null; // the newest state
let heard = 0;
let isFresh = true; // the next points are the whole picture
let width = 1;
let points = {}; // column -> values by place
const COLUMNS = ["round", "loss", "held_out", "payload", "sent", "ddp", "round_s", "compute", "pack", "exchange", "apply"];

function take(told) {
  if (isFresh || told.width !== width) points = Object.fromEntries(COLUMNS.map((name) => [name, []]));
  [isFresh, width] = [false, told.width];
  for (const name of COLUMNS) told.index.forEach((at, i) => { points[name][at] = told[name][i]; });
}

// Places that were never filled are left out: uPlot wants growing x.
function columns(names) {
  const places = [];
  (points.round ?? []).forEach((round, at) => { if (isNumber(round)) places.push(at); });
  return ["round", ...names].map((name) => places.map((at) => points[name][at] ?? null));
}

// ---------------------------------------------------------------- elements

function put(id, text) {
  const element = typeof id === "string" ? $(id) : id;
  if (element.textContent !== text) element.textContent = text;
}

function make(tag, { text, role, ...attributes } = {}, ...inside) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (role) element.setAttribute("role", role);
  for (const [name, value] of Object.entries(attributes)) if (value) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

const cell = (attributes, ...inside) => make("td", { role: "cell", ...attributes }, ...inside);

// A time that keeps up by itself.
const since = (ms, tag = "span") => make(tag, { text: ago(ms), "data-ms": String(ms), title: new Date(ms).toLocaleString() });

function refill(id, empty, rows) {
  $(id).replaceChildren(...rows);
  $(empty).hidden = rows.length > 0;
}

// ---------------------------------------------------------------- charts

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

class Chart {
  // `series`: { name, label, color, area?, dashed?, value? }; `data` gives the columns: x, then one per series.
  constructor(id, { series, text, data, log = false, zero = false, summary }) {
    Object.assign(this, { series, text, data, log, zero, summary, card: $(id), at: null });
    this.empty = make("p", { class: "empty", text: "Connecting" });
    this.plot = make("div", { class: "plot", role: "img" }, this.empty);
    this.values = series.map(() => make("b", { text: "–" }));
    const marks = series.map((one) => make("i", { class: one.area ? "area" : one.dashed ? "dashed" : "" }));
    const items = series.map((one, i) => make("li", {}, marks[i], `${one.label} `, this.values[i]));
    this.marks = marks;
    const inOrder = [...items.filter((_, i) => series[i].area).reverse(), ...items.filter((_, i) => !series[i].area)];
    this.card.append(this.plot, make("ul", { class: "legend" }, ...inOrder));
    new ResizeObserver(() => this.resize()).observe(this.plot);
    this.build();
  }

  build() {
    this.u?.destroy();
    const [ink, line, card] = ["soft", "line", "card"].map(color);
    const axis = { stroke: ink, font: `12px ${getComputedStyle(document.body).fontFamily}`, ticks: { show: false } };
    this.series.forEach((one, i) => {
      this.marks[i].style.background = color(one.color);
      this.marks[i].style.borderColor = color(one.color);
    });
    const series = this.series.map((one) => ({
      label: one.label, spanGaps: true, stroke: one.area ? card : color(one.color), width: one.area ? 1 : one.width ?? 1.75,
      fill: one.area ? color(one.color) : undefined, dash: one.dashed ? [6, 5] : undefined,
      points: { show: one.points ? (u, s, from, to) => to - from < 80 : false, size: 5, fill: color(one.color) },
    }));
    const powers = (u, axis, min, max) => {
      const [from, to] = [min, max].map((x) => Math.round(Math.log10(x)));
      return Array.from({ length: to - from + 1 }, (_, i) => 10 ** (from + i));
    };
    this.u = new uPlot({
      ...this.size(), series: [{}, ...series], legend: { show: false }, padding: [10, 16, 0, 0],
      cursor: { drag: { x: false, y: false }, y: false, points: { size: 7, width: 2, stroke: card, fill: (u, s) => color(this.series[s - 1].color) } },
      scales: {
        x: { time: false, range: (u, min, max) => (isNumber(min) ? [min, Math.max(max, min + 8)] : [0, 10]) },
        y: { distr: this.log ? 3 : 1, range: (u, min, max) => this.range(min, max) },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 30, gap: 6, values: (u, v) => v.map((x) => (Number.isInteger(x) ? whole(x) : "")) },
        { ...axis, grid: { stroke: line, width: 1 }, size: 60, gap: 8, splits: this.log ? powers : undefined, filter: (u, splits) => splits,
          values: (u, v) => v.map((x) => (x === null ? "" : x === 0 ? "0" : this.text(x).replace(/(\.\d*?)0+(?= |$)/, "$1").replace(/\.(?= |$)/, ""))) },
      ],
      hooks: { setCursor: [(u) => { this.at = u.cursor.idx; this.tell(); }] },
    }, this.shown(), this.plot);
  }

  // Areas are painted from the highest to the lowest; each one's value is what is left of it above the next.
  shown() {
    const [x, ...values] = this.data();
    this.known = values;
    this.tops = values.at(-1);
    const areas = this.series.map((one, i) => (one.area ? i : -1)).filter((i) => i >= 0);
    return [x, ...values.map((column, i) => (!areas.includes(i) ? column : column.map((value, at) => (
      value === null ? null : areas.filter((j) => j >= i).reduce((sum, j) => sum + (values[j][at] ?? 0), 0)))))];
  }

  range(min, max) {
    if (!isNumber(min) || !isNumber(max)) return this.log ? [1, 1e6] : [0, 1];
    if (this.log) return [10 ** Math.floor(Math.log10(min) + 1e-9), 10 ** Math.max(Math.ceil(Math.log10(max)), Math.floor(Math.log10(min)) + 1)];
    if (this.zero) {
      const all = this.tops.filter(isNumber).sort((a, b) => a - b);
      return [0, 1.08 * Math.min(max, 3 * (all[Math.floor(all.length * 0.9)] ?? max)) || 1]; // one slow round must not flatten the others
    }
    const pad = Math.max((max - min) * 0.08, Math.abs(max) * 0.01, 1e-6);
    return [min - pad, max + pad];
  }

  size() { return { width: Math.max(120, this.plot.clientWidth), height: this.plot.clientHeight || 200 }; }

  resize() {
    const { width, height } = this.size();
    if (this.u && (this.u.width !== width || this.u.height !== height)) this.u.setSize({ width, height });
  }

  update(waiting) {
    this.u.setData(this.shown());
    const some = this.known.some((column) => column.some(isNumber));
    this.empty.hidden = some;
    put(this.empty, waiting);
    this.tell();
    this.plot.setAttribute("aria-label", some ? this.summary(this.known, this.u.data[0]) : waiting);
  }

  // Beside each name: its value under the pointer, else the newest one.
  tell() {
    if (!this.known) return;
    this.known.forEach((column, i) => {
      const at = isNumber(this.at) ? this.at : column.findLastIndex(isNumber);
      put(this.values[i], at >= 0 && isNumber(column[at]) ? this.text(column[at], true) : "–");
    });
  }
}

const newest = (column) => column.findLast(isNumber);
const charts = [];

function buildCharts() {
  charts.push(
    new Chart("loss-chart", {
      series: [{ label: "training", color: "blue", width: 1.5 }, { label: "held-out", color: "orange", width: 2, points: true }],
      data: () => columns(["loss", "held_out"]),
      text: (x, exact) => (exact ? nats(x) : significant(x, 3)),
      summary: ([loss, held], x) => `Loss over ${whole(newest(x))} rounds: training from ${nats(loss.find(isNumber))} to ${nats(newest(loss))}`
        + (held.some(isNumber) ? `, held-out from ${nats(held.find(isNumber))} to ${nats(newest(held))}` : ""),
    }),
    new Chart("bytes-chart", {
      series: [{ label: "data-parallel", color: "soft", dashed: true }, { label: "all sent", color: "violet" }, { label: "payload", color: "blue", width: 2 }],
      data: () => columns(["ddp", "sent", "payload"]).map((c, i) => (i ? c.map((v) => (v > 0 ? v : null)) : c)),
      text: (x) => bytes(x), log: true,
      summary: ([ddp, sent, payload]) => `Per peer and round: payload ${bytes(newest(payload))}, all sent ${bytes(newest(sent))}, data-parallel ${bytes(newest(ddp))}`,
    }),
    new Chart("time-chart", {
      series: [
        { label: "apply", color: "apply", area: true }, { label: "exchange", color: "exchange", area: true },
        { label: "pack", color: "pack", area: true }, { label: "compute", color: "compute", area: true },
        { label: "round", color: "ink", width: 1.25 },
      ],
      data: () => columns(["apply", "exchange", "pack", "compute", "round_s"]),
      text: seconds, zero: true,
      summary: ([apply, exchange, pack, compute, round]) => `A round takes ${seconds(newest(round))}: compute ${seconds(newest(compute))},`
        + ` pack ${seconds(newest(pack))}, exchange ${seconds(newest(exchange))}, apply ${seconds(newest(apply))}`,
    }),
  );
}

// ---------------------------------------------------------------- what is shown

const STATES = { training: "training", joining: "joining", gone: "gone" };
const isAway = () => document.body.classList.contains("away");

// Nodes are with the one of several coordinators that leads: who is there, others do not know.
const isElsewhere = (told) => Boolean(told.seat) && told.seat.leader !== told.seat.peer_id && told.state !== "finished";

// Nothing trains after the last round, and of what is not heard of nobody knows.
function stateOf(peer) {
  if (isElsewhere(last)) return ["", "–"];
  if (peer.state === "gone") return ["gone", "gone"];
  if (last.state === "finished") return ["", peer.state === "training" ? "finished" : "there"];
  return isAway() ? ["", `was ${STATES[peer.state] ?? ""}`] : [peer.state, STATES[peer.state] ?? ""];
}
const CLOSED = { complete: "all there", deadline: "time was up", enough: "enough there", hung: "some hung" };
const LOST = { joined: ["fine", "✓", "trains"], left: ["", "–", "left"], lost: ["warn", "!", "was lost"], differs: ["fault", "✗", ""], rejected: ["warn", "!", ""], condemned: ["fault", "✗", "condemned"], changed: ["fine", "✎", ""] };

function showHead(told) {
  document.title = `${told.run} · round ${told.round} · thinwire`;
  put("run", told.run);
  const standsStill = Boolean(told.seat?.waits_for) && told.state !== "finished";
  const words = told.state === "waiting" ? `waiting for ${plural(told.waits_for, "more peer")}` : told.state;
  put("state", standsStill ? "waiting for coordinators" : words);
  $("state").className = `pill ${standsStill ? "waiting" : told.state}`;
  put("round", `Round ${whole(told.round)} of ${whole(told.rounds)}${isNumber(told.left_s) ? `, about ${span(told.left_s)} left` : ""}`);
  put("about", [told.strategy, `${count(told.n_params)} parameters`].filter(Boolean).join(" · "));
  $("bar").setAttribute("aria-valuemax", told.rounds);
  $("bar").setAttribute("aria-valuenow", told.round);
  $("bar").firstElementChild.style.transform = `scaleX(${Math.min(1, told.round / Math.max(1, told.rounds))})`;
  put("run-id", `run ${told.run_id}`);
}

function showTiles(told) {
  put("loss", nats(told.loss));
  put("loss-more", `training, ${unit()}`);
  put("loss-unit", `${unit()}, by round`);
  const held = points.held_out ?? [];
  const [at, first] = [held.findLastIndex(isNumber), held.findIndex(isNumber)];
  put("held-out", nats(held[at]));
  put("held-out-more", at < 0 ? "not measured yet"
    : [unit(), bits(held[at]), `round ${whole(points.round[at])}`, at === first ? "" : `at first ${nats(held[first])}`].filter(Boolean).join(" · "));
  put("payload", bytes(told.payload_bytes));
  const times = (of) => { const x = told.ddp_bytes / of; return `${x >= 10 ? whole(x) : x.toFixed(1)} ×`; };
  const all = told.sent_bytes ? `all sent ${bytes(told.sent_bytes)} · ` : "";
  const more = told.sent_bytes ? `, ${times(told.sent_bytes)} all sent` : "";
  put("payload-more", told.ddp_bytes ? `${all}data-parallel ${bytes(told.ddp_bytes)}: ${times(told.payload_bytes)}${more}` : "\u00a0");
  put("round-time", seconds(told.round_s));
  put("round-time-more", told.last_commit_ms ? "" : "no round yet");
  if (told.last_commit_ms) $("round-time-more").replaceChildren("last commit ", since(told.last_commit_ms), make("span", { id: "awaited" }));
  if (isElsewhere(told)) {
    put("peers", "–");
    put("peers-more", told.seat.leader ? `…${told.seat.leader.slice(-6)} knows them, which leads` : "no coordinator leads");
    return;
  }
  put("peers", `${whole(told.n_peers.training)}`);
  const others = [["joining", told.n_peers.joining], ["gone", told.n_peers.gone]].filter(([, n]) => n).map(([word, n]) => `${whole(n)} ${word}`);
  if (told.waits_for) others.push(`${whole(told.waits_for)} more needed`);
  put("peers-more", [told.state === "finished" ? "at the end" : "training", ...others].join(" · "));
}

// When a round takes much longer than usual: how many are waited for.
function showAwaited() {
  if (!last || !$("awaited")) return;
  const open = (now() - last.last_commit_ms) / 1000;
  const isLong = last.state === "training" && last.missing > 0 && open > Math.max(5, 3 * (last.round_s ?? 0));
  put("awaited", isLong ? `, ${whole(last.missing)} awaited` : "");
}

function replica(peer) {
  if (!peer.agreement) return cell({ text: peer.fingerprint_round === null ? "–" : `at round ${whole(peer.fingerprint_round)}` });
  const [same, other] = peer.agreement;
  const words = other ? `differs from ${whole(other)}` : same ? "identical" : "not compared";
  return cell({ class: "nowrap", title: `Fingerprint of round ${peer.fingerprint_round}: ${same} the same, ${other} others` },
    make("span", { class: other ? "bad" : same ? "good" : "soft", text: `${other ? "✗ " : same ? "✓ " : ""}${words}` }));
}

// How large a peer's payloads are beside the others', as most nodes say, and what was found of it.
function trust(peer) {
  const t = peer.trust ?? {};
  const refused = Object.entries(t.rejected ?? {});
  const n = refused.reduce((sum, [, times]) => sum + times, 0);
  const faults = [
    t.until ? "weight 0" : "",
    t.failed ? plural(t.failed, "failed audit") : "",
    peer.empty ? plural(peer.empty, "empty offer") : "",
    n ? `${whole(n)} refused` : "",
  ].filter(Boolean);
  const size = isNumber(t.size) ? `${significant(t.size, 2)} ×` : "–";
  const isFar = t.size >= 4;
  const says = [
    isNumber(t.size) ? `Payloads are ${size} the median's` : "Nobody has said how large its payloads are",
    t.clipped ? `${Math.round(100 * t.clipped)} % of them were scaled down` : "",
    t.until ? `weighs nothing until round ${whole(t.until)}, because of failed audits` : "",
    `audits: ${whole(t.passed ?? 0)} passed, ${whole(t.failed ?? 0)} failed`,
    peer.empty ? `${plural(peer.empty, "offer")} of dropped batches only` : "",
    refused.map(([reason, times]) => `refused: ${reason.replaceAll("_", " ")} ${whole(times)} times`).join(", "),
  ].filter(Boolean).join("; ");
  return cell({ class: "trust", title: says },
    make("span", { class: isFar ? "bad" : "soft", text: isFar ? `✗ ${size}` : size }),
    ...(faults.length ? [make("span", { class: t.until || t.failed ? "bad" : "", text: ` ${faults[0]}${faults.length > 1 ? " …" : ""}` })] : []));
}

function peerRow(peer) {
  const [mark, state] = stateOf(peer);
  const part = make("i");
  part.style.setProperty("--part", peer.share ?? 0);
  const speed = peer.speed ? `${peer.speed[0] < 1e4 ? significant(peer.speed[0]) : count(peer.speed[0])} ${peer.speed[1]}/s` : "–";
  return make("tr", { role: "row", class: isElsewhere(last) ? "" : peer.state, "data-peer": String(peer.index) },
    cell({ class: "who" }, make("b", { text: String(peer.index) }), make("span", { class: "mono", text: `…${peer.id}` })),
    cell({}, make("span", { class: `dot ${mark}`, text: state })),
    cell({ class: "device", text: peer.device || "–", title: peer.device }),
    cell({ class: "number", text: peer.state === "gone" ? "–" : speed }),
    cell({}, make("span", { class: "share", title: `${peer.counted} offers counted, ${peer.missed} missed` }, part,
      peer.share === null ? "–" : `${(peer.share * 100).toFixed(peer.share < 0.0995 ? 1 : 0)} %`)),
    replica(peer),
    trust(peer),
    cell({ class: "number" }, peer.seen_ms === null ? (peer.state === "gone" ? "–" : "now") : since(peer.seen_ms)));
}

function entryRow(entry) {
  return make("tr", { role: "row" },
    cell({ class: "number", text: whole(entry.round) }),
    cell({ class: "number", text: whole(entry.n_offers) }),
    cell({ class: "number", text: bytes(entry.n_bytes) }),
    cell({ class: "number", text: nats(entry.loss) }),
    cell({ class: "number", text: seconds(entry.duration_s) }),
    cell({ class: "nowrap", text: CLOSED[entry.why] ?? "–" }),
    cell({ class: "mono", text: entry.digest }),
    cell({ class: "number" }, since(entry.time_ms)));
}

function eventRow(event) {
  const [kind, mark, verb] = LOST[event.kind] ?? ["", "·", ""];
  const text = event.kind === "rejected" ? `refused: ${event.text.replaceAll("_", " ")}` : `${event.text} ${verb}`.trim();
  return make("li", { class: kind }, make("b", { class: "mark", text: mark, "aria-hidden": "true" }),
    make("span", { text: event.n > 1 ? `${text} (${whole(event.n)} times)` : text }), since(event.time_ms, "time"));
}

// Where several coordinators order the run: who leads since when, how far each is, and why training waits if it does.
function showSeats(seat) {
  $("seats").hidden = !seat;
  const waits = seat?.waits_for ?? "";
  $("waits").hidden = !waits;
  put("waits", waits && !waits.includes("training waits") ? `Training waits: ${waits}` : waits);
  if (!seat) return;
  const n = seat.seats.length;
  const more = [
    `${whole(seat.seats.filter((each) => each.reachable).length)} of ${whole(n)} reachable, ${whole(seat.need)} must sign`,
    seat.wanted > n ? `${whole(seat.wanted - n)} more to come` : "",
    seat.elections ? plural(seat.elections, "election") : "",
    n === 2 ? "with two the loss of either stops the run" : "",
  ].filter(Boolean).join(" · ");
  put("seats-more", more);
  const rows = seat.seats.map((each) => {
    const dot = each.role === "leads" ? "training" : each.role === "follows" ? "" : each.reachable ? "joining" : "gone";
    const says = [isNumber(each.head) ? `round ${whole(each.head)}` : "", each.lag ? `${plural(each.lag, "round")} behind` : ""];
    if (each.peer_id === seat.peer_id) says.push("this page's");
    const dd = make("dd", {}, make("span", { class: `dot ${dot}`, text: [each.role, ...says.filter(Boolean)].join(", ") }));
    if (each.peer_id === seat.leader && isNumber(seat.since_ms)) dd.append(" since ", since(seat.since_ms));
    return [make("dt", { class: "mono", text: `…${each.peer_id.slice(-6)}`, title: each.peer_id }), dd];
  });
  const others = seat.onlookers.map((each) => [make("dt", { class: "mono", text: `…${each.id}` }),
    make("dd", {}, make("span", { class: "dot joining", text: each.lacks ? `looks on, lacks ${each.lacks}` : "looks on, up to date" }))]);
  $("seat-rows").replaceChildren(...[...rows, ...others].flat());
}

// Peers on a circle; the more two have exchanged, the thicker is the line between them, broken where others carry it.
function showGossip(gossip) {
  $("gossip").hidden = !gossip;
  if (!gossip) return;
  const own = gossip.own_held_out;
  put("gossip-more", [
    gossip.merged ? `reference model of round ${whole(gossip.merged)}` : "the reference model is untrained before the first merge",
    isNumber(gossip.distance) ? `models ${significant(gossip.distance)} apart` : "",
    own.length ? `held-out of peers' own ${nats(Math.min(...own))}${own.length > 1 ? ` to ${nats(Math.max(...own))}` : ""}` : "",
  ].filter(Boolean).join(" · "));
  const names = [...new Set(gossip.edges.flatMap(([a, b]) => [a, b]))].sort((a, b) => a - b);
  const at = new Map(names.map((name, i) => {
    const angle = (2 * Math.PI * i) / names.length - Math.PI / 2;
    return [name, [Math.cos(angle), Math.sin(angle)]];
  }));
  const svg = (tag, attributes, text = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    return element;
  };
  const most = Math.max(1, ...gossip.edges.map(([, , n]) => n));
  const lines = gossip.edges.map(([a, b, n, relayed]) => {
    const [[x1, y1], [x2, y2]] = [at.get(a), at.get(b)].map((point) => point.map((x) => 40 * x));
    return svg("line", { x1, y1, x2, y2, stroke: "currentColor", "stroke-width": 0.5 + (2.5 * n) / most, ...(relayed ? { "stroke-dasharray": "4 3" } : {}) });
  });
  const labels = names.map((name) => svg("text", { x: 51 * at.get(name)[0], y: 51 * at.get(name)[1] }, String(name)));
  $("gossip-graph").replaceChildren(...lines, ...labels);
  const largest = [...gossip.edges].sort((a, b) => b[2] - a[2]).slice(0, 12);
  $("gossip-rows").replaceChildren(...largest.flatMap(([a, b, n, relayed]) =>
    [make("dt", { text: `Peers ${a} and ${b}` }), make("dd", { text: `${bytes(n)} both ways${relayed ? `, ${bytes(relayed)} by way of others` : ""}` })]));
}

const shown = {};
function onlyNew(name, value, draw) {
  const text = JSON.stringify(value);
  if (shown[name] !== text) [shown[name]] = [text, draw(value)];
}

function show() {
  const told = last;
  if (!told) return;
  showHead(told);
  showTiles(told);
  onlyNew("peers", [told.peers, told.state, isAway(), isElsewhere(told)], ([peers]) => refill("peer-rows", "no-peers", peers.map(peerRow)));
  const all = Object.values(told.n_peers).reduce((a, b) => a + b, 0);
  put("peers-title", all > told.peers.length ? `Peers (${told.peers.length} of ${whole(all)})` : "Peers");
  $("critical-batch").hidden = !told.critical_batch;
  put("critical-batch", told.critical_batch ?? "");
  onlyNew("seats", told.seat ?? null, showSeats);
  onlyNew("gossip", told.gossip ?? null, showGossip);
  onlyNew("evaluations", told.evaluations ?? [], (found) => {
    $("evaluations").hidden = !found.length;
    $("evaluation-rows").replaceChildren(...found.flatMap(([round, words]) => [make("dt", { text: `Round ${whole(round)}` }), make("dd", { text: words })]));
  });
  onlyNew("entries", told.entries, (entries) => refill("entry-rows", "no-entries", entries.map(entryRow)));
  onlyNew("events", told.happenings, (events) => refill("event-rows", "no-events", events.map(eventRow)));
}

function draw() {
  const waiting = last?.waits_for ? `Waiting for ${plural(last.waits_for, "more peer")}` : "No round yet";
  for (const chart of charts) chart.update(waiting);
}

setInterval(() => {
  for (const element of document.querySelectorAll("[data-ms]")) put(element, ago(Number(element.dataset.ms)));
  if (!$("notice").hidden) away();
  else showAwaited();
}, 1000);

// ---------------------------------------------------------------- the coordinator

let source = null;
let retry = null;

function away() {
  document.body.classList.add("away");
  $("notice").hidden = false;
  put("silence", heard ? `Last word ${ago(heard + skew)}.` : "");
  show();
  put("state", "no contact");
  $("state").className = "pill away";
}

function back(told) {
  skew = told.time_ms - Date.now();
  heard = Date.now();
  if (!isAway()) return;
  document.body.classList.remove("away");
  $("notice").hidden = true;
  showTicket();
}

function connect() {
  clearTimeout(retry);
  source?.close();
  source = new EventSource("events");
  source.onopen = () => { isFresh = true; };
  source.addEventListener("points", (event) => {
    const told = JSON.parse(event.data);
    back(told);
    take(told);
    requestAnimationFrame(() => { draw(); if (last) showTiles(last); });
  });
  source.addEventListener("now", (event) => {
    const told = JSON.parse(event.data);
    if (last && last.run_id !== told.run_id) location.reload();
    back(told);
    last = told;
    show();
    if (!charts.some((chart) => chart.empty.hidden)) draw();
    if (told.state === "finished") showEnd();
  });
  source.onerror = () => {
    if (last?.state === "finished") { source.close(); showEnd(); return; }
    away();
    if (source.readyState === EventSource.CLOSED) retry = setTimeout(connect, 3000);
  };
}

// Nobody looks: nothing has to be sent.
let hidden = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hidden);
  if (document.hidden) hidden = setTimeout(() => { clearTimeout(retry); source?.close(); }, 60000);
  else if (source?.readyState === EventSource.CLOSED && last?.state !== "finished") connect();
});

function showEnd() {
  put("join-more", "The run is over.");
  $("copy").disabled = true;
}

async function showTicket() {
  try {
    const { ticket, why } = await (await fetch("ticket", { cache: "no-store" })).json();
    if (ticket) {
      $("ticket").value = `thinwire join ${ticket}`;
      $("copy").disabled = false;
    } else if (why) put("join-more", why);
    else setTimeout(showTicket, 2000); // it is about to start
  } catch { /* the coordinator is away: asked again when it is back */ }
}

$("copy").addEventListener("click", async () => {
  $("ticket").select();
  try {
    await navigator.clipboard.writeText($("ticket").value);
  } catch {
    document.execCommand("copy"); // where the page does not come from this machine or by https
  }
  put("copy", "Copied");
  setTimeout(() => put("copy", "Copy"), 1500);
});
$("ticket").addEventListener("focus", () => $("ticket").select());
dark.addEventListener("change", () => { charts.forEach((chart) => chart.build()); draw(); });

buildCharts();
showTicket();
connect();
