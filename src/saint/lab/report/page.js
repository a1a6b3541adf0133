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
    const tell = figure.dataset.why ? explain(figure, () => Number(slider.value)) : () => {};
    const show = () => {
      const at = Number(slider.value);
      steps.forEach((step, i) => step.classList.toggle("off", i !== at));
      for (const group of figure.querySelectorAll("g.gone")) {
        group.classList.toggle("off", Number(group.dataset.from) > at);
        group.classList.toggle("now", Number(group.dataset.from) === at);
      }
      figure.querySelectorAll("g.heat").forEach((group, i) => {
        group.classList.toggle("off", i !== at);
        if (i === at) figure.querySelector(".counted").textContent = group.dataset.label;
      });
      said.textContent = steps[at].dataset.label;
      slider.setAttribute("aria-valuetext", steps[at].dataset.label);
      tell();
    };
    slider.parentElement.hidden = false;
    slider.addEventListener("input", show);
    show();
  }
}
// what stands for a patch: pointed at, clicked (stays), or walked to with the arrow keys; gives the function to call when the layer changes
function explain(figure, layer) {
  const { rows, columns, gone, degrees, names } = JSON.parse(figure.dataset.why);
  const said = figure.querySelector("output.patch");
  const hint = "Point at a patch, or move to the picture with the tab key and walk with the arrow keys.";
  const maps = [...figure.querySelectorAll("svg.map, svg.field")];
  let [at, pinned] = [null, false];
  const place = (n) => `row ${Math.floor(n / columns) + 1}, column ${(n % columns) + 1}`;
  const middle = (n) => `${(n % columns) * 10 + 5} ${Math.floor(n / columns) * 10 + 5}`;
  const box = (n) => `M${(n % columns) * 10} ${Math.floor(n / columns) * 10}h10v10h-10z`;
  // what stands for a patch at the layer shown: itself, or the end of a chain whose members were dropped by then
  const chain = (n) => {
    const found = [n];
    while (n !== null && gone[n] && gone[n][0] <= layer()) found.push((n = gone[n][1]));
    return found;
  };
  const words = (n) => {
    const found = chain(n);
    const seen = degrees[layer()];
    const source = seen ? seen[0].indexOf(n) : -1;
    const parts = [place(n)];
    if (found.length === 1) parts.push(gone[n] ? `kept here, dropped ${names[gone[n][0]]}` : "kept");
    else {
      const end = found[found.length - 1];
      const through = found.length > 2 ? ` (through ${found.length - 2} dropped since)` : "";
      const verb = gone[n][2] ? "became part of" : "its most similar survivor:";
      parts.push(`dropped ${names[gone[n][0]]}`, end === null ? "what stands for it is not on this picture" : `${verb} ${place(end)}${through}`);
    }
    if (source >= 0) parts.push(`${seen[1][source]} neighbour${seen[1][source] === 1 ? "" : "s"}: ${seen[1][source] >= seen[2] ? "votes to go" : "no vote"}`);
    return parts.join("; ");
  };
  const make = (name, attributes) => {
    const node = document.createElementNS(maps[0].namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const draw = () => {
    figure.querySelectorAll("g.cursor").forEach((old) => old.remove());
    said.textContent = at === null ? hint : words(at);
    if (at === null) return;
    const found = chain(at).filter((n) => n !== null);
    for (const map of maps) {
      const group = make("g", { class: "cursor" });
      if (found.length > 1) {
        const line = `M${found.map(middle).join("L")}`;
        group.append(make("path", { class: "shade", d: line }), make("path", { class: "line", d: line }));
      }
      group.append(make("path", { class: "shade", d: box(at) }), make("path", { class: "line", d: box(at) }));
      if (found.length > 1) group.append(make("path", { class: "shade", d: box(found.at(-1)) }), make("path", { class: "end", d: box(found.at(-1)) }));
      map.append(group);
    }
  };
  const under = (event) => {
    const area = event.currentTarget.getBoundingClientRect();
    const column = Math.floor(((event.clientX - area.left) / area.width) * columns);
    const row = Math.floor(((event.clientY - area.top) / area.height) * rows);
    return column >= 0 && column < columns && row >= 0 && row < rows ? row * columns + column : null;
  };
  const go = (n, stay) => {
    [at, pinned] = [n, stay];
    draw();
  };
  const first = () => Number(Object.keys(gone).find((n) => gone[n][0] === layer()) ?? Object.keys(gone)[0] ?? 0);
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  for (const map of maps) {
    map.addEventListener("mousemove", (event) => pinned || go(under(event), false));
    map.addEventListener("mouseleave", () => pinned || go(null, false));
    map.addEventListener("click", (event) => {
      const n = under(event);
      go(n, !(pinned && n === at));
    });
  }
  const [map] = maps;
  map.setAttribute("tabindex", "0");
  map.setAttribute("role", "application");
  map.addEventListener("focus", () => at === null && map.matches(":focus-visible") && go(first(), true));
  map.addEventListener("keydown", (event) => {
    if (event.key === "Escape") go(null, false);
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const from = at === null ? first() : at;
    const row = Math.min(rows - 1, Math.max(0, Math.floor(from / columns) + move[0]));
    go(row * columns + Math.min(columns - 1, Math.max(0, (from % columns) + move[1])), true);
  });
  said.hidden = false;
  return draw;
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
