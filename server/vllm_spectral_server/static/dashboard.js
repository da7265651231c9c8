// The dashboard: asks the server for its figures every two seconds and draws them. One file, no libraries.

const INTERVAL = 2000; // ms between the end of one round of questions and the next
const TIMEOUT = 10000; // ms until an answer counts as missing
const KEPT = 150; // points of the time series: five minutes
const KEY = "vllm-spectral-key"; // where sessionStorage keeps the API key
const ROOT = new URL(location.pathname.replace(/\/dashboard\/?$/, "/"), location.href); // what /dashboard is a child of

// ---------------------------------------------------------------------------------------------------------- numbers

const whole = new Intl.NumberFormat();
const short = new Intl.NumberFormat(undefined, { maximumSignificantDigits: 3 });
const three = new Intl.NumberFormat(undefined, { minimumSignificantDigits: 3, maximumSignificantDigits: 3 });
const tiny = new Intl.NumberFormat(undefined, { notation: "scientific", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const fixed = new Intl.NumberFormat(undefined, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const percent = new Intl.NumberFormat(undefined, { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const calendar = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

const NONE = "–"; // no sample yet
const orNone = (format) => (value) => (value === null || value === undefined ? NONE : format(value));
const count = orNone((value) => whole.format(value));
const figure = orNone((value) => (value !== 0 && Math.abs(value) < 1e-4 ? tiny : short).format(value));
const aligned = orNone((value) => (value !== 0 && Math.abs(value) < 1e-4 ? tiny : three).format(value)); // for columns
const two = orNone((value) => fixed.format(value));
const share = orNone((value) => percent.format(value));
const times = orNone((value) => `${fixed.format(value)} ×`);
const time = orNone((seconds) => (Date.now() / 1000 - seconds < 12 * 3600 ? clock : calendar).format(seconds * 1000));
const bytes = orNone((value) => {
  const power = value < 1024 ? 0 : Math.min(5, Math.floor(Math.log2(value) / 10));
  return `${(power ? three : whole).format(value / 1024 ** power)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][power]}`;
});

// --------------------------------------------------------------------------------------------------------- elements

const $ = (id) => document.getElementById(id);

/** Text of an element, written only if it changes, so that screen readers speak only of changes. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A figure: its text, and the number itself as data-value. */
function show(element, value, format) {
  say(element, format(value));
  element.dataset.value = value ?? "";
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The rows of a table body, one per key: existing ones stay, so that focus and selections do. */
function rows(body, keys, build) {
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const wanted = keys.map((key) => {
    const row = old.get(String(key)) ?? build(key);
    row.dataset.key = key;
    return row;
  });
  if (wanted.length !== body.rows.length || wanted.some((row, i) => row !== body.rows[i])) body.replaceChildren(...wanted);
  return wanted;
}

const cell = (className = "") => make("td", { className });
const rowHead = (...children) => make("th", { scope: "row" }, ...children);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A stacked bar out of [part, size] pairs that together are as wide as size / full. */
function fill(bar, parts, full) {
  if (bar.children.length !== parts.length) {
    bar.replaceChildren(...parts.map(([part]) => make("i", { className: `part ${part}` })));
  }
  parts.forEach(([, size], i) => {
    bar.children[i].style.width = `${full > 0 ? (100 * size) / full : 0}%`;
    bar.children[i].hidden = !size;
  });
}

// --------------------------------------------------------------------------------------------------------- the state

const state = { memory: null, fidelity: null, profile: null, digest: undefined, traffic: [], cursor: null, sort: ["layer", 1] };

const PARTS = [
  ["used", "used", "pages held by requests", (m) => m.used_bytes],
  ["cached", "cached but free", "pages that only prefix hits read", (m) => m.cached_bytes],
  ["free", "free pages", "", (m) => m.free_bytes],
  ["exact", "exact tier", "uncompressed copies of first and recent tokens", (m) => m.exact_tier_bytes],
  ["workspace", "workspace", "scratch of the attention kernels", (m) => m.workspace_bytes],
  ["profile", "profile", "bases, spectra, tables, moments of traffic", (m) => m.profile_bytes],
];

function showMemory(memory) {
  state.memory = memory;
  document.body.dataset.known = "";
  say($("model"), memory.model);
  document.title = `${memory.model} · KV cache · vllm-spectral`;
  say(
    $("identity"),
    memory.profile
      ? `profile ${memory.profile.name}, ${memory.profile.digest.slice(0, 12)} · kernels ${memory.kernels}`
      : "stock cache, nothing is compressed",
  );
  const full = memory.resident_bytes;
  show($("resident-bytes"), full, bytes);
  show($("effective-ratio"), memory.effective_compression_ratio, times);
  show($("effective-bits"), memory.effective_bits_per_element, two);
  show($("bytes-per-token"), memory.bytes_per_token, count);
  fill($("memory-bar"), PARTS.map(([part, , , size]) => [part, size(memory)]), full);

  const body = $("memory-table").tBodies[0];
  const build = (part) => {
    const [, name, meaning] = PARTS.find(([key]) => key === part) ?? [];
    const row = make("tr");
    row.append(rowHead(make("i", { className: `swatch ${part}` }), name, make("small", { textContent: meaning })));
    row.append(cell(), cell("wide"), cell());
    if (part === "total") row.cells[0].replaceChildren("together");
    row.cells[2].id = `${part}-bytes`;
    if (part === "exact") row.cells[0].lastChild.id = "exact-meaning";
    return row;
  };
  for (const row of rows(body, [...PARTS.map(([part]) => part), "total"], build)) {
    const size = PARTS.find(([part]) => part === row.dataset.key)?.[3](memory) ?? full;
    show(row.cells[1], size, bytes);
    show(row.cells[2], size, count);
    show(row.cells[3], full ? size / full : null, share);
  }
  const tier = `uncompressed copies of first and recent tokens; ${bytes(memory.exact_tier_used_bytes)} assigned`;
  say($("exact-meaning"), memory.exact_tier_bytes ? tier : "none");

  showRanks(memory.ranks);
  showTokens(memory);
}

function showRanks(ranks) {
  $("ranks").hidden = ranks.length < 2;
  const key = (rank) => `DP ${rank.data_parallel_rank}, TP ${rank.tensor_parallel_rank}`;
  const columns = ["pool_bytes", "exact_tier_bytes", "workspace_bytes", "profile_bytes"];
  const full = Math.max(...ranks.map((rank) => columns.reduce((sum, column) => sum + rank[column], 0)));
  const build = (name) => {
    const row = make("tr");
    row.append(rowHead(name), make("td", {}, make("div", { className: "bar small", ariaHidden: "true" })));
    row.append(...columns.map(() => cell()), cell());
    return row;
  };
  const body = $("rank-table").tBodies[0];
  rows(body, ranks.map(key), build).forEach((row, i) => {
    const sizes = columns.map((column) => ranks[i][column]);
    fill(row.cells[1].firstChild, ["cached", "exact", "workspace", "profile"].map((part, j) => [part, sizes[j]]), full);
    [...sizes, ranks[i].process_bytes].forEach((size, j) => show(row.cells[j + 2], size, bytes));
  });
}

function showTokens(memory) {
  show($("used-tokens"), memory.used_tokens, count);
  show($("cached-tokens"), memory.cached_tokens, count);
  show($("free-tokens"), Math.max(0, memory.capacity_tokens - memory.used_tokens - memory.cached_tokens), count);
  const capacity = {
    this: ["this cache", memory.capacity_tokens],
    fp8: ["fp8 would hold", memory.fp8_capacity_tokens],
    bf16: ["bf16 would hold", memory.uncompressed_capacity_tokens],
  };
  const full = Math.max(...Object.values(capacity).map(([, tokens]) => tokens));
  const build = (name) => {
    const row = make("tr");
    row.append(rowHead(capacity[name][0]), make("td", {}, make("div", { className: "bar small open", ariaHidden: "true" })));
    row.append(cell(), cell());
    row.cells[2].id = { this: "capacity-tokens", fp8: "fp8-tokens", bf16: "bf16-tokens" }[name];
    return row;
  };
  for (const row of rows($("token-table").tBodies[0], Object.keys(capacity), build)) {
    const [, tokens] = capacity[row.dataset.key];
    const held = row.dataset.key === "this" ? [memory.used_tokens, memory.cached_tokens] : [0, 0];
    const rest = Math.max(0, tokens - held[0] - held[1]);
    fill(row.cells[1].firstChild, [["used", held[0]], ["cached", held[1]], ["free", rest]], full);
    show(row.cells[2], tokens, count);
    const against = memory.uncompressed_capacity_tokens;
    show(row.cells[3], against ? tokens / against : null, times);
  }
}

// ------------------------------------------------------------------------------------------------ readiness and alarms

function showReadiness(ready) {
  const known = ready && typeof ready.ready === "boolean";
  $("readiness").dataset.state = known ? (ready.ready ? "ready" : "not-ready") : "unknown";
  // A reason that says no more than the verdict would only be said twice.
  const reason = known && ready.reason && ready.reason.toLowerCase() !== "ready" ? `: ${ready.reason}` : "";
  say($("readiness"), known ? `${ready.ready ? "Ready" : "Not ready"}${reason}` : "Not known whether the server is ready");
  if (known) showCanary(ready.canary);
}

function showCanary(canary) {
  const ran = canary.time === null ? "" : ` at ${time(canary.time)}; runs so far ${count(canary.runs)}, failed ${count(canary.failures)}`;
  const said = {
    off: "Canary off: nothing checks the answers.",
    pending: "Canary pending: it has not run yet.",
    passed: `Canary passed${ran}.`,
    failed: `Canary failed${ran}.`,
  };
  const parts = [said[canary.state]];
  if (canary.kl !== null) parts.push(`KL ${figure(canary.kl)} of at most ${figure(canary.kl_limit)} nats per token.`);
  if (canary.top1_agreement !== null) parts.push(`Same most likely token at ${share(canary.top1_agreement)} of positions.`);
  if (canary.worst_layer !== null && canary.worst_error_ratio !== null) {
    parts.push(
      `Worst layer ${canary.worst_layer}: error ratio ${figure(canary.worst_error_ratio)} of at most ${figure(canary.error_ratio_limit)}.`,
    );
  }
  if (canary.worst_drift !== null) parts.push(`Drift ${share(canary.worst_drift)} of at most ${share(canary.drift_limit)}.`);
  if (canary.state === "failed" && canary.message) parts.push(canary.message);
  $("canary").dataset.state = canary.state;
  say($("canary"), parts.join(" "));
}

function showAlarms(alarms) {
  // The summary is read aloud when it changes; the list, whose values change all the time, is not.
  const names = alarms.map((alarm) => alarm.kind + (alarm.layer === null ? "" : ` in layer ${alarm.layer}`));
  $("alarm-summary").dataset.value = alarms.length;
  const number = `${count(alarms.length)} ${alarms.length === 1 ? "alarm" : "alarms"}`;
  say($("alarm-summary"), alarms.length ? `${number}: ${names.join(", ")}.` : "No alarms.");
  const lines = alarms.map((alarm) => alarm.message);
  const list = $("alarms");
  if (lines.join("\n") === [...list.children].map((line) => line.textContent).join("\n")) return;
  list.replaceChildren(...lines.map((line) => make("li", { textContent: line })));
}

// ------------------------------------------------------------------------------------------------------------ traffic

const SERIES = [
  ["running", "requests running", (t) => t.running, count],
  ["waiting", "requests waiting", (t) => t.waiting, count],
  ["generated", "generated tokens / s", (t) => t.generated_tokens_per_second, aligned],
  ["prompt", "prompt tokens / s", (t) => t.prompt_tokens_per_second, aligned],
];

/** Takes a new point; null where the server did not answer, which leaves a gap. */
function showTraffic(traffic) {
  state.traffic = [...state.traffic, traffic].slice(-KEPT);
  if (!$("series").children.length) {
    for (const [id, name] of SERIES) {
      const now = make("b", { id, textContent: NONE });
      const peak = make("small", { id: `${id}-peak` });
      const plot = make("div", { className: "spark", ariaHidden: "true" });
      $("series").append(make("figure", {}, make("figcaption", {}, make("span", { textContent: name }), now, peak), plot));
    }
  }
  SERIES.forEach(([id, , of, format], index) => {
    const values = state.traffic.map((point) => (point === null ? null : of(point)));
    const peak = Math.max(0, ...values.filter((value) => value !== null));
    if (traffic) show($(id), of(traffic), format);
    say($(`${id}-peak`), `peak ${format(peak)}`);
    $("series").children[index].lastChild.replaceChildren(spark(values, peak));
  });
  if (!traffic) return;
  say(
    $("totals"),
    `Since the start: ${count(traffic.prompt_tokens)} prompt tokens, ${count(traffic.generated_tokens)} generated tokens, ` +
      `${count(traffic.preemptions)} preemptions.`,
  );
}

function spark(values, peak) {
  const height = 40;
  const y = (value) => height - 1.5 - (peak ? (value / peak) * (height - 4) : 0);
  const runs = [[]];
  values.forEach((value, i) => {
    if (value === null) runs.push([]);
    else runs.at(-1).push([KEPT - values.length + i, y(value)]);
  });
  const svg = draw("svg", { viewBox: `0 0 ${KEPT - 1} ${height}`, preserveAspectRatio: "none" });
  for (const run of runs.filter((points) => points.length)) {
    if (run.length === 1) run.unshift([run[0][0] - 0.7, run[0][1]]);
    const line = run.map((point) => point.join(" ")).join("L");
    svg.append(
      draw("path", { class: "area", d: `M${run[0][0]} ${height}L${line}L${run.at(-1)[0]} ${height}Z` }),
      draw("path", { class: "stroke", d: `M${line}` }),
    );
  }
  return svg;
}

// ----------------------------------------------------------------------------------------------------------- fidelity

const FIGURES = {
  output_error: ["output error", "Relative error of attention's output; its colours are logarithmic."],
  attention_kl: ["attention KL", "KL of the attention weights in nats; its colours are logarithmic."],
  error_ratio: [
    "error ratio",
    "Squared error of keys and values over what the profile predicts: 1 is as calibrated; its colours are logarithmic.",
  ],
};
const chosen = () => document.querySelector("input[name=figure]:checked").value;

const COLUMNS = [
  ["layer", "Layer", count],
  ["alarm", "Alarm", (text) => text],
  ["output_error", "Output error", aligned],
  ["attention_kl", "Attention KL", aligned],
  ["error_ratio", "Error ratio", aligned],
  ["drift", "Drift", aligned],
  ["key_drift", "Key drift", aligned],
  ["value_drift", "Value drift", aligned],
  ["fallback_share", "Coded flat", share],
  ["clipped_share", "Clipped", share],
  ["moment_tokens", "Tokens in moments", count],
  ["samples", "Samples", count],
  ["time", "Last sample", time],
];

function showFidelity(fidelity) {
  state.fidelity = fidelity;
  showAlarms(fidelity.alarms);
  const stock = state.memory !== null && state.memory.profile === null;
  $("fidelity-body").hidden = !fidelity.layers.length;
  if (stock) say($("sampling"), "The stock cache is served: it keeps keys and values as they are, so there is nothing to compare.");
  else if (!fidelity.every_steps) say($("sampling"), "Sampling is off.");
  else {
    say(
      $("sampling"),
      `About one step in ${count(fidelity.every_steps)} is sampled; ${count(fidelity.sampled_steps)} so far, which took ` +
        `${figure(fidelity.sampling_seconds)} s. Limits: error ratio ${figure(fidelity.error_ratio_limit)}, drift ${figure(fidelity.drift_limit)}.`,
    );
  }
  if (fidelity.layers.length) {
    showLayers();
    drawHeat();
  }
}

/** Alarms by layer, in words. */
function alarmed() {
  const found = new Map();
  for (const alarm of state.fidelity.alarms) {
    if (alarm.layer !== null) found.set(alarm.layer, [...(found.get(alarm.layer) ?? []), alarm.kind]);
  }
  return found;
}

function showLayers() {
  const head = $("layer-table").tHead.rows[0];
  const [by, direction] = state.sort;
  if (!head.cells.length) {
    for (const [name, title] of COLUMNS) {
      const button = make("button", { type: "button", textContent: title });
      button.addEventListener("click", () => {
        // Figures start with the largest, layers with the first.
        state.sort = [name, state.sort[0] === name ? -state.sort[1] : name === "layer" ? 1 : -1];
        showLayers();
      });
      head.append(make("th", { scope: "col" }, button));
    }
  }
  COLUMNS.forEach(([name], i) => {
    if (name === by) head.cells[i].ariaSort = direction > 0 ? "ascending" : "descending";
    else head.cells[i].removeAttribute("aria-sort");
  });
  const alarms = alarmed();
  const layers = state.fidelity.layers.map((layer) => ({ ...layer, alarm: alarms.get(layer.layer)?.join(", ") ?? "" }));
  const order = (a, b) => {
    if (a[by] === b[by]) return a.layer - b.layer;
    if (a[by] === null || b[by] === null) return a[by] === null ? 1 : -1; // what has no figure comes last
    return a[by] < b[by] ? -direction : direction;
  };
  layers.sort(order);
  const build = () => make("tr", {}, rowHead(), ...COLUMNS.slice(1).map(() => cell()));
  rows($("layer-table").tBodies[0], layers.map((layer) => layer.layer), build).forEach((row, i) => {
    row.id = `layer-${layers[i].layer}`;
    row.className = layers[i].alarm ? "alarmed" : "";
    COLUMNS.forEach(([name, , format], j) => {
      const mark = name === "alarm" && layers[i].alarm ? "▲ " : "";
      show(row.cells[j], layers[i][name], (value) => mark + format(value));
      row.cells[j].dataset.column = name;
    });
  });
}

/** The samples as a grid of means, layers by time; null where there is none. */
function grid(name, layers, most) {
  const { history } = state.fidelity;
  const row = new Map(layers.map((layer, i) => [layer, i]));
  const [from, to] = history.length ? [history[0].time, history.at(-1).time] : [0, 0];
  const columns = Math.max(1, Math.min(most, new Set(history.map((point) => point.time)).size));
  const sums = layers.map(() => new Float64Array(columns));
  const numbers = layers.map(() => new Uint32Array(columns));
  for (const point of history) {
    const i = row.get(point.layer);
    if (i === undefined || point[name] === null) continue;
    const j = to > from ? Math.min(columns - 1, Math.floor(((point.time - from) / (to - from)) * columns)) : 0;
    sums[i][j] += point[name];
    numbers[i][j] += 1;
  }
  const cells = sums.map((line, i) => Array.from(line, (sum, j) => (numbers[i][j] ? sum / numbers[i][j] : null)));
  return { cells, columns, from, to };
}

/** Limits of a logarithmic scale around the values: 1, 2 or 5 times a power of ten, so that colours hold still. */
function limits(values) {
  const positive = values.filter((value) => value > 0);
  if (!positive.length) return [0.1, 1];
  const round = (value, up) => {
    const power = 10 ** Math.floor(Math.log10(value));
    const steps = [1, 2, 5, 10].map((step) => step * power);
    return up ? steps.find((step) => step >= value * 0.999999) : steps.findLast((step) => step <= value * 1.000001);
  };
  const low = round(Math.min(...positive), false);
  const high = round(Math.max(...positive), true);
  return high > low ? [low, high] : [low, low * 10];
}

const position = (value, [low, high]) => {
  if (!(value > low)) return 0;
  return Math.min(1, Math.log(value / low) / Math.log(high / low));
};

/** The colour at 0 to 1 on the scale that the style sheet gives as --heat-0 to --heat-4. */
function colours() {
  const stops = [0, 1, 2, 3, 4].map((i) => css(`--heat-${i}`).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)));
  return (at) => {
    const i = Math.min(3, Math.floor(at * 4));
    return `rgb(${stops[i].map((from, c) => Math.round(from + (stops[i + 1][c] - from) * (at * 4 - i))).join(" ")})`;
  };
}

let heat = null; // what the map shows, for the pointer and the arrow keys

function drawHeat() {
  const canvas = $("heat");
  const width = canvas.parentElement.clientWidth;
  if (!width || !state.fidelity?.layers.length) return;
  const name = chosen();
  const layers = state.fidelity.layers.map((layer) => layer.layer);
  const left = 44;
  const rowHeight = Math.max(6, Math.min(16, Math.floor(420 / layers.length)));
  const height = layers.length * rowHeight + 22;
  const found = grid(name, layers, Math.floor((width - left) / 6));
  const values = found.cells.flat().filter((value) => value !== null);
  const range = limits(values);
  const alarms = alarmed();

  const density = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * density);
  canvas.height = Math.round(height * density);
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(density, density);
  const colour = colours();
  const edge = (j) => left + Math.round(((width - left) * j) / found.columns);
  const gapX = found.columns > 60 ? 0 : 1;
  const gapY = rowHeight > 8 ? 1 : 0;
  found.cells.forEach((line, i) => {
    line.forEach((value, j) => {
      pen.fillStyle = value === null ? css("--empty") : colour(position(value, range));
      pen.fillRect(edge(j), i * rowHeight, edge(j + 1) - edge(j) - gapX, rowHeight - gapY);
    });
  });

  // Labels: layers in alarm first, and of the others as many as have room.
  const font = `${Math.min(11, rowHeight + 3)}px system-ui, sans-serif`;
  const every = Math.ceil(13 / rowHeight);
  const marked = [...layers.keys()].filter((i) => alarms.has(layers[i]));
  const taken = [];
  for (const i of marked) if (!taken.length || i - taken.at(-1) >= every) taken.push(i);
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  layers.forEach((layer, i) => {
    const alarm = alarms.has(layer);
    if (alarm ? !taken.includes(i) : i % every || taken.some((other) => Math.abs(other - i) < every)) return;
    pen.font = alarm ? `700 ${font}` : font;
    pen.fillStyle = css(alarm ? "--alarm" : "--quiet");
    pen.fillText(alarm ? `▲ ${layer}` : layer, left - 6, (i + 0.5) * rowHeight);
  });
  for (const [colour, lineWidth] of [["--paper", 4], ["--alarm", 2]]) {
    Object.assign(pen, { strokeStyle: css(colour), lineWidth });
    for (const i of marked) pen.strokeRect(left, i * rowHeight - 0.5, width - left - 1, rowHeight);
  }
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = css("--quiet");
  if (found.to) {
    pen.fillText(time(found.to), width, height - 9);
    pen.textAlign = "left";
    if (found.to > found.from) pen.fillText(time(found.from), left, height - 9);
  }

  heat = { ...found, layers, left, rowHeight, width, name, range };
  canvas.dataset.layers = layers.length;
  canvas.dataset.columns = found.columns;
  canvas.dataset.alarmed = [...alarms.keys()].join(" ");
  canvas.dataset.figure = name;
  if (state.cursor) {
    const { row, column } = clamp(state.cursor);
    pen.strokeStyle = css("--ink");
    pen.strokeRect(edge(column) - 1, row * rowHeight - 1, edge(column + 1) - edge(column) + 1, rowHeight + 1);
  }
  readHeat();
  $("scale").hidden = !values.length;
  say($("scale-low"), figure(range[0]));
  say($("scale-high"), figure(range[1]));
  const limit = state.fidelity.error_ratio_limit;
  $("scale-limit").hidden = name !== "error_ratio" || limit < range[0] || limit > range[1];
  $("scale-limit").style.left = `${100 * position(limit, range)}%`;
  say($("figure-meaning"), FIGURES[name][1] + (name === "error_ratio" ? ` Alarm above ${figure(limit)}.` : ""));
}

const clamp = ({ row, column }) => ({
  row: Math.max(0, Math.min(heat.layers.length - 1, row)),
  column: Math.max(0, Math.min(heat.columns - 1, column)),
});

/** What the map shows, in words: the cell under the cursor, or else the largest of the recent means. */
function readHeat() {
  const [title] = FIGURES[heat.name];
  const known = state.fidelity.layers.filter((layer) => layer[heat.name] !== null);
  let text = `No sample of the ${title} yet.`;
  if (known.length) {
    const worst = known.reduce((a, b) => (b[heat.name] > a[heat.name] ? b : a));
    text = `Largest recent ${title}: ${figure(worst[heat.name])}, in layer ${worst.layer}.`;
  }
  $("heat").ariaLabel = `Heat map of the ${title}, ${heat.layers.length} layers over time. ${text}`;
  if (state.cursor) {
    const { row, column } = clamp(state.cursor);
    const at = heat.from + ((column + 0.5) / heat.columns) * (heat.to - heat.from);
    text = `Layer ${heat.layers[row]} about ${time(at)}: ${title} ${figure(heat.cells[row][column])}.`;
  }
  say($("heat-readout"), text);
}

function moveCursor(cursor) {
  state.cursor = cursor && clamp(cursor);
  drawHeat();
}

$("heat").addEventListener("pointermove", (event) => {
  if (!heat) return;
  const column = Math.floor(((event.offsetX - heat.left) / (heat.width - heat.left)) * heat.columns);
  moveCursor({ row: Math.floor(event.offsetY / heat.rowHeight), column });
});
for (const name of ["pointerleave", "blur"]) $("heat").addEventListener(name, () => heat && moveCursor(null));
$("heat").addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!heat || !step) return;
  event.preventDefault();
  const { row, column } = state.cursor ?? { row: 0, column: heat.columns - 1 };
  moveCursor(state.cursor ? { row: row + step[0], column: column + step[1] } : { row, column });
});
$("figure").addEventListener("change", drawHeat);

// ------------------------------------------------------------------------------------------------------------ profile

function showProfile(profile) {
  state.profile = profile;
  $("profile-body").hidden = profile === null;
  if (profile === null) {
    say($("profile-note"), "No profile is active.");
    return;
  }
  say(
    $("profile-note"),
    `${profile.name}: ${two(profile.bits_per_element)} bits per element, ${count(profile.bytes_per_token)} bytes per token ` +
      `against ${count(profile.uncompressed_bytes_per_token)} in bf16, ${times(profile.compression_ratio)}.`,
  );
  const select = $("layer");
  const before = select.value;
  select.replaceChildren(...profile.layers.map(({ layer }) => make("option", { value: layer, textContent: layer })));
  if (profile.layers.some(({ layer }) => String(layer) === before)) select.value = before;
  const facts = [["digest", profile.digest], ...Object.entries(profile.model), ...Object.entries(profile.provenance)];
  const text = (value) => (value !== null && typeof value === "object" ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value));
  $("provenance").replaceChildren(
    ...facts.map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name.replaceAll("_", " ") }), make("dd", { textContent: text(value) })),
    ),
  );
  showSpectrum();
}

function showSpectrum() {
  const layer = state.profile?.layers.find((candidate) => String(candidate.layer) === $("layer").value);
  if (!layer) return;
  say(
    $("layer-summary"),
    `keys ${two(layer.key_bits)} bits, effective rank ${figure(layer.key_effective_rank)}; ` +
      `values ${two(layer.value_bits)} bits, effective rank ${figure(layer.value_effective_rank)}`,
  );
  $("spectrum").ariaLabel = `Layer ${layer.layer}: share of energy and bits of each channel; the table has the numbers. ${$("layer-summary").textContent}.`;
  const channels = layer.key_spectrum.map((_, i) => i);
  const build = () => make("tr", {}, rowHead(), cell(), cell(), cell(), cell());
  rows($("channel-table").tBodies[0], channels, build).forEach((row, i) => {
    show(row.cells[0], i, count);
    show(row.cells[1], layer.key_spectrum[i], aligned);
    show(row.cells[2], layer.key_channel_bits[i], two);
    show(row.cells[3], layer.value_spectrum[i], aligned);
    show(row.cells[4], layer.value_channel_bits[i], two);
  });
  drawSpectrum(layer);
}

/** Two plots over the same channels: energy on a logarithmic scale, and bits. */
function drawSpectrum(layer) {
  const width = $("spectrum").clientWidth;
  if (!width) return;
  const channels = layer.key_spectrum.length;
  const left = 56;
  const [energyTop, energyBottom, bitsTop, bitsBottom, height] = [18, 178, 214, 294, 318];
  const energies = [...layer.key_spectrum, ...layer.value_spectrum].filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...energies, 0.1)));
  const high = Math.min(0, Math.ceil(Math.log10(Math.max(...energies, 10 ** (low + 1)))));
  const mostBits = Math.max(4, Math.ceil(Math.max(...layer.key_channel_bits, ...layer.value_channel_bits)));
  const x = (channel) => left + ((width - left - 1) * channel) / channels;
  const energy = (value) => {
    const at = (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low);
    return energyBottom - at * (energyBottom - energyTop);
  };
  const bits = (value) => bitsBottom - (value / mostBits) * (bitsBottom - bitsTop);
  const svg = draw("svg", { width, height, "aria-hidden": "true" });
  const label = (text, at, y, anchor = "end") =>
    svg.append(Object.assign(draw("text", { x: at, y, "text-anchor": anchor }), { textContent: text }));
  const rule = (y) => svg.append(draw("line", { class: "rule", x1: left, x2: width, y1: y, y2: y }));

  label("share of energy", left, 10, "start");
  const every = Math.ceil((high - low) / 5);
  for (let power = high; power >= low; power -= every) {
    rule(energy(10 ** power));
    label(figure(10 ** power), left - 8, energy(10 ** power) + 4);
  }
  label("bits per channel", left, bitsTop - 10, "start");
  for (let value = 0; value <= mostBits; value += 2) {
    rule(bits(value));
    label(value, left - 8, bits(value) + 4);
  }
  // Channels are drawn as steps, since there is nothing between two of them.
  const steps = (values, y) => `M${values.map((value, i) => `${x(i)} ${y(value)}H${x(i + 1)}`).join("L")}`;
  for (const part of ["value", "key"]) {
    svg.append(draw("path", { class: `line ${part}s`, d: steps(layer[`${part}_spectrum`], energy) }));
    svg.append(draw("path", { class: `line ${part}s`, d: steps(layer[`${part}_channel_bits`], bits) }));
  }
  label("channel 0", left, height - 4, "start");
  label(channels - 1, width - 1, height - 4);
  $("spectrum").replaceChildren(svg);
}

$("layer").addEventListener("change", showSpectrum);

// --------------------------------------------------------------------------------------------------- asking the server

class Refused extends Error {} // 401
class Absent extends Error {} // 404

async function ask(path, key, accepted = [200]) {
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      cache: "no-store",
      headers: key ? { Authorization: `Bearer ${key}` } : {},
      signal: AbortSignal.timeout(TIMEOUT),
    });
  } catch {
    throw new Error("The server does not answer");
  }
  if (response.status === 401) throw new Refused();
  if (response.status === 404) throw new Absent(`The server has no ${path}`);
  if (!accepted.includes(response.status)) throw new Error(`The server answers ${response.status} for ${path}`);
  return response.json().catch(() => {
    throw new Error(`The server's answer for ${path} is not understood`);
  });
}

let lastAnswer = null;
let timer = null;
let asking = false;
let askAgain = false;

function connection(kind, text) {
  $("connection").dataset.state = kind;
  document.body.dataset.connection = kind;
  say($("connection"), text);
}

/** One round: ask for everything, show what came, say what did not. */
async function round() {
  askAgain = asking;
  if (asking) return; // a second round would only overtake the first
  asking = true;
  clearTimeout(timer);
  const key = sessionStorage.getItem(KEY);
  const [ready, memory, fidelity, traffic] = await Promise.allSettled([
    ask("ready", key, [200, 503]),
    ask("v1/kv_cache/memory", key),
    ask("v1/kv_cache/fidelity", key),
    ask("v1/kv_cache/traffic", key),
  ]);
  let failures = [memory, fidelity, traffic].filter((answer) => answer.status === "rejected").map((answer) => answer.reason);
  try {
    showReadiness(ready.status === "fulfilled" ? ready.value : null);
    if (memory.status === "fulfilled") showMemory(memory.value);
    if (fidelity.status === "fulfilled") showFidelity(fidelity.value);
    showTraffic(traffic.status === "fulfilled" ? traffic.value : null);
    if (!failures.length) await refreshProfile(memory.value, key);
  } catch (error) {
    failures = [error instanceof TypeError ? new Error("The server's figures are not understood: is it another version?") : error];
  }
  const refused = failures.some((reason) => reason instanceof Refused);
  if (refused) askForKey(key);
  else if (!failures.length) keyAccepted(key);
  if (refused) connection("refused", "Waiting for the API key");
  else if (failures.length) {
    const since = lastAnswer ? ` Figures are those of ${clock.format(lastAnswer)}.` : "";
    connection("lost", `${failures[0].message}.${since} Trying again …`);
    state.digest = undefined; // it may come back with another profile
  } else {
    lastAnswer = new Date();
    connection("live", "Live, every 2 seconds");
  }
  asking = false;
  timer = setTimeout(round, askAgain ? 0 : INTERVAL);
}

async function refreshProfile(memory, key) {
  const digest = memory.profile?.digest ?? null;
  if (digest === state.digest) return;
  const absent = (reason) => {
    if (reason instanceof Absent) return null; // the stock cache is served
    throw reason;
  };
  showProfile(digest === null ? null : await ask("v1/kv_cache/profile", key).catch(absent));
  state.digest = digest;
}

/** Shows the form; `tried` is the key that was refused, or null if none was sent. */
function askForKey(tried) {
  if ($("key-form").hidden) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  // Another key may have been entered while this one was on its way.
  if (tried === null || tried !== sessionStorage.getItem(KEY)) return;
  sessionStorage.removeItem(KEY);
  $("forget").hidden = true;
  say($("key-error"), "The server does not accept this key.");
  $("key").select();
}

function keyAccepted(key) {
  $("forget").hidden = key === null;
  if ($("key-form").hidden) return;
  const focused = $("key-form").contains(document.activeElement);
  $("key-form").hidden = true;
  $("key").value = "";
  say($("key-error"), "");
  if (focused) $("main").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  const sendable = /^[\x21-\x7e]+$/.test(key);
  say($("key-error"), sendable ? "" : "A key consists of ASCII letters, digits and signs, without spaces.");
  if (!sendable) return;
  sessionStorage.setItem(KEY, key);
  round();
});
$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  round();
});

// Drawings have the width of the page and the colours of the scheme.
const redraw = () => {
  drawHeat();
  showSpectrum();
};
new ResizeObserver(redraw).observe($("main"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

round();
