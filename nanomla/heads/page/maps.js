"use strict";
// Colours, and triangles of attention on a canvas.

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** What a map can show of a head: its name in the menu, and the title of its colour bar. */
const MAP_VALUES = {
  weights: { name: "attention", title: "attention weight" },
  content: { name: "content logit", title: "content logit" },
  rope: { name: "RoPE logit", title: "RoPE logit" },
  sum: { name: "content + RoPE", title: "content + RoPE" },
};

// ---------------------------------------------------------------------------
// colours

// More attention, more contrast to the page: light to dark on a light one, dark to light otherwise.
const RAMPS = {
  weights: {
    light: ["#eef2ef", "#cfe6e0", "#96cbc9", "#57a8bf", "#2c7aac", "#22508f", "#172457"],
    dark: ["#1d232b", "#213556", "#23578a", "#2f84a8", "#56b4a6", "#a6dba6", "#f6f7cf"],
  },
  logits: {
    light: ["#2a5f9e", "#8db6d9", "#f1f1ee", "#e3a98f", "#a63a2b"],
    dark: ["#8cc4ff", "#3c6ea8", "#1d232b", "#a8563f", "#ffb199"],
  },
};
const rampTables = {}; // ramp and scheme -> 256 colours [r, g, b]

/** The 256 colours of a ramp, for the scheme of this screen. */
function ramp(name) {
  const scheme = darkScheme.matches ? "dark" : "light";
  const key = `${name} ${scheme}`;
  rampTables[key] ??= interpolate(RAMPS[name][scheme].map(rgbOf));
  return rampTables[key];
}

/** #rrggbb as [r, g, b]. */
function rgbOf(hex) {
  return [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
}

/** 256 colours along a line through the stops. */
function interpolate(stops) {
  return range(256).map(i => {
    const position = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(position), stops.length - 2);
    const share = position - low;
    return stops[low].map((from, c) => Math.round(from + share * (stops[low + 1][c] - from)));
  });
}

/** A weight in [0, 1] as an index into the ramp, on the scale that the reader chose. */
function shade(weight) {
  return Math.round(255 * (state.scale === "root" ? Math.sqrt(weight) : weight));
}

const rgbText = color => `rgb(${color.join(", ")})`;
const weightColor = weight => rgbText(ramp("weights")[shade(weight)]);

/** Ink that can be read on weightColor(weight). */
function inkOn(weight) {
  const [r, g, b] = ramp("weights")[shade(weight)];
  const brightness = 0.3 * r + 0.59 * g + 0.11 * b;
  return brightness > 140 ? "#12161b" : "#ffffff";
}

// ---------------------------------------------------------------------------
// a triangle of a head

/**
 * The values of a map and their colours: {values, color(value) -> [r, g, b], bar(share) -> [r, g,
 * b], ticks}. Weights for a head whose logits are not in the report.
 */
function mapValues(model, head, what) {
  const split = what === "weights" ? null : model.split(head);
  return split ? logitValues(split, what) : weightValues(model, head);
}

function weightValues(model, head) {
  const table = ramp("weights");
  const colors = range(256).map(byte => table[shade(byte / 255)]);
  const position = state.scale === "root" ? Math.sqrt : weight => weight;
  const marked = state.scale === "root" ? [0, 0.1, 0.5, 1] : [0, 0.5, 1];
  return {
    values: model.pattern(head),
    color: byte => colors[byte],
    bar: share => table[Math.round(255 * share)],
    ticks: marked.map(weight => [String(weight).replace("0.", "."), position(weight)]),
  };
}

function logitValues(split, what) {
  // One scale for all parts of a head, so that content and RoPE can be compared.
  let largest = 1e-6;
  for (const part of Object.values(split)) {
    for (const value of part) {
      if (isFinite(value)) largest = Math.max(largest, Math.abs(value));
    }
  }
  const table = ramp("logits");
  return {
    values: split[what],
    color: value => table[clamp(Math.round(127.5 * (1 + value / largest)), 0, 255)],
    bar: share => table[Math.round(255 * share)],
    ticks: [[fixed(-largest, 1), 0], ["0", 0.5], [fixed(largest, 1), 1]],
  };
}

/**
 * A triangle on a canvas of its own, a pixel a cell. With `most` pixels a side or fewer, a pixel
 * stands for several cells and shows the largest of them: thin stripes stay visible.
 */
function paintTriangle(model, head, what = "weights", most = Infinity) {
  const map = mapValues(model, head, what);
  const step = Math.max(1, Math.ceil(model.T / most)); // cells a pixel
  const side = Math.ceil(model.T / step);
  const canvas = document.createElement("canvas");
  canvas.width = side;
  canvas.height = side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(side, side);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column <= row; column++) {
      const value = largestOfBlock(map.values, model.T, row * step, column * step, step);
      if (value !== null) image.data.set([...map.color(value), 255], 4 * (row * side + column));
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The largest value of a square of cells; null where all of them are above the diagonal. */
function largestOfBlock(values, T, fromQ, fromK, step) {
  let largest = null;
  for (let q = fromQ; q < Math.min(T, fromQ + step); q++) {
    for (let k = fromK; k <= Math.min(q, fromK + step - 1); k++) {
      const value = values[at(q, k)];
      if (largest === null || value > largest) largest = value;
    }
  }
  return largest;
}

// ---------------------------------------------------------------------------
// the large map of one head

/** Every so many positions of T, so that about `room` of them have a number on an axis. */
function axisPositions(T, room) {
  let step = 1;
  while (T / step > room) step *= 2;
  return range(Math.ceil(T / step)).map(i => i * step);
}

/** Where things lie in a map of a given width, on the page and in a picture that leaves it. */
function layoutOf(T, width) {
  const hasNames = (width - 92) / T >= 11; // room for every token's text on both axes
  const left = hasNames ? 84 : 40;
  const bottom = hasNames ? 84 : 32;
  const top = 4;
  const right = 8;
  const side = Math.max(60, width - left - right);
  return { T, hasNames, left, top, side, cell: side / T, width, height: top + side + bottom };
}

/** What stands beside each row and below each column: [position, text]. */
function axisTexts(model, layout) {
  if (!layout.hasNames) return axisPositions(model.T, 9).map(i => [i, String(i)]);
  return range(model.T).map(i => [i, clip(visible(model.tokensText[i]), 10)]);
}

/** Paints the map of one head, and the cross of the query and the key on top. */
class HeadMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.base = document.createElement("canvas"); // everything that does not follow the pointer
  }

  show(model, head, what) {
    Object.assign(this, { model, head, what });
    const width = Math.min(this.canvas.parentElement.clientWidth || 360, 640);
    this.layout = layoutOf(model.T, width);
    this.ratio = devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.base]) {
      canvas.width = Math.round(width * this.ratio);
      canvas.height = Math.round(this.layout.height * this.ratio);
    }
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${this.layout.height}px`;
    this.paintBase();
  }

  paintBase() {
    const { left, top, side, cell, width, height } = this.layout;
    const context = this.base.getContext("2d");
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    // Cells smaller than a pixel are mixed; larger ones keep their edges.
    context.imageSmoothingEnabled = cell * this.ratio < 1;
    const triangle = paintTriangle(this.model, this.head, this.what);
    context.drawImage(triangle, left, top, side, side);
    this.paintAxes(context);
    this.paintColorBar(context);
  }

  paintAxes(context) {
    const { hasNames, left, top, side, cell } = this.layout;
    const bottom = top + side;
    const up = -Math.PI / 2;
    context.fillStyle = css("--muted");
    context.font = `10.5px ${css("--sans")}`;
    if (hasNames) context.font = `${Math.min(12, cell - 1)}px ${css("--mono")}`;
    for (const [i, text] of axisTexts(this.model, this.layout)) {
      const middle = (i + 0.5) * cell;
      writeText(context, text, left - 6, top + middle, "right");
      if (hasNames) writeText(context, text, left + middle, bottom + 7, "right", up);
      else writeText(context, text, left + middle, bottom + 11, "center");
    }
    if (hasNames) return;
    context.font = `11px ${css("--sans")}`;
    writeText(context, "key →", left + side, bottom + 24, "right");
    writeText(context, "← query", 6, bottom, "left", up);
  }

  /** The colour bar, in the empty corner above the diagonal. */
  paintColorBar(context) {
    const { left, top, side } = this.layout;
    const map = mapValues(this.model, this.head, this.what);
    const width = Math.round(Math.min(150, 0.36 * side));
    const x = left + side - width;
    const y = top + 16;
    for (let i = 0; i < width; i++) {
      context.fillStyle = rgbText(map.bar(i / (width - 1)));
      context.fillRect(x + i, y, 1.5, 8);
    }
    context.fillStyle = css("--muted");
    context.font = `10.5px ${css("--sans")}`;
    writeText(context, MAP_VALUES[this.what].title, x + width, y - 9, "right");
    for (const [text, share] of map.ticks) {
      writeText(context, text, x + share * width, y + 17, tickAlignment(share));
    }
  }

  /** The cross: a band along the query's row and the key's column, a ring around their cell. */
  mark(q, k, locked) {
    const { left, top, side, cell } = this.layout;
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.base, 0, 0);
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    const x = left + k * cell;
    const y = top + q * cell;
    const band = Math.max(cell, 1);
    context.strokeStyle = css("--accent");
    context.lineWidth = 1;
    context.globalAlpha = locked ? 1 : 0.8;
    context.strokeRect(left - 0.5, y - 0.5, (q + 1) * cell + 1, band + 1);
    context.globalAlpha = 0.45;
    context.strokeRect(x - 0.5, y - 0.5, band + 1, side - q * cell + 1);
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.strokeRect(x - 2, y - 2, band + 4, band + 4);
    this.paintQueryName(context, q);
    if (!this.layout.hasNames) this.paintKeyName(context, k);
  }

  nameAt(i) {
    return `${i} ${clip(visible(this.model.tokensText[i]), 14)}`;
  }

  /** The query's name right of its row, or above it where the row reaches the edge. */
  paintQueryName(context, q) {
    const { left, top, side, cell } = this.layout;
    context.font = `11.5px ${css("--mono")}`;
    const height = 18;
    const width = context.measureText(this.nameAt(q)).width + 12;
    let x = left + (q + 1) * cell + 6;
    let y = top + (q + 0.5) * cell - height / 2;
    if (x + width > left + side) {
      x = left + side - width;
      y = top + q * cell - height - 5;
    }
    y = Math.max(top, y);
    context.fillStyle = css("--accent");
    context.beginPath();
    context.roundRect(x, y, width, height, 5);
    context.fill();
    context.fillStyle = css("--on-accent");
    writeText(context, this.nameAt(q), x + 6, y + height / 2 + 0.5, "left");
  }

  /** The key's name below its column and the numbers there, left of the axis' own name. */
  paintKeyName(context, k) {
    const { left, top, side, cell } = this.layout;
    context.font = `11.5px ${css("--mono")}`;
    const width = context.measureText(this.nameAt(k)).width;
    const axisNameWidth = 40;
    const last = left + side - axisNameWidth - width;
    const x = clamp(left + (k + 0.5) * cell - width / 2, 0, Math.max(0, last));
    context.fillStyle = css("--accent");
    writeText(context, this.nameAt(k), x, top + side + 24, "left");
  }

  /** The cell under a pointer: {q, k}, k null beyond the diagonal; null outside the map. */
  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { left, top, cell, T } = this.layout;
    const q = Math.floor((event.clientY - box.top - top) / cell);
    const k = Math.floor((event.clientX - box.left - left) / cell);
    const isInside = q >= 0 && q < T && k >= 0 && k < T;
    if (!isInside) return null;
    return { q, k: k > q ? null : k };
  }
}

/** Write a text beside a point at half its height, turned by an angle around it. */
function writeText(context, text, x, y, align, angle = 0) {
  context.save();
  context.textBaseline = "middle";
  context.translate(x, y);
  context.rotate(angle);
  context.textAlign = align;
  context.fillText(text, 0, 0);
  context.restore();
}

/** The first and the last number of a colour bar stay within it. */
function tickAlignment(share) {
  if (share === 0) return "left";
  if (share === 1) return "right";
  return "center";
}
