// Brings the tables of a page to life, each once.
for (const root of document.querySelectorAll(".udon-runs:not([data-ready])")) {
  root.dataset.ready = "";
  runsTable(root);
}
