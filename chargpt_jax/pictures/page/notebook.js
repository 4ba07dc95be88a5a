// The sublines of a notebook: replaces each picture that has not been replaced yet by its live form. Those side by side
// share a panel below them.

for (const place of document.querySelectorAll(".cg-notebook[data-sample]")) {
  const sample = JSON.parse(place.dataset.sample), group = place.closest(".cg-beside");
  const panel = group && (group.querySelector(":scope > .cg-details") ?? group.appendChild(detailsPanel()));
  place.removeAttribute("data-sample");
  place.replaceChildren();
  subline(place, { vocabSize: sample.vocab_size, series: seriesOf(sample), panel }).append(tokensOf(sample));
}
