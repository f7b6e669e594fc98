// One column: a model, the chunks of its text, and what they cost.

import { ApiError, complete } from "./api.js";
import { count, hideVote, make, showVote } from "./vote.js";

const SHADES = [0.05, 0.15, 0.35, 0.6]; // shares of a vote from which on a chunk is a shade stronger
const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };

export class Column {
  /** A column in `place`; `isOptional`: it may stay empty. */
  constructor(place, name, { isOptional = false } = {}) {
    this.isOptional = isOptional;
    this.element = document.getElementById("column").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    [this.select, this.figures, this.error, this.given, this.text] =
      [".model", ".figures", ".error", ".given", ".chunks"].map(find);
    find(".name").textContent = name;
    this.select.addEventListener("change", () => this.clear());
    this.text.setAttribute("aria-label", `text of the ${name}`);
    this.text.addEventListener("keydown", (event) => this.#walk(event));
    place.append(this.element);
    this.clear();
  }

  get model() {
    return this.select.value;
  }

  /** Offer these models and choose `chosen` unless another one was chosen before. */
  offer(models, chosen) {
    const before = this.model;
    const names = models.map((model) => model.id);
    const options = models.map(({ id, calm }) => new Option(describe(id, calm), id));
    if (this.isOptional) options.unshift(new Option("none", ""));
    this.select.replaceChildren(...options);
    this.select.value = names.includes(before) ? before : (chosen ?? "");
  }

  clear() {
    hideVote();
    this.given.textContent = "";
    this.text.replaceChildren();
    this.figures.textContent = "";
    this.error.hidden = true;
    Object.assign(this, { tokens: 0, draws: 0, fallbacks: 0, timed: 0, begin: null, end: null });
  }

  /** Write a text; errors are shown, and nothing is thrown. */
  async write(body, key, signal) {
    this.clear();
    this.given.textContent = body.prompt;
    this.text.setAttribute("aria-busy", "true");
    this.select.disabled = true; // another model would clear a text that goes on
    try {
      for await (const event of complete({ ...body, model: this.model }, key, signal)) {
        this.#add(event);
      }
    } catch (error) {
      if (error.name === "AbortError") this.figures.append(" · stopped");
      else this.fail(error);
    } finally {
      this.text.setAttribute("aria-busy", "false");
      this.select.disabled = false;
    }
  }

  /** Show an error as the server gave it. */
  fail(error) {
    const details = error instanceof ApiError ? [make("small", "", error.details)] : [];
    this.error.replaceChildren(error.message, ...details);
    this.error.hidden = false;
  }

  #add({ choices: [{ text, calm: figures, finish_reason: reason }], calm: { seed } }) {
    const now = performance.now();
    if (this.begin === null) this.begin = now;
    else this.timed += figures.tokens; // the first chunk also waited for a slot and the prompt
    this.end = now;
    this.tokens += figures.tokens;
    this.draws += figures.draws;
    this.fallbacks += figures.is_fallback;
    this.text.append(this.#chunk(text, figures));
    this.figures.textContent = this.#summary(seed, reason);
  }

  #chunk(text, figures) {
    const element = make("span", "chunk", ...withSigns(text));
    const number = this.text.childElementCount + 1;
    element.tabIndex = number === 1 ? 0 : -1; // Tab leads to one chunk, arrows to the others
    element.setAttribute("aria-describedby", "vote");
    element.classList.toggle("fallback", figures.is_fallback);
    element.classList.toggle("empty", text === "");
    element.dataset.shade = SHADES.filter((least) => shareOf(figures) >= least).length;
    const show = () => showVote(element, number, figures);
    element.addEventListener("mouseenter", show);
    element.addEventListener("mouseleave", hideVote);
    element.addEventListener("focus", show);
    element.addEventListener("blur", hideVote);
    return element;
  }

  #summary(seed, reason) {
    const seconds = (this.end - this.begin) / 1000;
    const speed = seconds > 0 ? Math.round(this.timed / seconds).toLocaleString("en") : "–";
    const chunks = this.text.childElementCount;
    const found = [`${speed} tokens/s`, count(this.tokens, "token"), count(chunks, "chunk")];
    if (this.draws > chunks) found.push(count(this.draws, "draw"));
    if (this.fallbacks) found.push(count(this.fallbacks, "fallback"));
    found.push(`seed ${seed}`);
    if (reason) found.push(reason === "stop" ? "ended" : "cut at its length");
    return found.join(" · ");
  }

  #walk(event) {
    const step = STEPS[event.key];
    const chunks = [...this.text.children];
    const next = chunks[chunks.indexOf(document.activeElement) + step];
    if (!step || !next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

/** The share of the vote that the chosen chunk had; 0 without a vote. */
function shareOf({ vote, draws }) {
  const chosen = vote?.candidates.find((candidate) => candidate.is_chosen);
  return chosen ? chosen.count / (draws - vote.rejected) : 0;
}

function describe(id, { kind, patch_size: size }) {
  return size > 1 ? `${id}: ${kind}, ${size} tokens a chunk` : `${id}: ${kind}`;
}

/** Text whose ends of lines can be seen, but are not copied as signs. */
function withSigns(text) {
  return text.split(/(?=\n)/).flatMap((line) =>
    line.startsWith("\n") ? [make("span", "sign"), line] : [line],
  );
}
