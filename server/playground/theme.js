// Applied before anything is painted, so that a chosen theme does not flash in the other one. Storage may be forbidden.
try {
  document.documentElement.dataset.theme = localStorage.getItem("paellera.theme") ?? "";
} catch {
  document.documentElement.dataset.theme = "";
}
