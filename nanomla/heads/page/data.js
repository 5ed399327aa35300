"use strict";
// The report: unpacked lazily, one head at a time. Letters: T tokens, q a query's position, k a key's.

const report = JSON.parse(document.getElementById("report").textContent);

// The names come with the report: nanomla/heads/page/build.py has the one list of them.
const LABELS = report.names.labels;
const FAMILIES = report.names.families; // scores with null, control, gap and interval
// What heads can be ordered by: key -> { name, short, column, help, is_loss }.
const SCORES = Object.fromEntries(report.names.scores.map(score => [score.key, score]));

/** Bytes [from, to) of a base64 text; the rest is not decoded. */
function bytesOf(text, from, to) {
  const group = Math.floor(from / 3); // 3 bytes are 4 letters
  const raw = atob(text.slice(4 * group, 4 * Math.ceil(to / 3)));
  const bytes = new Uint8Array(to - from);
  for (let i = 0; i < bytes.length; i++) bytes[i] = raw.charCodeAt(from - 3 * group + i);
  return bytes;
}

/** Little-endian float16 as numbers. */
function halves(bytes) {
  const view = new DataView(bytes.buffer), out = new Float32Array(bytes.length / 2);
  for (let i = 0; i < out.length; i++) {
    const half = view.getUint16(2 * i, true), exponent = half >> 10 & 31, fraction = half & 1023;
    const size = exponent === 0 ? fraction * 2 ** -24
      : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
    out[i] = half >> 15 ? -size : size;
  }
  return out;
}

const number = value => typeof value === "number" && isFinite(value) ? value : null;

/** Where (q, k) lies in a packed triangle. */
const at = (q, k) => q * (q + 1) / 2 + k;

class Model {
  constructor(raw, index) {
    Object.assign(this, raw);
    this.index = index;
    this.kind = raw.kind || "MHA";
    this.tokensText = raw.tokens_text || [];
    this.T = this.tokensText.length;
    this.size = this.T * (this.T + 1) / 2;
    this.count = raw.layers * raw.heads;
    this.allHeads = Array.from({ length: this.count }, (_, head) => head);
    this.untrained = raw.trained === false;
    this.scoreOf = new Map();
    for (const score of raw.scores || []) this.scoreOf.set(score.layer * raw.heads + score.head, score);
    const split = raw.mla_split;
    this.splitAt = new Map(split ? split.heads.map(([layer, head], i) => [layer * raw.heads + head, i]) : []);
    this.patterns = new Map();
    this.splits = new Map();
  }

  layer(head) { return Math.floor(head / this.heads); }
  nameOf(head) { return `L${this.layer(head)}\u202fH${head % this.heads}`; }
  label(head) { return this.scoreOf.get(head)?.label || ""; }

  /** The packed attention of a head: bytes, 255 for 1. */
  pattern(head) {
    if (!this.patterns.has(head)) this.patterns.set(head, bytesOf(this.patterns_u8, head * this.size, (head + 1) * this.size));
    return this.patterns.get(head);
  }

  weight(head, q, k) { return k > q ? 0 : this.pattern(head)[at(q, k)] / 255; }

  /** The key that gets most of a query's attention. */
  topKey(head, q) {
    const row = this.pattern(head).subarray(at(q, 0), at(q, q) + 1);
    return row.reduce((best, weight, k) => weight > row[best] ? k : best, 0);
  }

  /** {content, rope, sum}: packed parts of a head's logits; null where they are not in the report. */
  split(head) {
    const place = this.splitAt.get(head);
    if (place === undefined) return null;
    if (!this.splits.has(head)) {
      const part = text => halves(bytesOf(text, 2 * place * this.size, 2 * (place + 1) * this.size));
      const content = part(this.mla_split.content_f16), rope = part(this.mla_split.rope_f16);
      this.splits.set(head, { content, rope, sum: content.map((value, i) => value + rope[i]) });
    }
    return this.splits.get(head);
  }

  /** A number of the table: score("induction"), score("induction", "null"), score("copying"). */
  score(head, key, part = "score") {
    const value = this.scoreOf.get(head)?.[key];
    return value !== null && typeof value === "object" ? number(value[part]) : part === "score" ? number(value) : null;
  }

  /** What stands between a query and a key, by the texts of the sequence. */
  role(q, k) {
    const text = this.tokensText;
    if (k === q) return "current";
    if (k > 0 && text[k - 1] === text[q] && k - 1 < q) return k === q - 1 ? "induction, previous" : "induction";
    if (text[k] === text[q]) return "duplicate";
    if (k === q - 1) return "previous";
    return k === 0 ? "first" : "";
  }

  /** The line that every picture of this model carries. */
  get passport() {
    const seen = number(this.tokens) === null ? "tokens unknown" : `${short(this.tokens)} tokens`;
    return [this.name, this.kind, `${short(this.params)} parameters`, number(this.step) === null ? "step unknown" : `step ${whole(this.step)}`,
      seen, number(this.val_loss) === null ? "val loss unknown" : `val loss ${this.val_loss.toFixed(3)}`,
      ...(this.untrained ? ["UNTRAINED"] : [])].join(" · ");
  }
}

const models = (report.models || []).map((raw, index) => new Model(raw, index));

// ---------------------------------------------------------------------------
// texts

const esc = text => String(text).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);
const whole = value => number(value) === null ? "–" : value.toLocaleString("en-US");
const fixed = (value, digits = 2) => number(value) === null ? "–" : value.toFixed(digits).replace("-", "−");
const signed = (value, digits = 3) => number(value) === null ? "–" : (value > 0 ? "+" : "") + fixed(value, digits);
const showScore = (value, key) => SCORES[key]?.is_loss ? signed(value, 2) : fixed(value, 2);

/** 124_439_808 as 124M. */
function short(value) {
  if (number(value) === null) return "–";
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= unit) return String(Number((value / unit).toPrecision(3))) + letter;
  return String(Number(value.toPrecision(3)));
}

/** A token as text that can be seen: spaces, line ends and the like have signs. */
function visible(token) {
  const signs = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };
  const text = String(token).replace(/[ \n\t\r]/g, sign => signs[sign]).replace(/[\u0000-\u001f\u007f]/g, "␦");
  return text || "∅";
}
const clip = (text, most) => [...text].length > most ? [...text].slice(0, most - 1).join("") + "…" : text;
const labelName = label => label || "no label";
