// Sorts a table.sortable by a click on a column head: numbers by value, missing values last.
for (const button of document.querySelectorAll('table.sortable th button')) {
  button.addEventListener('click', () => {
    const head = button.closest('th'), table = head.closest('table'), column = head.cellIndex;
    const sign = head.getAttribute('aria-sort') === 'descending' ? 1 : -1;
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      if (column === 0) return sign * y.localeCompare(x) * -1;
      return Number.isNaN(p) - Number.isNaN(q) || sign * (p - q);
    };
    for (const other of table.querySelectorAll('th[aria-sort]')) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
}
