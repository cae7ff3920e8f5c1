"""What page.py puts around its content: the style of the page, light and dark, and the script that
sorts its tables."""

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --fore: #1b1f24; --quiet: #57606a;
  --line: #d0d7de; --link: #0550ae; --soft: #f3f5f8; --warn: #7a3e00; --warn-back: #fff4e0; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --fore: #e6e9ed; --quiet: #a3acb7; --line: #3a424c; --link: #85bdff;
    --soft: #1e2329; --warn: #ffd28a; --warn-back: #33270f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: var(--fore);
  background: var(--back); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1.2rem 0 .5rem; }
p { max-width: 46rem; margin: .6rem 0; }
a { color: var(--link); }
.lead, caption, figcaption, .remarks, dt { color: var(--quiet); }
.lead { font-size: 1.05rem; }
.findings { color: var(--warn); background: var(--warn-back); border-left: .25rem solid;
  padding: .6rem .8rem .6rem 1.6rem; margin: 1rem 0; }
ul.remarks { padding-left: 1.2rem; font-size: .9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; list-style: none; padding: 0;
  margin: 1rem 0 0; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.scroll { overflow-x: auto; margin: .8rem 0; }
.scroll:focus-visible { outline-offset: -3px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 4.5rem); }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; overflow-wrap: normal; }
thead th[scope="colgroup"] { text-align: center; border-left: 1px solid var(--line); }
th:first-child[data-column], tbody th, .words { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--back); }
tbody tr:hover > * { background: var(--soft); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: .3rem 0; cursor: pointer; text-align: inherit; position: relative; }
.js th button { padding-right: 1.1em; }
th button:hover { color: var(--link); }
.arrow { display: none; }
.js .arrow { display: inline; position: absolute; right: 0; bottom: .3rem; color: var(--quiet); }
.arrow::before { content: "\\2195"; }
[aria-sort="ascending"] .arrow::before { content: "\\2191"; }
[aria-sort="descending"] .arrow::before { content: "\\2193"; }
pre { background: var(--soft); padding: .7rem .9rem; border-radius: 4px; white-space: pre-wrap; }
code { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { border: 1px solid var(--line); border-radius: 6px; padding: 0 .9rem; margin: .8rem 0; }
details[open] { padding-bottom: .9rem; }
summary { cursor: pointer; padding: .6rem 0; }
summary h3 { display: inline; }
figure { margin: 1.2rem 0; }
figure img { max-width: min(100%, 46rem); height: auto; background: #ffffff; }
.wrong { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.4rem, 1fr));
  gap: 1rem .9rem; }
.wrong figure { margin: 0; font-size: .8rem; line-height: 1.4; }
.wrong img, .gone { width: 100%; aspect-ratio: 1; margin: 0; border-radius: 4px;
  background: var(--soft); }
.wrong img { object-fit: contain; display: block; }
.gone { display: grid; place-items: center; text-align: center; padding: .5rem;
  color: var(--quiet); border: 1px dashed var(--line); }
.wrong figcaption { margin-top: .3rem; }
.wrong b { color: var(--fore); }
.path { unicode-bidi: isolate; }
dl { display: grid; gap: .15rem; margin: .5rem 0; }
dl div { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1rem; }
dd { margin: 0; }
@media (max-width: 40rem) { dl div { grid-template-columns: 7rem 1fr; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } .arrow { display: none; } }
"""

# Cells that are empty come last in either order. Numbers are compared as numbers, words as words.
SCRIPT = """
document.documentElement.classList.add("js");
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const other = {ascending: "descending", descending: "ascending"};
    const order = other[head.getAttribute("aria-sort")] || button.dataset.first;
    for (const th of table.querySelectorAll("[aria-sort]")) th.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const key = row => row.cells[head.dataset.column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const numbers = [a, b].map(value => Number(value.replace("inf", "Infinity")));
      return sign * (numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1]);
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}
"""
