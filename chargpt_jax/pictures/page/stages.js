// The samples along the training, one step after the other: a slider and a button that plays them.

const SECONDS_PER_STAGE = 1.2;

function watch(place, stages, panel) {
  if (stages.length < 2) return;
  const slider = element("input", { type: "range", min: 0, max: stages.length - 1, value: stages.length - 1, "aria-label": "Stage of training" });
  const button = element("button", { type: "button" }, "Play");
  const caption = element("p", { class: "cg-caption", "aria-live": "polite" });
  const { vocab_size: vocabSize } = stages[0].texts[0];
  place.classList.add("has-live"); // hides the list of all stages, which print shows with the last one open
  place.querySelector(".static").lastElementChild.open = true;
  place.append(element("div", { class: "cg-controls" }, button, slider), caption);
  const views = stages[0].texts.map((_, i) => {
    const parent = element("div");
    place.append(parent);
    return subline(parent, { vocabSize, panel, label: `Sample ${i + 1} along the training` });
  });
  let timer = 0;

  function show() {
    const stage = stages[slider.value];
    caption.textContent = stage.caption;
    slider.setAttribute("aria-valuetext", stage.caption);
    views.forEach((view, i) => {
      view.truncate(0);
      if (stage.texts[i]) view.append(tokensOf(stage.texts[i]));
    });
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    button.textContent = "Play";
  }

  button.addEventListener("click", () => {
    if (timer) return stop();
    button.textContent = "Stop";
    if (slider.value === slider.max) slider.value = 0;
    show();
    timer = setInterval(() => {
      if (views.some((view) => view.current >= 0)) return stop(); // the reader looks at a character
      slider.stepUp();
      show();
      if (slider.value === slider.max) stop();
    }, 1000 * SECONDS_PER_STAGE);
  });
  slider.addEventListener("input", () => (stop(), show()));
  show();
}
