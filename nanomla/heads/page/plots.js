"use strict";
// Curves as SVG. An <svg> written as HTML needs no address of its namespace; XMLSerializer adds
// it to what is saved.

// ---------------------------------------------------------------------------
// colours of models

/** Any CSS colour as rgb(), which every reader of SVG knows. */
function solidColor(color) {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  context.fillStyle = color;
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
  return rgbText([red, green, blue]);
}

/** The colour of a kind, moved towards the ink for each earlier model of that kind. */
function colorOfKind(kind, earlier) {
  const base = css(`--${kind.toLowerCase()}-ink`) || css("--ink");
  if (earlier === 0) return solidColor(base);
  const share = Math.max(30, 100 - 38 * earlier);
  return solidColor(`color-mix(in oklab, ${base} ${share}%, ${css("--ink")})`);
}

function colorOf(model) {
  const before = models.slice(0, model.index);
  return colorOfKind(model.kind, before.filter(other => other.kind === model.kind).length);
}

// ---------------------------------------------------------------------------
// axes

const TICK_MIDDLE = html`class="tick" text-anchor="middle"`;
const TICK_END = html`class="tick" text-anchor="end"`;

/** A text in an SVG; attributes are Markup. */
function svgText(x, y, attributes, text) {
  return html`<text x="${x}" y="${y}" ${attributes}>${text}</text>`;
}

/** Round numbers in [low, high], about `count` of them. */
function linearTicks(low, high, count) {
  const wanted = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(wanted));
  const steps = [1, 2, 2.5, 5, 10].map(size => size * power);
  const step = steps.find(size => size >= wanted * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    ticks.push(Number((i * step).toPrecision(12)));
  }
  return ticks;
}

/** Powers of ten in [low, high], with 2 and 5 times these where they are few. */
function logTicks(low, high) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    powers.push(10 ** power);
  }
  const isFew = powers.length <= 3;
  const all = isFew ? powers.flatMap(value => [value, 2 * value, 5 * value]) : powers;
  return all.filter(value => value >= low * 0.999 && value <= high * 1.001);
}

/** How many digits after the point tell these numbers apart. */
function digitsOf(ticks) {
  const isExact = count => ticks.every(y => Math.abs(y - Number(y.toFixed(count))) < 1e-9);
  return [0, 1, 2, 3].find(isExact) ?? 4;
}

/** A position on the x axis: position(x) in [0, 1], and its ticks. */
function makeXAxis(xs, isLog, room) {
  const positive = xs.filter(x => x > 0);
  // A logarithm knows no 0: it stands a bit left of the rest.
  const zero = (positive.length ? Math.min(...positive) : 1) / 2.5;
  const scale = x => (isLog ? Math.log10(Math.max(x, zero)) : x);
  const first = scale(Math.min(...xs));
  const last = scale(Math.max(...xs));
  const position = x => (last > first ? (scale(x) - first) / (last - first) : 0.5);
  let ticks = linearTicks(first, last, room);
  if (isLog) {
    ticks = positive.length ? logTicks(Math.min(...positive), Math.max(...xs)) : [];
    if (xs.includes(0)) ticks.push(0);
  }
  return { position, ticks };
}

/** A position on the y axis, from 0 below to 1 above, and its ticks. */
function makeYAxis(ys, room) {
  const least = Math.min(...ys);
  const most = Math.max(...ys);
  const margin = Math.max(most - least, 1e-3) * 0.06;
  // The axis begins at 0 where that is near.
  const isNearZero = least >= 0 && least < 0.25 * most;
  const low = isNearZero ? 0 : least - margin;
  const high = most + margin;
  const position = y => (y - low) / (high - low);
  return { position, ticks: linearTicks(low, high, room) };
}

// ---------------------------------------------------------------------------
// a line chart

const CHART = { left: 52, right: 14, top: 34, bottom: 40 }; // margins

/**
 * Curves with axes: draws them into a holder, reads out what the pointer is nearest to, and marks
 * a point of every curve.
 *
 * options: {title, xName, yName, series, log, width, height, xText}, series being a list of
 * {name, color, dash, x, y}; log: a logarithmic x axis; xText(x): a number of it as text
 */
class LineChart {
  constructor(holder, options) {
    Object.assign(this, { log: false, width: 640, height: 300, xText: short }, options);
    this.holder = holder;
    this.curves = this.series.map(withPoints).filter(curve => curve.points.length);
    if (!this.curves.length) {
      holder.innerHTML = html`<p class="quiet">${this.title}: no numbers in this report.</p>`;
      return;
    }
    this.xs = this.curves.flatMap(curve => curve.points.map(([x]) => x));
    const ys = this.curves.flatMap(curve => curve.points.map(([, y]) => y));
    this.xAxis = makeXAxis(this.xs, this.log, this.width / 90);
    this.yAxis = makeYAxis(ys, this.height / 60);
    this.draw();
    this.listen();
  }

  x(value) {
    const room = this.width - CHART.left - CHART.right;
    return CHART.left + this.xAxis.position(value) * room;
  }

  y(value) {
    const room = this.height - CHART.top - CHART.bottom;
    return CHART.top + (1 - this.yAxis.position(value)) * room;
  }

  draw() {
    const names = this.curves.map(curve => curve.name).join(", ");
    this.holder.innerHTML = html`
      <div class="figure-head">
        <ul class="key">${this.curves.map(keyEntry)}</ul>
        <span class="export"></span>
      </div>
      <svg class="plot" viewBox="0 0 ${this.width} ${this.height}" role="img"
        aria-label="${this.title}: ${names}">
        ${this.gridMarkup()}${this.axisMarkup()}${this.curves.map(curve => this.curveMarkup(curve))}
        <g class="cursor"></g><g class="dots"></g>
      </svg>
      <p class="reading quiet">&nbsp;</p>`;
    this.svg = this.holder.querySelector(".plot");
    this.reading = this.holder.querySelector(".reading");
    const key = this.curves;
    const lines = models.map(model => model.describe());
    const exports = this.holder.querySelector(".export");
    const size = { width: this.width, height: this.height };
    addExportButtons(exports, this.title, () => pictureOf(this.svg, size, { key, lines }));
  }

  /** A line and a number for every tick of the y axis. */
  gridMarkup() {
    const right = this.width - CHART.right;
    const digits = digitsOf(this.yAxis.ticks);
    return this.yAxis.ticks.map(tick => {
      const y = this.y(tick);
      return html`<line class="grid" x1="${CHART.left}" x2="${right}" y1="${y}" y2="${y}"/>
        ${svgText(CHART.left - 8, y + 3.5, TICK_END, fixed(tick, digits))}`;
    });
  }

  /** The x axis with its numbers, and the names of both. */
  axisMarkup() {
    const right = this.width - CHART.right;
    const y = this.height - CHART.bottom;
    const numbers = this.xAxis.ticks.map(tick =>
      svgText(this.x(tick), y + 18, TICK_MIDDLE, this.xText(tick)));
    return html`${numbers}
      <line class="axis" x1="${CHART.left}" x2="${right}" y1="${y}" y2="${y}"/>
      ${svgText(right, this.height - 6, TICK_END, this.xName)}
      ${svgText(4, 16, html`class="name"`, this.title)}
      ${svgText(right, 16, TICK_END, this.yName)}`;
  }

  curveMarkup(curve) {
    const steps = curve.points.map(([x, y], i) => {
      const command = i === 0 ? "M" : "L";
      return `${command}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`;
    });
    return html`<path class="curve" d="${steps.join("")}" stroke="${curve.color}"
      stroke-dasharray="${curve.dash || "none"}"/>`;
  }

  listen() {
    this.svg.addEventListener("pointermove", event => this.readOut(event));
    this.svg.addEventListener("pointerleave", () => {
      this.svg.querySelector(".cursor").innerHTML = "";
      this.reading.textContent = "\u00a0";
    });
  }

  /** Read out the values at the x that the pointer is nearest to. */
  readOut(event) {
    const box = this.svg.getBoundingClientRect();
    const pointed = ((event.clientX - box.left) / box.width) * this.width;
    const distance = x => Math.abs(this.x(x) - pointed);
    const nearest = this.xs.reduce((best, x) => (distance(x) < distance(best) ? x : best));
    const x = this.x(nearest);
    this.svg.querySelector(".cursor").innerHTML = html`<line class="axis" x1="${x}" x2="${x}"
      y1="${CHART.top}" y2="${this.height - CHART.bottom}"/>`;
    const values = [];
    for (const curve of this.curves) {
      const point = curve.points.find(([x]) => x === nearest);
      if (point) values.push(`${curve.name} ${fixed(point[1], 3)}`);
    }
    this.reading.textContent = `${this.xName} ${this.xText(nearest)}: ${values.join(" · ")}`;
  }

  /** Put a dot on every curve, at its last point up to x. */
  mark(x) {
    if (!this.curves.length) return;
    const dots = [];
    for (const curve of this.curves) {
      const point = curve.points.filter(([at]) => at <= x).pop();
      if (point) {
        dots.push(html`<circle class="dot" cx="${this.x(point[0])}" cy="${this.y(point[1])}"
          r="4.5" fill="${curve.color}"/>`);
      }
    }
    this.svg.querySelector(".dots").innerHTML = dots.join("");
  }
}

/** A series with the points that have two numbers. */
function withPoints(series) {
  const points = series.x.map((x, i) => [x, series.y[i]]);
  const isMeasured = ([x, y]) => finite(x) !== null && finite(y) !== null;
  return { ...series, points: points.filter(isMeasured) };
}

/** A short piece of a curve and its name. */
function keyEntry(curve) {
  return html`<li><svg width="26" height="8" aria-hidden="true">
    <path class="curve" d="M1 4H25" stroke="${curve.color}"
      stroke-dasharray="${curve.dash || "none"}"/></svg>${curve.name}</li>`;
}
