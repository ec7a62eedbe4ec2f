"use strict";
// Sorting by clicking on a heading, numbers as numbers, absent values always last; and filtering by words.
for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody");
  const heads = [...box.querySelectorAll("th")];
  const rows = [...body.rows];

  heads.forEach((head, column) => {
    const isNumber = head.classList.contains("number");
    const keys = new Map();
    const key = (row) => {
      if (!keys.has(row)) {
        const cell = row.cells[column];
        const value = isNumber ? parseFloat(cell.dataset.v) : cell.textContent;
        keys.set(row, cell.dataset.v === "inf" ? Infinity : cell.dataset.v === "-inf" ? -Infinity : value);
      }
      return keys.get(row);
    };
    const isAbsent = (value) => (isNumber ? Number.isNaN(value) : value === "");
    const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

    head.firstElementChild.addEventListener("click", () => {
      const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      const sorted = [...rows].sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (isAbsent(a) || isAbsent(b)) return isAbsent(a) - isAbsent(b);
        return direction * (isNumber ? (a < b ? -1 : a > b ? 1 : 0) : words.compare(a, b));
      });
      body.append(...sorted);
    });
  });

  const input = box.querySelector("input[type=search]");
  const count = box.querySelector("output");
  const texts = new Map();
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      if (!texts.has(row)) texts.set(row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase());
      row.hidden = !wanted.every((word) => texts.get(row).includes(word));
      shown += !row.hidden;
    }
    count.textContent = wanted.length ? `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows` : `${rows.length.toLocaleString("en")} rows`;
  });
}
