"use strict";
// The page itself: what the reader chose, and everything that follows from it.

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
  threshold: null, // of composition; null: the strongest edges of each model
  moment: 0, // of training: an index into `moments`
};
const views = [];
const byId = id => document.getElementById(id);

/** <option>s of [value, text] pairs. */
function options(pairs, chosen) {
  const option = ([value, text]) => {
    const selected = value === chosen ? "selected" : "";
    return html`<option value="${value}" ${selected}>${text}</option>`;
  };
  return html`${pairs.map(option)}`;
}

/** Switch a chip on or off: its value joins or leaves a set. */
function toggleChip(event, name, set) {
  const chip = event.target.closest("button");
  if (!chip) return;
  const value = chip.dataset[name];
  if (!set.delete(value)) set.add(value);
  chip.setAttribute("aria-pressed", String(set.has(value)));
}

// ---------------------------------------------------------------------------
// one query for all views

let isFrameAsked = false;

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

/** Draw what a query attends to, at most once a frame. */
function queryChanged() {
  if (isFrameAsked) return;
  isFrameAsked = true;
  requestAnimationFrame(() => {
    isFrameAsked = false;
    for (const view of views) view.showQuery();
  });
}

/** Show a head: in the view that has its model, else in the last one. */
function selectHead(model, head) {
  const view = views.find(view => view.model === model) || views[views.length - 1];
  if (view.model !== model) view.setModel(model);
  view.setHead(head);
  const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
  view.root.scrollIntoView({ block: "nearest", behavior: isStill ? "auto" : "smooth" });
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

/** What a model is and how far it was trained, with warnings. */
function banner(model) {
  const facts = [
    ["parameters", short(model.params)],
    ["step", whole(model.step)],
    ["tokens seen", short(model.tokens)],
    ["val loss", fixed(model.val_loss, 3)],
    ["heads", `${model.layers} × ${model.heads}`],
  ];
  if (finite(model.icl_score) !== null) {
    facts.push(["in-context score", signed(model.icl_score, 2)]);
  }
  const terms = facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`);
  const warnings = (model.warnings || []).map(text => html`<p class="alarm">${text}</p>`);
  const untrained = html`<p class="alarm"><b>Untrained.</b> These weights are random: nothing below
    was learned.</p>`;
  const source = model.source || "source unknown";
  return html`
    <article class="banner ${model.untrained ? "untrained" : ""}" style="--own:${colorOf(model)}">
      <h2>${kindBadge(model)} ${model.name}</h2>
      ${model.untrained ? untrained : ""}${warnings}
      <dl>${terms}</dl>
      <p class="source" title="${source}">${source}</p>
    </article>`;
}

// ---------------------------------------------------------------------------
// loss by position

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
  new LineChart(byId("loss-plot"), { ...axes, width: 1100, height: 320, series });
}

// ---------------------------------------------------------------------------
// composition

const composed = models.filter(model => model.composition?.length);

function setUpGraphs() {
  byId("graph-section").hidden = !composed.length;
  if (!composed.length) return;
  const edges = composed.flatMap(model => model.composition);
  const found = new Set(edges.map(edge => edge.kind));
  const kinds = Object.keys(COMPOSITION).filter(kind => found.has(kind));
  state.kinds = new Set(kinds);
  byId("graph-kinds").innerHTML = kinds.map(kindChip).join("");
  byId("graph-kinds").onclick = event => {
    toggleChip(event, "kind", state.kinds);
    showGraphs();
  };
  setUpThreshold(edges.map(edge => finite(edge.value)).filter(value => value !== null));
  byId("graphs").innerHTML = composed.map(() => '<div class="figure"></div>').join("");
  showGraphs();
}

function kindChip(kind) {
  return html`<button type="button" class="chip kind-chip-${kind}" data-kind="${kind}"
    aria-pressed="true"><i></i>${kind}: ${COMPOSITION[kind]}</button>`;
}

/** The slider of the least value that is drawn. */
function setUpThreshold(values) {
  const slider = byId("threshold");
  slider.min = Math.min(0, ...values);
  slider.max = Math.max(1e-3, ...values);
  slider.value = Math.min(...composed.map(strongestThreshold));
  slider.oninput = () => {
    state.threshold = Number(slider.value);
    showGraphs();
  };
}

function showGraphs() {
  let text = `the strongest ${STRONGEST} of each`;
  if (state.threshold !== null) text = fixed(state.threshold, 3);
  byId("threshold-value").textContent = text;
  composed.forEach((model, i) => new Graph(byId("graphs").children[i], model));
}

// ---------------------------------------------------------------------------
// legend

function showLegend() {
  const cards = NAMES.labels.map(legendCard);
  const terms = NAMES.terms.map(([name, text]) =>
    html`<div><dt>${name}</dt><dd>${text}</dd></div>`);
  byId("legend").innerHTML = html`<div class="cards">${cards}</div><dl class="terms">${terms}</dl>`;
}

function legendCard({ name, meaning, example }) {
  return html`<article class="card">${pictogram(example)}<div>
    <h3><i class="dot label-${name}"></i>${name}</h3><p>${meaning}</p></div></article>`;
}

/** A small triangle with some of its cells, [q, k], filled. */
function pictogram(filled) {
  const keys = new Set(filled.map(String));
  const side = 9; // tokens of the example
  const cells = range(side).map(q => range(q + 1).map(k => {
    const name = keys.has(String([q, k])) ? "hit" : "";
    return html`<rect x="${7 * k}" y="${7 * q}" width="6" height="6" rx="1" class="${name}"/>`;
  }));
  return html`<svg viewBox="0 0 63 63" width="72" height="72" aria-hidden="true">${cells}</svg>`;
}

// ---------------------------------------------------------------------------
// what is above the maps

/** Which score, in which order, on which scale, which labels. */
function setUpToolbar(labels) {
  const all = [...SCORES.keys()];
  const measured = all.filter(isMeasured);
  const keys = measured.length ? measured : all;
  const scoreNames = keys.map(key => [key, SCORES.get(key).name]);
  byId("shown-score").innerHTML = options(scoreNames, state.shown);
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
  byId("chips").onclick = event => {
    toggleChip(event, "label", state.labels);
    showAllThumbs();
  };
  byId("second-view").onclick = () => setViews(views.length > 1 ? 1 : 2);
}

function showAllThumbs() {
  for (const view of views) view.showThumbs();
}

function labelChip(label) {
  return html`<button type="button" class="chip" data-label="${label}" aria-pressed="true">
    <i class="dot label-${label || "none"}"></i>${labelName(label)}
    <span class="quiet">${countOf(label)}</span></button>`;
}

/** How many heads of all models have a label. */
function countOf(label) {
  let count = 0;
  for (const model of models) {
    count += model.allHeads.filter(head => model.label(head) === label).length;
  }
  return count;
}

function setUpSlider() {
  const slider = byId("moment");
  state.moment = Math.max(0, moments.length - 1);
  slider.max = state.moment;
  slider.value = state.moment;
  slider.oninput = () => {
    state.moment = Number(slider.value);
    showMoment();
  };
}

// ---------------------------------------------------------------------------
// beginning

/** Draw anew all that carries colours of its own. */
function repaint() {
  for (const view of views) view.render();
  showBanners();
  showLoss();
  if (composed.length) showGraphs();
  showTraining();
}

/** What is below the first screen. */
function showRest() {
  byId("table-section").hidden = models.every(model => !model.scoresOf.size);
  showTable();
  showGroups();
  showLoss();
  setUpGraphs();
  showTraining();
  document.body.classList.add("complete");
}

function showOrigin() {
  const { date, commit, command } = report.made || {};
  const parts = [date, commit ? `commit ${commit}` : ""];
  byId("made").textContent = parts.filter(Boolean).join(" · ");
  byId("footer").textContent = command || "";
  document.title = ["Attention heads", ...models.map(model => model.name)].join(" · ");
}

/** Maps are as wide as the window allows. */
function watchWidth() {
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width === innerWidth) return;
    width = innerWidth;
    for (const view of views) {
      view.showHead();
      view.showQuery();
    }
  });
}

function begin() {
  showOrigin();
  showBanners();
  if (!models.length) {
    byId("views").innerHTML = '<p class="quiet">This report holds no model.</p>';
    return;
  }
  state.query = Math.round(0.75 * (models[0].T - 1));
  const labels = LABELS.filter(label => countOf(label) > 0);
  setUpToolbar(labels);
  setUpTable(labels);
  setUpSlider();
  setViews(Math.min(2, models.length));
  showLegend();
  setTimeout(showRest); // after the first paint
  darkScheme.addEventListener("change", repaint);
  watchWidth();
}

begin();
