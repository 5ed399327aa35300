"use strict";
// The page itself: what is chosen, and everything that follows from it.

const state = {
  query: 0, key: null, locked: false, // key null: the one with the largest weight, in each view its own
  shown: "induction", order: "grid", scale: "root", labels: new Set(LABELS),
  table: { sort: "score", down: true, family: "induction", model: "", label: "" },
  kinds: new Set(), threshold: 0, moment: 0,
};
const views = [];
const byId = id => document.getElementById(id);
const options = (pairs, chosen) => pairs.map(([value, text]) => `<option value="${esc(value)}"${value === chosen ? " selected" : ""}>${esc(text)}</option>`).join("");

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
  requestAnimationFrame(() => { waiting = false; for (const view of views) view.showQuery(); });
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
  byId("banners").innerHTML = models.map(model => {
    const facts = [["parameters", short(model.params)], ["step", whole(model.step)], ["tokens seen", short(model.tokens)],
      ["val loss", fixed(model.val_loss, 3)], ["heads", `${model.layers} × ${model.heads}`]];
    if (number(model.icl_score) !== null) facts.push(["in-context score", signed(model.icl_score, 2)]);
    return `<article class="banner ${model.untrained ? "untrained" : ""}" style="--own:${colorOf(model)}">
      <h2><span class="kind kind-${esc(model.kind.toLowerCase())}">${esc(model.kind)}</span> ${esc(model.name)}</h2>
      ${model.untrained ? '<p class="alarm"><b>Untrained.</b> These weights are random: nothing below was learned.</p>' : ""}
      <dl>${facts.map(([name, value]) => `<div><dt>${name}</dt><dd>${value}</dd></div>`).join("")}</dl>
      <p class="source" title="${esc(model.source || "")}">${esc(model.source || "source unknown")}</p></article>`;
  }).join("");
}

// ---------------------------------------------------------------------------
// table

const COLUMNS = [ // key, heading, digits or null for text, text of a cell
  ["model", "Model"], ["head", "Head"], ["label", "Label"], ["score", "Score"], ["null", "Null"], ["control", "Control"], ["gap", "Gap"],
  ["interval", "Interval"], ["copying", "Copying"], ["effective_copying", "as read"], ["zero_ablation", "Δ zero"], ["mean_ablation", "Δ mean"], ["pattern_ablation", "Δ pattern kept"],
];
const EXPLAINED = {
  null: "what a head that looks everywhere alike would score", control: "the same places in a sequence that does not repeat",
  gap: "the score when other tokens stand between the two copies", interval: "confidence interval of the score over sequences; sorts by its lower end",
  copying: "by weights, from the embedding. 1: whatever it looks at, it makes likelier; −1: less likely",
  effective_copying: "copying of what the head really reads, which the layers before it may have turned round", zero_ablation: "loss added when the head's output is set to zero (nats)",
  mean_ablation: "loss added when the head's output is replaced by its mean (nats)",
  pattern_ablation: "loss added when the head is removed but later heads keep their patterns (nats)",
};

function cell({ model, head }, key) { // what a column sorts by
  if (key === "model") return model.name;
  if (key === "head") return head;
  if (key === "label") return model.label(head) || null;
  if (key === "interval") return model.score(head, state.table.family, "low");
  return ["score", "null", "control", "gap"].includes(key) ? model.score(head, state.table.family, key) : model.score(head, key);
}

/** Score, null, control and interval on one line from 0 to 1. */
function whisker({ model, head }) {
  const [score, low, high, none, control] = ["score", "low", "high", "null", "control"].map(part => model.score(head, state.table.family, part));
  const place = value => `${(100 * Math.max(0, Math.min(1, value))).toFixed(1)}%`;
  const says = low === null || high === null ? "no interval" : `${fixed(low, 3)} to ${fixed(high, 3)}`;
  return `<span class="whisker" role="img" aria-label="${says}" title="${says}">` +
    (none === null ? "" : `<i class="null" style="left:${place(none)}"></i>`) + (control === null ? "" : `<i class="control" style="left:${place(control)}"></i>`) +
    (low === null || high === null ? "" : `<i class="range" style="left:${place(low)};width:${(100 * Math.max(0, Math.min(1, high) - Math.max(0, low))).toFixed(1)}%"></i>`) +
    (score === null ? "" : `<i class="score" style="left:${place(score)}"></i>`) + "</span>";
}

function showTable() {
  const { sort, down, family, model: only, label } = state.table;
  const rows = models.filter(model => only === "" || model.index === Number(only))
    .flatMap(model => Array.from({ length: model.count }, (_, head) => ({ model, head })))
    .filter(({ model, head }) => label === "" || model.label(head) === (label === "none" ? "" : label));
  rows.sort((a, b) => {
    const [x, y] = [cell(a, sort), cell(b, sort)];
    if (x === null || y === null) return (x === null) - (y === null); // what was not measured comes last, either way
    const order = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (down ? -order : order) || a.model.index - b.model.index || a.head - b.head;
  });
  const shown = COLUMNS.filter(([key]) => key !== "model" || models.length > 1);
  byId("table").tHead.innerHTML = `<tr>${shown.map(([key, name]) => `<th scope="col" class="col-${key}" aria-sort="${key !== sort ? "none" : down ? "descending" : "ascending"}">
    <button type="button" data-sort="${key}" title="${esc(EXPLAINED[key] || `sort by ${name.toLowerCase()}`)}">${name}</button></th>`).join("")}</tr>`;
  byId("table").tBodies[0].innerHTML = rows.map(row => {
    const { model, head } = row, name = model.label(head);
    const text = {
      model: () => `<span class="kind kind-${esc(model.kind.toLowerCase())}">${esc(model.kind)}</span> <span class="model-name" title="${esc(model.name)}">${esc(model.name)}</span>`,
      head: () => `<button type="button" class="head-link" data-model="${model.index}" data-head="${head}">${model.nameOf(head)}</button>`,
      label: () => name ? `<span class="label label-${esc(name)}">${esc(name)}</span>` : '<span class="quiet">–</span>',
      interval: () => whisker(row),
    };
    return `<tr>${shown.map(([key]) => `<td class="col-${key}">${text[key]?.() ?? (key.endsWith("ablation") ? signed(cell(row, key)) : fixed(cell(row, key), key.endsWith("copying") ? 2 : 3))}</td>`).join("")}</tr>`;
  }).join("");
  byId("table-count").textContent = `${rows.length} heads`;
}

function setTable(change) {
  Object.assign(state.table, change);
  showTable();
}

/** Whatever was measured on groups of heads: a small dict of numbers, lists of heads and dicts of these. */
function showGroups() {
  const pairs = list => Array.isArray(list) && list.length && list.every(item => Array.isArray(item) && item.length === 2);
  const tell = (value, about = "") => pairs(value) ? value.map(([layer, head]) => `L${layer}\u202fH${head}`).join(", ") : Array.isArray(value) ? value.map(tell).join(", ")
    : value !== null && typeof value === "object" ? Object.entries(value).map(([key, item]) => `${key.replaceAll("_", " ")} ${tell(item, key)}`).join(" · ")
      : number(value) === null ? (value === null ? "–" : String(value)) : Number.isInteger(value) ? String(value) : about === "loss" ? fixed(value, 3) : signed(value);
  byId("groups").innerHTML = models.filter(model => model.group_ablation && Object.keys(model.group_ablation).length).map(model =>
    `<article class="card"><h3><span class="kind kind-${esc(model.kind.toLowerCase())}">${esc(model.kind)}</span> ${esc(model.name)}: heads ablated together, Δ loss in nats</h3>
    <dl>${Object.entries(model.group_ablation).map(([key, value]) => `<div><dt>${esc(key.replaceAll("_", " "))}</dt><dd>${esc(tell(value, key))}</dd></div>`).join("")}</dl></article>`).join("");
}

// ---------------------------------------------------------------------------
// plots

function showLoss() {
  const measured = models.filter(model => model.loss_by_position?.x?.length);
  byId("loss-section").hidden = !measured.length;
  if (!measured.length) return;
  lineChart(byId("loss-plot"), {
    title: "Loss by position", xName: "position", yName: "nats", width: 1100, height: 320, xText: String,
    series: measured.flatMap(model => [["repeated", ""], ["control", "5 4"]].filter(([key]) => model.loss_by_position[key]?.length)
      .map(([key, dash]) => ({ name: `${model.name}, ${key}`, color: colorOf(model), dash, x: model.loss_by_position.x, y: model.loss_by_position[key] }))),
  });
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

function showTraining() {
  byId("training-section").hidden = !runs.length;
  if (!runs.length) return;
  const spoken = runs.some(run => run.max_text?.some(value => number(value) !== null)); // held-out text was said twice as well
  const kinds = [["max_induction", "Strongest induction score", "score"], ...spoken ? [["max_text", "... on held-out text", "score"], ["max_previous", "Strongest previous-token score", "score"]] : [],
    ["icl", "In-context score", "nats"], ["repeat_loss", "Loss on repeats", "nats"], ["text_repeat_loss", "Loss on repeated text", "nats"]]
    .filter(([key]) => runs.some(run => run[key]?.some(value => number(value) !== null)));
  byId("training-plots").innerHTML = kinds.map(() => '<div class="figure"></div>').join("");
  curves = kinds.map(([key, title, yName], i) => lineChart(byId("training-plots").children[i], {
    title, xName: "tokens seen", yName, log: true, width: 420, height: 260,
    series: runs.filter(run => run[key]?.length).map(run => ({ name: run.name, color: run.color(), x: run.tokens, y: run[key] })),
  }));
  showMoment();
}

function showMoment() {
  const moment = moments[state.moment];
  byId("moment-value").textContent = short(moment);
  for (const curve of curves) curve.mark(moment);
  byId("training-maps").innerHTML = runs.map(run => {
    const last = run.tokens.reduce((best, tokens, i) => tokens <= moment ? i : best, -1), scores = run.scores?.[last];
    if (!run.scores) return "";
    const step = number(run.step?.[last]);
    const body = !scores ? '<p class="quiet">no checkpoint yet</p>' : `<div class="heat" style="--heads:${scores[0].length};--cell:${Math.max(14, Math.min(56, 330 / scores.length))}px">${scores.map((row, layer) => `<span class="row">L${layer}</span>` +
      row.map((value, head) => `<i style="background:${number(value) === null ? "transparent" : weightColor(Math.max(0, Math.min(1, value)))};color:${inkOn(Math.max(0, Math.min(1, number(value) ?? 0)))}"
        title="L${layer} H${head}: ${fixed(value, 3)}">${row.length <= 8 ? fixed(value) : ""}</i>`).join("")).join("")}</div>`;
    return `<article><h3><i class="swatch" style="background:${run.color()}"></i>${esc(run.name)} <span class="quiet">${step === null ? "" : `step ${whole(step)}`}${last < 0 ? "" : ` · ${short(run.tokens[last])} tokens`}</span></h3>${body}</article>`;
  }).join("");
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

function setUpControls() {
  const measured = Object.entries(SCORES).filter(([key]) => models.some(model => [...model.scoreOf.keys()].some(head => model.score(head, key) !== null)));
  byId("shown-score").innerHTML = options((measured.length ? measured : Object.entries(SCORES)).map(([key, [name]]) => [key, name]), state.shown);
  const heads = () => { for (const view of views) view.showThumbs(); };
  byId("shown-score").onchange = event => { state.shown = event.target.value; heads(); };
  byId("order").onchange = event => { state.order = event.target.value; heads(); };
  byId("scale").onchange = event => { state.scale = event.target.value; repaint(); };
  const count = label => models.reduce((sum, model) => sum + Array.from({ length: model.count }, (_, head) => head).filter(head => model.label(head) === label).length, 0);
  const found = LABELS.filter(label => count(label));
  byId("chips").innerHTML = found.map(label => `<button type="button" class="chip" data-label="${label}" aria-pressed="true"><i class="dot label-${label || "none"}"></i>${labelName(label)} <span class="quiet">${count(label)}</span></button>`).join("");
  byId("chips").onclick = event => toggle(event, "label", state.labels, heads);
  byId("second-view").onclick = () => setViews(views.length > 1 ? 1 : 2);
  byId("table-family").innerHTML = options(FAMILIES.filter(key => key !== "on_text" || models.some(model => model.score(0, key) !== null)).map(key => [key, SCORES[key][0]]), state.table.family);
  byId("table-family").onchange = event => setTable({ family: event.target.value });
  byId("table-model").innerHTML = options([["", "all"], ...models.map(model => [String(model.index), model.name])], "");
  byId("table-model").parentElement.hidden = models.length < 2;
  byId("table-model").onchange = event => setTable({ model: event.target.value });
  byId("table-label").innerHTML = options([["", "all"], ...found.map(label => [label || "none", labelName(label)])], "");
  byId("table-label").onchange = event => setTable({ label: event.target.value });
  byId("table").onclick = event => {
    const { sort, model, head } = event.target.dataset;
    if (sort) {
      const text = ["model", "head", "label"].includes(sort);
      setTable({ sort, down: sort === state.table.sort ? !state.table.down : !text });
      byId("table").querySelector(`[data-sort="${sort}"]`).focus();
    } else if (model !== undefined) selectHead(models[model], Number(head));
  };
  Object.assign(byId("moment"), { max: Math.max(0, moments.length - 1) });
  state.moment = Math.max(0, moments.length - 1);
  byId("moment").value = state.moment;
  byId("moment").oninput = event => { state.moment = Number(event.target.value); showMoment(); };
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
