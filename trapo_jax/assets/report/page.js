"use strict";
// Builds the page from DATA.runs; `read_run` in runs/report.py defines each run's fields.

const REWARD_PREFIX = "rewards/"; // Followed by a reward function's name.
const LEVEL_PREFIX = "guidance/level_"; // Followed by the index of a micro-group.
const PART_COLORS = 4;

function state(run) {
  return run.complete ? `complete, ${run.num_steps} steps` : `step ${run.step} of ${run.num_steps}`;
}

function summary() {
  const spent = (run) => Object.values(run.seconds).reduce((a, b) => a + b);
  const runs = DATA.runs.map((run, i) => [make("span", {}, swatch(i), run.name), run.method, state(run),
    run.tokens.sampled, run.tokens.trained, seconds(spent(run))]);
  const names = [...new Set(DATA.runs.flatMap((run) => run.scores.map(([name]) => name)))];
  const score = (run, name, k) => run.scores.find((row) => row[0] === name)?.[k] ?? null;
  const heads = DATA.runs.flatMap((run) => (DATA.runs.length > 1 ? [`${run.name}: before`, `${run.name}: after`] : ["before", "after"]));
  const shown = [...new Set(DATA.runs.flatMap((run) => run.shown_settings))];
  const fields = [...new Set(DATA.runs.flatMap((run) => Object.keys(run.settings)))];
  const settings = (chosen) => table("Settings", ["setting", ...DATA.runs.map((run) => run.name)],
    chosen.map((field) => [field, ...DATA.runs.map((run) => run.settings[field] ?? "–")]));
  return [
    table("Runs", ["run", "method", "state", "tokens sampled", "tokens trained", "time"], runs),
    make("div", { class: "columns" },
      make("div", {}, make("h3", {}, "Test split"), ...sampling(),
        table("Test split, before and after training", ["score", ...heads], names.map((name) =>
          [name, ...DATA.runs.flatMap((run) => [fixed(score(run, name, 1)), fixed(score(run, name, 2))])]))),
      make("div", {}, make("h3", {}, "Settings"), settings(shown), folded("All settings", () => settings(fields)))),
  ];
}

// Returns paragraphs that describe how the scores were sampled: one if all runs agree, otherwise one per run.
function sampling() {
  const scored = DATA.runs.filter((run) => run.scored_samples);
  const same = new Set(scored.map((run) => run.scored_samples)).size === 1;
  return (same ? scored.slice(0, 1) : scored).map((run) =>
    make("p", { class: "muted" }, `${same ? "" : `${run.name}: `}${run.scored_samples} (greedy: 1)`));
}

// Returns checkboxes that select the runs shown in the charts.
function runToggles() {
  const toggle = (i) => (event) => charts.forEach(({ chart, runs }) => chart.batch(() => runs.forEach((run, k) => {
    if (run === i) chart.setSeries(k, { show: event.target.checked });
  })));
  return make("fieldset", {}, make("legend", {}, "Runs"), ...DATA.runs.map((run, i) => make("label", {},
    make("input", { type: "checkbox", checked: true, change: toggle(i) }), " ", swatch(i), run.name)));
}

function timeTable() {
  const rows = DATA.runs.map((run) => {
    const total = Object.values(run.seconds).reduce((a, b) => a + b) || 1;
    return [run.name, ...Object.values(run.seconds).map((s) => `${seconds(s)} (${Math.round((100 * s) / total)}%)`)];
  });
  return table("Time spent", ["run", ...Object.keys(DATA.runs[0].seconds)], rows);
}

// Returns the names of the reward functions whose rewards are logged separately.
function rewardFunctions() {
  const names = DATA.runs.flatMap((run) => Object.keys(run.columns)).filter((name) => name.startsWith(REWARD_PREFIX));
  return [...new Set(names)].map((name) => name.slice(REWARD_PREFIX.length));
}

function curves() {
  const stepsPerPoint = Math.max(...DATA.runs.map((run) => run.steps_per_point));
  const some = (metric) => (run) => run.columns[metric].some((v) => v !== null && v !== 0);
  const each = (has, build) => DATA.runs.flatMap((run, i) => (has(run)
    ? [build(run.columns, i, DATA.runs.length > 1 ? `: ${run.name}` : "")] : []));
  const part = (name, tone, values) => ({ name, color: `--part-${tone}`, values });
  return [
    make("p", { class: "muted" }, "Thin line: " + (stepsPerPoint > 1 ? `means of ${stepsPerPoint} steps` : "each step")
      + ". Bold line: moving average. Drag across a chart to zoom in; double-click to reset."),
    DATA.runs.length > 1 ? runToggles() : null,
    make("div", { class: "charts" }, ...[
      lineChart({ title: "Reward", about: "mean over sampled rollouts, including guided ones", metric: "reward/sampled_mean", scales: SHARE }),
      lineChart({ title: "Reward without guidance", about: "mean over rollouts without an expert prefix", metric: "reward/unguided_mean", scales: SHARE }),
      ...rewardFunctions().map((name) => lineChart({ title: `Reward: ${name}`, about: "mean of this reward function over all rollouts", metric: REWARD_PREFIX + name, scales: SHARE })),
      lineChart({ title: "No answer", about: "share of sampled rollouts in which the reward function found no answer", metric: "reward/no_answer", scales: SHARE }),
      accuracyChart({ title: "Accuracy, sampled", about: "line: validation split; large points: test split", field: "sampled" }),
      accuracyChart({ title: "Accuracy, greedy", about: "line: validation split; large points: test split", field: "greedy" }),
      lineChart({ title: "Entropy", about: "mean entropy of the policy at completion tokens, in nats", metric: "policy/entropy" }),
      lineChart({ title: "Completion length", about: "mean, in tokens", metric: "completion/len_mean" }),
      lineChart({ title: "Truncated", about: "share of rollouts that reached the length limit", metric: "completion/truncated", scales: SHARE }),
      ...each(some("guidance/ratio_mean"), (c, i, of) => stackChart({ run: i, title: `Guidance level${of}`,
        about: "share of problems by last guided micro-group",
        parts: Object.keys(c).filter((name) => name.startsWith(LEVEL_PREFIX)).map((name, k) =>
          part(k ? `micro-group ${k + 1}` : "unguided", k % PART_COLORS, c[name])) })),
      ...each(some("batch/expert_trained_tokens"), (c, i, of) => stackChart({ run: i, title: `Expert gradient${of}`,
        about: "share of the gradient from tokens inside (p ≥ alpha) and outside (p < alpha) the trust region",
        parts: [part("inside", 3, c["expert/gradient_share_inside"]),
          part("outside", 1, c["expert/gradient_share_inside"].map((v) => (v === null ? null : 1 - v)))] })),
      ...each(some("batch/expert_trained_tokens"), (c, i, of) => heatMap({ run: i, title: `Probability of expert tokens${of}`,
        about: "a stronger color means a larger share of the trained expert tokens",
        bins: [...Array(10).keys()].map((k) => c[`expert/prob_from_${(k / 10).toFixed(1)}`]) })),
      lineChart({ title: "Throughput", about: "trained tokens per second, including sampling and grading", metric: "time/tokens_per_sec" }),
      ...each(some("time/train_secs"), (c, i, of) => stackChart({ run: i, title: `Seconds per step${of}`, about: "excluding evaluation and checkpoints; the axis cuts off steps that include compilation",
        scales: { y: { range: () => [0, nearlyAll(c["time/train_secs"].map((s, k) => s + c["time/sample_secs"][k] + c["time/reward_secs"][k]))] } },
        parts: [part("sampling", 1, c["time/sample_secs"]), part("waiting for rewards", 2, c["time/reward_secs"]), part("training", 3, c["time/train_secs"])] })),
    ].filter((chart) => chart !== null)),
    make("h3", {}, "Time spent"),
    timeTable(),
  ].filter((node) => node !== null);
}

// Applies the light or dark theme: the system preference until the button selects one.
function themes() {
  const system = matchMedia("(prefers-color-scheme: dark)"), button = document.getElementById("theme");
  let chosen = "system";
  const apply = () => {
    document.documentElement.dataset.theme = chosen === "system" ? (system.matches ? "dark" : "light") : chosen;
    button.textContent = `Theme: ${chosen}`;
    charts.forEach(({ chart }) => chart.redraw(false));
  };
  button.addEventListener("click", () => { chosen = { system: "light", light: "dark", dark: "system" }[chosen]; apply(); });
  system.addEventListener("change", apply);
  apply();
}

themes();
document.getElementById("summary").append(...summary());
document.getElementById("curves").append(...curves());
document.getElementById("rollouts").append(reader());
