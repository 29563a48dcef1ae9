"use strict";
// Filters and sorts the table of test rows. It reads nothing but that table and writes nothing but its order.
(() => {
  const table = document.getElementById("rows-table");
  const controls = document.getElementById("rows-controls");
  if (!table || !controls) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row, index) => ({
    row,
    index,
    text: Array.from(row.querySelectorAll(".said"), (cell) => cell.textContent).join("\n").toLowerCase(),
    type: row.dataset.type,
    gain: Number(row.dataset.gain),
    score: Number(row.dataset.score),
    length: Number(row.dataset.words),
  }));
  const words = document.getElementById("rows-text");
  const type = document.getElementById("rows-type");
  const order = document.getElementById("rows-order");
  const count = document.getElementById("rows-count");

  function show() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const entry of rows) {
      const fits = (type.value === "" || entry.type === type.value) && wanted.every((word) => entry.text.includes(word));
      entry.row.hidden = !fits;
      if (fits) shown += 1;
    }
    count.textContent = `${shown} of ${rows.length} rows shown`;
  }

  function sort() {
    const [key, way] = order.value.split(":");
    const sign = way === "down" ? -1 : 1;
    const sorted = rows.slice().sort((a, b) => sign * (a[key] - b[key]) || a.index - b.index);
    body.append(...sorted.map((entry) => entry.row));
  }

  words.addEventListener("input", show);
  type.addEventListener("change", show);
  order.addEventListener("change", sort);
  controls.hidden = false;
  // a browser that goes back to the page keeps what was typed
  show();
  sort();
})();
