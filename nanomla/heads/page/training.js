"use strict";
// Scores through training: curves over the checkpoints of runs, and a map of scores at one of them.

/** The runs of the report, each with its colour and the model that it ended as, if that is here. */
const runs = [];
for (const run of report.checkpoints || []) {
  if (!run?.tokens?.length) continue;
  const model = models.find(other => other.name === run.name);
  const earlier = runs.length;
  const color = () => (model ? colorOf(model) : colorOfKind(run.kind || "MHA", earlier));
  runs.push({ ...run, color });
}

// Tokens seen at the checkpoints of all runs: where the slider stops.
const moments = [...new Set(runs.flatMap(run => run.tokens))].sort((a, b) => a - b);
let trainingCharts = [];

const isMeasuredInRun = (run, key) => (run[key] || []).some(value => finite(value) !== null);

function showTraining() {
  byId("training-section").hidden = !runs.length;
  if (!runs.length) return;
  const shown = NAMES.curves.filter(({ key }) => runs.some(run => isMeasuredInRun(run, key)));
  byId("training-plots").innerHTML = shown.map(() => '<div class="figure"></div>').join("");
  const holders = byId("training-plots").children;
  trainingCharts = shown.map((curve, i) => trainingChart(holders[i], curve));
  showMoment();
}

/** The chart of one of NAMES.curves, with a curve a run. */
function trainingChart(holder, { key, title, unit }) {
  const measured = runs.filter(run => run[key]?.length);
  const series = measured.map(run =>
    ({ name: run.name, color: run.color(), x: run.tokens, y: run[key] }));
  const axes = { title, xName: "tokens seen", yName: unit, log: true };
  return new LineChart(holder, { ...axes, width: 420, height: 260, series });
}

/** What follows the slider: the dots on the curves, and the maps. */
function showMoment() {
  const moment = moments[state.moment];
  byId("moment-value").textContent = short(moment);
  for (const chart of trainingCharts) chart.mark(moment);
  const mapped = runs.filter(run => run.gaps || run.scores);
  byId("training-maps").innerHTML = mapped.map(run => runMap(run, moment)).join("");
}

/** A run's map at its last checkpoint up to a moment: of gap scores, which the curve shows too. */
function runMap(run, moment) {
  const last = run.tokens.findLastIndex(tokens => tokens <= moment);
  const name = run.gaps ? "gap score of each head" : "induction score of each head";
  const facts = [name];
  if (finite(run.step?.[last]) !== null) facts.push(`step ${whole(run.step[last])}`);
  if (last >= 0) facts.push(`${short(run.tokens[last])} tokens`);
  const grids = run.gaps || run.scores;
  const body = last < 0 ? html`<p class="quiet">no checkpoint yet</p>` : heatMap(grids[last]);
  return html`<article><h3><i class="swatch" style="background:${run.color()}"></i>${run.name}
    <span class="quiet">${facts.join(" · ")}</span></h3>${body}</article>`;
}

/** Scores [layer][head] as coloured cells, with a number in each where there is room. */
function heatMap(scores) {
  const side = clamp(330 / scores.length, 14, 56);
  const heads = scores[0].length;
  const hasRoom = heads <= 8;
  const rows = scores.map((row, layer) => {
    const cells = row.map((value, head) => heatCell(value, `L${layer} H${head}`, hasRoom));
    return html`<span class="row">L${layer}</span>${cells}`;
  });
  return html`<div class="heat" style="--heads:${heads};--cell:${side}px">${rows}</div>`;
}

function heatCell(value, name, hasRoom) {
  const share = clamp(finite(value) ?? 0, 0, 1);
  const background = finite(value) === null ? "transparent" : weightColor(share);
  return html`<i style="background:${background};color:${inkOn(share)}"
    title="${name}: ${fixed(value, 3)}">${hasRoom ? fixed(value) : ""}</i>`;
}
