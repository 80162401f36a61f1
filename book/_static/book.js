// What scrolls sideways must be reachable by keyboard, and have a name.
function mark() {
  for (const e of document.querySelectorAll("article figure, article .cell_output, article pre, article div.math, article .table-wrapper, article mjx-container")) {
    if (e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== "visible" && !e.hasAttribute("tabindex")) {
      e.setAttribute("tabindex", "0");
      e.setAttribute("role", "group");
      e.setAttribute("aria-label", e.tagName === "FIGURE" ? "figure, scrolls sideways" : "scrolls sideways");
    }
  }
}
window.addEventListener("load", mark);
window.addEventListener("resize", mark);
setTimeout(mark, 1500);  // after the formulas are set
