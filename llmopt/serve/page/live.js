// The live view: what the server's metrics say, read once a second while the page is seen.

import { getJson, getText } from "./api.js";
import { parseMetrics, quantile, total } from "./metrics.js";

const by = (id) => document.getElementById(id);
const EVERY = 1000; // ms
const KEPT = 120; // readings in a curve: two minutes
const WINDOW = 30; // readings a quantile looks back over
const SVG = "http://www.w3.org/2000/svg";

const percent = (part, all) => (part === undefined || !all ? undefined : (100 * part) / all);

// Title, unit, and the value: from two readings `seconds` apart, quantiles since the `first` one kept. Undefined: a dash.
const TILES = [
  ["Output", "tokens/s", (then, now, seconds) => rate(then, now, "llmopt_generation_tokens_total", seconds)],
  ["Prompts", "tokens/s", (then, now, seconds) => rate(then, now, "llmopt_prompt_tokens_total", seconds)],
  ["Running", "requests", (then, now) => total(now, "llmopt_requests_running")],
  ["Waiting", "requests", (then, now) => total(now, "llmopt_requests_waiting")],
  ["KV blocks in use", "%", (then, now) => percent(total(now, "llmopt_kv_blocks_used"), total(now, "llmopt_kv_blocks"))],
  ["First token, p50", "ms", (then, now, seconds, first) => milliseconds(quantile(first, now, "llmopt_time_to_first_token_seconds", 0.5))],
  ["Between tokens, p99", "ms", (then, now, seconds, first) => milliseconds(quantile(first, now, "llmopt_inter_token_latency_seconds", 0.99))],
  ["Prefix cache hits", "%", (then, now, seconds, first) => percent(grown(first, now, "llmopt_prefix_hit_tokens_total"), grown(first, now, "llmopt_prefix_tokens_total"))],
  ["Preemptions", "in all", (then, now) => total(now, "llmopt_preemptions_total")],
];

// What a counter grew by; a server that began anew counts from zero.
function grown(then, now, name) {
  const [before, after] = [total(then, name), total(now, name)];
  return before === undefined || after === undefined ? undefined : Math.max(0, after - before);
}

function rate(then, now, name, seconds) {
  const growth = grown(then, now, name);
  return growth === undefined ? undefined : growth / seconds;
}

function milliseconds(seconds) {
  return seconds === undefined ? undefined : seconds * 1000;
}

function makeTile([title, unit, value]) {
  const box = document.createElement("div");
  const name = document.createElement("dt");
  const figure = document.createElement("dd");
  const number = document.createElement("span");
  const small = document.createElement("small");
  const spark = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "polyline");
  name.textContent = title;
  number.textContent = "–";
  small.textContent = ` ${unit}`;
  spark.setAttribute("class", "spark");
  spark.setAttribute("viewBox", `0 0 ${KEPT - 1} 30`);
  spark.setAttribute("preserveAspectRatio", "none");
  spark.setAttribute("aria-hidden", "true");
  spark.append(line);
  figure.append(number, small);
  box.append(name, figure, spark);
  by("tiles").append(box);
  return { value, number, line, kept: [] };
}

function update(tile, value) {
  tile.number.textContent = value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: value < 100 ? 1 : 0 });
  tile.kept.push(value ?? 0);
  if (tile.kept.length > KEPT) tile.kept.shift();
  const top = Math.max(1, ...tile.kept);
  const start = KEPT - tile.kept.length;
  const points = tile.kept.map((kept, i) => `${start + i},${(29 - (28 * kept) / top).toFixed(1)}`);
  tile.line.setAttribute("points", points.join(" "));
}

function setHealth(state, text) {
  by("health").dataset.health = state;
  if (by("health-text").textContent !== text) by("health-text").textContent = text;
}

export function startLive() {
  const tiles = TILES.map(makeTile);
  let readings = []; // oldest first

  async function read() {
    await getJson("health");
    const now = { samples: parseMetrics(await getText("metrics")), at: performance.now() };
    setHealth("ok", "serving");
    by("live-note").textContent = "";
    readings.push(now);
    if (readings.length > WINDOW + 1) readings.shift();
    if (readings.length < 2) return;
    const last = readings[readings.length - 2];
    const seconds = (now.at - last.at) / 1000;
    for (const tile of tiles) update(tile, tile.value(last.samples, now.samples, seconds, readings[0].samples));
  }

  async function turn() {
    try {
      if (document.hidden) readings = [];
      else await read();
    } catch (error) {
      readings = [];
      setHealth("bad", error.status ? `error ${error.status}` : "no connection");
      by("live-note").textContent = error.message;
    }
    setTimeout(turn, EVERY);
  }
  turn();
}
