"use strict";
// Colours, and triangles of attention on a canvas.

const dark = matchMedia("(prefers-color-scheme: dark)");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const RAMPS = { // light to dark on paper, dark to light on a screen at night: more attention, more contrast
  weights: { light: ["#eef2ef", "#cfe6e0", "#96cbc9", "#57a8bf", "#2c7aac", "#22508f", "#172457"],
             dark: ["#1d232b", "#213556", "#23578a", "#2f84a8", "#56b4a6", "#a6dba6", "#f6f7cf"] },
  logits: { light: ["#2a5f9e", "#8db6d9", "#f1f1ee", "#e3a98f", "#a63a2b"],
            dark: ["#8cc4ff", "#3c6ea8", "#1d232b", "#a8563f", "#ffb199"] },
};
const tables = {}; // ramp and theme -> 256 × [r, g, b]

function ramp(name) {
  const theme = dark.matches ? "dark" : "light", key = name + theme;
  if (!tables[key]) {
    const stops = RAMPS[name][theme].map(hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)));
    tables[key] = Array.from({ length: 256 }, (_, i) => {
      const place = i / 255 * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
      return stops[low].map((value, c) => Math.round(value + (place - low) * (stops[low + 1][c] - value)));
    });
  }
  return tables[key];
}

/** A weight in [0, 1] as an entry of the ramp, on the scale that the reader chose. */
const shade = weight => Math.round(255 * (state.scale === "root" ? Math.sqrt(weight) : weight));
const weightColor = weight => `rgb(${ramp("weights")[shade(weight)].join(" ")})`;
/** Ink that can be read on weightColor(weight). */
const inkOn = weight => {
  const [r, g, b] = ramp("weights")[shade(weight)];
  return 0.3 * r + 0.59 * g + 0.11 * b > 140 ? "#12161b" : "#ffffff";
};

/**
 * What a map shows of a head: {values, color(value) -> [r, g, b], low, high}. Logits share one scale a head, so
 * that content and RoPE can be compared.
 */
function layerOf(model, head, what) {
  const split = what === "weights" ? null : model.split(head);
  if (!split) {
    const table = ramp("weights"), steps = Array.from({ length: 256 }, (_, byte) => table[shade(byte / 255)]);
    return { values: model.pattern(head), color: byte => steps[byte], low: 0, high: 1, logits: false };
  }
  let high = 1e-6;
  for (const part of Object.values(split)) for (const value of part) if (isFinite(value)) high = Math.max(high, Math.abs(value));
  const table = ramp("logits");
  return { values: split[what], low: -high, high, logits: true,
           color: value => table[Math.max(0, Math.min(255, Math.round(127.5 * (1 + value / high))))] };
}

/** A triangle painted one pixel a cell; with `most`, as many cells a pixel as it takes, each showing its largest. */
function paint(model, head, what = "weights", most = Infinity) {
  const T = model.T, layer = layerOf(model, head, what), step = Math.max(1, Math.ceil(T / most)), side = Math.ceil(T / step);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d"), image = context.createImageData(side, side);
  for (let row = 0; row < side; row++) {
    for (let column = 0; column <= row; column++) {
      let value = -Infinity;
      for (let q = row * step; q < Math.min(T, (row + 1) * step); q++)
        for (let k = column * step; k <= Math.min(q, (column + 1) * step - 1); k++) value = Math.max(value, layer.values[at(q, k)]);
      if (value === -Infinity) continue;
      const [r, g, b] = layer.color(value);
      image.data.set([r, g, b, 255], 4 * (row * side + column));
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Positions worth a number on an axis of T tokens with room for about `room` of them. */
function marks(T, room) {
  const step = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024].find(size => T / size <= room) || 2048;
  return Array.from({ length: Math.ceil(T / step) }, (_, i) => i * step);
}

/** Where things lie in a map of a given width: the same for the canvas and the picture that leaves the page. */
function layout(T, width) {
  const named = (width - 92) / T >= 11; // room to name every token on both axes
  const left = named ? 84 : 40, bottom = named ? 84 : 32, top = 4, right = 8;
  const side = Math.max(60, width - left - right);
  return { T, named, left, top, side, cell: side / T, width, height: top + side + bottom };
}

/** The large map of one head: paints it, and the cross of the query and the key on top. */
class HeadMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.base = document.createElement("canvas"); // everything that does not move
  }

  show(model, head, what) {
    Object.assign(this, { model, head, what });
    const width = Math.min(this.canvas.parentElement.clientWidth || 360, 640), ratio = devicePixelRatio || 1;
    this.place = layout(model.T, width);
    for (const canvas of [this.canvas, this.base]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(this.place.height * ratio);
    }
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${this.place.height}px`;
    this.ratio = ratio;
    this.paintBase();
  }

  paintBase() {
    const { model, head, what, ratio } = this, { T, named, left, top, side, cell } = this.place;
    const context = this.base.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.place.width, this.place.height);
    context.imageSmoothingEnabled = cell * ratio < 1;
    context.drawImage(paint(model, head, what), left, top, side, side);

    context.fillStyle = css("--muted");
    const write = (text, x, y, align, turn = 0) => {
      context.save();
      context.translate(x, y);
      context.rotate(turn);
      context.textAlign = align;
      context.fillText(text, 0, 0);
      context.restore();
    };
    context.textBaseline = "middle";
    context.font = named ? `${Math.min(12, cell - 1)}px ${css("--mono")}` : `10.5px ${css("--sans")}`;
    for (const i of named ? marks(T, T) : marks(T, 9)) {
      const middle = (i + 0.5) * cell;
      write(named ? clip(visible(model.tokensText[i]), 10) : i, left - 6, top + middle, "right");
      if (named) write(clip(visible(model.tokensText[i]), 10), left + middle, top + side + 7, "right", -Math.PI / 2);
      else write(i, left + middle, top + side + 11, "center");
    }
    context.font = `11px ${css("--sans")}`;
    if (!named) write("key →", left + side, top + side + 24, "right");
    if (!named) write("← query", 6, top + side, "left", -Math.PI / 2);
    this.paintScale(context);
  }

  /** The colour bar, in the empty corner above the diagonal. */
  paintScale(context) {
    const { left, top, side } = this.place, layer = layerOf(this.model, this.head, this.what);
    const width = Math.round(Math.min(150, 0.36 * side)), x = left + side - width, y = top + 16;
    for (let i = 0; i < width; i++) {
      const share = i / (width - 1);
      context.fillStyle = `rgb(${(layer.logits ? layer.color(layer.low + share * (layer.high - layer.low)) : ramp("weights")[Math.round(255 * share)]).join(" ")})`;
      context.fillRect(x + i, y, 1.5, 8);
    }
    context.fillStyle = css("--muted");
    context.font = `10.5px ${css("--sans")}`;
    context.textAlign = "right";
    const title = { weights: "attention weight", content: "content logit", rope: "RoPE logit", sum: "content + RoPE" }[this.what];
    context.fillText(title, x + width, y - 9);
    context.textAlign = "center";
    for (const [text, share] of scaleTicks(layer)) {
      context.textAlign = share === 0 ? "left" : share === 1 ? "right" : "center";
      context.fillText(text, x + share * width, y + 17);
    }
  }

  /** The cross: a quiet band along the query's row and the key's column, a ring around their cell. */
  mark(q, k, locked) {
    const { left, top, side, cell } = this.place, context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.base, 0, 0);
    if (q === null) return;
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    const accent = css("--accent"), thick = Math.max(cell, 1);
    context.strokeStyle = accent;
    context.lineWidth = 1;
    context.globalAlpha = locked ? 1 : 0.8;
    context.strokeRect(left - 0.5, top + q * cell - 0.5, (q + 1) * cell + 1, thick + 1);
    context.globalAlpha = 0.45;
    context.strokeRect(left + k * cell - 0.5, top + q * cell - 0.5, thick + 1, side - q * cell + 1);
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.strokeRect(left + k * cell - 2, top + q * cell - 2, thick + 4, thick + 4);
    this.pill(context, q, k, accent);
  }

  /** The query's name right of its row, or above it where the row reaches the edge. */
  pill(context, q, k, accent) {
    const { left, top, side, cell, named } = this.place;
    const text = `${q} ${clip(visible(this.model.tokensText[q]), 14)}`;
    context.font = `11.5px ${css("--mono")}`;
    context.textBaseline = "middle";
    context.textAlign = "left";
    const width = context.measureText(text).width + 12, height = 18;
    let x = left + (q + 1) * cell + 6, y = top + (q + 0.5) * cell - height / 2;
    if (x + width > left + side) { x = left + side - width; y = top + q * cell - height - 5; }
    y = Math.max(top, y);
    context.fillStyle = accent;
    context.beginPath();
    context.roundRect(x, y, width, height, 5);
    context.fill();
    context.fillStyle = css("--on-accent");
    context.fillText(text, x + 6, y + height / 2 + 0.5);
    if (named) return;
    const name = `${k} ${clip(visible(this.model.tokensText[k]), 14)}`, wide = context.measureText(name).width + 12;
    const start = Math.max(0, Math.min(left + (k + 0.5) * cell - wide / 2, left + side - wide));
    context.fillStyle = css("--panel");
    context.fillRect(start - 8, top + side + 2, wide + 16, height);
    context.fillStyle = accent;
    context.fillText(name, start + 6, top + side + 2 + height / 2);
  }

  /** The cell under a pointer: {q, k}, k null beyond the diagonal; null outside the map. */
  cellAt(event) {
    const box = this.canvas.getBoundingClientRect(), { left, top, cell, T } = this.place;
    const q = Math.floor((event.clientY - box.top - top) / cell), k = Math.floor((event.clientX - box.left - left) / cell);
    return q < 0 || q >= T || k < 0 || k >= T ? null : { q, k: k > q ? null : k };
  }
}

/** [text, place along the bar] for a colour bar. */
function scaleTicks(layer) {
  if (layer.logits) return [[fixed(layer.low, 1), 0], ["0", 0.5], [fixed(layer.high, 1), 1]];
  return state.scale === "root" ? [["0", 0], [".1", Math.sqrt(0.1)], [".5", Math.sqrt(0.5)], ["1", 1]] : [["0", 0], [".5", 0.5], ["1", 1]];
}
