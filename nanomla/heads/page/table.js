"use strict";
// The table of scores, and what models lose without groups of heads.

// Columns of numbers that a family of scores has in parts: its score, null, control and gap.
const FAMILY_KEYS = new Set(NAMES.columns.map(column => column.key));
const TABLE_COLUMNS = [
  { key: "model", heading: "Model", help: "" },
  { key: "head", heading: "Head", help: "" },
  { key: "label", heading: "Label", help: "" },
  ...NAMES.columns,
];
for (const { key, column, help } of NAMES.scores) {
  if (column) TABLE_COLUMNS.push({ key, heading: column, help });
}

const percent = share => `${(100 * share).toFixed(1)}%`;

function kindBadge(model) {
  return html`<span class="kind kind-${model.kind.toLowerCase()}">${model.kind}</span>`;
}

// ---------------------------------------------------------------------------
// rows

/** The rows of the table, {model, head}: those that the reader chose, in order. */
function tableRows() {
  const { model: onlyModel, label: onlyLabel } = state.table;
  const rows = [];
  for (const model of models) {
    if (onlyModel !== "" && model.index !== Number(onlyModel)) continue;
    for (const head of model.allHeads) {
      const label = model.label(head) || "none";
      if (onlyLabel === "" || label === onlyLabel) rows.push({ model, head });
    }
  }
  return rows.sort(compareRows);
}

/** What a column sorts by. */
function cellValue({ model, head }, key) {
  const { family } = state.table;
  if (key === "model") return model.name;
  if (key === "head") return head;
  if (key === "label") return model.label(head) || null;
  if (key === "interval") return model.score(head, family, "low");
  if (FAMILY_KEYS.has(key)) return model.score(head, family, key);
  return model.score(head, key);
}

function compareRows(a, b) {
  const x = cellValue(a, state.table.sort);
  const y = cellValue(b, state.table.sort);
  // What was not measured comes last, either way.
  if (x === null || y === null) return (x === null) - (y === null);
  const ascending = typeof x === "string" ? x.localeCompare(y) : x - y;
  const order = state.table.down ? -ascending : ascending;
  return order || a.model.index - b.model.index || a.head - b.head;
}

// ---------------------------------------------------------------------------
// cells

function cellMarkup(row, key) {
  const { model, head } = row;
  if (key === "model") return modelCell(model);
  if (key === "head") return headCell(model, head);
  if (key === "label") return labelCell(model.label(head));
  if (key === "interval") return intervalCell(row);
  const value = cellValue(row, key);
  if (FAMILY_KEYS.has(key) || SCORES.get(key).is_loss) return scoreText(value, key, 3);
  return scoreText(value, key);
}

function modelCell(model) {
  const { name } = model;
  return html`${kindBadge(model)} <span class="model-name" title="${name}">${name}</span>`;
}

function headCell(model, head) {
  return html`<button type="button" class="head-link" data-model="${model.index}"
    data-head="${head}">${model.nameOf(head)}</button>`;
}

function labelCell(label) {
  if (!label) return html`<span class="quiet">–</span>`;
  return html`<span class="label label-${label}">${label}</span>`;
}

/** Score, null, control and interval on one line from 0 to 1. */
function intervalCell({ model, head }) {
  const part = name => model.score(head, state.table.family, name);
  const point = name => {
    if (part(name) === null) return "";
    return html`<i class="${name}" style="left:${percent(clamp(part(name), 0, 1))}"></i>`;
  };
  const marks = [point("null"), point("control")];
  const low = part("low");
  const high = part("high");
  let text = "no interval";
  if (low !== null && high !== null) {
    const left = clamp(low, 0, 1);
    const width = clamp(high, 0, 1) - left;
    text = `${fixed(low, 3)} to ${fixed(high, 3)}`;
    marks.push(html`<i class="range" style="left:${percent(left)};width:${percent(width)}"></i>`);
  }
  marks.push(point("score"));
  return html`<span class="whisker" role="img" aria-label="${text}"
    title="${text}">${marks}</span>`;
}

// ---------------------------------------------------------------------------
// the table

/** One model needs no name in every row; a score that no model has needs no column. */
function isShownColumn({ key }) {
  if (key === "model") return models.length > 1;
  return !SCORES.has(key) || isMeasured(key);
}

function showTable() {
  const columns = TABLE_COLUMNS.filter(isShownColumn);
  const rows = tableRows();
  const bodyRows = rows.map(row => {
    const cell = ({ key }) => html`<td class="col-${key}">${cellMarkup(row, key)}</td>`;
    return html`<tr>${columns.map(cell)}</tr>`;
  });
  byId("table").tHead.innerHTML = html`<tr>${columns.map(headingCell)}</tr>`;
  byId("table").tBodies[0].innerHTML = bodyRows.join("");
  byId("table-count").textContent = `${rows.length} heads`;
}

function headingCell({ key, heading, help }) {
  let sorted = "none";
  if (key === state.table.sort) sorted = state.table.down ? "descending" : "ascending";
  const title = help || `sort by ${heading.toLowerCase()}`;
  return html`<th scope="col" class="col-${key}" aria-sort="${sorted}">
    <button type="button" data-sort="${key}" title="${title}">${heading}</button></th>`;
}

function setTable(change) {
  Object.assign(state.table, change);
  showTable();
}

/** Sort by a column; by the same one again, the other way round. */
function sortTable(key) {
  const isText = ["model", "head", "label"].includes(key);
  const down = key === state.table.sort ? !state.table.down : !isText;
  setTable({ sort: key, down });
  // The heading was drawn anew, so the keyboard has to be brought back to it.
  byId("table").querySelector(`[data-sort="${key}"]`).focus();
}

/** What is above the table: which family of scores, which model, which label. */
function setUpTable(labels) {
  // Held-out text is not here for every model; the other families always are.
  const families = NAMES.families.filter(key => key !== "on_text" || isMeasured(key));
  const familyNames = families.map(key => [key, SCORES.get(key).name]);
  byId("table-family").innerHTML = options(familyNames, state.table.family);
  byId("table-family").onchange = event => setTable({ family: event.target.value });
  const modelNames = models.map(model => [String(model.index), model.name]);
  byId("table-model").innerHTML = options([["", "all"], ...modelNames]);
  byId("table-model").parentElement.hidden = models.length < 2;
  byId("table-model").onchange = event => setTable({ model: event.target.value });
  const labelNames = labels.map(label => [label || "none", labelName(label)]);
  byId("table-label").innerHTML = options([["", "all"], ...labelNames]);
  byId("table-label").onchange = event => setTable({ label: event.target.value });
  byId("table").onclick = event => {
    const { sort, model, head } = event.target.dataset;
    if (sort) sortTable(sort);
    else if (model !== undefined) selectHead(models[model], Number(head));
  };
}

// ---------------------------------------------------------------------------
// groups of heads

/** What each model loses without its induction heads, without its previous-token heads, ... */
function showGroups() {
  const measured = models.filter(model => model.groups?.length);
  byId("groups").innerHTML = measured.map(groupCard).join("");
}

function groupCard(model) {
  return html`<article class="card">
    <h3>${kindBadge(model)} ${model.name}: heads ablated together, Δ loss in nats</h3>
    ${model.groups.map(groupTable)}</article>`;
}

/** The costs of groups on one kind of text. */
function groupTable({ text, loss, groups, paths }) {
  const keys = Object.keys(NAMES.group_costs).filter(key =>
    groups.some(group => finite(group.costs[key]) !== null));
  const headings = keys.map(key => html`<th scope="col">${NAMES.group_costs[key]}</th>`);
  const rows = groups.map(({ name, costs }) => {
    const cells = keys.map(key => html`<td>${signed(costs[key])}</td>`);
    return html`<tr><th scope="row">${name}</th>${cells}</tr>`;
  });
  const nothing = html`<p class="quiet">no head has a label to be ablated by</p>`;
  const table = html`<table class="groups"><thead><tr><td></td>${headings}</tr></thead>
    <tbody>${rows}</tbody></table>`;
  return html`<p class="group-text">${text}: loss ${fixed(loss, 3)} with all heads</p>
    ${groups.length ? table : nothing}${paths ? pathSentence(paths) : ""}`;
}

function pathSentence(paths) {
  const parts = Object.entries(paths).map(([reads, cost]) =>
    `${NAMES.reads[reads]} ${signed(cost)}`);
  return html`<p class="quiet">Previous-token heads missing only in the induction heads’
    ${parts.join(", ")}</p>`;
}
