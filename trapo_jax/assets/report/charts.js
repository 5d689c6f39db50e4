"use strict";
// Draws charts over training steps with uPlot. Each chart has a text summary, a readout for pointer and keyboard, and a table.

const RUN_COLORS = 6;
const DASHES = [[], [8, 4], [2, 3], [12, 3, 2, 3]];
const charts = []; // Entries are {chart, runs}: a uPlot instance and the run index of each of its series.

const runColor = (run) => `--run-${run % RUN_COLORS}`;
const runDash = (run) => DASHES[run % DASHES.length];

function swatch(run) {
  const line = make("span", { class: `swatch dash-${run % DASHES.length}`, "aria-hidden": "true" });
  line.style.borderTopColor = `var(${runColor(run)})`;
  return line;
}

// Returns a curve's moving average, which makes its trend visible.
function smooth(values) {
  const reach = Math.floor(values.length / 40);
  if (reach === 0) return values;
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((v) => v !== null);
    return near.length === 0 ? null : near.reduce((a, b) => a + b) / near.length;
  });
}

function describeTrend(steps, values) {
  const known = values.map((v, i) => [v, steps[i]]).filter(([v]) => v !== null && v !== undefined);
  if (known.length === 0) return "no values";
  const [first, last] = [known[0], known[known.length - 1]];
  const top = known.reduce((a, b) => (b[0] > a[0] ? b : a));
  return `${number(first[0])} at step ${first[1]}, ${number(last[0])} at step ${last[1]}, highest ${number(top[0])} at step ${top[1]}`;
}

function axes() {
  const common = { stroke: () => color("--muted"), font: "12px system-ui, sans-serif",
    grid: { stroke: () => color("--line"), width: 1 }, ticks: { show: false } };
  return [{ ...common, size: 26, grid: { show: false } }, { ...common, size: 52, values: (_, marks) => marks.map(number) }];
}

// Builds a chart. `lines` contains {name, values, run} for the summary, readout and table; `draw` contains uPlot options.
function frame({ title, about, steps, lines, parts = null, data, draw }) {
  const trends = lines.map((line) => `${line.name}: ${describeTrend(steps, line.values)}`).join(". ");
  const plot = make("div", { class: "plot", "aria-hidden": "true" });
  const readout = make("p", { class: "readout" });
  const box = make("figure", { class: "chart" }, make("h3", {}, title), make("p", { class: "muted" }, about), parts,
    make("div", { tabindex: 0, role: "application", "aria-roledescription": "chart",
      "aria-label": `${title}. ${trends}. Use the arrow keys to read the values step by step.`, keydown: (e) => move(e) }, plot),
    readout,
    folded("Data table", () => table(title, ["step", ...lines.map((l) => l.name)],
      steps.map((step, i) => [step, ...lines.map((l) => l.values[i] ?? null)]))));
  let chart = null;

  function showReadout(index) {
    readout.replaceChildren(...(index === null || index === undefined ? [] :
      [make("span", {}, `step ${steps[index]}`), ...lines.filter((l) => l.values[index] !== null && l.values[index] !== undefined)
        .map((l) => make("span", {}, `${l.name} ${number(l.values[index])}`))]));
  }

  function move(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    readout.setAttribute("aria-live", "polite"); // Screen readers announce values only when keys are used.
    const at = Math.min(steps.length - 1, Math.max(0, (chart.cursor.idx ?? (by > 0 ? -1 : steps.length)) + by));
    chart.setCursor({ left: chart.valToPos(steps[at], "x"), top: 10 });
  }

  chart = new uPlot({
    width: 360, height: 210, axes: axes(), legend: { show: false },
    cursor: { y: false, sync: { key: "steps", scales: ["x", null] }, points: { size: 7 } },
    ...draw,
    scales: { x: { time: false, range: (_, low, high) => [low <= 1 ? 0 : low, steps.length > 1 ? high : Math.max(steps[0], lastStep())] }, ...draw.scales },
    hooks: { setCursor: [(u) => showReadout(u.cursor.idx)], ...draw.hooks },
  }, data, plot);
  new ResizeObserver(() => { if (plot.clientWidth) chart.setSize({ width: plot.clientWidth, height: 210 }); }).observe(plot);
  charts.push({ chart, runs: draw.series.map((s) => s.run) });
  return box;
}

// The upper limit of the step axis if there is only an evaluation before the first step.
const lastStep = () => Math.max(1, ...DATA.runs.map((run) => run.step));
const fromZero = (_, low, high) => [Math.min(0, low ?? 0), (high ?? 1) * 1.05 || 1];
// Returns an upper axis limit that covers all values except outliers.
const nearlyAll = (values) => 1.4 * ([...values].sort((a, b) => a - b)[Math.floor(0.95 * (values.length - 1))] || 1);
const SHARE = { y: { range: [0, 1] } };

// Shows one curve per run: the values as a thin line, their moving average as a bold line.
function lineChart({ title, about, metric, scales = { y: { range: fromZero } } }) {
  const tables = [], series = [{}], steps = new Set();
  DATA.runs.forEach((run, i) => {
    const { step, [metric]: values } = run.columns;
    if (values.every((v) => v === null)) return;
    step.forEach((s) => steps.add(s));
    tables.push([step, values], [step, smooth(values)]);
    const stroke = (alpha) => () => color(runColor(i)) + alpha;
    series.push({ run: i, stroke: stroke("55"), width: 1, spanGaps: true, points: { show: false } });
    series.push({ run: i, stroke: stroke(""), width: 2, dash: runDash(i), spanGaps: true, points: { show: step.length === 1 } });
  });
  if (tables.length === 0) return null;
  const data = uPlot.join(tables);
  const lines = series.flatMap((s, k) => (k && k % 2 ? [{ name: DATA.runs[s.run].name, values: data[k], run: s.run }] : []));
  return frame({ title, about, steps: data[0], lines, data, draw: { series, scales } });
}

// Shows evaluations: the validation split as a line, the test split as large points.
function accuracyChart({ title, about, field }) {
  const tables = [], series = [{}], lines = [];
  DATA.runs.forEach((run, i) => {
    for (const split of ["validation", "test"]) {
      const found = run.evaluations.filter((e) => e.split === split);
      if (found.length === 0) continue;
      tables.push([found.map((e) => e.step), found.map((e) => e[field])]);
      const test = split === "test", stroke = () => color(runColor(i));
      series.push({ run: i, stroke, width: test ? 0 : 2, dash: runDash(i), spanGaps: true,
        points: { show: true, size: test ? 11 : 6, fill: stroke, stroke } });
      lines.push({ name: `${run.name}, ${split}`, run: i });
    }
  });
  if (tables.length === 0) return null;
  const data = uPlot.join(tables);
  lines.forEach((line, k) => { line.values = data[k + 1]; });
  return frame({ title, about, steps: data[0], lines, data, draw: { series, scales: SHARE } });
}

// Shows the parts of one run's total as stacked moving averages.
function stackChart({ title, about, run, parts, scales = SHARE }) {
  const { step } = DATA.runs[run].columns;
  const lines = parts.map((part) => ({ name: part.name, values: part.values, run }));
  const means = parts.map((part) => smooth(part.values));
  const upTo = means.map((_, k) => step.map((_, i) => means.slice(0, k + 1).reduce((sum, mean) => sum + (mean[i] ?? 0), 0)));
  const data = [step, ...[...upTo].reverse()]; // The highest curve comes first, because each series is drawn over the previous ones.
  const series = [{}, ...[...parts].reverse().map((part) => ({ run, stroke: () => color(part.color), width: 1,
    fill: () => color(part.color), points: { show: false } }))];
  const list = make("ul", { class: "parts" }, ...parts.map((part) => make("li", {}, patch(`var(${part.color})`), part.name)));
  return frame({ title, about, steps: step, lines, parts: list, data, draw: { series, scales } });
}

function patch(background) {
  const node = make("span", { class: "patch", "aria-hidden": "true" });
  node.style.background = background;
  return node;
}

// Shows a distribution over ten bins of [0, 1] at each step. A stronger color means a larger share.
function heatMap({ title, about, run, bins }) {
  const { step } = DATA.runs[run].columns;
  const lines = bins.map((values, k) => ({ name: `${k / 10}–${(k + 1) / 10}`, values, run }));
  const means = bins.map(smooth), strongest = Math.max(...means.flat().map((v) => v ?? 0)) || 1;
  const paint = (u) => {
    const { ctx } = u, heat = color("--heat");
    ctx.save();
    ctx.beginPath();
    ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height);
    ctx.clip();
    step.forEach((s, i) => {
      const half = (i ? s - step[i - 1] : (step[1] ?? s + 1) - s) / 2;
      const [left, right] = [s - half, s + half].map((x) => u.valToPos(x, "x", true));
      means.forEach((values, k) => {
        const top = u.valToPos((k + 1) / bins.length, "y", true), bottom = u.valToPos(k / bins.length, "y", true);
        ctx.fillStyle = `rgb(${heat} / ${Math.sqrt((values[i] ?? 0) / strongest)})`;
        ctx.fillRect(left, top, Math.max(1, right - left + 0.5), bottom - top);
      });
    });
    ctx.restore();
  };
  const series = [{}, ...bins.map(() => ({ run, paths: () => null, points: { show: false } }))];
  return frame({ title, about, steps: step, lines, data: [step, ...bins],
    draw: { series, scales: SHARE, cursor: { y: false, sync: { key: "steps", scales: ["x", null] }, points: { show: false } },
      hooks: { drawClear: [paint] } } });
}
