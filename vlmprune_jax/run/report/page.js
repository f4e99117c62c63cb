// Tables sort by the column whose name is clicked, best first, then the other way; long ones can be filtered.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  const rows = [...body.rows].filter((row) => !row.classList.contains("pinned"));
  heads.forEach((head, column) => {
    const text = (row) => row.cells[column].textContent.trim().replace(/^–$/, "");
    const number = (row) => parseFloat(text(row).replace(/[,<\s]/g, ""));
    const numeric = rows.every((row) => text(row) === "" || /^(< )?[-+]?[\d,]*\.?\d/.test(text(row)));
    const compare = numeric
      ? (a, b) => number(a) - number(b)
      : (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true });
    const empty = (row) => text(row) === "";  // last, whichever way
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = numeric ? head.dataset.best : "ascending";
      const last = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? last : first;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : sign * compare(a, b)));
      body.append(...rows);
    });
  });
  if (rows.length < 6) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.placeholder = "filter rows, as: width sft";
  filter.setAttribute("aria-label", `Filter the rows of: ${table.caption.textContent.trim()}`);
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.closest(".table").prepend(filter);
}
