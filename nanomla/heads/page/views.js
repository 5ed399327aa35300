"use strict";
// One model as the page shows it: its heads as small maps, one of them large, and what a query
// attends to.

const MOST_KEYS = 8; // listed for a query

class View {
  constructor(model) {
    const template = document.getElementById("view-template").content.firstElementChild;
    this.root = template.cloneNode(true);
    this.map = new HeadMap(this.part("canvas.map"));
    this.what = "weights"; // what the large map shows, of MAP_VALUES
    this.fillMenus();
    this.listen();
    // Small maps are painted when they come near the window.
    this.observer = new IntersectionObserver(
      entries => {
        for (const { isIntersecting, target } of entries) {
          if (isIntersecting) this.paintThumb(target);
        }
      },
      { rootMargin: "200px" },
    );
    this.setModel(model);
  }

  part(selector) {
    return this.root.querySelector(selector);
  }

  fillMenus() {
    const modelNames = models.map(model => [String(model.index), model.name]);
    this.part(".pick-model").innerHTML = options(modelNames);
    this.part(".pick-model").onchange = event => {
      this.setModel(models[event.target.value]);
      queryChanged();
    };
    const valueNames = Object.entries(MAP_VALUES).map(([what, { name }]) => [what, name]);
    this.part(".pick-values").innerHTML = options(valueNames);
    this.part(".pick-values").onchange = event => {
      this.what = event.target.value;
      this.showHead();
      this.showQuery();
    };
    this.part(".lock").onclick = () => setLocked(!state.locked);
    const saveMap = () => mapPicture(this.model, this.head, this.what);
    addExportButtons(this.part('[data-what="map"]'), "map", saveMap);
    const saveOverview = () => overviewPicture(this.model);
    addExportButtons(this.part('[data-what="overview"]'), "heads", saveOverview);
  }

  setModel(model) {
    this.model = model;
    // It begins with the head that is most an induction head.
    this.head = sortedHeads(model, "induction")[0];
    this.part(".pick-model").value = model.index;
    this.part(".kind").textContent = model.kind;
    this.part(".kind").className = `kind kind-${model.kind.toLowerCase()}`;
    this.part(".warning").hidden = !model.untrained;
    this.root.setAttribute("aria-label", model.name);
    if (this.root.isConnected) this.render();
  }

  render() {
    this.showThumbs();
    this.showHead();
    this.showTokens();
    this.showQuery();
  }

  // the small maps ----------------------------------------------------------

  showThumbs() {
    const { model } = this;
    const isGrid = state.order === "grid";
    const holder = this.part(".thumbs");
    holder.className = isGrid ? "thumbs grid" : "thumbs ranked";
    holder.style.setProperty("--heads", model.heads);
    // All layers fit on one screen.
    holder.style.setProperty("--thumb", `${clamp(396 / model.layers, 26, 92)}px`);
    const order = isGrid ? "layer by layer" : `by ${SCORES.get(state.shown).name}`;
    holder.setAttribute("aria-label", `Heads of ${model.name}, ${order}`);
    this.part(".choice").classList.toggle("broad", model.heads > 16);
    this.observer.disconnect();
    holder.innerHTML = isGrid ? this.gridMarkup() : this.rankedMarkup();
    for (const thumb of holder.querySelectorAll(".thumb")) this.observer.observe(thumb);
    this.markThumb();
  }

  /** All heads, a row a layer. */
  gridMarkup() {
    const { model } = this;
    const columns = range(model.heads).map(row => html`<span class="column">H${row}</span>`);
    const rows = range(model.layers).map(layer => {
      const heads = range(model.heads).map(row => model.headAt([layer, row]));
      return html`<span class="row">L${layer}</span>${heads.map(head => this.thumbMarkup(head))}`;
    });
    return html`<span class="corner"></span>${columns}${rows}`;
  }

  /** The heads with a label that is switched on, best first. */
  rankedMarkup() {
    const { model } = this;
    const sorted = sortedHeads(model, state.shown);
    const heads = sorted.filter(head => state.labels.has(model.label(head)));
    if (heads.length) return html`${heads.map(head => this.thumbMarkup(head))}`;
    return html`<p class="quiet">No head of this model has a label that is switched on.</p>`;
  }

  thumbMarkup(head) {
    const { model } = this;
    const label = model.label(head);
    const value = model.score(head, state.shown);
    const score = value === null ? "" : scoreText(value, state.shown);
    const position = `layer ${model.layer(head)} head ${model.headInLayer(head)}`;
    const { name: scoreName } = SCORES.get(state.shown);
    const title = `${position}, ${labelName(label)}, ${scoreName} ${score || "–"}`;
    const faded = state.labels.has(label) ? "" : "faded";
    const name = state.order === "grid" ? "" : html`<b>${model.nameOf(head)}</b>`;
    return html`<button type="button" class="thumb ${faded}" data-head="${head}" tabindex="-1"
      aria-pressed="false" aria-label="${title}" title="${title}">
      <span class="paper"></span>
      <span class="caption">${name}<i class="dot label-${label || "none"}"></i>
        <span class="value">${score}</span></span></button>`;
  }

  paintThumb(thumb) {
    this.observer.unobserve(thumb);
    const triangle = paintTriangle(this.model, Number(thumb.dataset.head), "weights", 64);
    thumb.querySelector(".paper").replaceChildren(triangle);
  }

  /** Mark the chosen head's small map; it is the one that Tab comes to. */
  markThumb(focus = false) {
    const thumbs = [...this.root.querySelectorAll(".thumb")];
    const chosen = thumbs.find(thumb => Number(thumb.dataset.head) === this.head);
    const reachable = chosen || thumbs[0];
    for (const thumb of thumbs) {
      thumb.setAttribute("aria-pressed", String(thumb === chosen));
      thumb.tabIndex = thumb === reachable ? 0 : -1;
    }
    if (focus) chosen?.focus();
  }

  setHead(head, focus = false) {
    this.head = head;
    this.markThumb(focus);
    this.showHead();
    this.showQuery();
  }

  // one head ----------------------------------------------------------------

  showHead() {
    const { model, head } = this;
    this.showMapMenu();
    for (const name of this.root.querySelectorAll(".which")) name.textContent = model.nameOf(head);
    this.showLabel();
    const measured = [...SCORES.keys()].filter(key => model.score(head, key) !== null);
    const facts = measured.map(key => this.factMarkup(key));
    const none = html`<div class="quiet">no scores in this report</div>`;
    this.part(".facts").innerHTML = facts.length ? facts.join("") : none;
    this.map.show(model, head, this.what);
    const name = `Attention of ${model.nameOf(head)} of ${model.name}.`;
    const keys = "Arrow keys move the query and the key, Enter locks.";
    this.map.canvas.setAttribute("aria-label", `${name} ${keys}`);
  }

  /** Only MLA has parts of its logits, and the report has them for some heads. */
  showMapMenu() {
    const menu = this.part(".pick-values");
    const hasParts = this.model.split(this.head) !== null;
    menu.parentElement.hidden = this.model.splitIndex.size === 0;
    for (const option of menu.options) option.disabled = option.value !== "weights" && !hasParts;
    if (!hasParts) this.what = "weights";
    menu.value = this.what;
  }

  /** The head's label; a head may have another one on held-out text. */
  showLabel() {
    const label = this.model.label(this.head);
    const onText = this.model.scoresOf.get(this.head)?.on_text?.label;
    const labels = [label, onText && onText !== label ? `${onText} on text` : ""];
    this.part(".chosen .label").className = `label label-${label || "none"}`;
    this.part(".chosen .label").textContent = labels.filter(Boolean).join(", ") || labelName("");
  }

  factMarkup(key) {
    const { name, short: shortName, is_loss: isLoss } = SCORES.get(key);
    const value = this.model.score(this.head, key);
    const hasBar = !isLoss && value >= 0;
    const bar = html`<i style="width:${percent(Math.min(1, value))}"></i>`;
    return html`<div><dt title="${name}">${shortName}</dt>
      <dd class="bar">${hasBar ? bar : ""}</dd><dd>${scoreText(value, key)}</dd></div>`;
  }

  /** The sequence, a piece of text a token. */
  showTokens() {
    const tokens = this.model.tokensText.map((token, i) => {
      const span = document.createElement("span");
      span.textContent = clip(visible(token), 24);
      span.title = `${i}: ${visible(token)}`;
      span.dataset.position = i;
      return span;
    });
    this.part(".strip").replaceChildren(...tokens);
  }

  // what the query attends to -------------------------------------------------

  /** The query and the key of this view: the page's, within this model's sequence. */
  current() {
    const q = Math.min(state.query, this.model.T - 1);
    const hasKey = state.key !== null && state.key <= q;
    return { q, k: hasKey ? state.key : this.model.topKey(this.head, q) };
  }

  showQuery() {
    const { q, k } = this.current();
    this.map.mark(q, k, state.locked);
    this.part(".asks").innerHTML = this.sentenceMarkup(q, k);
    const rows = this.topKeys(q).map(key => this.keyMarkup(q, key, key === k));
    this.part(".keys").innerHTML = rows.join("");
    this.part(".split").innerHTML = this.splitMarkup(q, k);
    const lock = this.part(".lock");
    lock.textContent = state.locked ? "Locked: click to follow the pointer" : "Lock this query";
    lock.setAttribute("aria-pressed", String(state.locked));
    this.colorTokens(q, k);
    if (state.locked) this.speak(q, k);
  }

  tokenMarkup(i) {
    return html`<span class="token">${clip(visible(this.model.tokensText[i]), 18)}</span>`;
  }

  sentenceMarkup(q, k) {
    const note = html` <span class="quiet">(this sequence ends at ${q})</span>`;
    const weight = fixed(this.model.weight(this.head, q, k), 3);
    return html`Query <b>${q}</b> ${this.tokenMarkup(q)}${state.query > q ? note : ""} gives key
      <b>${k}</b> ${this.tokenMarkup(k)} <b class="weight">${weight}</b>`;
  }

  /** The keys with the largest weights of a query, best first: those above 0, at least one. */
  topKeys(q) {
    const weight = k => this.model.weight(this.head, q, k);
    const ordered = range(q + 1).sort((a, b) => weight(b) - weight(a) || a - b);
    const best = ordered.slice(0, MOST_KEYS);
    return best.filter((k, i) => i === 0 || weight(k) > 0);
  }

  keyMarkup(q, k, isChosen) {
    const weight = this.model.weight(this.head, q, k);
    const token = visible(this.model.tokensText[k]);
    return html`<li data-key="${k}" class="${isChosen ? "here" : ""}">
      <span class="position">${k}</span>
      <span class="what"><span class="token" title="${token}">${clip(token, 18)}</span>
        <span class="role">${this.model.role(q, k)}</span></span>
      <span class="bar"><i style="width:${percent(weight)}"></i></span>
      <span class="weight">${fixed(weight, 3)}</span></li>`;
  }

  /** MLA: the logit as content plus RoPE. */
  splitMarkup(q, k) {
    const { model } = this;
    const split = model.split(this.head);
    if (!split && model.splitIndex.size === 0) return "";
    if (!split) {
      const heads = [...model.splitIndex.keys()];
      const names = heads.slice(0, 6).map(head => model.nameOf(head)).join(", ");
      const more = heads.length > 6 ? " …" : "";
      return html`<p class="quiet">This report has the parts of the logit for other heads:
        ${names}${more}</p>`;
    }
    // The largest part of the row, so that bars of one query compare.
    let largest = 1e-6;
    for (const part of Object.values(split)) {
      const row = part.subarray(at(q, 0), at(q, q) + 1);
      for (const value of row) largest = Math.max(largest, Math.abs(value));
    }
    const names = { content: "content", rope: "RoPE", sum: "sum" };
    const parts = Object.entries(names).map(([part, name]) =>
      logitPartMarkup(part, name, split[part][at(q, k)], largest));
    return html`<p class="quiet">Its logit, before the softmax</p>${parts}`;
  }

  /** Each token's background is its weight. */
  colorTokens(q, k) {
    [...this.part(".strip").children].forEach((span, i) => {
      span.className = tokenClass(i, q, k);
      const isVisible = i <= q;
      const weight = this.model.weight(this.head, q, i);
      span.style.background = isVisible ? weightColor(weight) : "";
      span.style.color = isVisible ? inkOn(weight) : "";
    });
  }

  /** What a screen reader says of a locked query. */
  speak(q, k) {
    const { tokensText } = this.model;
    const weight = fixed(this.model.weight(this.head, q, k), 2);
    this.part(".spoken").textContent =
      `Query ${q} ${visible(tokensText[q])}: ${weight} on key ${k} ${visible(tokensText[k])}`;
  }

  // pointer and keyboard --------------------------------------------------------

  listen() {
    this.listenToMap();
    this.listenToTokens();
    this.listenToThumbs();
  }

  listenToMap() {
    const { canvas } = this.map;
    const point = event => {
      const cell = this.map.cellAt(event);
      if (cell && !state.locked) setQuery(cell.q, cell.k);
      return cell;
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("click", event => {
      if (point(event)) setLocked(!state.locked);
    });
    canvas.addEventListener("keydown", event => this.mapKey(event));
  }

  mapKey(event) {
    const move = this.moveOf(event);
    if (move) {
      const q = clamp(move.q, 0, this.model.T - 1);
      setQuery(q, clamp(move.k, 0, q));
    } else if (event.key === "Enter" || event.key === " ") {
      setLocked(!state.locked);
    } else if (event.key === "Escape") {
      setLocked(false);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Where a key of the keyboard leads: {q, k}, which may be outside the map. */
  moveOf(event) {
    const { q, k } = this.current();
    const step = event.shiftKey ? 8 : 1;
    const moves = {
      ArrowUp: { q: q - step, k },
      ArrowDown: { q: q + step, k },
      ArrowLeft: { q, k: k - step },
      ArrowRight: { q, k: k + step },
      Home: { q, k: 0 },
      End: { q, k: q },
      PageUp: { q: q - 16, k },
      PageDown: { q: q + 16, k },
    };
    return moves[event.key];
  }

  listenToTokens() {
    const strip = this.part(".strip");
    strip.addEventListener("pointerover", ({ target }) => {
      const { position } = target.dataset;
      if (position !== undefined && !state.locked) setQuery(Number(position), null);
    });
    strip.addEventListener("click", ({ target }) => {
      const { position } = target.dataset;
      if (position === undefined) return;
      setQuery(Number(position), null);
      setLocked(true);
    });
    this.part(".keys").addEventListener("click", ({ target }) => {
      const row = target.closest("li");
      if (row) setQuery(this.current().q, Number(row.dataset.key));
    });
  }

  listenToThumbs() {
    const thumbs = this.part(".thumbs");
    thumbs.addEventListener("click", ({ target }) => {
      const thumb = target.closest(".thumb");
      if (thumb) this.setHead(Number(thumb.dataset.head));
    });
    thumbs.addEventListener("keydown", event => {
      const next = nextThumb([...thumbs.querySelectorAll(".thumb")], event.key);
      if (next === null) return;
      event.preventDefault();
      if (next) this.setHead(Number(next.dataset.head), true);
    });
  }
}

/**
 * The small map that a key of the keyboard leads to from the focused one: undefined beyond the
 * last, null for keys that lead nowhere.
 */
function nextThumb(thumbs, key) {
  const here = thumbs.indexOf(document.activeElement);
  const across = thumbs.filter(thumb => thumb.offsetTop === thumbs[0].offsetTop).length;
  const moves = {
    ArrowLeft: here - 1,
    ArrowRight: here + 1,
    ArrowUp: here - across,
    ArrowDown: here + across,
    Home: 0,
    End: thumbs.length - 1,
  };
  if (here < 0 || !(key in moves)) return null;
  return thumbs[moves[key]];
}

function tokenClass(i, q, k) {
  if (i > q) return "later";
  if (i === q) return "query";
  return i === k ? "key" : "";
}

/** One part of a logit as a bar from the middle, to the left where it is negative. */
function logitPartMarkup(part, name, value, largest) {
  const width = (50 * Math.abs(value)) / largest;
  const left = value < 0 ? 50 - width : 50;
  return html`<div class="part part-${part}"><span>${name}</span>
    <span class="axis"><i style="left:${left}%;width:${width}%"></i></span>
    <b>${signed(value, 2)}</b></div>`;
}
