"use strict";
(function () {
  // Sorting: best first, worst first, then the order of the params again. Cells without a number stay last.
  var said = document.getElementById("sorted");
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var given = Array.from(table.tBodies);
    table.querySelectorAll("thead button").forEach(function (button) {
      var head = button.parentElement, column = Number(head.dataset.column);
      button.addEventListener("click", function () {
        var now = head.getAttribute("aria-sort");
        var next = now === "none" ? (column ? "descending" : "ascending") : now === (column ? "descending" : "ascending") ? (column ? "ascending" : "descending") : "none";
        table.querySelectorAll("th[aria-sort]").forEach(function (other) { other.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", next);
        said.textContent = next === "none" ? "Rows in their given order." : "Sorted by " + (button.getAttribute("aria-label") || button.textContent) + ", " + next + ".";
        var bodies = given.slice(), sign = next === "ascending" ? 1 : -1;
        if (next !== "none") bodies.sort(function (a, b) {
          var x = a.rows[0].cells[column].dataset.value, y = b.rows[0].cells[column].dataset.value;
          if (x === "" || y === "") return (x === "") - (y === "");
          return sign * (column ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
        });
        bodies.forEach(function (body) { table.insertBefore(body, table.tFoot); });
      });
    });
  });

  // The seeds behind a mean unfold.
  document.querySelectorAll("button.unfold").forEach(function (button) {
    function toggle() {
      var open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      Array.from(button.closest("tbody").rows).slice(1).forEach(function (row) { row.hidden = !open; });
    }
    button.addEventListener("click", toggle);
    toggle();
  });

  // Provenance: a cell is a link to its run, so it works without this; with it the facts open in a dialog.
  var dialog = document.getElementById("provenance"), title = dialog.querySelector("h2"), content = dialog.querySelector(".content");
  if (!dialog.showModal) return;
  function facts(rows) {
    var list = document.createElement("dl");
    rows.forEach(function (row) {
      var term = document.createElement("dt"), value = document.createElement("dd");
      term.textContent = row[0]; value.textContent = row[1];
      list.append(term, value);
    });
    return list;
  }
  function nameOf(cell) {
    var heads = cell.closest("table").tHead.rows, at = 0, span = "";
    Array.from(heads[0].cells).forEach(function (head) {
      if (at <= cell.cellIndex) span = head.textContent;
      at += head.colSpan;
    });
    return [cell.parentElement.cells[0].dataset.value, span, heads[1].cells[cell.cellIndex].textContent].filter(Boolean).join(", ");
  }
  document.querySelectorAll("a.cell").forEach(function (cell) {
    cell.setAttribute("aria-haspopup", "dialog");
    cell.addEventListener("click", function (event) {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      title.textContent = nameOf(cell.closest("td"));
      content.replaceChildren(facts(JSON.parse(cell.dataset.facts)));
      (cell.dataset.runs || cell.hash.replace(/^#(run-|paper$)/, "")).split(" ").filter(Boolean).forEach(function (run) {
        var block = document.getElementById("run-" + run);
        if (!block) return;
        var heading = document.createElement("h3"), copy = block.querySelector(".body").cloneNode(true);
        heading.textContent = block.dataset.label;
        content.append(heading, copy);
      });
      dialog.showModal();
      dialog.scrollTop = 0;
    });
  });
  dialog.addEventListener("click", function (event) { if (event.target === dialog) dialog.close(); });
})();
