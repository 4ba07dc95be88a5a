// The sublines of a notebook: replaces each picture that has not been replaced yet by its live form.

for (const place of document.querySelectorAll(".cg-notebook[data-sample]")) {
  const sample = JSON.parse(place.dataset.sample);
  place.removeAttribute("data-sample");
  place.replaceChildren();
  subline(place, { vocabSize: sample.vocab_size }).append(tokensOf(sample));
}
