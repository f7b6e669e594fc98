// What stands beside a chunk: the candidates of its vote, with their counts.

const panel = document.getElementById("vote");
const SIGNS = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
const GAP = 8; // pixels between the chunk and the panel

/** An element with a class and content. */
export function make(tag, className, ...content) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...content);
  return element;
}

/** "1 draw", "2,000 draws". */
export function count(number, unit) {
  return `${number.toLocaleString("en")} ${unit}${number === 1 ? "" : "s"}`;
}

function visible(text) {
  return text.replace(/[ \n\t\r]/g, (sign) => SIGNS[sign]) || "nothing to see";
}

function row(label, number, className, track) {
  const shown = make("span", "count", number.toLocaleString("en"));
  return make("li", className, make("span", "label", label), track, shown);
}

function track(share) {
  const bar = make("span", "bar");
  bar.style.width = `${100 * share}%`;
  return make("span", "track", bar);
}

function rows(vote) {
  const most = Math.max(...vote.candidates.map((candidate) => candidate.count));
  const list = make("ul", "candidates");
  for (const { text, count: number, is_chosen: isChosen } of vote.candidates) {
    list.append(row(visible(text), number, isChosen ? "chosen" : "", track(number / most)));
  }
  if (vote.others) list.append(row("others", vote.others, "rest", ""));
  if (vote.rejected) list.append(row("do not continue the prompt", vote.rejected, "rest", ""));
  return list;
}

function facts({ tokens, draws, draws_saved: saved, level, is_fallback: isFallback }) {
  const found = [count(tokens, "token"), count(draws, "draw")];
  if (draws > 1) found.push(`${level} agreed`);
  if (saved) found.push(`${saved.toLocaleString("en")} of the draws were not needed`);
  if (isFallback) found.push("a fallback decided");
  return found.join(" · ");
}

/** Show what is known of a chunk beside its element. */
export function showVote(element, number, figures) {
  const title = make("p", "title", make("strong", "", `chunk ${number}`), ` ${facts(figures)}`);
  panel.replaceChildren(title, figures.vote ? rows(figures.vote) : make("p", "rest", "no vote"));
  panel.hidden = false;
  const place = element.getClientRects()[0];
  const { width, height } = panel.getBoundingClientRect();
  const isBelow = place.bottom + GAP + height <= window.innerHeight || place.top < height + GAP;
  const left = Math.min(place.left, document.documentElement.clientWidth - width - GAP);
  const top = isBelow ? place.bottom + GAP : place.top - height - GAP;
  panel.style.left = `${Math.max(GAP, left) + window.scrollX}px`;
  panel.style.top = `${top + window.scrollY}px`;
}

/** Hide it; whether it was shown. */
export function hideVote() {
  const wasShown = !panel.hidden;
  panel.hidden = true;
  return wasShown;
}
