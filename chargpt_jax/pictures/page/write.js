// A model as a page: the form, and the text that the model writes. Everything is computed here; nothing is requested.

const SLICE = 8; // milliseconds of work, after which the browser may draw and answer
const DRAW_EVERY = 30; // milliseconds between two drawings
const SPEED_EVERY = 250; // milliseconds between two displays of the speed
const MAX_CHARACTERS = 20000; // of a prompt, and of one continuation

const byId = (id) => document.getElementById(id);
const grouped = (value) => value.toLocaleString("en");
const plural = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;

/** Return the values of the base64 block, float32, and drop its text. */
function decodedParameters() {
  const characters = atob(byId("parameters").textContent);
  byId("parameters").remove();
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

/** Name characters and their code points for a message, at most 10 of them. */
function named(characters) {
  const names = characters.slice(0, 10).map((character) => `“${glyph(character)}” (${codePoint(character)})`);
  return names.join(", ") + (characters.length > 10 ? ` and ${characters.length - 10} more` : "");
}

/** Say in one sentence what is wrong with a prompt; "" if nothing is. */
function problemOfPrompt(session, prompt) {
  if (!prompt) return "The prompt is empty, but the model needs at least one character: type some text.";
  if ([...prompt].length > MAX_CHARACTERS) {
    const [length, most] = [[...prompt].length, MAX_CHARACTERS].map(grouped);
    return `The prompt has ${length} characters, but ${most} is the maximum: shorten it.`;
  }
  const unknown = session.unknown(prompt);
  if (unknown.length) {
    const them = unknown.length > 1 ? "them" : "it";
    return `The prompt has ${named(unknown)}, not in the vocabulary of the model: remove ${them}, or use other text.`;
  }
  return "";
}

/** Say in one sentence what is wrong with the numbers; "" if nothing is. */
function problemOfNumbers() {
  const rules = {
    count: `The number of characters must be a whole number from 1 to ${grouped(MAX_CHARACTERS)}: try 300.`,
    "top-k": "Top-k must be a whole number above 0: leave it empty to sample from all characters.",
    seed: "The seed must be a whole number from 0 to 2,147,483,647: leave it empty for a random one.",
  };
  return rules[Object.keys(rules).find((id) => !byId(id).checkValidity())] ?? "";
}

/** Return what the form asks for, without the prompt; null, after saying what is wrong, if that is not possible. */
function settings(problem = problemOfNumbers()) {
  byId("problem").textContent = problem;
  if (problem) {
    byId("status").textContent = byId("speed").textContent = "";
    byId("problem").scrollIntoView({ block: "nearest" });
    return null;
  }
  const numberIn = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const seed = numberIn("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return { count: numberIn("count"), temperature: numberIn("temperature"), topK: numberIn("top-k"), seed };
}

/**
 * Do the work of a generator in slices, and draw its tokens; return a function that stops it.
 *
 * A long text takes the browser some time to lay out: drawing it takes at most a quarter of the time.
 */
function inSlices(pieces, onTokens, onEnd) {
  const channel = new MessageChannel(); // its messages wait for input and frames, but not for a timer
  let tokens = [];
  let frame = 0;
  let nextDraw = 0; // not before this time

  function draw() {
    frame = 0;
    const began = performance.now();
    onTokens(tokens.splice(0));
    const end = performance.now();
    nextDraw = end + Math.max(DRAW_EVERY, 3 * (end - began));
  }

  function stop() {
    channel.port1.close();
    cancelAnimationFrame(frame);
    draw();
  }

  channel.port1.onmessage = () => {
    const until = performance.now() + SLICE;
    let piece;
    do {
      piece = pieces.next();
      if (!piece.done) tokens = tokens.concat(piece.value);
    } while (!piece.done && performance.now() < until);
    if (piece.done) {
      stop();
      onEnd();
      return;
    }
    if (performance.now() >= nextDraw) frame ||= requestAnimationFrame(draw);
    channel.port2.postMessage(null);
  };
  channel.port2.postMessage(null);
  return stop;
}

/** Connect the form, a session, and the view of its text. */
function connect(session) {
  const view = subline(byId("text"), { vocabSize: session.model.config.vocab_size, onBranch, label: "Generated text" });
  let work = null; // what is running
  let began = 0; // when it began to generate

  function start(pieces, { seed, temperature }) {
    let generated = 0;
    let shown = 0;
    began = performance.now();
    byId("result").hidden = false;
    const onTokens = (tokens) => {
      view.append(tokens);
      generated += tokens.filter((token) => !token.prompt).length;
      const now = performance.now();
      if (now - shown < SPEED_EVERY) return;
      shown = now;
      showSpeed(generated, now - began);
    };
    const onEnd = () => {
      showSpeed(generated, performance.now() - began);
      finish(`${plural(generated, "character")} generated ${temperature ? `with seed ${seed}` : "greedily"}.`);
    };
    work = { stop: inSlices(pieces, onTokens, onEnd) };
    say("Generating…");
    enable();
  }

  function halt() {
    work?.stop();
    work = null;
  }

  function onStop() {
    halt();
    if (session.reading) clear();
    finish(view.tokens.length ? "Stopped." : "Stopped before the prompt was read.");
  }

  function finish(words) {
    work = null;
    say(words);
    enable();
  }

  function clear() {
    session.clear();
    view.truncate(0);
    byId("result").hidden = true;
    byId("speed").textContent = "";
  }

  /** Enable the buttons that have something to do; a button that is disabled leaves its focus to another one. */
  function enable() {
    const focused = document.activeElement;
    byId("stop").disabled = !work;
    byId("continue").disabled = work !== null || !view.tokens.length;
    byId("clear").disabled = !work && !view.tokens.length;
    if (focused.disabled) byId(work ? "stop" : "write").focus();
  }

  function* fromPrompt(prompt, given) {
    yield* session.read(prompt);
    began = performance.now(); // the time for the prompt does not count
    yield* session.write(given.count, given);
  }

  function onWrite(event) {
    event.preventDefault();
    const prompt = session.repaired(byId("prompt").value);
    const given = settings(problemOfPrompt(session, prompt) || problemOfNumbers());
    if (!given) return;
    halt();
    clear();
    start(fromPrompt(prompt, given), given);
  }

  function onContinue() {
    const given = settings();
    if (given) start(session.write(given.count, given), given);
  }

  function onBranch(index, text) {
    const given = settings();
    if (!given) return;
    halt();
    view.truncate(index);
    view.append(session.branch(index, text));
    view.select(index);
    byId("text").querySelector("[tabindex]").focus({ preventScroll: true }); // the pressed button is gone
    start(session.write(given.count, given), given);
  }

  function onClear() {
    halt();
    clear();
    finish("");
    byId("prompt").focus();
  }

  byId("form").addEventListener("submit", onWrite);
  byId("continue").addEventListener("click", onContinue);
  byId("stop").addEventListener("click", onStop);
  byId("clear").addEventListener("click", onClear);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) onWrite(event);
  });
}

function say(words) {
  byId("status").textContent = words;
}

function showSpeed(characters, milliseconds) {
  const perSecond = (1000 * characters) / milliseconds;
  const rounded = perSecond < 10 ? perSecond.toPrecision(2) : grouped(Math.round(perSecond));
  byId("speed").textContent = characters && milliseconds ? `${rounded} characters per second` : "";
}

/** Describe the model in the heading and in the facts. */
function describe({ config, vocabulary, about }, parameters) {
  byId("name").textContent = about.name;
  byId("what").textContent =
    `A character-level GPT with ${plural(parameters, "parameter")}. It runs in this page: nothing is sent or loaded.`;
  const loss = about.loss === null ? [] : [["validation loss", `${about.loss.toFixed(4)} nats per character`]];
  const facts = [
    ...(about.texts.length ? [["trained on", about.texts.join(", ")]] : []),
    ["training steps", grouped(about.step ?? 0)],
    ...loss,
    ["layers", `${config.n_layer} of width ${config.n_embd}`],
    ["attention heads", `${config.n_head} of width ${config.n_head_dim}`],
    ["context", `${plural(config.block_size, "character")}; generation is slower beyond it`],
    ["vocabulary", plural(vocabulary.length - 1, "character")],
  ];
  byId("facts").append(
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
  byId("about").hidden = false;
}

/** Read the data of the page, and show the form. */
function open() {
  const data = JSON.parse(byId("model").textContent);
  const model = createModel(data.config, data.names, decodedParameters());
  describe(data, model.parameters);
  const { temperature, top_k, max_new_tokens } = data.sample;
  byId("prompt").value = data.prompt;
  byId("count").value = Math.min(max_new_tokens, MAX_CHARACTERS);
  byId("top-k").value = top_k ?? "";
  byId("temperature").max = Math.max(2, temperature);
  byId("temperature").value = temperature;
  const showTemperature = () => {
    const value = Number(byId("temperature").value);
    byId("temperature-value").textContent = value ? value.toFixed(2) : "0 (greedy)";
  };
  byId("temperature").addEventListener("input", showTemperature);
  addEventListener("pageshow", showTemperature); // a browser may restore an earlier value
  showTemperature();
  connect(new Session(model, data.vocabulary));
  byId("form").hidden = false;
}

try {
  open();
} catch (error) {
  byId("what").textContent = `The model in this page cannot be read (${error.message}): export it again.`;
}
