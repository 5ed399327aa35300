"use strict";
// The report: its numbers, unpacked one head at a time, and how numbers and tokens become text.
//
// Letters: T tokens, q the position of a query, k that of a key. A head is its number in its
// model, counted layer by layer.

const report = JSON.parse(document.getElementById("report").textContent);

// Labels, scores and headings come with the report: names.py has the one list of them.
const NAMES = report.names;
const LABELS = [...NAMES.labels.map(label => label.name), ""];
const SCORES = new Map(NAMES.scores.map(score => [score.key, score]));
const COMPOSITION = NAMES.composition; // kind of composition -> what reads

// ---------------------------------------------------------------------------
// numbers out of base64

/** Bytes [from, to) of a base64 text; the rest is not decoded. */
function bytesOf(text, from, to) {
  // 4 letters hold 3 bytes, so decoding begins at a whole group of them.
  const group = Math.floor(from / 3);
  const decoded = atob(text.slice(4 * group, 4 * Math.ceil(to / 3)));
  const bytes = new Uint8Array(to - from);
  for (let i = 0; i < bytes.length; i++) {
    bytes[i] = decoded.charCodeAt(from - 3 * group + i);
  }
  return bytes;
}

/** Little-endian float16 as numbers. */
function halves(bytes) {
  const view = new DataView(bytes.buffer);
  const numbers = new Float32Array(bytes.length / 2);
  for (let i = 0; i < numbers.length; i++) numbers[i] = half(view.getUint16(2 * i, true));
  return numbers;
}

/** The number that the 16 bits of a float16 stand for. */
function half(bits) {
  const sign = bits >> 15 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent < 31) return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  return fraction ? NaN : sign * Infinity;
}

/** The index of (q, k) in a packed triangle. */
const at = (q, k) => (q * (q + 1)) / 2 + k;

/** A number, or null for whatever is none. */
const finite = value => (typeof value === "number" && isFinite(value) ? value : null);

/** 0 to count - 1. */
const range = count => Array.from({ length: count }, (_, i) => i);

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

// ---------------------------------------------------------------------------
// a model of the report

/** A `models` entry, under the keys that build.py lists. */
class Model {
  constructor(entry, index) {
    Object.assign(this, entry);
    this.index = index;
    this.kind = entry.kind || "MHA";
    this.tokensText = entry.tokens_text || [];
    this.T = this.tokensText.length;
    this.triangle = at(this.T, 0); // weights of a head
    this.allHeads = range(entry.layers * entry.heads);
    this.untrained = entry.trained === false;
    this.scoresOf = new Map();
    for (const score of entry.scores || []) {
      this.scoresOf.set(this.headAt([score.layer, score.head]), score);
    }
    // Where the parts of a head's logits are stored: they are in the report for some heads only.
    this.splitIndex = new Map();
    const splitHeads = entry.mla_split?.heads || [];
    splitHeads.forEach((pair, i) => this.splitIndex.set(this.headAt(pair), i));
    // What was unpacked, by head.
    this.patterns = new Map();
    this.splits = new Map();
  }

  headAt([layer, head]) {
    return layer * this.heads + head;
  }

  layer(head) {
    return Math.floor(head / this.heads);
  }

  /** A head's number in its layer. */
  headInLayer(head) {
    return head % this.heads;
  }

  nameOf(head) {
    return `L${this.layer(head)}\u202fH${this.headInLayer(head)}`;
  }

  label(head) {
    return this.scoresOf.get(head)?.label || "";
  }

  /** The packed attention of a head: bytes, 255 for 1. */
  pattern(head) {
    if (!this.patterns.has(head)) {
      const from = head * this.triangle;
      this.patterns.set(head, bytesOf(this.patterns_u8, from, from + this.triangle));
    }
    return this.patterns.get(head);
  }

  weight(head, q, k) {
    if (k > q) return 0;
    return this.pattern(head)[at(q, k)] / 255;
  }

  /** The key with the largest weight of a query. */
  topKey(head, q) {
    const row = this.pattern(head).subarray(at(q, 0), at(q, q) + 1);
    return row.reduce((best, weight, k) => (weight > row[best] ? k : best), 0);
  }

  /** {content, rope, sum}: a head's packed logits; null where the report does not have them. */
  split(head) {
    if (!this.splitIndex.has(head)) return null;
    if (!this.splits.has(head)) this.splits.set(head, this.unpackSplit(this.splitIndex.get(head)));
    return this.splits.get(head);
  }

  unpackSplit(index) {
    const size = 2 * this.triangle; // bytes
    const unpack = text => halves(bytesOf(text, index * size, (index + 1) * size));
    const content = unpack(this.mla_split.content_f16);
    const rope = unpack(this.mla_split.rope_f16);
    const sum = content.map((value, i) => value + rope[i]);
    return { content, rope, sum };
  }

  /** One number of a head: score(head, "induction", "null"), score(head, "copying"). */
  score(head, key, part = "score") {
    const value = this.scoresOf.get(head)?.[key];
    if (value !== null && typeof value === "object") return finite(value[part]);
    // A single number has no parts.
    return part === "score" ? finite(value) : null;
  }

  /** What a key is to a query, by the texts of the sequence. */
  role(q, k) {
    const text = this.tokensText;
    if (k === q) return "current";
    const followsCopy = k > 0 && k - 1 < q && text[k - 1] === text[q];
    if (followsCopy && k === q - 1) return "induction, previous";
    if (followsCopy) return "induction";
    if (text[k] === text[q]) return "duplicate";
    if (k === q - 1) return "previous";
    if (k === 0) return "first";
    return "";
  }

  /** The line that every picture of this model carries. */
  describe() {
    const parts = [this.name, this.kind, `${short(this.params)} parameters`];
    parts.push(finite(this.step) === null ? "step unknown" : `step ${whole(this.step)}`);
    parts.push(finite(this.tokens) === null ? "tokens unknown" : `${short(this.tokens)} tokens`);
    const loss = finite(this.val_loss) === null ? "unknown" : fixed(this.val_loss, 3);
    parts.push(`val loss ${loss}`);
    if (this.untrained) parts.push("UNTRAINED");
    return parts.join(" · ");
  }
}

const models = (report.models || []).map((entry, index) => new Model(entry, index));

/** Heads by a score, best first; heads without one last. */
function sortedHeads(model, key) {
  const value = head => model.score(head, key) ?? -Infinity;
  return [...model.allHeads].sort((a, b) => value(b) - value(a) || a - b);
}

/** Whether any head of any model has a number for a score. */
function isMeasured(key) {
  return models.some(model => model.allHeads.some(head => model.score(head, key) !== null));
}

// ---------------------------------------------------------------------------
// markup

/** Text that is HTML already, and is not escaped again. */
class Markup {
  constructor(text) {
    this.text = text;
  }

  toString() {
    return this.text;
  }
}

/** html`<b>${anything}</b>`: what is put in is escaped, unless it is Markup or a list of it. */
function html(strings, ...values) {
  const pieces = strings.map((piece, i) => (i === 0 ? piece : asMarkup(values[i - 1]) + piece));
  return new Markup(pieces.join(""));
}

function asMarkup(value) {
  if (Array.isArray(value)) return value.map(asMarkup).join("");
  if (value instanceof Markup) return value.text;
  return String(value).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);
}

// ---------------------------------------------------------------------------
// texts

const whole = value => (finite(value) === null ? "–" : value.toLocaleString("en-US"));

/** A number with a true minus sign and a fixed number of digits; what rounds to 0 has no sign. */
function fixed(value, digits = 2) {
  if (finite(value) === null) return "–";
  const text = value.toFixed(digits);
  return Number(text) < 0 ? text.replace("-", "−") : text.replace("-", "");
}

/** A difference, with its sign. */
function signed(value, digits = 3) {
  const text = fixed(value, digits);
  return Number(text) > 0 ? `+${text}` : text;
}

/** A score, with its sign where it is a difference in loss. */
function scoreText(value, key, digits = 2) {
  return SCORES.get(key)?.is_loss ? signed(value, digits) : fixed(value, digits);
}

/** 124_439_808 as 124M. */
function short(value) {
  if (finite(value) === null) return "–";
  const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]];
  const [size, letter] = units.find(([size]) => Math.abs(value) >= size) || [1, ""];
  return Number((value / size).toPrecision(3)) + letter;
}

const SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };

/** A token as text that can be seen: spaces, line ends and the like have signs. */
function visible(token) {
  const text = String(token)
    .replace(/[ \n\t\r]/g, sign => SIGNS[sign])
    .replace(/[\u0000-\u001f\u007f]/g, "␦");
  return text || "∅";
}

/** At most so many characters of a text. */
function clip(text, most) {
  const characters = [...text];
  return characters.length > most ? characters.slice(0, most - 1).join("") + "…" : text;
}

const labelName = label => label || "no label";
