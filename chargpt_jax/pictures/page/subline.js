// A text with the curves of its metrics under every line. Characters answer a pointer, a finger and the arrow keys.
//
// The browser lays out the text, so writing directions, wide characters and the width of the window are its business.
// The curves are drawn where it has put the characters.

const RISE = 18; // pixels from the baseline of the curves to the value 1
const FALL = 9; // pixels for values below 0
const GAP = 3; // pixels between the characters and the value 1
const SVG = "http://www.w3.org/2000/svg";

const SYMBOLS = { "\n": "↵", "\u2028": "↵", "\u2029": "↵", "\t": "→", "\x7f": "␡" };

const METRICS = [
  { key: "entropy", label: "Entropy", filled: true, scale: (vocabSize) => 1 / Math.log(vocabSize) },
  { key: "surprisal", label: "Surprisal", scale: (vocabSize) => 1 / Math.log(vocabSize) },
  { key: "s2", label: "S₂ (surprise-surprise)", scale: () => 1 },
];

// Return the curves of a sample: the metrics, and what its samplers show.
function seriesOf(sample) {
  const own = Object.entries(sample.series ?? {}).map(([name, { label, top }]) => ({
    key: `sampler ${name}`, label: `${label} (height: ${Number(top.toPrecision(3))})`, sampler: label, scale: () => 1 / top,
  }));
  return [...METRICS, ...own];
}

// Return the visible form of a character; symbols stand for controls.
function glyph(text) {
  if (text in SYMBOLS) return SYMBOLS[text];
  if (text < " ") return String.fromCharCode(0x2400 + text.charCodeAt(0));
  return /[\p{Cc}\p{Cs}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/u.test(text) ? "\ufffd" : text;
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svgElement(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Return the tokens of a sample in the form of its JSON file.
function tokensOf(sample) {
  const n = [...sample.prompt].length < sample.tokens.length ? [...sample.prompt].length : 0;
  return sample.tokens.map((text, i) => ({
    text,
    prompt: i < n,
    surprisal: sample.surprisal[i],
    entropy: sample.entropy[i],
    s2: sample.surprise_surprise[i],
    rank: sample.rank?.[i] ?? null,
    sampled: sample.sampled_probability?.[i] ?? null,
    alternatives: sample.alternatives?.[i] ?? [],
    ...Object.fromEntries(Object.entries(sample.series ?? {}).map(([name, own]) => [`sampler ${name}`, own.values[i]])),
  }));
}

// Return a path through knots [[x, y], ...] as monotone cubics, which do not overshoot (Fritsch and Butland, 1984).
function smooth(knots, filled) {
  const slopes = knots.slice(1).map(([x, y], i) => (y - knots[i][1]) / (x - knots[i][0]));
  const tangent = (i) => {
    const before = slopes[i - 1] ?? slopes[i], after = slopes[i] ?? slopes[i - 1];
    if (i > 0 && i < slopes.length && before * after <= 0) return 0;
    return before === after ? before : (2 * before * after) / (before + after);
  };
  const point = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  let path = point(...knots[0]);
  for (let i = 1; i < knots.length; i++) {
    const [x0, y0] = knots[i - 1], [x1, y1] = knots[i], third = (x1 - x0) / 3;
    path += `C${point(x0 + third, y0 + tangent(i - 1) * third)} ${point(x1 - third, y1 - tangent(i) * third)} ${point(x1, y1)}`;
  }
  if (!filled) return `M${path}${knots.length === 1 ? "h0" : ""}`; // round caps make it a dot
  return `M${knots[0][0].toFixed(1)} 0L${path}L${knots.at(-1)[0].toFixed(1)} 0Z`;
}

// Return the highest of the values that are defined; NaN if none is.
function highest(values) {
  const defined = values.filter((value) => value != null);
  return defined.length ? Math.max(...defined) : NaN;
}

// Return the path of a series over the places [{x, value}, ...] of a line, from left to right; NaN breaks it.
function curve(places, filled) {
  const runs = [[]];
  for (const { x, value } of places) {
    if (!Number.isFinite(value)) runs.push([]);
    else runs.at(-1).push([x, -RISE * Math.min(1.05, Math.max(-0.5, value))]);
  }
  return runs.filter((run) => run.length).map((run) => smooth(run, filled)).join("");
}

// Return the form of a character that stands alone: spaces and marks would be invisible.
function visible(text) {
  if (/^\p{Zs}$/u.test(text)) return "␣";
  return /^\p{M}/u.test(text) ? `◌${text}` : /^\p{Cf}*$/u.test(text) ? "∅" : glyph(text);
}

const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.00095 ? `${(100 * p).toFixed(1)} %` : "below 0.1 %");
const nats = (value) => `${value.toFixed(2)} nats`;
const codePoint = (text) => [...text].map((c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`).join(" ");

// Say what the model predicted at a character, and what the samplers show there, in words.
function facts(token, series) {
  const said = [];
  if (token.surprisal != null) said.push(["probability", percent(Math.exp(-token.surprisal))]);
  if (token.rank) said.push(["rank", `${token.rank}`]);
  if (token.sampled != null) said.push(["probability in the sampler", percent(token.sampled)]);
  if (token.surprisal != null) said.push(["surprisal", nats(token.surprisal)]);
  if (token.entropy != null) said.push(["entropy", nats(token.entropy)]);
  if (token.s2 != null) said.push(["S₂", token.s2.toFixed(2).replace("-", "−")]);
  for (const { key, sampler } of series) if (sampler && token[key] != null) said.push([sampler, token[key].toFixed(2)]);
  return said.length ? said : [["", token.prompt ? "part of the prompt, without a prediction" : "no prediction: it has no context"]];
}

// Draw the details of a character: what it is, the facts, and the alternatives as bars.
function details(panel, token, index, { series, onBranch }) {
  const name = element("p", { class: "cg-name" }, element("b", {}, visible(token.text)), ` ${codePoint(token.text)}`);
  const list = element("dl", {});
  const told = [["position", `${index}`], ...facts(token, series)];
  for (const [term, value] of told) {
    list.append(element("div", {}, element("dt", {}, term), element("dd", {}, value)));
  }
  const bars = element("ol", { "aria-label": "most likely characters" });
  for (const [text, p] of token.alternatives ?? []) {
    const own = text === token.text;
    const filled = element("span", { class: "cg-filled" });
    filled.style.width = `${100 * p}%`;
    const parts = [element("b", {}, visible(text)), element("span", { class: "cg-bar" }, filled), element("span", {}, percent(p))];
    const bar = onBranch && !own
      ? element("button", { type: "button", title: `Continue from here with ${visible(text)}` }, ...parts)
      : element("div", {}, ...parts);
    if (onBranch && !own) bar.addEventListener("click", () => onBranch(index, text));
    bars.append(element("li", own ? { class: "cg-own" } : {}, bar));
  }
  panel.replaceChildren(element("div", {}, name, list), bars, panel.said);
  panel.said.textContent = [`${visible(token.text)} ${codePoint(token.text)}`, ...told.slice(1, 3).map((fact) => fact.join(" "))].join(", ");
}

// Return an element for the details of the selected character.
function detailsPanel(...content) {
  const panel = element("div", { class: "cg-details" }, ...content);
  panel.said = element("p", { class: "cg-said", role: "status" }); // what a screen reader says at each character
  panel.append(panel.said);
  return panel;
}

let active = null; // the view that has the selected character; a page has at most one

// Show a text with its metrics in an empty element; return the view, to which tokens can be appended.
//
// series: METRICS, or those of `seriesOf`; vocabSize: number of characters that the model knows; onBranch(index, text): called when the
// reader picks another character, without it the alternatives are not buttons; panel: an element for the details, which
// several texts may share, without it the text has its own.
function subline(parent, { series = METRICS, vocabSize, onBranch = null, panel = null, label = "Text with its metrics" }) {
  const tokens = [];
  const spans = [];
  const places = []; // of each token: {line, x}, x in pixels from the left edge of the text
  const lines = []; // of each line: {top, bottom, first, group}, in pixels from the top of the text
  const hidden = new Set();
  let current = -1;

  const text = element("div", { class: "cg-flow", tabindex: "0", role: "application", dir: "auto",
    "aria-label": `${label}. The arrow keys move from character to character.` });
  const overlay = svgElement("svg", { class: "cg-curves", "aria-hidden": "true" });
  const cursor = svgElement("path", { class: "cg-cursor" });
  overlay.append(cursor);
  text.append(overlay);
  const shared = panel !== null;
  const legend = element("div", { class: "cg-legend", role: "group", "aria-label": `Curves of: ${label}` });
  const hint = element("p", {}, "Point at a character, or use the arrow keys.");
  series.forEach((s, i) => legend.append(toggle(s, i)));
  parent.classList.add("cg-live");
  parent.append(text, legend);
  if (shared) legend.append(hint);
  else parent.append((panel = detailsPanel(hint)));

  function toggle(s, i) {
    const button = element("button", { type: "button", "aria-pressed": "true", class: `cg-key cg-k${(i % 5) + 1}` }, s.label);
    button.addEventListener("click", () => {
      if (!hidden.delete(s.key)) hidden.add(s.key);
      button.setAttribute("aria-pressed", String(!hidden.has(s.key)));
      drawFrom(0);
    });
    return button;
  }

  function append(added) {
    const first = tokens.length;
    for (const token of added) {
      const shown = glyph(token.text);
      const kind = [token.prompt && "cg-prompt", shown !== token.text && "cg-symbol"].filter(Boolean).join(" ");
      const span = element("span", kind ? { class: kind } : {}, shown);
      tokens.push(token);
      spans.push(span);
      text.insertBefore(span, overlay);
    }
    draw(first);
  }

  function truncate(n) {
    for (const span of spans.splice(n)) span.remove();
    tokens.length = Math.min(tokens.length, n);
    if (current >= n) select(-1);
    draw(n);
  }

  // Find where the browser has put the tokens, from the line of the first changed one on, and draw these lines.
  function draw(changed) {
    const start = Math.max(0, lines.findLastIndex((line) => line.first < changed));
    places.length = lines[start]?.first ?? 0;
    for (const line of lines.splice(start)) line.group.remove();
    const box = text.getBoundingClientRect();
    for (let i = places.length; i < spans.length; i++) {
      const rect = spans[i].getBoundingClientRect(), top = rect.top - box.top;
      if (rect.width && !(top < lines.at(-1)?.bottom - 4)) {
        lines.push({ top, bottom: rect.bottom - box.top, first: lines.length ? i : 0, group: null });
      }
      places.push({ line: lines.length - 1, x: rect.left - box.left + rect.width / 2, width: rect.width });
    }
    drawFrom(start);
    mark();
  }

  function drawFrom(start) {
    for (let number = start; number < lines.length; number++) drawLine(number);
  }

  function drawLine(number) {
    const line = lines[number], end = lines[number + 1]?.first ?? spans.length;
    line.group?.remove();
    line.group = svgElement("g", { transform: `translate(0 ${(line.bottom + GAP + RISE).toFixed(1)})` });
    const own = []; // tokens without a width, such as marks, share the place of the one before them
    for (let i = line.first; i < end; i++) {
      if (places[i].width || !own.length) own.push({ x: places[i].x, tokens: [tokens[i]] });
      else own.at(-1).tokens.push(tokens[i]);
    }
    const dots = own.map(({ x }) => `M${x.toFixed(1)} 0h0`).join("");
    own.sort((a, b) => a.x - b.x);
    if (own.length) { // the curve goes on towards the neighbours on other lines, beyond the edges
      const step = own.length > 1 ? (own.at(-1).x - own[0].x) / (own.length - 1) : 8;
      const rightToLeft = end - line.first > 1 && places[line.first].x > places[end - 1].x;
      const [left, right] = rightToLeft ? [tokens[end], tokens[line.first - 1]] : [tokens[line.first - 1], tokens[end]];
      if (left) own.unshift({ x: own[0].x - step, tokens: [left] });
      if (right) own.push({ x: own.at(-1).x + step, tokens: [right] });
    }
    series.forEach((s, i) => {
      if (hidden.has(s.key)) return;
      const factor = s.scale(vocabSize);
      const values = own.map(({ x, tokens }) => ({ x, value: highest(tokens.map((token) => token[s.key])) * factor }));
      line.group.append(svgElement("path", { class: `${s.filled ? "cg-area" : "cg-line"} cg-s${(i % 5) + 1}`, d: curve(values, s.filled) }));
    });
    line.group.append(svgElement("path", { class: "cg-mark", d: dots }));
    overlay.insertBefore(line.group, cursor);
  }

  function select(index) {
    if (active !== view) active?.select(-1);
    active = view;
    spans[current]?.classList.remove("cg-current");
    current = index < spans.length ? index : -1;
    panel.classList.toggle("cg-open", current >= 0);
    if (current >= 0) {
      spans[current].classList.add("cg-current");
      details(panel, tokens[current], current, { series, onBranch });
    } else {
      panel.replaceChildren(...(shared ? [panel.said] : [hint, panel.said]));
      panel.said.textContent = "";
    }
    mark();
  }

  function mark() {
    const place = places[current], line = place && lines[place.line];
    cursor.setAttribute("d", line ? `M${place.x.toFixed(1)} ${line.bottom.toFixed(1)}V${(line.bottom + GAP + RISE + FALL).toFixed(1)}` : "");
  }

  // Return the token nearest to a position on a line.
  function nearest(number, x) {
    const end = lines[number + 1]?.first ?? spans.length;
    let best = lines[number].first;
    for (let i = best; i < end; i++) if (places[i].width && Math.abs(places[i].x - x) < Math.abs(places[best].x - x)) best = i;
    return best;
  }

  function point(event) {
    const box = text.getBoundingClientRect();
    const y = event.clientY - box.top;
    let number = lines.findLastIndex((line) => line.top - 6 <= y);
    if (number < 0) number = 0;
    if (lines.length) select(nearest(number, event.clientX - box.left));
  }

  text.addEventListener("pointermove", (event) => event.pointerType === "mouse" && event.buttons === 0 && point(event));
  text.addEventListener("click", point); // a finger that scrolls does not click
  text.addEventListener("focus", () => text.matches(":focus-visible") && current < 0 && spans.length && select(0));
  if (shared) {
    text.addEventListener("pointerleave", () => document.activeElement !== text && select(-1));
    text.addEventListener("blur", () => select(-1));
  }
  text.addEventListener("keydown", (event) => {
    const ahead = getComputedStyle(text).direction === "rtl" ? -1 : 1;
    const moves = {
      ArrowRight: () => Math.max(0, current + ahead),
      ArrowLeft: () => Math.max(0, current - ahead),
      ArrowDown: () => step(1),
      ArrowUp: () => step(-1),
      Home: () => 0,
      End: () => spans.length - 1,
    };
    if (event.key === "Escape") select(-1);
    else if (event.key in moves && spans.length) {
      select(Math.min(spans.length - 1, moves[event.key]()));
      spans[current].scrollIntoView({ block: "nearest" });
      event.preventDefault();
    }
  });

  function step(by) {
    const number = (places[current]?.line ?? -1) + by;
    return lines[number] ? nearest(number, places[current]?.x ?? 0) : current;
  }

  if (!shared) { // the text wraps again on paper: it gets a width that fits on the page
    const wrap = (pixels) => ((text.style.width = pixels), draw(0));
    addEventListener("beforeprint", () => wrap("600px"));
    addEventListener("afterprint", () => wrap(""));
  }
  let width = 0;
  new ResizeObserver(() => {
    if (text.clientWidth === width) return;
    width = text.clientWidth;
    draw(0);
  }).observe(text);
  document.fonts?.ready.then(() => draw(0));
  const view = { append, truncate, select, tokens, get current() { return current; } };
  return view;
}
