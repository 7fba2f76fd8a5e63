"""How the page looks. Every colour is a variable that has a value for light and one for dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #faf9f6; --panel: #ffffff; --ink: #1d2127; --soft: #5d6671; --line: #dedbd3;
  --accent: #2b5f9e; --closed: #6ea8de; --open: #f0a35c; --cell: #f6f4ef; --strong: #8fc9a3;
  --worse: #b8402f; --better: #2c7d4f; --none: #8a919b; --first: #b9c4d6; --last: #1f4f8f;
  --c0: #2f6db3; --c1: #d2772a; --c2: #2f8a57; --c3: #a8486f; --c4: #6f5fb5; --c5: #927414;
  --c6: #2b8c96; --c7: #6b6f76;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --panel: #1c2026; --ink: #e8e6e1; --soft: #a2aab4; --line: #343a43;
    --accent: #8fb8ea; --closed: #2e6ea8; --open: #b5652a; --cell: #262b32; --strong: #2f7a4c;
    --worse: #ef8573; --better: #6fce96; --none: #7d8590; --first: #3d4a5e; --last: #9cc4f5;
    --c0: #6ba4e6; --c1: #e89a55; --c2: #63c08a; --c3: #dd86aa; --c4: #a99bea; --c5: #c9aa4b;
    --c6: #5fc3cd; --c7: #a0a5ad;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4.2vw, 2.5rem); line-height: 1.18; margin: 0.4rem 0 1rem;
  letter-spacing: -0.015em; max-width: 24em; text-wrap: balance; }
h2 { font-size: 1.35rem; margin: 3rem 0 0.5rem; letter-spacing: -0.01em; }
h3 { font-size: 0.95rem; margin: 0 0 0.6rem; font-weight: 600; }
p { max-width: 46rem; margin: 0.5rem 0; }
ul { max-width: 46rem; margin: 0.6rem 0 1rem; padding-left: 1.1rem; }
li { margin: 0.3rem 0; }
.above, .note, figcaption, dt { color: var(--soft); font-size: 0.875rem; }
.above { margin: 0; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; }
figcaption { margin-top: 0.6rem; max-width: 46rem; }
figure { margin: 0; min-width: 0; }
.grid { display: grid; gap: 1rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1rem; min-width: 0; overflow-x: auto; }
.tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr));
  margin: 1.6rem 0 0; }
.tiles > div { background: var(--panel); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 0.8rem 1rem; }
.tiles dd { margin: 0; font-size: 1.65rem; font-weight: 600; letter-spacing: -0.02em; }
.tiles dd small { font-size: 0.85rem; font-weight: 400; color: var(--soft); letter-spacing: 0;
  display: block; line-height: 1.35; }
table { border-collapse: separate; border-spacing: 2px; width: 100%;
  font-variant-numeric: tabular-nums; }
th { font-weight: 500; color: var(--soft); font-size: 0.8rem; text-align: center; }
th[scope=row] { text-align: right; padding-right: 0.5rem; white-space: nowrap; }
.heat td { text-align: center; font-size: 0.85rem; padding: 0.42rem 0.2rem; border-radius: 3px;
  background: var(--cell); min-width: 2.6rem; }
.heat td.faint { color: var(--soft); background: none; }
.heat td.found { font-weight: 650; }
.worth { border-spacing: 0; font-size: 0.875rem; min-width: 46rem; }
.worth th, .worth td { text-align: right; padding: 0.28rem 0.5rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
.worth th:first-child, .worth td:first-child, .worth th:nth-child(2), .worth td:nth-child(2) {
  text-align: left; }
.worth tr.begins td { border-top: 2px solid var(--line); }
.worth td.plot { padding: 0 0.5rem; width: 16rem; }
.worse { color: var(--worse); } .better { color: var(--better); } .none { color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .axis { stroke: var(--line); stroke-width: 1; }
svg .zero { stroke: var(--soft); stroke-width: 1; }
.key { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; font-size: 0.85rem; margin: 0.8rem 0 0; }
.key i { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 2px;
  margin-right: 0.4em; }
.scale { display: flex; align-items: center; gap: 0.5rem; color: var(--soft); font-size: 0.8rem;
  margin-top: 0.6rem; }
.scale i { flex: 0 1 9rem; height: 0.6rem; border-radius: 3px; }
@media (max-width: 34rem) {
  main { padding: 1.5rem 0.9rem 3rem; }
  .panel { padding: 0.7rem; }
  .heat td { font-size: 0.75rem; padding: 0.35rem 0; min-width: 0; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 0.6rem; }
  .tiles dd { font-size: 1.3rem; }
}
"""
