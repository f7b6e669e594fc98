// The page: what is asked for, and the two columns that answer.

import { listModels } from "./api.js";
import { Column } from "./column.js";
import { hideVote } from "./vote.js";

const SAMPLES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]; // steps of the slider of N
const CANDIDATES = 8; // shown of each vote
const BASELINE = "BaselineTransformer";

const [access, form, served, key, stop, write] =
  ["access", "request", "served", "key", "stop", "write"].map((id) => document.getElementById(id));
const [prompt, method, temperature, samples, tokens, seed, inTurn] =
  ["prompt", "method", "temperature", "samples", "tokens", "seed", "in-turn"].map(
    (id) => document.getElementById(id),
  );
const place = document.getElementById("columns");
const columns = [new Column(place, "Model"), new Column(place, "Beside it", { isOptional: true })];
let running = null; // an AbortController while texts are written

/** The request, but for the model. */
function body() {
  const asked = {
    prompt: prompt.value,
    temperature: Number(temperature.value),
    calm: { method: method.value, num_samples: numSamples(), candidates: CANDIDATES },
  };
  if (tokens.value !== "") asked.max_tokens = Number(tokens.value);
  if (seed.value !== "") asked.seed = Number(seed.value);
  return asked;
}

function numSamples() {
  return SAMPLES[Number(samples.value)];
}

/** What sliders stand at; a readout alone takes temperatures above 1, `direct` takes 1 alone. */
function showValues() {
  temperature.max = method.value === "readout" ? 2 : 1;
  temperature.disabled = method.value === "direct";
  if (temperature.disabled) temperature.value = 1;
  document.getElementById("temperature-value").textContent = Number(temperature.value).toFixed(2);
  document.getElementById("samples-value").textContent = numSamples().toLocaleString("en");
  samples.setAttribute("aria-valuetext", numSamples());
}

async function findModels() {
  try {
    const models = await listModels(key.value);
    const isBaseline = (model) => model.calm.kind === BASELINE;
    const first = models.find((model) => !isBaseline(model)) ?? models[0];
    const others = models.filter((model) => model !== first);
    const second = others.find(isBaseline) ?? others[0];
    columns[0].offer(models, first?.id);
    columns[1].offer(models, second?.id);
    columns[0].error.hidden = true;
    served.textContent = `served: ${models.map((model) => model.id).join(", ")}`;
    write.disabled = false;
  } catch (error) {
    served.textContent = "no models to show";
    write.disabled = true;
    columns[0].fail(error);
    if (error.status === 401) key.focus();
  }
}

async function writeAll() {
  if (running !== null || write.disabled) return;
  running = new AbortController();
  const { signal } = running;
  stop.disabled = false;
  write.disabled = true;
  const [asked, chosen] = [body(), columns.filter((column) => column.model !== "")];
  columns.forEach((column) => column.clear());
  if (inTurn.checked) {
    for (const column of chosen) if (!signal.aborted) await column.write(asked, key.value, signal);
  } else {
    await Promise.all(chosen.map((column) => column.write(asked, key.value, signal)));
  }
  running = null;
  stop.disabled = true;
  write.disabled = false;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  writeAll();
});
form.addEventListener("input", showValues);
access.addEventListener("submit", (event) => {
  event.preventDefault();
  findModels();
});
stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  if (event.key === "Escape" && !hideVote()) running?.abort();
});
showValues();
findModels();
