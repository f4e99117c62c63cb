// Tables sort by the column whose name is clicked: ascending, then descending. Without script they stand as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows];
      const number = (row) => parseFloat(text(row).replace(/,/g, ""));
      const numeric = rows.every((row) => text(row) === "" || /^[-+]?[\d,]*\.?\d/.test(text(row)));
      const compare = numeric
        ? (a, b) => number(a) - number(b)
        : (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true });
      const empty = (row) => text(row) === "";  // last, whichever way
      rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : sign * compare(a, b)));
      body.append(...rows);
    });
  });
}
