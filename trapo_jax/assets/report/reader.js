"use strict";
// Builds the rollout reader. Tokens can be colored by kind or by their role in the update.

const KINDS = { 1: "prompt", 2: "expert, context only", 3: "expert, trained", 4: "completion" };
const PAGE = 8; // Rollouts per page.

const COLORINGS = {
  kind: { label: "token kind", legend: () => [1, 2, 3, 4].map((kind) => make("span", { class: `kind-${kind}` }, KINDS[kind])) },
  probability: { label: "probability", legend: () => caption("A stronger color means that the token is less likely under the policy.") },
  advantage: { label: "advantage", legend: () => [tinted("--for", 0.6, "above the group mean"), tinted("--against", 0.6, "below the group mean")] },
  gradient: { label: "gradient weight", legend: () => caption("A stronger color means that the token's log-probability has a larger weight in the update, relative to the largest weight in its group.") },
};

const caption = (text) => [make("span", {}, text)];

function tinted(name, strength, text) {
  const node = make("span", {}, text);
  tint(node, name, strength);
  return node;
}

function tint(node, name, strength) {
  node.style.backgroundColor = `rgb(var(${name}) / calc(var(--strongest) * ${strength.toFixed(3)}))`;
}

// Returns the rollouts of all runs, newest step first, each with the largest gradient weight in its group.
function allRollouts() {
  const rollouts = DATA.runs.flatMap((run, i) => run.samples.map((sample) => ({ ...sample, run: i })));
  const largest = new Map();
  const group = (r) => `${r.run} ${r.step} ${r.problem_id}`;
  for (const r of rollouts) {
    largest.set(group(r), Math.max(largest.get(group(r)) ?? 0, ...r.tokens.gradient_weights.map((w) => w ?? 0)));
  }
  for (const r of rollouts) r.largest = largest.get(group(r)) || 1;
  return rollouts.sort((a, b) => b.step - a.step || a.run - b.run
    || (a.problem_id < b.problem_id ? -1 : a.problem_id > b.problem_id ? 1 : a.sample_index - b.sample_index));
}

function paintToken(node, rollout, i, coloring) {
  const { kinds, logprobs, gradient_weights: weights } = rollout.tokens;
  const trained = logprobs[i] !== null;
  if (coloring === "kind") node.className = `kind-${kinds[i]}`;
  else if (!trained) node.className = "untrained";
  else if (coloring === "probability") tint(node, "--heat", 1 - Math.exp(logprobs[i]));
  else if (coloring === "gradient") tint(node, "--heat", Math.sqrt(weights[i] / rollout.largest));
  else if (kinds[i] === "4") tint(node, rollout.advantage < 0 ? "--against" : "--for", Math.min(1, Math.abs(rollout.advantage)));
}

function describeToken(rollout, i) {
  const { pieces, kinds, logprobs, gradient_weights: weights } = rollout.tokens;
  const text = `token ${i + 1}, ${JSON.stringify(pieces[i])}: ${KINDS[kinds[i]]}`;
  if (logprobs[i] === null) return `${text}, not trained`;
  const advantage = kinds[i] === "4" ? `, advantage ${number(rollout.advantage)}` : "";
  return `${text}, probability ${number(Math.exp(logprobs[i]))}${advantage}, gradient weight ${number(weights[i])}`;
}

// Returns a card that shows one rollout. Selecting a token with the arrow keys or the pointer describes it below the text.
function card(rollout, coloring) {
  const { pieces } = rollout.tokens;
  const spans = pieces.map((piece, i) => {
    const node = make("span", {}, piece);
    paintToken(node, rollout, i, coloring);
    return node;
  });
  const about = make("p", { class: "token" }, "");
  let current = -1;
  const show = (i, live) => {
    if (i < 0 || i >= spans.length) return;
    spans[current]?.classList.remove("current");
    spans[(current = i)].classList.add("current");
    if (live) about.setAttribute("aria-live", "polite");
    about.textContent = describeToken(rollout, i);
  };
  const text = make("div", { class: "text-of-rollout", tabindex: 0, role: "group",
    "aria-label": `Response to problem ${rollout.problem_id}, sample ${rollout.sample_index}; use the arrow keys to move between tokens`,
    pointerover: (e) => show(spans.indexOf(e.target), false),
    keydown: (e) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (by === undefined) return;
      e.preventDefault();
      show(Math.min(spans.length - 1, Math.max(0, current + by)), true);
      spans[current]?.scrollIntoView({ block: "nearest" });
    } }, make("span", { class: "prompt" }, rollout.prompt), ...spans);
  const leftOut = rollout.num_tokens - pieces.length;
  const guided = rollout.ratio > 0 ? `guided by ${number(rollout.ratio)} of the expert solution` : "unguided";
  const run = DATA.runs.length > 1 ? `${DATA.runs[rollout.run].name}, ` : "";
  return make("article", { class: "card" },
    make("p", {}, make("span", { class: "verdict" }, gradeText(rollout)),
      ` · advantage ${number(rollout.advantage)} · ${guided} · micro-group ${rollout.micro_group + 1} · ${rollout.num_tokens} tokens`),
    text,
    leftOut ? make("p", {}, `${leftOut} tokens in the middle are omitted`) : null,
    make("p", {}, `${run}step ${rollout.step}, problem ${rollout.problem_id}, sample ${rollout.sample_index}, finish reason ${rollout.finish_reason}; extracted answer: ${rollout.answer ?? "none"}; gold answer: ${rollout.gold}`),
    about,
    folded("Tokens as a table", () => table("Tokens", ["token", "text", "kind", "probability", "gradient weight"],
      pieces.map((piece, i) => [i + 1, JSON.stringify(piece), KINDS[rollout.tokens.kinds[i]],
        rollout.tokens.logprobs[i] === null ? null : Math.exp(rollout.tokens.logprobs[i]), rollout.tokens.gradient_weights[i]]))));
}

// Describes the grade, for example "correct, reward 0.9 (math 1, length 0.5)", including the reason for a missing reward.
function gradeText(rollout) {
  const names = Object.keys(rollout.rewards);
  const each = names.map((name) => `${name} ${rollout.missing[name] ? `missing: ${rollout.missing[name]}` : number(rollout.rewards[name])}`);
  const verdict = rollout.is_correct ? "correct" : rollout.rewards[names[0]] === null ? "not graded" : "wrong";
  const shown = names.length > 1 || Object.keys(rollout.missing).length > 0;
  return `${verdict}, reward ${rollout.reward === null ? "missing" : number(rollout.reward)}` + (shown ? ` (${each.join(", ")})` : "");
}

function choice(label, options, onChange) {
  const select = make("select", { change: onChange }, ...options.map(([value, text]) => make("option", { value }, text)));
  return { label: make("label", {}, label, select), select };
}

function distinct(rollouts, value, text = value) {
  const found = new Map(rollouts.map((r) => [String(value(r)), String(text(r))]));
  return [["", "all"], ...found];
}

// Returns a function that shortens a prompt to its beginning, without what all prompts have in common.
function shortener(prompts) {
  const first = prompts[0] ?? "";
  const shared = (at) => {
    let length = 0;
    while (length < first.length && prompts.every((p) => length < p.length && at(p, length) === at(first, length))) length += 1;
    return length;
  };
  if (prompts.every((p) => p === first)) return (prompt) => prompt.trim().slice(-40);
  const start = shared((p, i) => p[i]);
  const end = shared((p, i) => p[p.length - 1 - i]);
  return (prompt) => prompt.slice(start, Math.max(start, prompt.length - end)).trim().slice(0, 40);
}

function reader() {
  const rollouts = allRollouts();
  if (rollouts.length === 0) return make("p", { class: "muted" }, "No rollouts were logged (log_samples=0).");
  const rewardOf = (r) => (r.reward === null ? "missing" : r.reward === 1 ? "1" : r.reward === 0 ? "0" : "between 0 and 1");
  const shorten = shortener([...new Set(rollouts.map((r) => r.prompt))]);
  const fields = [
    ["Run", (r) => r.run, (r) => DATA.runs[r.run].name],
    ["Step", (r) => r.step, (r) => r.step],
    ["Problem", (r) => r.problem_id, (r) => `${r.problem_id.slice(0, 8)}  ${shorten(r.prompt)}`],
    ["Micro-group", (r) => r.micro_group + 1, (r) => r.micro_group + 1],
    ["Reward", rewardOf, rewardOf],
  ].filter(([name]) => name !== "Run" || DATA.runs.length > 1);
  let page = 0;
  const refilter = () => { page = 0; update(); };
  const filters = fields.map(([name, value, text]) => ({ value, ...choice(name, distinct(rollouts, value, text), refilter) }));
  const coloring = choice("Color by", Object.entries(COLORINGS).map(([name, c]) => [name, c.label]), () => update());
  const status = make("span", { role: "status" });
  const earlier = make("button", { type: "button", click: () => { page -= 1; update(); } }, "Previous");
  const later = make("button", { type: "button", click: () => { page += 1; update(); } }, "Next");
  const legend = make("div", { class: "legend" });
  const cards = make("div", { class: "cards" });

  function update() {
    const chosen = rollouts.filter((r) => filters.every((f) => f.select.value === "" || f.select.value === String(f.value(r))));
    const from = page * PAGE, shown = chosen.slice(from, from + PAGE);
    status.textContent = chosen.length ? `${from + 1} to ${from + shown.length} of ${chosen.length} rollouts` : "No matching rollouts";
    earlier.disabled = page === 0;
    later.disabled = from + PAGE >= chosen.length;
    legend.replaceChildren(...COLORINGS[coloring.select.value].legend());
    cards.replaceChildren(...shown.map((r) => card(r, coloring.select.value)));
  }

  update();
  const held = DATA.runs.map((run) => new Set(run.samples.map((s) => `${s.step} ${s.problem_id}`)).size);
  const selection = DATA.runs.map((run, i) => `${held[i]} of the ${run.num_groups} logged rollout groups of ${run.name}`).join(", ");
  return make("div", {},
    make("p", { class: "muted" }, `This report contains ${selection}, evenly spaced over each run. A group consists of the rollouts of one problem in one step.`),
    make("form", { class: "filters", submit: (e) => e.preventDefault() }, ...filters.map((f) => f.label), coloring.label),
    make("div", { class: "pager" }, earlier, later, status), legend, cards);
}
