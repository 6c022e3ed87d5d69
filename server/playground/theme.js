// Applies the theme before the first paint, so that the other one does not flash. Storage may be forbidden.
try {
  document.documentElement.dataset.theme = localStorage.getItem("paellera.theme") ?? "";
} catch {
  document.documentElement.dataset.theme = "";
}
