// The report of a run: its texts answer, its curves have one cursor, its samples along the training can be played.

const dataOf = (id) => JSON.parse(document.getElementById(id).textContent);

const panel = detailsPanel();
panel.classList.add("cg-shared");
document.body.append(panel);
document.addEventListener("pointerdown", ({ target }) => target.closest(".cg-flow,.cg-details") || active?.select(-1));
document.addEventListener("keydown", ({ key }) => key === "Escape" && active?.select(-1));

for (const place of document.querySelectorAll("[data-text]")) {
  const sample = dataOf(place.dataset.text), live = element("div");
  place.classList.add("has-live"); // hides the picture, which print shows
  place.append(live);
  subline(live, { vocabSize: sample.vocab_size, series: seriesOf(sample), label: place.dataset.label, panel }).append(tokensOf(sample));
}
if (document.getElementById("cursor")) {
  cursor(document.getElementById("cursor"), [...document.querySelectorAll(".curve svg")], dataOf("data-curves"));
}
if (document.getElementById("watch")) watch(document.getElementById("watch"), dataOf("data-stages"), panel);
