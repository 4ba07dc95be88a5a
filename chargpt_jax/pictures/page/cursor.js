// One cursor over all curves of a run: a slider, and lines in the plots that follow a pointer or a finger.

// Return the index of the last step that is not after a given one; -1 if there is none.
function lastUpTo(steps, step) {
  let low = 0, high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

const grouped = (value, digits) => value.toLocaleString("en", { maximumSignificantDigits: digits });
const decimals = (value, count) => value.toLocaleString("en", { minimumFractionDigits: count, maximumFractionDigits: count });

// Return the values of all curves at a step, in words: [[name, value], ...].
function readings({ curves, epoch_steps }, step) {
  const read = [["step", `${step.toLocaleString("en")} (epoch ${(step / epoch_steps).toFixed(2)})`]];
  for (const { name, unit, exact, steps, values } of curves) {
    const i = lastUpTo(steps, step);
    const at = i >= 0 && steps[i] !== step ? ` (step ${grouped(steps[i], 9)})` : "";
    const value = i < 0 ? "none yet" : exact === null ? grouped(values[i], 3) : decimals(values[i], exact);
    read.push([name, i < 0 ? value : `${value}${unit && ` ${unit}`}${at}`]);
  }
  return read;
}

// Put a slider and its readings into an element, and lines into the plots that follow it.
function cursor(place, plots, data) {
  if (!data.curves.length) return;
  const first = Math.ceil(data.low), last = Math.floor(data.high);
  const slider = element("input", { type: "range", min: first, max: last, step: 1, value: last, "aria-label": "Step" });
  const list = element("dl", {});
  const lines = plots.map((plot) => {
    const line = svgElement("path", { class: "cg-cursor" });
    plot.append(line);
    return line;
  });
  place.append(slider, list);

  function show() {
    const step = Number(slider.value), read = readings(data, step);
    slider.setAttribute("aria-valuetext", read.map(([name, value]) => `${name} ${value}`).join("; "));
    list.replaceChildren(...read.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    lines.forEach((line, i) => {
      const { width, height } = plots[i].viewBox.baseVal;
      const x = data.margin + ((step - data.low) / (data.high - data.low)) * (width - 2 * data.margin);
      line.setAttribute("d", `M${x.toFixed(1)} 38V${height - 46}`);
    });
  }

  for (const plot of plots) {
    const follow = (event) => {
      const box = plot.getBoundingClientRect(), { width } = plot.viewBox.baseVal;
      const part = (((event.clientX - box.left) / box.width) * width - data.margin) / (width - 2 * data.margin);
      slider.value = Math.round(data.low + part * (data.high - data.low));
      show();
    };
    plot.addEventListener("pointermove", (event) => (event.pointerType === "mouse" || event.buttons) && follow(event));
    plot.addEventListener("pointerdown", follow);
  }
  slider.addEventListener("input", show);
  show();
}
