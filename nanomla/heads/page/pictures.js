"use strict";
// Pictures that leave the page: each is {svg (its text), width, height, name?}, and is saved as
// SVG or PNG.

// What the page's style gives to a mark, written out in the picture.
const STYLE_NAMES = [
  "fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray",
  "stroke-linejoin", "stroke-linecap", "opacity", "font-family", "font-size", "font-weight",
];
const PAGE_ATTRIBUTES = [
  "class", "tabindex", "role", "aria-label", "data-head", "data-at", "data-ends",
];

/** An SVG of the page as a picture: its style written out, a key above it, lines below it. */
function pictureOf(svg, size, { key, lines }) {
  const copy = svg.cloneNode(true);
  const originals = svg.querySelectorAll("*");
  copy.querySelectorAll("*").forEach((element, i) => {
    const style = getComputedStyle(originals[i]);
    const rules = STYLE_NAMES.map(name => `${name}:${style.getPropertyValue(name)}`);
    element.setAttribute("style", rules.join(";"));
  });
  copy.querySelector(".cursor")?.remove();
  for (const element of copy.querySelectorAll("*")) {
    for (const name of PAGE_ATTRIBUTES) element.removeAttribute(name);
  }
  return sheet(new Markup(copy.innerHTML), size, { key, lines });
}

/** Marks on a sheet with a key above them and lines of text below. */
function sheet(marks, size, { key = [], lines = [] }) {
  const footer = lines.flatMap(line => wrap(line, size.width));
  const keyHeight = key.length ? 16 * key.length + 10 : 0;
  const bottom = keyHeight + size.height;
  const height = bottom + 14 * footer.length + 14;
  const keyMarkup = key.map((entry, i) => html`
    <path d="M8 ${14 + 16 * i}H32" stroke="${entry.color}" stroke-width="2"
      stroke-dasharray="${entry.dash || "none"}"/>
    ${svgText(40, 18 + 16 * i, textType(11, "--ink"), entry.name)}`);
  const footerMarkup = footer.map((line, i) =>
    svgText(8, bottom + 12 + 14 * i, textType(10, "--muted"), line));
  const holder = document.createElement("div");
  holder.innerHTML = html`<svg viewBox="0 0 ${size.width} ${height}" width="${size.width}"
    height="${height}"><rect width="100%" height="100%" fill="${css("--panel")}"/>${keyMarkup}
    <g transform="translate(0 ${keyHeight})">${marks}</g>${footerMarkup}</svg>`;
  const svg = new XMLSerializer().serializeToString(holder.firstElementChild);
  return { svg, width: size.width, height };
}

/** Attributes of text: its size in pixels and its colour, one of the page's. */
function textType(size, color, family = "--sans") {
  return html`font-family="${css(family)}" font-size="${size}" fill="${css(color)}"`;
}

/** A line of parts joined by " · " as several, with as many parts on each as fit. */
function wrap(line, width) {
  const wrapped = [];
  for (const part of line.split(" · ")) {
    const last = wrapped.length - 1;
    const longer = `${wrapped[last]} · ${part}`;
    const fits = last >= 0 && longer.length * 5.8 < width - 16; // 5.8: a letter of 10 px type
    if (fits) wrapped[last] = longer;
    else wrapped.push(part);
  }
  return wrapped;
}

/** A head's map, with its tokens where there is room. */
function mapPicture(model, head, what) {
  const layout = layoutOf(model.T, 720);
  const titleHeight = 30;
  const title = [model.nameOf(head), labelName(model.label(head)), MAP_VALUES[what].name];
  const induction = model.score(head, "induction");
  if (induction !== null) title.push(`induction ${fixed(induction)}`);
  const bold = html`${textType(14, "--ink")} font-weight="600"`;
  const marks = html`
    ${svgText(8, 20, bold, title.join(" · "))}
    <g transform="translate(0 ${titleHeight})">
      <image href="${enlarged(model, head, what)}" x="${layout.left}" y="${layout.top}"
        width="${layout.side}" height="${layout.side}"/>
      ${mapAxes(model, layout)}${mapColorBar(mapValues(model, head, what), layout)}
    </g>`;
  const size = { width: layout.width, height: layout.height + titleHeight + 6 };
  const name = `${model.name} L${model.layer(head)}H${model.headInLayer(head)} ${what}`;
  return { name, ...sheet(marks, size, { lines: [model.describe()] }) };
}

/** A triangle as an image with whole pixels a cell: readers of SVG would blur a small one. */
function enlarged(model, head, what) {
  const canvas = document.createElement("canvas");
  const side = model.T * Math.max(1, Math.ceil(720 / model.T));
  canvas.width = side;
  canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(paintTriangle(model, head, what), 0, 0, side, side);
  return canvas.toDataURL();
}

/** Attributes of the small grey text of a map; anchor: where it stands beside its point. */
function mapType(layout, anchor) {
  let type = textType(11, "--muted");
  if (layout.hasNames) type = textType(Math.min(12, layout.cell - 1), "--muted", "--mono");
  return html`${type} text-anchor="${anchor}"`;
}

/** The tokens, or their positions, beside the rows and below the columns. */
function mapAxes(model, layout) {
  const { hasNames, left, top, side, cell } = layout;
  const type = mapType(layout, "end");
  return axisTexts(model, layout).map(([i, text]) => {
    const middle = (i + 0.5) * cell;
    const beside = svgText(left - 6, top + middle + 4, type, text);
    if (!hasNames) {
      const centred = mapType(layout, "middle");
      return [beside, svgText(left + middle, top + side + 15, centred, text)];
    }
    const turn = `translate(${left + middle + 4} ${top + side + 7}) rotate(-90)`;
    return [beside, svgText(0, 0, html`${type} transform="${turn}"`, text)];
  });
}

function mapColorBar(map, layout) {
  const width = 160;
  const pieces = 64;
  const x = layout.left + layout.side - 170;
  const bar = range(pieces).map(i => html`<rect x="${x + (i * width) / pieces}"
    y="${layout.top + 6}" width="2.8" height="9" fill="${rgbText(map.bar(i / (pieces - 1)))}"/>`);
  const type = mapType(layout, "middle");
  const numbers = map.ticks.map(([text, share]) =>
    svgText(x + width * share, layout.top + 28, type, text));
  return [bar, numbers];
}

/** All heads of a model, layer × head. */
function overviewPicture(model) {
  const tile = clamp(1100 / model.heads, 40, 110);
  const rowHeight = tile + 12;
  const left = 36;
  const top = 24;
  const type = html`${textType(10.5, "--muted")} text-anchor="middle"`;
  const columnNames = range(model.heads).map(row =>
    svgText(left + (row + 0.5) * tile, 16, type, `H${row}`));
  const rowNames = range(model.layers).map(layer =>
    svgText(18, top + layer * rowHeight + tile / 2, type, `L${layer}`));
  const tiles = model.allHeads.map(head => {
    const x = left + model.headInLayer(head) * tile;
    const y = top + model.layer(head) * rowHeight;
    return overviewTile(model, head, { x, y, tile, type });
  });
  const size = {
    width: left + model.heads * tile + 12,
    height: top + model.layers * rowHeight + 8,
  };
  const lines = [`number: ${SCORES.get(state.shown).name}`, model.describe()];
  const marks = html`${columnNames}${rowNames}${tiles}`;
  return { name: `${model.name} heads`, ...sheet(marks, size, { lines }) };
}

/** One head of the overview: its map, and its score below. */
function overviewTile(model, head, { x, y, tile, type }) {
  const gap = 0.14 * tile;
  const side = tile - gap;
  const image = paintTriangle(model, head, "weights", 128).toDataURL();
  const score = scoreText(model.score(head, state.shown), state.shown);
  return html`<image href="${image}" x="${x + gap / 2}" y="${y}" width="${side}" height="${side}"/>
    ${svgText(x + tile / 2, y + side + 11, type, score)}`;
}

// ---------------------------------------------------------------------------
// saving

/** PNG and SVG buttons in a holder; draw() returns the picture that they save. */
function addExportButtons(holder, title, draw) {
  const button = format => html`<button type="button" data-format="${format}"
    aria-label="Save ${title} as ${format}">${format}</button>`;
  holder.innerHTML = [button("PNG"), button("SVG")].join("");
  holder.onclick = event => {
    const { format } = event.target.dataset;
    if (format) savePicture(draw(), format, title);
  };
}

async function savePicture(picture, format, title) {
  const name = (picture.name || title).replace(/[^\w.-]+/g, "_");
  let blob = new Blob([picture.svg], { type: "image/svg+xml" });
  if (format === "PNG") blob = await pngOf(picture);
  saveBlob(blob, `${name}.${format.toLowerCase()}`);
}

/** A picture as a PNG, two pixels a unit. */
async function pngOf({ svg, width, height }) {
  const image = new Image();
  // By setAttribute, so that the page's text holds no attribute that would load something.
  image.setAttribute("src", `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`);
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(2 * width);
  canvas.height = Math.round(2 * height);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

function saveBlob(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
