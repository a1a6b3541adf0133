"use strict";
function activate(root) {
  // sorting: heads become buttons, so that without JavaScript nothing looks like one
  for (const table of root.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const body = table.tBodies[0];
        const rows = [...body.rows];
        const value = (row) => row.cells[column].dataset.key;
        rows.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (x !== undefined && y !== undefined) return (up ? 1 : -1) * (Number(x) - Number(y));
          if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1; // what is no number comes last
          return (up ? 1 : -1) * row_text(a, column).localeCompare(row_text(b, column), "en", { numeric: true });
        });
        body.append(...rows);
      });
    });
  }
  // sliders over layers
  for (const figure of root.querySelectorAll("figure.kept")) {
    const steps = [...figure.querySelectorAll(".step")];
    const slider = figure.querySelector("input");
    const said = figure.querySelector("output");
    const show = () => {
      const at = Number(slider.value);
      steps.forEach((step, i) => step.classList.toggle("off", i !== at));
      said.textContent = steps[at].dataset.label;
      slider.setAttribute("aria-valuetext", steps[at].dataset.label);
    };
    slider.parentElement.hidden = false;
    slider.addEventListener("input", show);
    show();
  }
}
function row_text(row, column) {
  return row.cells[column].textContent;
}
activate(document);
window.saintActivate = activate; // for what comes into the page later
// tips: what a title says, at once and for the keyboard too
const tip = document.getElementById("tip");
let owner = null;
function place() {
  tip.hidden = owner === null;
  if (tip.hidden) return;
  tip.textContent = owner.dataset.tip;
  const box = owner.getBoundingClientRect();
  const left = Math.min(Math.max(6, box.left + box.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 6);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
}
function tell(event) {
  owner = event.target.closest ? event.target.closest("[data-tip]") : null;
  place();
}
document.addEventListener("mouseover", tell);
document.addEventListener("focusin", tell);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  owner = null;
  place();
});
document.addEventListener("scroll", place, { passive: true }); // focus scrolls, too
