(() => {
"use strict";
// Text from models reaches the page only through textContent here, and through plain() where plotly would read markup.
const data = JSON.parse(document.getElementById("data").textContent);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const make = (tag, name, text) => { const e = document.createElement(tag); if (name) e.className = name; if (text !== undefined) e.textContent = text; return e; };

// ---- pictures
const alpha = (hex, a) => "rgba(" + [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)).join(",") + "," + a + ")";

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches && !document.documentElement.classList.contains("printing");
const DARK = { "#0072B2": "#3d9ad8" };  // the one colour of the palette that is too dark on a dark page
function tone(colour) {
  if (colour === "ink") return isDark() ? "#e9e9e7" : "#1c1d1f";
  return isDark() && DARK[colour] || colour;
}

function heat(f) {  // rows and columns are settings, so they stand evenly; the number is in the cell and the colour repeats it
  const soft = css("--soft");
  return [{ type: "heatmap", x: f.columns.map(plain), y: f.rows.map(plain), z: f.z, text: f.text.map(row => row.map(plain)), texttemplate: "%{text}", textfont: { size: 12, color: "#1c1d1f" },
    colorscale: [[0, "#fff3c4"], [.5, "#b9d9e8"], [1, "#4a9bcf"]], zmin: f.bar.range[0], zmax: f.bar.range[1], xgap: 2, ygap: 2, hoverongaps: false,
    hovertemplate: plain(f.x) + " %{x}<br>" + plain(f.y) + " %{y}<br>%{text}<extra></extra>",
    colorbar: { orientation: "h", y: -.28, yanchor: "top", thickness: 10, len: .92, outlinewidth: 0, ticklabeloverflow: "allow", tickvals: f.bar.ticks[0], ticktext: f.bar.ticks[1],
      tickfont: { size: 11, color: soft }, title: { text: plain(f.bar.title), side: "bottom", font: { size: 12, color: soft } } } }];
}

const folded = text => plain(String(text).replace(/(.{40,60}?) /g, "$1\n")).replace(/\n/g, "<br>");

function traces(f) {
  if (f.kind === "heat") return heat(f);
  const out = [], named = f.series.filter(s => !s.faint).length;
  for (const raw of f.series) {
    const s = Object.assign({}, raw, { color: tone(raw.color) });
    const t = { type: "scatter", mode: s.mode, name: plain(s.name), x: s.x, y: s.y, connectgaps: false, showlegend: !s.faint && named > 1 && s.legend !== false,
      line: { color: s.faint ? alpha(s.color, .33) : s.color, width: s.faint ? 1 : 2.2, dash: s.dash },
      marker: { color: s.color, size: s.big ? 15 : f.small && !s.symbol ? 4 : 7, symbol: s.symbol || "circle" }, hoverinfo: s.faint ? "skip" : "all",
      hovertemplate: s.faint ? undefined : "%{x:.4~g}, %{y:.3~g}" + (s.text ? "<br>%{text}" : "") + "<extra>" + plain(s.name) + "</extra>" };
    if (s.text) t.text = s.text.map(plain);
    if (s.low && s.mode === "markers") {
      t.error_y = { type: "data", symmetric: false, array: s.high.map((h, i) => h === null ? 0 : h - s.y[i]), arrayminus: s.low.map((l, i) => l === null ? 0 : s.y[i] - l),
        color: s.color, thickness: 1.4, width: 3 };
    } else if (s.low) {
      out.push({ type: "scatter", mode: "lines", x: s.x, y: s.low, line: { width: 0 }, hoverinfo: "skip", showlegend: false });
      out.push({ type: "scatter", mode: "lines", x: s.x, y: s.high, line: { width: 0 }, fill: "tonexty", fillcolor: alpha(s.color, .15), hoverinfo: "skip", showlegend: false });
    }
    out.push(t);
  }
  const marks = (f.marks || []).filter(m => m.y !== null);
  if (marks.length) out.push({ type: "scatter", mode: "markers", x: marks.map(m => m.x), y: marks.map(m => m.y), text: marks.map(m => folded(m.text)), showlegend: false,
    marker: { color: css("--alarm-line"), size: f.small ? 9 : 12, symbol: "triangle-down", line: { color: css("--ink"), width: 1 } }, hovertemplate: "%{text}<extra></extra>" });
  return out;
}

function layout(f) {
  const ink = css("--ink"), soft = css("--soft"), grid = css("--grid"), size = f.small ? 11 : 13;
  const axis = title => ({ title: { text: plain(title), font: { size, color: soft }, standoff: 6 }, gridcolor: grid, zerolinecolor: grid, linecolor: grid,
    tickfont: { size: size - 1, color: soft }, automargin: true, nticks: f.small ? 5 : 7, exponentformat: "power", hoverformat: ".4~g" });
  const shapes = [], notes = [], legend = f.series.filter(s => !s.faint).length > 1;
  if (f.band) shapes.push({ type: "rect", layer: "below", xref: "paper", x0: 0, x1: 1, yref: "y", y0: f.band[0], y1: f.band[1], fillcolor: css("--band"), line: { width: 0 } });
  if (f.level) {
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, yref: "y", y0: f.level.y, y1: f.level.y, line: { color: soft, width: 1, dash: "dash" } });
    notes.push({ xref: "paper", x: 1, xanchor: "right", yref: "y", y: f.level.y, yanchor: "bottom", text: plain(f.level.text), showarrow: false, font: { size: size - 1, color: soft } });
  }
  if (f.diagonal) {
    shapes.push({ type: "line", x0: 0, y0: 0, x1: 1, y1: 1, line: { color: soft, width: 1, dash: "dash" } });
    notes.push({ x: .97, y: .97, xanchor: "right", yanchor: "bottom", textangle: 0, text: plain(f.diagonal), showarrow: false, font: { size: size - 1, color: soft } });
  }
  for (const m of f.marks || []) shapes.push({ type: "line", xref: "x", x0: m.x, x1: m.x, yref: "paper", y0: 0, y1: 1, line: { color: css("--alarm-line"), width: 1.5, dash: "dot" } });
  const xaxis = axis(f.x), yaxis = axis(f.y);
  if (f.range && Math.max(Math.abs(f.range[0]), Math.abs(f.range[1])) >= 2e4) yaxis.tickformat = "~s";
  if (f.range) yaxis.range = f.range;
  if (f.xrange) xaxis.range = f.xrange;
  if (f.xlog) xaxis.type = "log";
  if (f.ylog) yaxis.type = "log";
  if (f.yticks) { yaxis.tickvals = f.yticks[0]; yaxis.ticktext = f.yticks[1]; }
  if (f.xformat) xaxis.tickformat = f.xformat;
  if (f.xticks) { xaxis.tickvals = f.xticks[0]; xaxis.ticktext = f.xticks[1]; }
  if (f.kind === "heat") { xaxis.type = yaxis.type = "category"; xaxis.showgrid = yaxis.showgrid = false; }
  if (f.diagonal) { xaxis.range = [0, 1.02]; yaxis.range = [0, 1.08]; }
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size, color: ink }, xaxis, yaxis, shapes, annotations: notes,
    margin: { l: 8, r: 10, t: legend ? 6 : 8, b: 8 }, showlegend: legend, hovermode: "closest", dragmode: false,
    legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: { size }, bgcolor: "rgba(0,0,0,0)" },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: ink } } };
}

const plots = Array.from(document.querySelectorAll("[data-figure]")), drawn = new Set();
function draw(div) {
  const f = data.figures[div.dataset.figure];
  if (!f || !window.Plotly) {
    div.classList.add("empty");
    div.textContent = f ? "The picture needs plotly.min.js beside this page." : "Nothing to draw.";
    return;
  }
  window.Plotly.react(div, traces(f), layout(f), { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false });
  drawn.add(div);
}
function start() {  // one at a time, so that the page answers while it draws
  let next = 0;
  const one = () => { if (next < plots.length) { if (!drawn.has(plots[next])) draw(plots[next]); next += 1; setTimeout(one, 0); } };
  one();
}
if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); plots.forEach(draw); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); drawn.forEach(draw); });

// ---- samples
const PAGE = 10, CELLS = 1500000;
const words = text => text.match(/\s+|\S+/g) || [];

function common(a, b) {  // longest common subsequence: which words of each side are on both
  const n = a.length, m = b.length, inA = new Uint8Array(n), inB = new Uint8Array(m);
  if (n * m > CELLS) return null;
  const width = m + 1, table = new Uint16Array((n + 1) * width);
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--)
    table[i * width + j] = a[i] === b[j] ? table[(i + 1) * width + j + 1] + 1 : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  for (let i = 0, j = 0; i < n && j < m;) {
    if (a[i] === b[j]) { inA[i++] = 1; inB[j++] = 1; }
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++; else j++;
  }
  return [inA, inB];
}

function marked(parts, keep, tag) {
  const box = make("div", "text");
  box.dir = "auto";
  for (let i = 0; i < parts.length;) {
    let j = i; while (j < parts.length && keep[j] === keep[i]) j++;
    const text = parts.slice(i, j).join("");
    box.append(keep[i] || !text.trim() ? document.createTextNode(text) : make(tag, "", text));
    i = j;
  }
  return box;
}

const short = x => Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < .001) ? Number(x.toPrecision(3)).toLocaleString("en") : x.toPrecision(3).replace("-", "\u2212");
function head(side, which) {
  const facts = [which + ", step " + side.step.toLocaleString("en")];
  if (side.score !== null) facts.push("score " + short(side.score));
  if (side.n !== null) facts.push(side.n.toLocaleString("en") + " tokens");
  if (side.end === false) facts.push("cut, did not end by itself");
  return facts.join(" \u00b7 ");
}

function sample(row) {
  const box = make("article", "sample"), prompt = make("div", "prompt text", row.p), sides = make("div", "sides");
  prompt.dir = "auto";
  const a = row.a ? words(row.a.t) : [], b = words(row.b.t), both = row.a ? common(a, b) : null;
  const side = (one, which, parts, keep, tag) => {
    const cell = make("div", "side");
    cell.append(make("span", "head", head(one, which) + (row.a && !both ? " \u00b7 too long to mark differences" : "")));
    cell.append(parts.length === 0 ? make("div", "empty-text", "(empty response)") : marked(parts, keep || new Uint8Array(parts.length).fill(1), tag));
    sides.append(cell);
  };
  if (row.a) side(row.a, "before", a, both && both[0], "del");
  side(row.b, row.a ? "after" : "only once", b, both && both[1], "ins");
  box.append(prompt, sides);
  return box;
}

function showSamples(root) {
  const rows = data.samples, list = root.querySelector(".list"), where = root.querySelector(".where"), order = root.querySelector("select");
  const gain = r => r.a && r.a.score !== null && r.b.score !== null ? r.b.score - r.a.score : null;
  const by = { file: null, worst: [r => r.b.score, 1], best: [r => r.b.score, -1], fell: [gain, 1], rose: [gain, -1], longest: [r => r.b.n === null ? r.b.t.length : r.b.n, -1],
    cut: [r => r.b.end === null ? null : Number(r.b.end), 1] };
  let sorted = rows, at = 0;
  function sort() {
    const rule = by[order.value];
    sorted = rows;
    if (rule) {
      const keyed = rows.map((r, i) => [rule[0](r), i]);
      keyed.sort((x, y) => (x[0] === null) - (y[0] === null) || rule[1] * (x[0] - y[0]) || x[1] - y[1]);
      sorted = keyed.map(k => rows[k[1]]);
    }
    at = 0; show();
  }
  function show() {
    list.replaceChildren(...sorted.slice(at, at + PAGE).map(sample));
    where.textContent = (at + 1).toLocaleString("en") + " to " + Math.min(at + PAGE, rows.length).toLocaleString("en") + " of " + rows.length.toLocaleString("en");
    root.querySelector(".back").disabled = at === 0;
    root.querySelector(".on").disabled = at + PAGE >= rows.length;
  }
  order.addEventListener("change", sort);
  const turn = by => { at += by; show(); root.scrollIntoView({ block: "start" }); };
  root.querySelector(".back").addEventListener("click", () => turn(-PAGE));
  root.querySelector(".on").addEventListener("click", () => turn(PAGE));
  sort();
}
const samples = document.getElementById("samples");
if (samples && data.samples && data.samples.length) showSamples(samples);
})();
