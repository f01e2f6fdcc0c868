"""Style sheet and script of the report. The script only adds: the page is complete without it."""

STYLE = """
:root { color-scheme: light dark;
 --bg:#f6f7f9; --card:#ffffff; --ink:#1c2430; --soft:#5b6675; --line:#e1e5ea; --grid:#eceff3; --mark:#fff6d6;
 --c0:#2f6fd0; --c1:#d9730d; --c2:#138a5e; --c3:#9a4fc0; --c4:#c73e5d; --c5:#0f8ea3; --c6:#8a6d1f; --c7:#6b7280;
 --p0:#8fa3bf14; --p1:#d9a43d1f; --p2:#3aa67a1c; --p3:#9a6fc01c; --good:#0d7a50; --goodbg:#e3f5ec; --bad:#b3304e;
 --badbg:#fbe8ec; }
@media (prefers-color-scheme: dark) { :root {
 --bg:#12161c; --card:#1a2028; --ink:#e4e8ee; --soft:#9aa6b4; --line:#2c3540; --grid:#252d37; --mark:#3a3420;
 --c0:#6ea8ff; --c1:#f2a154; --c2:#4cc38f; --c3:#c58be8; --c4:#f2708d; --c5:#4cc5d9; --c6:#d3b25a; --c7:#a3adba;
 --p0:#8fa3bf14; --p1:#d9a43d1c; --p2:#3aa67a1c; --p3:#9a6fc01c; --good:#5bd6a0; --goodbg:#17332a; --bad:#ff8aa3;
 --badbg:#3a1d26; } }
* { box-sizing:border-box } body { margin:0; background:var(--bg); color:var(--ink);
 font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1280px; margin:0 auto; padding:24px 20px 60px }
h1 { font-size:24px; margin:0 0 2px; font-weight:650 } h2 { font-size:18px; margin:34px 0 10px; font-weight:650 }
.sub { color:var(--soft); margin:0 0 18px } nav a { color:var(--c0); margin-right:16px; text-decoration:none }
nav a:hover { text-decoration:underline }
.tiles { display:grid; grid-template-columns:repeat(4,minmax(0,1fr)); gap:12px; margin:16px 0 8px }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:12px 14px }
.tile span { display:block; color:var(--soft); font-size:12px } .tile b { font-size:21px; font-weight:650 }
.tile small { display:block; color:var(--soft); font-size:12px } .tile.alert b { color:var(--bad) }
.charts { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:14px }
.charts.small { grid-template-columns:repeat(3,minmax(0,1fr)) }
.card { background:var(--card); border:1px solid var(--line); border-radius:10px; margin:0; padding:12px 14px 8px;
 position:relative; min-width:0 } .wide { grid-column:1/-1 }
figcaption { font-weight:650; font-size:15px; overflow-wrap:anywhere }
.note { color:var(--soft); font-size:12.5px; margin:0 }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:2px 16px; margin:6px 0 2px; padding:0; font-size:12.5px;
 color:var(--soft) } .legend b { color:var(--ink); font-weight:600; font-variant-numeric:tabular-nums }
.swatch { display:inline-block; width:14px; height:3px; border-radius:2px; margin-right:6px; vertical-align:middle;
 background:currentColor } .plot { position:relative } .chart { display:block; width:100%; height:auto }
.c0{color:var(--c0)} .c1{color:var(--c1)} .c2{color:var(--c2)} .c3{color:var(--c3)} .c4{color:var(--c4)}
.c5{color:var(--c5)} .c6{color:var(--c6)} .c7{color:var(--c7)}
.curves { overflow:hidden }
.line { fill:none; stroke:currentColor; stroke-width:1.8; stroke-linejoin:round } .faint { opacity:.26; stroke-width:1 }
.dot { fill:currentColor } .area { fill:currentColor; opacity:.72 }
.grid { stroke:var(--grid) } .axis { stroke:var(--line) }
.tick,.phase-name,.limit-name { font-size:11px; fill:var(--soft); font-variant-numeric:tabular-nums }
.limit { stroke:var(--bad); stroke-dasharray:5 4; opacity:.65 } .limit-name { fill:var(--bad); font-size:10px;
 stroke:var(--card); stroke-width:3px; paint-order:stroke }
.cursor { stroke:var(--soft); stroke-dasharray:2 3 } .p0 rect{fill:var(--p0)} .p1 rect{fill:var(--p1)}
.p2 rect{fill:var(--p2)} .p3 rect{fill:var(--p3)}
.tip { position:absolute; pointer-events:none; background:var(--card); border:1px solid var(--line); border-radius:8px;
 padding:6px 9px; font-size:12px; box-shadow:0 3px 12px #0003; white-space:nowrap; z-index:2 }
.tip b { font-variant-numeric:tabular-nums } .tip div { line-height:1.45 }
table { border-collapse:collapse; width:100% } td,th { text-align:left; vertical-align:top; padding:6px 8px;
 border-top:1px solid var(--line) } th { color:var(--soft); font-weight:600; font-size:12px; border-top:0 }
td.num,th.num { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.filters { display:flex; gap:10px; margin:0 0 10px; flex-wrap:wrap } .filters[hidden] { display:none }
.filters input,.filters select { font:inherit; color:inherit; background:var(--card); border:1px solid var(--line);
 border-radius:8px; padding:5px 9px } .filters input { flex:1; min-width:200px }
.sample { margin-bottom:12px; padding:12px 14px } .sample[hidden] { display:none }
.sample header { color:var(--soft); font-size:12.5px; margin-bottom:6px }
.text { white-space:pre-wrap; overflow-wrap:anywhere;
 font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace }
.prefix { background:var(--bg); border-radius:8px; padding:8px 10px; max-height:130px; overflow:auto;
 margin-bottom:6px }
.kind { font-weight:600; white-space:nowrap }
tr.chosen td { background:var(--goodbg) } tr.rejected td { background:var(--badbg) }
.flag { font-size:12px; font-weight:650; white-space:nowrap } .chosen .flag { color:var(--good) }
.rejected .flag { color:var(--bad) } summary { cursor:pointer; font-weight:600 }
details.card { padding:12px 14px; margin-bottom:12px } details pre { overflow:auto; font-size:12.5px; margin:8px 0 0 }
details .charts { margin-top:12px } .empty { color:var(--soft) }
@media (max-width:900px) { .tiles { grid-template-columns:repeat(2,minmax(0,1fr)) }
 .charts,.charts.small { grid-template-columns:minmax(0,1fr) } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const source = figure.querySelector("script"), svg = figure.querySelector("svg");
  const plot = figure.querySelector(".plot");
  if (!source || !svg) continue;
  const data = JSON.parse(source.textContent), cursor = svg.querySelector(".cursor");
  const tip = document.createElement("div"); tip.className = "tip"; tip.hidden = true; plot.append(tip);
  const nearest = (xs, x) => { let best = 0; xs.forEach((v, i) => {
    if (Math.abs(v - x) < Math.abs(xs[best] - x)) best = i; }); return best; };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), scale = data.width / box.width;
    const at = (event.clientX - box.left) * scale, inner = data.width - data.left - data.right;
    const step = data.x[0] + (data.x[1] - data.x[0]) * Math.min(1, Math.max(0, (at - data.left) / inner));
    const shown = data.series.reduce((best, s) => {
      const x = s.x[nearest(s.x, step)]; return Math.abs(x - step) < Math.abs(best - step) ? x : best; }, Infinity);
    const px = data.left + inner * (shown - data.x[0]) / ((data.x[1] - data.x[0]) || 1);
    cursor.setAttribute("x1", px); cursor.setAttribute("x2", px); cursor.setAttribute("visibility", "visible");
    tip.replaceChildren();
    const add = (name, value, color) => { const row = document.createElement("div");
      const mark = document.createElement("span"), number = document.createElement("b");
      mark.className = "swatch c" + color; number.textContent = value;
      row.append(...(color === null ? [] : [mark]), name + " ", number); tip.append(row); };
    add("step", Math.round(shown), null);
    for (const s of data.series) { const i = nearest(s.x, shown);
      if (Math.abs(s.x[i] - shown) <= Math.max(1, (data.x[1] - data.x[0]) / 30)) add(s.name, s.y[i], s.color); }
    tip.hidden = false;
    const left = px / scale; tip.style.top = "24px";
    tip.style.left = (left + tip.offsetWidth + 20 > box.width ? left - tip.offsetWidth - 12 : left + 12) + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
}
const filters = document.querySelector(".filters");
if (filters) {
  filters.hidden = false;
  const kind = filters.querySelector("select"), words = filters.querySelector("input");
  const apply = () => { for (const sample of document.querySelectorAll(".sample")) {
    const text = words.value.toLowerCase();
    sample.hidden = (kind.value && sample.dataset.chosen !== kind.value)
      || (text && !sample.textContent.toLowerCase().includes(text)); } };
  kind.addEventListener("change", apply); words.addEventListener("input", apply);
}
"""
