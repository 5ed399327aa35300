"use strict";
// Curves and the composition graph as SVG, and how a picture leaves the page. An <svg> written as HTML needs no
// address of its namespace; XMLSerializer adds it to what is saved.

/** Any CSS colour as rgb(), which every reader of SVG knows. */
function solid(color) {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  return `rgb(${[...context.getImageData(0, 0, 1, 1).data].slice(0, 3).join(", ")})`;
}

/** A model's colour: its kind's, moved towards the ink for each earlier model of the same kind. */
function modelColor(kind, earlier) {
  const base = css(`--${(kind || "mha").toLowerCase()}-ink`) || css("--ink");
  return solid(earlier ? `color-mix(in oklab, ${base} ${Math.max(30, 100 - 38 * earlier)}%, ${css("--ink")})` : base);
}
const colorOf = model => modelColor(model.kind, models.slice(0, model.index).filter(other => other.kind === model.kind).length);

/** Round numbers in [low, high]. */
function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(size => size * power).find(size => size >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(Number((i * step).toPrecision(12)));
  return out;
}

/** Ticks of a logarithmic axis: powers of ten, with 2 and 5 where these are few. */
function logTicks(low, high) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) powers.push(10 ** power);
  const all = powers.length > 3 ? powers : powers.flatMap(value => [value, 2 * value, 5 * value]);
  return all.filter(value => value >= low * 0.999 && value <= high * 1.001);
}

/**
 * A line chart in `holder`: series of {name, color, dash, x, y}; log for a logarithmic x axis. What the pointer is
 * nearest to is read out below. mark(x) puts a dot on every curve at the last point up to x.
 */
function lineChart(holder, { title, xName, yName, series, log = false, width = 640, height = 300, xText = short }) {
  const left = 52, right = 14, top = 34, bottom = 40;
  const drawn = series.map(line => ({ ...line, points: line.x.map((x, i) => [x, line.y[i]]).filter(([x, y]) => number(x) !== null && number(y) !== null) }))
    .filter(line => line.points.length);
  const xs = drawn.flatMap(line => line.points.map(point => point[0])), ys = drawn.flatMap(line => line.points.map(point => point[1]));
  if (!xs.length) { holder.innerHTML = `<p class="quiet">${esc(title)}: no numbers in this report.</p>`; return { mark() {} }; }
  const positive = xs.filter(x => x > 0), zero = (positive.length ? Math.min(...positive) : 1) / 2.5; // log has no 0: it stands a bit left of the rest
  const along = x => log ? Math.log10(Math.max(x, zero)) : x;
  const x0 = along(Math.min(...xs)), x1 = along(Math.max(...xs)), y0 = Math.min(...ys), y1 = Math.max(...ys);
  const room = Math.max(y1 - y0, 1e-3) * 0.06, low = y0 >= 0 && y0 < 0.25 * y1 ? 0 : y0 - room, high = y1 + room;
  const X = x => left + (x1 > x0 ? (along(x) - x0) / (x1 - x0) : 0.5) * (width - left - right);
  const Y = y => top + (high - y) / (high - low) * (height - top - bottom);
  const xTicks = !log ? ticks(x0, x1, width / 90) : logTicks(Math.min(...positive), Math.max(...xs)).concat(xs.includes(0) ? [0] : []);
  const yTicks = ticks(low, high, height / 60), digits = [0, 1, 2, 3].find(count => yTicks.every(y => Math.abs(y - Number(y.toFixed(count))) < 1e-9)) ?? 4;
  const parts = yTicks.map(y => `<line class="grid" x1="${left}" x2="${width - right}" y1="${Y(y)}" y2="${Y(y)}"/>
    <text class="tick" x="${left - 8}" y="${Y(y) + 3.5}" text-anchor="end">${fixed(y, digits)}</text>`);
  parts.push(...xTicks.map(x => `<text class="tick" x="${X(x)}" y="${height - bottom + 18}" text-anchor="middle">${xText(x)}</text>`));
  parts.push(`<line class="axis" x1="${left}" x2="${width - right}" y1="${height - bottom}" y2="${height - bottom}"/>
    <text class="tick" x="${width - right}" y="${height - 6}" text-anchor="end">${esc(xName)}</text>
    <text class="name" x="4" y="16">${esc(title)}</text><text class="tick" x="${width - right}" y="16" text-anchor="end">${esc(yName)}</text>`);
  for (const line of drawn) {
    const path = line.points.map(([x, y], i) => `${i ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    parts.push(`<path class="curve" d="${path}" stroke="${line.color}" stroke-dasharray="${line.dash || "none"}"/>`);
  }
  parts.push('<g class="cursor"></g><g class="dots"></g>');
  holder.innerHTML = `<div class="figure-head"><ul class="key">${drawn.map(line => `<li><svg width="26" height="8" aria-hidden="true"><path class="curve"
    d="M1 4H25" stroke="${line.color}" stroke-dasharray="${line.dash || "none"}"/></svg>${esc(line.name)}</li>`).join("")}</ul><span class="export"></span></div>
    <svg class="plot" viewBox="0 0 ${width} ${height}" role="img" aria-label="${esc(`${title}: ${drawn.map(line => line.name).join(", ")}`)}">${parts.join("")}</svg>
    <p class="reading quiet">&nbsp;</p>`;

  const svg = holder.querySelector(".plot"), reading = holder.querySelector(".reading");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), place = (event.clientX - box.left) / box.width * width;
    const nearest = xs.reduce((best, x) => Math.abs(X(x) - place) < Math.abs(X(best) - place) ? x : best);
    svg.querySelector(".cursor").innerHTML = `<line class="axis" x1="${X(nearest)}" x2="${X(nearest)}" y1="${top}" y2="${height - bottom}"/>`;
    const values = drawn.flatMap(line => line.points.filter(([x]) => x === nearest).map(([, y]) => `${line.name} ${fixed(y, 3)}`));
    reading.textContent = `${xName} ${xText(nearest)}: ${values.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => { svg.querySelector(".cursor").innerHTML = ""; reading.textContent = "\u00a0"; });
  exportButtons(holder.querySelector(".export"), title, () => saved(svg, width, height,
    { key: drawn, lines: models.map(model => model.passport) }));
  return {
    mark(moment) {
      svg.querySelector(".dots").innerHTML = drawn.map(line => {
        const point = line.points.filter(([x]) => x <= moment).pop();
        return point ? `<circle cx="${X(point[0])}" cy="${Y(point[1])}" r="4.5" fill="${line.color}" class="dot"/>` : "";
      }).join("");
    },
  };
}

// ---------------------------------------------------------------------------
// composition: layers are columns, heads their rows

const COMPOSITION = { Q: "query reads", K: "key reads", V: "value reads" };
const FEW = 25; // edges of each model to begin with

/** The value of a model's FEW-th edge: two models' values need not be of one size. */
function strongest(model) {
  const values = model.composition.map(edge => number(edge.value) ?? 0).sort((a, b) => b - a);
  return Math.max(0, values[Math.min(values.length, FEW) - 1]);
}

function drawGraph(holder, model) {
  const least = state.threshold ?? strongest(model);
  const edges = model.composition.filter(edge => number(edge.value) !== null && state.kinds.has(edge.kind) && edge.value >= least);
  const most = Math.max(1e-9, ...model.composition.map(edge => number(edge.value) ?? 0));
  const width = 640, rows = Math.max(26, Math.min(44, 420 / model.heads)), height = 76 + rows * model.heads;
  const X = layer => model.layers > 1 ? 56 + layer * (width - 112) / (model.layers - 1) : width / 2, Y = head => 60 + rows * (head + 0.5);
  const radius = Math.min(13, rows / 2 - 2, (width - 112) / Math.max(1, model.layers - 1) / 4);
  const name = ([layer, head]) => model.nameOf(layer * model.heads + head);
  const bend = { Q: -9, K: 0, V: 9 };
  const lines = [...edges].sort((a, b) => a.value - b.value).map(edge => {
    const [x0, y0, x1, y1] = [X(edge.from[0]) + radius, Y(edge.from[1]), X(edge.to[0]) - radius, Y(edge.to[1])], half = (x1 - x0) / 2;
    const share = Math.max(0, edge.value / most), shift = bend[edge.kind] || 0;
    return `<path class="edge kind-${esc(edge.kind)}" data-ends="${edge.from.join("-")} ${edge.to.join("-")}" stroke-width="${(0.8 + 3.4 * share).toFixed(2)}"
      stroke-opacity="${(0.3 + 0.65 * share).toFixed(2)}" d="M${x0} ${y0}C${x0 + half} ${y0 + shift} ${x1 - half} ${y1 + shift} ${x1} ${y1}">
      <title>${esc(`${name(edge.from)} → ${name(edge.to)}: ${edge.kind}-composition ${edge.value.toFixed(3)}`)}</title></path>`;
  });
  const nodes = Array.from({ length: model.count }, (_, head) => {
    const layer = model.layer(head), row = head % model.heads, label = model.label(head);
    return `<g class="node ${label ? `label-${esc(label)}` : ""}" data-head="${head}" data-at="${layer}-${row}" tabindex="0" role="button"
      aria-label="${esc(`layer ${layer} head ${row}, ${labelName(label)}`)}"><title>${esc(`${model.nameOf(head)} · ${labelName(label)}`)}</title>
      <circle cx="${X(layer)}" cy="${Y(row)}" r="${radius}"/>${radius > 7 ? `<text x="${X(layer)}" y="${Y(row) + 3.5}" text-anchor="middle">${row}</text>` : ""}</g>`;
  });
  const columns = Array.from({ length: model.layers }, (_, layer) =>
    `<text class="tick" x="${X(layer)}" y="48" text-anchor="middle">${model.layers > 8 ? "L" : "layer "}${layer}</text>`);
  holder.innerHTML = `<div class="figure-head"><span class="quiet">${edges.length} of ${model.composition.length} edges</span><span class="export"></span></div>
    <svg class="plot graph" viewBox="0 0 ${width} ${height}" role="group" aria-label="${esc(`Composition in ${model.name}`)}">
    <text class="name" x="4" y="18">${esc(clip(model.name, 60))}</text>${columns.join("")}${lines.join("")}${nodes.join("")}</svg>`;
  const svg = holder.querySelector(".graph");
  const focus = event => {
    const node = event.target.closest?.(".node");
    svg.classList.toggle("focused", !!node);
    for (const edge of svg.querySelectorAll(".edge")) edge.classList.toggle("lit", !!node && edge.dataset.ends.split(" ").includes(node.dataset.at));
  };
  for (const kind of ["pointerover", "focusin", "pointerleave", "focusout"]) svg.addEventListener(kind, focus);
  const choose = event => { const node = event.target.closest(".node"); if (node) selectHead(model, Number(node.dataset.head)); };
  svg.addEventListener("click", choose);
  svg.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(event); } });
  exportButtons(holder.querySelector(".export"), `composition ${model.name}`, () => saved(svg, width, height,
    { key: [...state.kinds].map(kind => ({ name: `${kind}: ${COMPOSITION[kind]}`, color: css(`--kind-${kind}`) })), lines: [model.passport] }));
}

// ---------------------------------------------------------------------------
// pictures that leave the page: {svg (text), width, height, title}

const KEPT = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-opacity", "stroke-dasharray", "stroke-linejoin", "stroke-linecap",
              "opacity", "font-family", "font-size", "font-weight"];

/** An SVG of the page as a file's text: its style written out, a key on top, lines on where it is from below. */
function saved(svg, width, height, { key = [], lines = [] }) {
  const copy = svg.cloneNode(true), originals = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, i) => {
    const style = getComputedStyle(originals[i]);
    element.setAttribute("style", KEPT.map(name => `${name}:${style.getPropertyValue(name)}`).join(";"));
    for (const name of ["class", "tabindex", "role", "aria-label", "data-head", "data-at", "data-ends"]) element.removeAttribute(name);
  });
  for (const name of [".cursor"]) copy.querySelector(name)?.remove();
  return picture(copy.innerHTML, width, height, key, lines);
}

/** Marks inside a sheet of their own, with a key and a footer. */
function picture(inside, width, height, key, lines) {
  const type = `font-family="${esc(css("--sans"))}" font-size="11"`;
  lines = lines.flatMap(line => line.split(" · ").reduce((out, part) => { // as many parts on a line as fit
    const longer = out.length ? `${out[out.length - 1]} · ${part}` : part;
    return out.length && longer.length * 5.8 < width - 16 ? [...out.slice(0, -1), longer] : [...out, part];
  }, []));
  const rows = key.map((item, i) => `<path d="M8 ${14 + 16 * i}H32" stroke="${item.color}" stroke-width="2" stroke-dasharray="${item.dash || "none"}"/>
    <text x="40" y="${18 + 16 * i}" ${type} fill="${css("--ink")}">${esc(item.name)}</text>`);
  const down = key.length ? 16 * key.length + 10 : 0, tall = height + down + 14 * lines.length + 14;
  const foot = lines.map((line, i) => `<text x="8" y="${height + down + 12 + 14 * i}" ${type} font-size="10" fill="${css("--muted")}">${esc(line)}</text>`);
  const holder = document.createElement("div");
  holder.innerHTML = `<svg viewBox="0 0 ${width} ${tall}" width="${width}" height="${tall}"><rect width="100%" height="100%" fill="${css("--panel")}"/>
    ${rows.join("")}<g transform="translate(0 ${down})">${inside}</g>${foot.join("")}</svg>`;
  return { svg: new XMLSerializer().serializeToString(holder.firstChild), width, height: tall };
}

/** A head's map as a picture, with its tokens where there is room. */
function mapPicture(model, head, what) {
  const place = layout(model.T, 720), { T, named, left, top, side, cell } = place, down = 30;
  const small = paint(model, head, what), big = document.createElement("canvas"), context = big.getContext("2d");
  big.width = big.height = T * Math.max(1, Math.ceil(720 / T));
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, big.width, big.height);
  const words = `font-family="${esc(css(named ? "--mono" : "--sans"))}" font-size="${named ? Math.min(12, cell - 1) : 11}" fill="${css("--muted")}"`;
  const parts = (named ? marks(T, T) : marks(T, 9)).map(i => {
    const text = named ? esc(clip(visible(model.tokensText[i]), 10)) : i, middle = (i + 0.5) * cell;
    return `<text x="${left - 6}" y="${top + middle + 4}" text-anchor="end" ${words}>${text}</text>` + (named
      ? `<text transform="translate(${left + middle + 4} ${top + side + 7}) rotate(-90)" text-anchor="end" ${words}>${text}</text>`
      : `<text x="${left + middle}" y="${top + side + 15}" text-anchor="middle" ${words}>${text}</text>`);
  });
  const layer = layerOf(model, head, what), x = left + side - 170;
  const colors = layer.logits ? i => layer.color(layer.low + i / 63 * (layer.high - layer.low)) : i => ramp("weights")[Math.round(255 * i / 63)];
  for (let i = 0; i < 64; i++) parts.push(`<rect x="${x + i * 160 / 64}" y="${top + 6}" width="2.8" height="9" fill="rgb(${colors(i).join(",")})"/>`);
  for (const [text, share] of scaleTicks(layer)) parts.push(`<text x="${x + 160 * share}" y="${top + 28}" text-anchor="middle" ${words}>${text}</text>`);
  const title = [model.nameOf(head), labelName(model.label(head)), what === "weights" ? "attention" : `${what} logit`,
    ...["induction"].filter(key => model.score(head, key) !== null).map(key => `${key} ${fixed(model.score(head, key))}`)].join(" · ");
  const name = `${model.name} L${model.layer(head)}H${head % model.heads} ${what}`;
  return { name, ...picture(`<text x="8" y="20" font-family="${esc(css("--sans"))}" font-size="14" font-weight="600" fill="${css("--ink")}">${esc(title)}</text>
    <g transform="translate(0 ${down})"><image href="${big.toDataURL()}" x="${left}" y="${top}" width="${side}" height="${side}"/>${parts.join("")}</g>`,
    place.width, place.height + down + 6, [], [model.passport]) };
}

/** All heads of a model, layer × head, as a picture. */
function overviewPicture(model) {
  const tile = Math.max(40, Math.min(110, 1100 / model.heads)), left = 36, top = 24, gap = tile * 0.14;
  const type = `font-family="${esc(css("--sans"))}" font-size="10.5" fill="${css("--muted")}" text-anchor="middle"`;
  const parts = Array.from({ length: model.heads }, (_, head) => `<text x="${left + head * tile + tile / 2}" y="16" ${type}>H${head}</text>`);
  for (let head = 0; head < model.count; head++) {
    const x = left + head % model.heads * tile, y = top + model.layer(head) * (tile + 12), value = model.score(head, state.shown);
    if (head % model.heads === 0) parts.push(`<text x="18" y="${y + tile / 2}" ${type}>L${model.layer(head)}</text>`);
    parts.push(`<image href="${paint(model, head, "weights", 128).toDataURL()}" x="${x + gap / 2}" y="${y}" width="${tile - gap}" height="${tile - gap}"/>
      <text x="${x + tile / 2}" y="${y + tile - gap + 11}" ${type}>${showScore(value, state.shown)}</text>`);
  }
  return { name: `${model.name} heads`, ...picture(parts.join(""), left + model.heads * tile + 12, top + model.layers * (tile + 12) + 8, [],
    [`number: ${SCORES[state.shown].name}`, model.passport]) };
}

/** PNG and SVG buttons in `holder` for what `draw` returns. */
function exportButtons(holder, title, draw) {
  holder.innerHTML = ["PNG", "SVG"].map(kind => `<button type="button" data-kind="${kind}" aria-label="${esc(`Save ${title} as ${kind}`)}">${kind}</button>`).join("");
  holder.onclick = async event => {
    const kind = event.target.dataset.kind;
    if (!kind) return;
    const { svg, width, height, name: about = title } = draw(), name = `${about.replace(/[^\w.-]+/g, "_")}.${kind.toLowerCase()}`;
    save(kind === "SVG" ? new Blob([svg], { type: "image/svg+xml" }) : await png(svg, width, height), name);
  };
}

/** An SVG's text as a PNG, two pixels a unit. */
async function png(svg, width, height) {
  const image = new Image(), canvas = document.createElement("canvas");
  image.setAttribute("src", `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`);
  await image.decode();
  canvas.width = Math.round(2 * width);
  canvas.height = Math.round(2 * height);
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise(done => canvas.toBlob(done, "image/png"));
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
