// Before the page is drawn, so that it is never drawn in the other colours first.
"use strict";
try {
  const chosen = localStorage.getItem("offshoot-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is forbidden here: the system's colours do.
}
