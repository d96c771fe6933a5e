// Load: asks the server for its totals once a second and draws what changed in the last seconds.

import { Chart } from "./chart.js";
import { failure, headers, onKeyChange } from "./key.js";

const INTERVAL_MS = 1000;
const NUM_INTERVALS = 5; // That rates and percentiles are of.

const CHARTS = [
  [new Chart("Requests", ["running", "waiting"]), (now) => [now.num_running, now.num_waiting]],
  [new Chart("Tokens a second", ["output", "prompt"]), (now, before, seconds) => [
    (now.num_generation_tokens - before.num_generation_tokens) / seconds,
    (now.num_prompt_tokens - before.num_prompt_tokens) / seconds,
  ]],
  [new Chart("Time to first token", ["P50", "P99"], { unit: " ms" }), percentiles("ttft_s")],
  [new Chart("Time between tokens", ["P50", "P99"], { unit: " ms" }), percentiles("itl_s")],
  [new Chart("Step", ["P50", "P99"], { unit: " ms" }), percentiles("step_s")],
  [new Chart("KV cache", ["used", "kept prefixes"], { unit: " %", top: 100 }), (now) => {
    const total = now.num_pages_total;
    if (!total) return [null, null];
    const used = total - now.num_pages_free - now.num_pages_cached;
    return [(100 * used) / total, (100 * now.num_pages_cached) / total];
  }],
];

const server = document.getElementById("server");
const note = document.getElementById("load-note");
const adapters = document.getElementById("adapters");
let reports = []; // The last ones, oldest first.
let asking = false;
let refused = false; // An answer that asks for another key stays the same until there is one.

document.getElementById("charts").append(...CHARTS.map(([chart]) => chart.figure));
onKeyChange(() => {
  refused = false;
  poll();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
window.addEventListener("resize", redraw);

function redraw() {
  for (const [chart] of CHARTS) chart.draw();
}

// The value below which a share `q` of what a histogram counted lies: as Prometheus estimates it,
// on a straight line within a bucket. null when it counted nothing.
function quantile(bounds, counts, q) {
  const rank = q * counts.reduce((sum, count) => sum + count, 0);
  if (rank === 0) return null;
  let below = 0;
  for (const [index, bound] of bounds.entries()) {
    if (below + counts[index] >= rank) {
      const floor = index ? bounds[index - 1] : 0;
      return floor + ((bound - floor) * (rank - below)) / counts[index];
    }
    below += counts[index];
  }
  return bounds[bounds.length - 1];
}

function percentiles(name) {
  return (now, earlier) => {
    const counts = now[name].counts.map((count, index) => count - earlier[name].counts[index]);
    return [0.5, 0.99].map((q) => {
      const value = quantile(now[name].upper_bounds, counts, q);
      return value === null ? null : 1000 * value;
    });
  };
}

async function poll() {
  if (asking || refused || document.hidden) return;
  asking = true; // A slow server gets one question at a time, so that answers keep their order.
  try {
    await ask();
  } finally {
    asking = false;
  }
}

async function ask() {
  let response;
  try {
    response = await fetch("v1/load", { headers: headers(), cache: "no-store" });
  } catch {
    reports = [];
    server.textContent = "the server does not answer";
    return;
  }
  if (!response.ok) {
    reports = [];
    refused = response.status === 401 || response.status === 403;
    note.textContent = `No figures: ${await failure(response)}`;
    if (!refused) server.textContent = "not serving";
    else server.textContent = "";
    return;
  }
  show(await response.json(), performance.now() / 1000);
}

function show(answer, at) {
  note.textContent = "";
  server.textContent =
    `${answer.model} (${answer.family}), ${answer.state}, jaxserve ${answer.version}`;
  const now = answer.load;
  adapters.textContent = now.adapters
    .map((one) => `${one.name}: ${one.num_open} open, ${one.num_requests} taken`).join("\n");
  adapters.hidden = !now.adapters.length;
  const restarted = reports.length > 0 && now.num_steps < reports.at(-1).load.num_steps;
  if (restarted) reports = [];
  if (reports.length > 0) {
    const before = reports[0];
    const seconds = Math.max(at - before.at, 1e-3);
    for (const [chart, values] of CHARTS) chart.push(values(now, before.load, seconds));
  }
  reports = [...reports.slice(1 - NUM_INTERVALS), { load: now, at }];
}

poll();
setInterval(poll, INTERVAL_MS);
