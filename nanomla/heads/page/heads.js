"use strict";
// The page itself: what is chosen, and everything that follows from it.

const state = {
  query: 0,
  key: null, // null: the one with the largest weight, in each view its own
  locked: false,
  shown: "induction", // the score on the small maps
  order: "grid",
  scale: "root",
  labels: new Set(LABELS),
  table: { sort: "score", down: true, family: "induction", model: "", label: "" },
  kinds: new Set(), // of composition
  threshold: 0,
  moment: 0,
};
const views = [];
const byId = id => document.getElementById(id);

/** <option>s of [value, text] pairs. */
function options(pairs, chosen) {
  const option = ([value, text]) =>
    `<option value="${esc(value)}"${value === chosen ? " selected" : ""}>${esc(text)}</option>`;
  return pairs.map(option).join("");
}

const kindBadge = model =>
  `<span class="kind kind-${esc(model.kind.toLowerCase())}">${esc(model.kind)}</span>`;

// ---------------------------------------------------------------------------
// one query for all views

let waiting = false;

/** Look at query q and key k (null: the largest weight) in every view. */
function setQuery(q, k) {
  if (q === state.query && k === state.key) return;
  Object.assign(state, { query: q, key: k });
  queryChanged();
}

function setLocked(locked) {
  state.locked = locked;
  document.body.classList.toggle("locked", locked);
  queryChanged();
}

function queryChanged() { // at most once a frame
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const view of views) view.showQuery();
  });
}

/** Show a head: in the view that has its model, else in the last one. */
function selectHead(model, head) {
  const view = views.find(view => view.model === model) || views[views.length - 1];
  if (view.model !== model) view.setModel(model);
  view.setHead(head);
  view.root.scrollIntoView({ block: "nearest", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

function setViews(count) {
  while (views.length > count) views.pop().root.remove();
  while (views.length < count) {
    const view = new View(models[Math.min(views.length, models.length - 1)]);
    views.push(view);
    byId("views").append(view.root);
  }
  byId("views").className = count > 1 ? "two" : "one";
  byId("second-view").textContent = count > 1 ? "One view" : "Compare side by side";
  for (const view of views) view.render();
}

// ---------------------------------------------------------------------------
// banners

function showBanners() {
  byId("banners").innerHTML = models.map(banner).join("");
}

function banner(model) {
  const facts = [
    ["parameters", short(model.params)],
    ["step", whole(model.step)],
    ["tokens seen", short(model.tokens)],
    ["val loss", fixed(model.val_loss, 3)],
    ["heads", `${model.layers} × ${model.heads}`],
  ];
  if (number(model.icl_score) !== null) facts.push(["in-context score", signed(model.icl_score, 2)]);
  const alarm = '<p class="alarm"><b>Untrained.</b> These weights are random: nothing below was learned.</p>';
  const terms = facts.map(([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`);
  return `<article class="banner ${model.untrained ? "untrained" : ""}" style="--own:${colorOf(model)}">
    <h2>${kindBadge(model)} ${esc(model.name)}</h2>${model.untrained ? alarm : ""}
    <dl>${terms.join("")}</dl>
    <p class="source" title="${esc(model.source || "")}">${esc(model.source || "source unknown")}</p></article>`;
}

// ---------------------------------------------------------------------------
// table

// Columns of every report; those of single scores come from the report's names.
const PARTS = ["score", "null", "control", "gap"];
const COLUMNS = [
  { key: "model", heading: "Model" },
  { key: "head", heading: "Head" },
  { key: "label", heading: "Label" },
  { key: "score", heading: "Score" },
  { key: "null", heading: "Null", help: "what a head that attends evenly would score" },
  { key: "control", heading: "Control", help: "the same positions in a sequence that does not repeat" },
  { key: "gap", heading: "Gap", help: "the score with other tokens between the two copies" },
  { key: "interval", heading: "Interval",
    help: "confidence interval of the score over sequences; sorts by its lower end" },
];
for (const score of Object.values(SCORES))
  if (score.column) COLUMNS.push({ key: score.key, heading: score.column, help: score.help });

/** What a column sorts by. */
function cell({ model, head }, key) {
  if (key === "model") return model.name;
  if (key === "head") return head;
  if (key === "label") return model.label(head) || null;
  if (key === "interval") return model.score(head, state.table.family, "low");
  if (PARTS.includes(key)) return model.score(head, state.table.family, key);
  return model.score(head, key);
}

/** A cell as HTML. */
function cellText(row, key) {
  const { model, head } = row;
  const label = model.label(head);
  if (key === "model")
    return `${kindBadge(model)} <span class="model-name" title="${esc(model.name)}">${esc(model.name)}</span>`;
  if (key === "head")
    return `<button type="button" class="head-link" data-model="${model.index}" data-head="${head}">${model.nameOf(head)}</button>`;
  if (key === "label" && label) return `<span class="label label-${esc(label)}">${esc(label)}</span>`;
  if (key === "label") return '<span class="quiet">–</span>';
  if (key === "interval") return whisker(row);
  const value = cell(row, key);
  if (SCORES[key]?.is_loss) return signed(value);
  return fixed(value, key in SCORES ? 2 : 3);
}

const clamp = value => Math.max(0, Math.min(1, value));
const percent = share => `${(100 * share).toFixed(1)}%`;

/** Score, null, control and interval on one line from 0 to 1. */
function whisker({ model, head }) {
  const part = name => model.score(head, state.table.family, name);
  const low = part("low"), high = part("high");
  const marks = ["null", "control"].filter(name => part(name) !== null)
    .map(name => `<i class="${name}" style="left:${percent(clamp(part(name)))}"></i>`);
  let text = "no interval";
  if (low !== null && high !== null) {
    text = `${fixed(low, 3)} to ${fixed(high, 3)}`;
    const width = Math.min(1, high) - Math.max(0, low);
    marks.push(`<i class="range" style="left:${percent(clamp(low))};width:${percent(width)}"></i>`);
  }
  if (part("score") !== null)
    marks.push(`<i class="score" style="left:${percent(clamp(part("score")))}"></i>`);
  return `<span class="whisker" role="img" aria-label="${text}" title="${text}">${marks.join("")}</span>`;
}

/** The rows of the table, {model, head}: those that the reader chose, in order. */
function tableRows() {
  const { model: only, label } = state.table;
  const rows = [];
  for (const model of models) {
    if (only !== "" && model.index !== Number(only)) continue;
    for (const head of model.allHeads)
      if (label === "" || (model.label(head) || "none") === label) rows.push({ model, head });
  }
  return rows.sort(compareRows);
}

function compareRows(a, b) {
  const x = cell(a, state.table.sort), y = cell(b, state.table.sort);
  // What was not measured comes last, either way.
  if (x === null || y === null) return (x === null) - (y === null);
  const order = typeof x === "string" ? x.localeCompare(y) : x - y;
  return (state.table.down ? -order : order) || a.model.index - b.model.index || a.head - b.head;
}

function headingCell({ key, heading, help }) {
  let sorted = "none";
  if (key === state.table.sort) sorted = state.table.down ? "descending" : "ascending";
  const title = esc(help || `sort by ${heading.toLowerCase()}`);
  return `<th scope="col" class="col-${key}" aria-sort="${sorted}">
    <button type="button" data-sort="${key}" title="${title}">${heading}</button></th>`;
}

/** One model needs no name in every row; a score that no model has needs no column. */
function isShown({ key }) {
  if (key === "model") return models.length > 1;
  return !(key in SCORES) || isMeasured(key);
}

function showTable() {
  const columns = COLUMNS.filter(isShown);
  const rows = tableRows();
  const bodyRow = row => columns.map(({ key }) => `<td class="col-${key}">${cellText(row, key)}</td>`).join("");
  byId("table").tHead.innerHTML = `<tr>${columns.map(headingCell).join("")}</tr>`;
  byId("table").tBodies[0].innerHTML = rows.map(row => `<tr>${bodyRow(row)}</tr>`).join("");
  byId("table-count").textContent = `${rows.length} heads`;
}

function setTable(change) {
  Object.assign(state.table, change);
  showTable();
}

/** A value of group_ablation as text: a number, a list of heads, or a small dict of these. */
function groupText(value, key = "") {
  if (value === null) return "–";
  if (isListOfHeads(value)) return value.map(([layer, head]) => `L${layer}\u202fH${head}`).join(", ");
  if (Array.isArray(value)) return value.map(item => groupText(item)).join(", ");
  if (typeof value === "object")
    return Object.entries(value).map(([name, item]) => `${words(name)} ${groupText(item, name)}`).join(" · ");
  if (number(value) === null) return String(value);
  if (Number.isInteger(value)) return String(value);
  return key === "loss" ? fixed(value, 3) : signed(value);
}

function isListOfHeads(value) {
  return Array.isArray(value) && value.length > 0 && value.every(item => Array.isArray(item) && item.length === 2);
}

const words = key => key.replaceAll("_", " ");

/** Whatever was measured on groups of heads. */
function showGroups() {
  const measured = models.filter(model => Object.keys(model.group_ablation || {}).length);
  const term = ([key, value]) =>
    `<div><dt>${esc(words(key))}</dt><dd>${esc(groupText(value, key))}</dd></div>`;
  byId("groups").innerHTML = measured.map(model => `<article class="card">
    <h3>${kindBadge(model)} ${esc(model.name)}: heads ablated together, Δ loss in nats</h3>
    <dl>${Object.entries(model.group_ablation).map(term).join("")}</dl></article>`).join("");
}

// ---------------------------------------------------------------------------
// plots

const LOSS_DASHES = { repeated: "", control: "5 4" };

function showLoss() {
  const measured = models.filter(model => model.loss_by_position?.x?.length);
  byId("loss-section").hidden = !measured.length;
  if (!measured.length) return;
  const series = [];
  for (const model of measured) {
    const losses = model.loss_by_position;
    for (const [key, dash] of Object.entries(LOSS_DASHES)) {
      if (!losses[key]?.length) continue;
      const name = `${model.name}, ${key}`;
      series.push({ name, color: colorOf(model), dash, x: losses.x, y: losses[key] });
    }
  }
  const axes = { title: "Loss by position", xName: "position", yName: "nats", xText: String };
  lineChart(byId("loss-plot"), { ...axes, width: 1100, height: 320, series });
}

const composed = models.filter(model => model.composition?.length);

function setUpGraphs() {
  byId("graph-section").hidden = !composed.length;
  if (!composed.length) return;
  const values = composed.flatMap(model => model.composition.map(edge => number(edge.value)).filter(value => value !== null)).sort((a, b) => b - a);
  const kinds = Object.keys(COMPOSITION).filter(kind => composed.some(model => model.composition.some(edge => edge.kind === kind)));
  state.kinds = new Set(kinds);
  state.threshold = null; // until the slider is moved: the strongest FEW of each model
  Object.assign(byId("threshold"), { min: Math.min(0, values[values.length - 1] ?? 0), max: Math.max(values[0] ?? 1, 1e-3) });
  byId("threshold").value = Math.min(...composed.map(strongest));
  byId("graph-kinds").innerHTML = kinds.map(kind => `<button type="button" class="chip kind-chip-${kind}" data-kind="${kind}" aria-pressed="true"><i></i>${kind}: ${COMPOSITION[kind]}</button>`).join("");
  byId("graph-kinds").onclick = event => toggle(event, "kind", state.kinds, showGraphs);
  byId("threshold").oninput = event => { state.threshold = Number(event.target.value); showGraphs(); };
  byId("graphs").innerHTML = composed.map(() => '<div class="figure"></div>').join("");
  showGraphs();
}

function showGraphs() {
  byId("threshold-value").textContent = state.threshold === null ? `the strongest ${FEW} of each` : fixed(state.threshold, 3);
  composed.forEach((model, i) => drawGraph(byId("graphs").children[i], model));
}

/** A chip switched on or off. */
function toggle(event, name, set, then) {
  const chip = event.target.closest("button");
  if (!chip) return;
  const value = chip.dataset[name];
  if (!set.delete(value)) set.add(value);
  chip.setAttribute("aria-pressed", String(set.has(value)));
  then();
}

// ---------------------------------------------------------------------------
// through training

const runs = (report.checkpoints || []).filter(run => run?.tokens?.length).map((run, i, all) => {
  const model = models.find(model => model.name === run.name), kind = model?.kind || "MHA";
  return { ...run, model, color: () => model ? colorOf(model) : modelColor(kind, all.slice(0, i).length) };
});
const moments = [...new Set(runs.flatMap(run => run.tokens))].sort((a, b) => a - b);
let curves = [];

const isMeasuredInRun = (run, key) => (run[key] || []).some(value => number(value) !== null);

/** The curves of this report: [key, title, unit]. */
function curvesOfRuns() {
  // Held-out text is measured beside the random tokens where it is here.
  const hasText = runs.some(run => isMeasuredInRun(run, "max_text"));
  const curves = [["max_induction", "Strongest induction score", "score"]];
  if (hasText) {
    curves.push(["max_text", "... on held-out text", "score"]);
    curves.push(["max_previous", "Strongest previous-token score", "score"]);
  }
  curves.push(["icl", "In-context score", "nats"]);
  curves.push(["repeat_loss", "Loss on repeats", "nats"]);
  curves.push(["text_repeat_loss", "Loss on repeated text", "nats"]);
  return curves.filter(([key]) => runs.some(run => isMeasuredInRun(run, key)));
}

function showTraining() {
  byId("training-section").hidden = !runs.length;
  if (!runs.length) return;
  const shown = curvesOfRuns();
  byId("training-plots").innerHTML = shown.map(() => '<div class="figure"></div>').join("");
  curves = shown.map(([key, title, yName], i) => {
    const measured = runs.filter(run => run[key]?.length);
    const series = measured.map(run =>
      ({ name: run.name, color: run.color(), x: run.tokens, y: run[key] }));
    const size = { width: 420, height: 260 };
    const axes = { title, xName: "tokens seen", yName, log: true };
    return lineChart(byId("training-plots").children[i], { ...axes, ...size, series });
  });
  showMoment();
}

function showMoment() {
  const moment = moments[state.moment];
  byId("moment-value").textContent = short(moment);
  for (const curve of curves) curve.mark(moment);
  const mapped = runs.filter(run => run.scores);
  byId("training-maps").innerHTML = mapped.map(run => mapAt(run, moment)).join("");
}

/** A run's map of induction scores at its last checkpoint up to a moment. */
function mapAt(run, moment) {
  const last = run.tokens.reduce((best, tokens, i) => (tokens <= moment ? i : best), -1);
  const facts = [];
  if (number(run.step?.[last]) !== null) facts.push(`step ${whole(run.step[last])}`);
  if (last >= 0) facts.push(`${short(run.tokens[last])} tokens`);
  const body = last < 0 ? '<p class="quiet">no checkpoint yet</p>' : heatMap(run.scores[last]);
  return `<article><h3><i class="swatch" style="background:${run.color()}"></i>${esc(run.name)}
    <span class="quiet">${facts.join(" · ")}</span></h3>${body}</article>`;
}

/** Scores [layer][head] as coloured cells; with a number in each where there is room. */
function heatMap(scores) {
  const side = Math.max(14, Math.min(56, 330 / scores.length));
  const heads = scores[0].length;
  const cells = scores.map((row, layer) => {
    const name = `<span class="row">L${layer}</span>`;
    return name + row.map((value, head) => heatCell(value, `L${layer} H${head}`, heads <= 8)).join("");
  });
  return `<div class="heat" style="--heads:${heads};--cell:${side}px">${cells.join("")}</div>`;
}

function heatCell(value, name, hasRoom) {
  const share = clamp(number(value) ?? 0);
  const background = number(value) === null ? "transparent" : weightColor(share);
  return `<i style="background:${background};color:${inkOn(share)}"
    title="${name}: ${fixed(value, 3)}">${hasRoom ? fixed(value) : ""}</i>`;
}

// ---------------------------------------------------------------------------
// legend

/** A small triangle of [first, S, S], |S| = 4, with the cells that `hit(q, k)` names filled. */
function pictogram(hit) {
  const cells = [];
  for (let q = 0; q < 9; q++) for (let k = 0; k <= q; k++) cells.push(`<rect x="${7 * k}" y="${7 * q}" width="6" height="6" rx="1" class="${hit(q, k) ? "hit" : ""}"/>`);
  return `<svg viewBox="0 0 63 63" width="72" height="72" aria-hidden="true">${cells.join("")}</svg>`;
}

const MEANINGS = [
  ["induction", (q, k) => q > 4 && k === q - 3, "Finds the earlier copy of the token it stands on and looks at what came <em>after</em> it: seen “A B … A”, it looks at B. With a head that copies, the model then says B again. The score is the mean weight on that key, over the second copy. A head is called induction only when it also beats its null, its control and the gap test."],
  ["previous", (q, k) => q > 0 && k === q - 1, "Looks one token back. Induction needs it: it writes “what stood before me” where an induction head can find it."],
  ["duplicate", (q, k) => q > 4 && k === q - 4, "Looks at the earlier copy of the very token it stands on, not at what followed."],
  ["current", (q, k) => k === q, "Looks at its own token."],
  ["first", (q, k) => k === 0, "Looks at the first token, where heads often rest when they have nothing to do."],
  ["positional", (q, k) => q > 2 && k === q - 3, "Looks a fixed distance back whatever the tokens are. On repeats of one length this draws the same stripe as induction; the control and the gap tell them apart."],
];
const [early, late] = models.find(model => model.icl_positions?.length === 2)?.icl_positions || [50, 500];
const TERMS = [
  ["Null", "What a head that spreads its attention evenly scores, about 1/(q+1) a row. Not zero."],
  ["Control", "The score at the same places when the second half is other tokens. A head that scores here as well matches positions, not tokens."],
  ["Gap", "The score when filler stands between the two copies, so that the distance is new. Only matching by content survives it."],
  ["Copying", "From the weights alone: does the head make the token that it looks at likelier as the next one? 1 always, −1 the opposite."],
  ["Δ loss", "What the model loses, in nats, without the head. Zero: its output is set to zero. Mean: to its mean. Pattern kept: later heads keep looking where they looked, so what remains is the head's direct part."],
  ["In-context score", `Loss at position ${late} minus loss at position ${early}: how much a longer context helps. More negative is better.`],
  ["Logit parts (MLA)", "Before the softmax, a logit of MLA is a sum: content, read from the latent, and RoPE, which carries position."],
  ["Weights", "Stored in steps of 1/255. A row's weights sum to 1. Small maps show the largest weight under each pixel, so that thin stripes stay visible."],
];

function showLegend() {
  byId("legend").innerHTML = `<div class="cards">${MEANINGS.map(([name, hit, text]) => `<article class="card">${pictogram(hit)}<div><h3><i class="dot label-${name}"></i>${name}</h3><p>${text}</p></div></article>`).join("")}</div>
    <dl class="terms">${TERMS.map(([name, text]) => `<div><dt>${name}</dt><dd>${text}</dd></div>`).join("")}</dl>`;
}

// ---------------------------------------------------------------------------
// beginning

/** Whether any head of any model has a number for a score. */
function isMeasured(key) {
  return models.some(model => model.allHeads.some(head => model.score(head, key) !== null));
}

/** How many heads of all models have a label. */
function countOf(label) {
  let count = 0;
  for (const model of models) count += model.allHeads.filter(head => model.label(head) === label).length;
  return count;
}

function showAllThumbs() {
  for (const view of views) view.showThumbs();
}

function setUpControls() {
  const found = LABELS.filter(label => countOf(label) > 0);
  setUpToolbar(found);
  setUpTableControls(found);
  const last = Math.max(0, moments.length - 1);
  state.moment = last;
  byId("moment").max = last;
  byId("moment").value = last;
  byId("moment").oninput = event => {
    state.moment = Number(event.target.value);
    showMoment();
  };
}

/** What is above the maps: which score, in which order, on which scale, which labels. */
function setUpToolbar(labels) {
  const all = Object.keys(SCORES);
  const measured = all.filter(isMeasured);
  const keys = measured.length ? measured : all;
  byId("shown-score").innerHTML = options(keys.map(key => [key, SCORES[key].name]), state.shown);
  byId("shown-score").onchange = event => {
    state.shown = event.target.value;
    showAllThumbs();
  };
  byId("order").onchange = event => {
    state.order = event.target.value;
    showAllThumbs();
  };
  byId("scale").onchange = event => {
    state.scale = event.target.value;
    repaint();
  };
  byId("chips").innerHTML = labels.map(labelChip).join("");
  byId("chips").onclick = event => toggle(event, "label", state.labels, showAllThumbs);
  byId("second-view").onclick = () => setViews(views.length > 1 ? 1 : 2);
}

function labelChip(label) {
  return `<button type="button" class="chip" data-label="${label}" aria-pressed="true">
    <i class="dot label-${label || "none"}"></i>${labelName(label)}
    <span class="quiet">${countOf(label)}</span></button>`;
}

/** What is above the table: which family of scores, which model, which label. */
function setUpTableControls(labels) {
  // Held-out text is not here for every model; the other families always are.
  const families = FAMILIES.filter(key => key !== "on_text" || isMeasured(key));
  const familyNames = families.map(key => [key, SCORES[key].name]);
  byId("table-family").innerHTML = options(familyNames, state.table.family);
  byId("table-family").onchange = event => setTable({ family: event.target.value });
  const modelNames = models.map(model => [String(model.index), model.name]);
  byId("table-model").innerHTML = options([["", "all"], ...modelNames], "");
  byId("table-model").parentElement.hidden = models.length < 2;
  byId("table-model").onchange = event => setTable({ model: event.target.value });
  const labelNames = labels.map(label => [label || "none", labelName(label)]);
  byId("table-label").innerHTML = options([["", "all"], ...labelNames], "");
  byId("table-label").onchange = event => setTable({ label: event.target.value });
  byId("table").onclick = event => {
    const { sort, model, head } = event.target.dataset;
    if (sort) sortTable(sort);
    else if (model !== undefined) selectHead(models[model], Number(head));
  };
}

/** Sort by a column; by the same one again, the other way round. */
function sortTable(key) {
  const isText = ["model", "head", "label"].includes(key);
  const down = key === state.table.sort ? !state.table.down : !isText;
  setTable({ sort: key, down });
  byId("table").querySelector(`[data-sort="${key}"]`).focus(); // the heading was drawn anew
}

/** All that carries colours of its own. */
function repaint() {
  for (const view of views) view.render();
  showBanners();
  showLoss();
  if (composed.length) showGraphs();
  showTraining();
}

function begin() {
  const made = report.made || {};
  byId("made").textContent = [made.date, made.commit ? `commit ${made.commit}` : ""].filter(Boolean).join(" · ");
  byId("footer").textContent = made.command || "";
  document.title = ["Attention heads", ...models.map(model => model.name)].join(" · ");
  showBanners();
  if (!models.length) { byId("views").innerHTML = '<p class="quiet">This report holds no model.</p>'; return; }
  state.query = Math.round(0.75 * (models[0].T - 1));
  setUpControls();
  setViews(Math.min(2, models.length));
  showLegend();
  setTimeout(() => { // below the first screen: after the first paint
    byId("table-section").hidden = models.every(model => !model.scoreOf.size);
    showTable();
    showGroups();
    showLoss();
    setUpGraphs();
    showTraining();
    document.body.classList.add("complete");
  });
  dark.addEventListener("change", repaint);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width === innerWidth) return;
    width = innerWidth;
    for (const view of views) { view.showHead(); view.showQuery(); }
  });
}

begin();
