// The panel of live figures: /health every two seconds, while somebody looks.

import { Refusal, readHealth } from "./api.js";
import { $ } from "./dom.js";
import { duration, number, size } from "./words.js";

const PERIOD = 2000; // ms between two looks
const SAMPLES = 60; // two minutes of them
const WIDTH = 120, HEIGHT = 32; // of a sparkline, in its own units
const SVG = "http://www.w3.org/2000/svg";

const history = { speed: [], first: [], memory: [], temperature: [] };
let timer = 0;
let looking = false;
let report = { up() {}, down() {} };

/**
 * Start looking.
 * @param {{up: function(): void, down: function(): void}} callbacks Called when the server begins
 *   to answer (the first time too) and when it ceases to.
 */
export function watch(callbacks) {
  report = callbacks;
  document.addEventListener("visibilitychange", look);
  look();
}

let isUp = null; // not known yet

/** Look now, and again every PERIOD until the page is hidden. */
export async function look() {
  clearTimeout(timer);
  if (document.hidden || looking) return;
  looking = true;
  let health = null;
  try {
    health = await readHealth();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
  } finally {
    looking = false;
    timer = setTimeout(look, PERIOD);
  }
  if (health) show(health);
  if (isUp === Boolean(health)) return;
  isUp = Boolean(health);
  if (isUp) report.up();
  else report.down();
}

function show(health) {
  const { memory, queue, requests } = health;
  $("logged").hidden = !health.logs_prompts;
  $("version").textContent = health.uptime_s === undefined
    ? `edgemerge ${health.version}; the figures need the key.`
    : `edgemerge ${health.version}, ${health.status}, up ${duration(health.uptime_s)}`;
  if (!memory) return; // without the key there is no more than that
  const speed = number(health.tokens_per_second, 1);
  const [used, usedUnit] = size(memory.rss);
  const heat = number(health.temperature_c, 0);
  figure("speed", speed, "tokens/s", health.tokens_per_second, 0);
  figure("first", number(health.time_to_first_token_s, 2), "s", health.time_to_first_token_s, 0);
  figure("memory", used, usedUnit + beside(memory), memory.rss, 0, memory.limit);
  figure("temperature", heat, heat === "–" ? "not reported" : "°C", health.temperature_c, 20, 90);
  line("queue", `${queue.running} running, ${queue.waiting} of ${queue.limit} waiting`,
    queue.waiting >= queue.limit);
  line("throttled", { true: "yes", false: "no", null: "not reported" }[health.throttled],
    health.throttled === true);
  line("requests", [
    `${requests.answered} answered`,
    requests.refused && `${requests.refused} refused`,
    requests.failed && `${requests.failed} failed`,
  ].filter(Boolean).join(", "));
  const told = health.models.filter((model) => model.state !== "closed");
  line("models", told.map(describe).join("\n") || "none loaded",
    told.some((model) => model.state === "crashed"));
  $("brief").textContent = [
    speed !== "–" && `${speed} tokens/s`, `${used} ${usedUnit}`, heat !== "–" && `${heat} °C`,
  ].filter(Boolean).join(" · ");
}

/** A model, how it is, and how much it has to do. */
function describe(model) {
  if (model.state === "loading") return `${model.id}, being loaded`;
  if (model.state === "crashed") return `${model.id}, stopped by an error; the next question starts it`;
  const now = model.running ? `, ${model.running} of ${model.sequences} at a time` : "";
  return `${model.id}, ${size(model.bytes).join(" ")}${now}`;
}

function beside(memory) {
  if (memory.limit) return ` of ${size(memory.limit).join(" ")}`;
  return memory.available ? `, ${size(memory.available).join(" ")} free` : "";
}

function figure(id, value, unit, sample, floor, ceiling = null) {
  const box = $(id);
  box.querySelector("b").textContent = value;
  box.querySelector("span").textContent = unit;
  const samples = history[id];
  if (typeof sample === "number") samples.push(sample);
  if (samples.length > SAMPLES) samples.shift();
  const svg = box.querySelector("svg");
  svg.toggleAttribute("hidden", !samples.length);
  draw(svg, samples, floor, ceiling);
}

function line(id, text, warns = false) {
  const value = $(id).querySelector("dd");
  value.textContent = text;
  value.classList.toggle("warns", warns);
}

/** A line of samples, newest at the right edge, from `floor` to `ceiling`, or higher where they are. */
function draw(svg, samples, floor, ceiling) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  if (samples.length < 2) return svg.replaceChildren();
  const high = Math.max(ceiling ?? 0, ...samples.map((sample) => sample * 1.1), floor + 1e-9);
  const step = WIDTH / (SAMPLES - 1);
  const points = samples.map((sample, i) => {
    const x = WIDTH - (samples.length - 1 - i) * step;
    const share = Math.max(0, (sample - floor) / (high - floor));
    return `${x.toFixed(1)},${(HEIGHT - 1 - (HEIGHT - 3) * share).toFixed(1)}`;
  });
  const start = (WIDTH - (samples.length - 1) * step).toFixed(1);
  const area = shape("polygon", `${start},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`);
  return svg.replaceChildren(area, shape("polyline", points.join(" ")));
}

function shape(kind, points) {
  const node = document.createElementNS(SVG, kind);
  node.setAttribute("points", points);
  return node;
}
