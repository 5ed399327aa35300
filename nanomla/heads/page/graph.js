"use strict";
// The composition graph: layers are columns, heads their rows, edges what a head can read.

const STRONGEST = 25; // edges of each model to begin with

const valueOf = edge => finite(edge.value) ?? 0;

/** The value of the last of a model's STRONGEST edges: two models' values may differ in size. */
function strongestThreshold(model) {
  const values = model.composition.map(valueOf).sort((a, b) => b - a);
  const last = Math.min(values.length, STRONGEST) - 1;
  return Math.max(0, values[last]);
}

/** The composition graph of one model, drawn into a holder. */
class Graph {
  constructor(holder, model) {
    this.model = model;
    this.width = 640;
    this.rowHeight = clamp(420 / model.heads, 26, 44);
    this.height = 76 + this.rowHeight * model.heads;
    const columnWidth = (this.width - 112) / Math.max(1, model.layers - 1);
    this.radius = Math.min(13, this.rowHeight / 2 - 2, columnWidth / 4);
    this.edges = this.chosenEdges();
    this.draw(holder);
    this.listen();
  }

  /** The edges that the reader chose: of some kinds, above a threshold. */
  chosenEdges() {
    const threshold = state.threshold ?? strongestThreshold(this.model);
    return this.model.composition.filter(edge =>
      finite(edge.value) !== null && state.kinds.has(edge.kind) && edge.value >= threshold);
  }

  x(layer) {
    if (this.model.layers === 1) return this.width / 2;
    return 56 + (layer * (this.width - 112)) / (this.model.layers - 1);
  }

  y(row) {
    return 60 + this.rowHeight * (row + 0.5);
  }

  draw(holder) {
    const { model, edges, width, height } = this;
    const largest = Math.max(1e-9, ...model.composition.map(valueOf));
    // The strongest edges are drawn last, above the others.
    const ordered = [...edges].sort((a, b) => a.value - b.value);
    const paths = ordered.map(edge => this.edgeMarkup(edge, Math.max(0, edge.value / largest)));
    const layerName = model.layers > 8 ? "L" : "layer ";
    const columns = range(model.layers).map(layer =>
      svgText(this.x(layer), 48, TICK_MIDDLE, `${layerName}${layer}`));
    holder.innerHTML = html`
      <div class="figure-head">
        <span class="quiet">${edges.length} of ${model.composition.length} edges</span>
        <span class="export"></span>
      </div>
      <svg class="plot graph" viewBox="0 0 ${width} ${height}" role="group"
        aria-label="Composition in ${model.name}">
        ${svgText(4, 18, html`class="name"`, clip(model.name, 60))}
        ${columns}${paths}${model.allHeads.map(head => this.nodeMarkup(head))}
      </svg>`;
    this.svg = holder.querySelector(".graph");
    const lines = [model.describe()];
    addExportButtons(holder.querySelector(".export"), `composition ${model.name}`, () => {
      const key = [...state.kinds].map(kind =>
        ({ name: `${kind}: ${COMPOSITION[kind]}`, color: css(`--kind-${kind}`) }));
      return pictureOf(this.svg, { width, height }, { key, lines });
    });
  }

  /** An edge; share: its value beside the largest one. */
  edgeMarkup(edge, share) {
    const [fromLayer, fromRow] = edge.from;
    const [toLayer, toRow] = edge.to;
    const x0 = this.x(fromLayer) + this.radius;
    const y0 = this.y(fromRow);
    const x1 = this.x(toLayer) - this.radius;
    const y1 = this.y(toRow);
    const half = (x1 - x0) / 2;
    // Edges of several kinds between two heads bend apart.
    const bend = { Q: -9, K: 0, V: 9 }[edge.kind] || 0;
    const ends = `${x0 + half} ${y0 + bend} ${x1 - half} ${y1 + bend} ${x1} ${y1}`;
    const from = this.model.nameOf(this.model.headAt(edge.from));
    const to = this.model.nameOf(this.model.headAt(edge.to));
    const title = `${from} → ${to}: ${edge.kind}-composition ${edge.value.toFixed(3)}`;
    return html`<path class="edge kind-${edge.kind}" d="M${x0} ${y0}C${ends}"
      data-ends="${edge.from.join("-")} ${edge.to.join("-")}"
      stroke-width="${(0.8 + 3.4 * share).toFixed(2)}"
      stroke-opacity="${(0.3 + 0.65 * share).toFixed(2)}"><title>${title}</title></path>`;
  }

  nodeMarkup(head) {
    const { model, radius } = this;
    const layer = model.layer(head);
    const row = model.headInLayer(head);
    const label = model.label(head);
    const x = this.x(layer);
    const y = this.y(row);
    const number = svgText(x, y + 3.5, html`text-anchor="middle"`, row);
    return html`<g class="node label-${label || "none"}" tabindex="0" role="button"
      data-head="${head}" data-at="${layer}-${row}"
      aria-label="layer ${layer} head ${row}, ${labelName(label)}">
      <title>${model.nameOf(head)} · ${labelName(label)}</title>
      <circle cx="${x}" cy="${y}" r="${radius}"/>${radius > 7 ? number : ""}</g>`;
  }

  listen() {
    for (const event of ["pointerover", "focusin", "pointerleave", "focusout"]) {
      this.svg.addEventListener(event, ({ target }) => this.light(target.closest?.(".node")));
    }
    this.svg.addEventListener("click", ({ target }) => this.choose(target.closest(".node")));
    this.svg.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.choose(event.target.closest(".node"));
    });
  }

  /** Show the edges of one head and dim the others; all of them where there is no head. */
  light(node) {
    this.svg.classList.toggle("focused", Boolean(node));
    for (const edge of this.svg.querySelectorAll(".edge")) {
      const isLit = node && edge.dataset.ends.split(" ").includes(node.dataset.at);
      edge.classList.toggle("lit", Boolean(isLit));
    }
  }

  choose(node) {
    if (node) selectHead(this.model, Number(node.dataset.head));
  }
}
